"""The sections of the page of edges. Each returns HTML, empty when it has nothing to show."""

from __future__ import annotations

import shlex

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from patchkit.report._canvas import to_svg
from patchkit.report._circuit_plot import MOST_EDGES
from patchkit.report._edge_conventions import blind_spots, conventions
from patchkit.report._edge_plots import (
    PLACED,
    concentration_figure,
    edges_figure,
    layer_maps,
    needed,
    pictured,
    place_map,
)
from patchkit.report._edge_words import flows, means, method_name, ranked, runs, scored, sizes, unscored, what
from patchkit.report._html import (
    arrows,
    count,
    decimals,
    definitions,
    escape,
    figure,
    paragraph,
    percent,
    rich,
    section,
    signed,
    unit,
)
from patchkit.report._matrix_plot import matrix_figure
from patchkit.report._study_sections import escape_lines
from patchkit.report._tables import Cell, Table, number_cell
from patchkit.results.edge_scores import EdgeScores
from patchkit.results.manifest import Manifest

SHOWN = 25
_DRAWS = 1000


def tiles(scores: EdgeScores, held: Float[Tensor, " edges"]) -> str:
    """The numbers one looks for first; `held` are the `shares` of the largest edges."""
    top = ranked(scores, 1)
    size = top[0][2] if top else 0.0
    largest = unit(size) if flows(scores) else signed(size, decimals(size))
    named = f", {scores.name(top[0][0])}" if top else ""
    shown = [("tile main", largest, f"largest {what(scores)}{named}")]
    if scores.circuit is not None:
        share = unit(scores.circuit.n_edges / scores.graph.n_edges)
        shown.insert(0, ("tile main", count(scores.circuit.n_edges), f"edges kept, {share} of all"))
        shown[1] = ("tile", *shown[1][1:])
    if not flows(scores):
        base = runs(scores)[0]
        shown += [
            (
                "tile",
                signed(value, 2),
                f"{scores.convention.metric}, {name}{' (base)' if name == base else ''}",
            )
            for name, value in means(scores).items()
        ]
    shown += [
        ("tile", count(len(scores.pair_ids)), "pairs" if len(scores.pair_ids) > 1 else "pair"),
        ("tile", count(scored(scores)), "edges scored" if unscored(scores) else "edges"),
        ("tile", count(needed(held, 0.5)), f"of them hold half of all {what(scores)}"),
        ("tile", f"{scores.cost:,.1f}", "forward-equivalents"),
    ]
    return tile_row(shown)


def tile_row(shown: list[tuple[str, str, str]]) -> str:
    """Tiles of (style class, number, what it is)."""
    inside = "".join(
        f'<div class="{css}"><b>{escape(value)}</b><span>{arrows(said)}</span></div>'
        for css, value, said in shown
    )
    return f'<div class="tiles" role="group" aria-label="Main numbers">{inside}</div>'


def picture(scores: EdgeScores) -> str:
    """The largest edges, or what ACDC kept, in layers."""
    circuit = pictured(scores)
    if circuit.is_empty:
        return ""
    whole = circuit.pruned()
    if scores.circuit is not None:
        title, caption = "The circuit that ACDC kept", ""
        if circuit.n_edges > MOST_EDGES:
            caption = (
                f"Drawn one by one: the {MOST_EDGES} with the largest {what(scores)} when they were visited."
            )
    elif flows(scores):
        title = f"The {count(circuit.n_edges)} edges of the widest routes"
        caption = (
            "From the logits backwards, always the largest share into a node that is in already: an edge counts only "
            "where what it feeds is itself read."
        )
    else:
        title = f"The {count(circuit.n_edges)} largest edges"
        caption = (
            f"The edges with the largest {what(scores)}, as they are: nothing was added to join them. "
            f"{count(whole.n_edges)} of them lie on paths from the input to the logits that use no others."
        )
    if not flows(scores):
        caption += f" An edge that helps raises {scores.convention.metric} as long as it is whole."
    names = ", ".join(scores.name(number) for number, _, _ in ranked(scores, 5))
    alt = f"Picture of {circuit.n_edges} edges in layers, from the input at the bottom to the logits. Largest: {names}."
    svg = to_svg(edges_figure(scores), alt, "circuit")
    return section("circuit", title, "Picture", figure(svg, caption.strip(), wide=True))


def maps(scores: EdgeScores) -> str:
    """From which layers to which."""
    drawn, rows = layer_maps(scores)
    if all(float(each.cells.nan_to_num().abs().max()) == 0.0 for each in drawn):
        return ""
    alt = "Heat maps, one a kind of receiver: layer of the sender by layer of the receiver."
    svg = to_svg(matrix_figure(drawn, rows, down="layer of sender"), alt, "layers")
    caption = (
        f"Sum of {what(scores)} over all edges from one layer's heads and MLP (or the input) to one layer's receivers "
        "of a kind. Many small edges add up here; blank: no such edge."
    )
    return section("layers", "From which layers to which?", "Layers", figure(svg, caption, wide=True))


def concentration(scores: EdgeScores, held: Float[Tensor, " edges"]) -> str:
    """How few edges hold most of all |effect|; `held` are the `shares` of the largest."""
    if len(held) < 2:
        return ""
    total = scored(scores)
    half, most = needed(held, 0.5), needed(held, 0.9)
    of = "edges at positions" if scores.placed else "edges"
    said = (
        f"Half of all {what(scores)} is in the {count(half)} largest of {count(total)} {of} ({unit(half / total)}), "
        f"and 90 % in {count(most)} ({unit(most / total)})."
    )
    alt = f"Line chart on a logarithmic axis: share of all effect in the largest edges. {said}"
    caption = (
        "Sums of sizes do not add up to the behaviour, and the many small ones of an estimate are partly noise: this "
        "says how the scores are spread, not how small a faithful circuit is."
    )
    return section(
        "concentration",
        "How few edges hold most of it?",
        "Concentration",
        paragraph(said),
        figure(to_svg(concentration_figure(scores, held), alt, "conc"), caption),
    )


def table(scores: EdgeScores) -> str:
    """The top edges, with intervals where the pairs were kept."""
    found = ranked(scores, SHOWN)
    if not found:
        return ""
    listed = [(scores.name(number), mean, size) for number, mean, size in found]
    pairs, total = len(scores.pair_ids), float(sizes(scores).double().nansum())
    scale = max(size for _, _, size in listed)
    places = min(5, decimals(scale) + 1)
    several = pairs > 1
    columns: dict[str, list[Cell]] = {
        "": [number_cell(str(rank + 1)) for rank in range(len(listed))],
        "edge": [Cell(arrows(name), head=True) for name, _, _ in listed],
    }
    if flows(scores):
        columns["share"] = [number_cell(unit(size), "key") for _, _, size in listed]
    else:
        columns["mean effect" if several else "effect"] = [
            Cell(signed(mean, places, plus=True), heat=mean / scale if scale else 0.0, number=True)
            for _, mean, _ in listed
        ]
        columns |= _spread(scores, [number for number, _, _ in found], places)
        columns[what(scores)] = [number_cell(signed(size, places), "key") for _, _, size in listed]
    columns["of all, %"] = [number_cell(percent(size / total if total else None)) for _, _, size in listed]
    if scores.circuit is not None and not scores.placed:
        kept = set(scores.circuit.names())
        columns["kept"] = [Cell("yes" if name in kept else "no") for name, _, _ in listed]
    up, down = sum(mean > 0 for _, mean, _ in listed), sum(mean < 0 for _, mean, _ in listed)
    over = f"means over {count(pairs)} pairs" if several else "one pair"
    kind = "Exact effects" if scores.method.name in ("exact", "acdc") else "Estimated effects"
    told = f"{kind} on {scores.convention.metric}, {over}, by size. Cut alone, {up} of these raise it, {down} lower it."
    if flows(scores):
        told = f"Shares of what the receiver reads, {over}. Left out: receivers that have one sender only."
    made = Table(told, list(columns), list(zip(*columns.values(), strict=True)))
    return section(
        "top", f"The {len(listed)} edges with the largest {what(scores)}", "Top edges", made.render()
    )


def _spread(scores: EdgeScores, numbers: list[int], places: int) -> dict[str, list[Cell]]:
    """Interval and agreement of the pairs, where the scores of pairs were kept."""
    if scores.per_pair is None or len(scores.pair_ids) < 2:
        return {}
    effects = scores.per_pair.flatten(1)[:, numbers].double()
    low, high = _interval(effects)
    same = (effects.sign() == effects.mean(0).sign()).double().mean(0)
    return {
        "95 % interval": [
            number_cell(f"{signed(a, places)} to {signed(b, places)}")
            for a, b in zip(low.tolist(), high.tolist(), strict=True)
        ],
        "pairs of this sign, %": [number_cell(percent(share)) for share in same.tolist()],
    }


def _interval(
    effects: Float[Tensor, "pairs edges"],
) -> tuple[Float[Tensor, " edges"], Float[Tensor, " edges"]]:
    """2.5 % and 97.5 % of the mean over bootstraps of the pairs; the same draws for every edge."""
    pairs = len(effects)
    drawn = torch.randint(pairs, (_DRAWS, pairs), generator=torch.Generator().manual_seed(0))
    found = np.quantile(effects[drawn].mean(1).numpy(), [0.025, 0.975], axis=0)
    return torch.from_numpy(found[0]), torch.from_numpy(found[1])


def positions(scores: EdgeScores) -> str:
    """Where in the prompt the largest edges act."""
    if not scores.placed:
        return ""
    made, names = place_map(scores)
    if not names:
        return ""
    alt = f"Heat map of the mean effect of the {len(names)} largest edges, position by position: {', '.join(names[:5])}."
    told = (
        f"The {min(PLACED, len(names))} edges with the largest {what(scores)} summed over positions; blue raises "
        f"{scores.convention.metric} when the edge is cut there, orange lowers it."
    )
    return section(
        "positions",
        "Where in the prompt?",
        "Positions",
        figure(to_svg(matrix_figure([made], names), alt, "places"), told, wide=True),
    )


def notes(scores: EdgeScores) -> str:
    """What these numbers cannot show."""
    items = "".join(f"<li>{rich(note)}</li>" for note in blind_spots(scores))
    return section("notes", f"What {method_name(scores)} cannot show", "Blind spots", f"<ul>{items}</ul>")


def onwards(scores: EdgeScores, manifest: Manifest | None, place: str) -> str:
    """The command that says whether a circuit of these edges is enough."""
    if scores.placed:
        told = (
            "A circuit has no positions: to see whether the best edges are enough together, score them with "
            "`--positions all` and give that run to `patchkit evaluate`."
        )
        return section("onwards", "How to go on", "Next step", paragraph(told))
    options = manifest.options if manifest is not None else {}
    named = manifest.model.id if manifest is not None and manifest.model is not None else None
    asked = {"model": options.get("model") or named or "MODEL"}
    asked |= {"task": options["task"]} if options.get("task") else {"pairs": options.get("pairs") or "FILE"}
    asked["circuit"] = place
    if scores.circuit is None:
        sizes = sorted({max(1, round(scores.graph.n_edges * part)) for part in (0.001, 0.01, 0.05, 0.1)})
        asked["top-n"] = ",".join(map(str, sizes))
    kept = scores.convention
    usual = {"metric": "logit-diff", "direction": "noise", "ablation": "resample"}
    if options.get("task") and manifest is not None:
        asked["seed"] = str((manifest.seed or 0) + 1)
    asked |= {} if flows(scores) else {f: getattr(kept, f) for f in usual if getattr(kept, f) != usual[f]}
    said = " ".join(f"--{option} {shlex.quote(str(value))}" for option, value in asked.items())
    command = f"patchkit evaluate {said} --random 100 --out EVALUATION"
    told = (
        "A score says what an edge does by itself. To see whether the best edges are enough together, and whether they "
        "beat random circuits of their size (best on pairs that the edges were not scored on):"
    )
    return section(
        "onwards",
        "How to go on",
        "Next step",
        paragraph(told),
        f'<pre tabindex="0" aria-label="command">{escape_lines(command)}</pre>',
    )


def reading(scores: EdgeScores, manifest: Manifest | None) -> str:
    """The conventions behind every number."""
    entries = [(term, escape(said)) for term, said in conventions(scores, manifest)]
    return section("conventions", "How to read the numbers", "Conventions", definitions(entries))
