"""The sections of the page of path patching. Each returns HTML, empty when it has nothing to show."""

from __future__ import annotations

import re

import torch

from patchkit.report._canvas import to_svg
from patchkit.report._edge_sections import tile_row
from patchkit.report._edge_words import put_in
from patchkit.report._html import (
    ABSENT,
    count,
    decimals,
    definitions,
    duration,
    escape,
    figure,
    names,
    paragraph,
    percent,
    rich,
    section,
    signed,
)
from patchkit.report._matrix_plot import Matrix, matrix_figure
from patchkit.report._paths_plot import MOST_PILLS, letters_of, moved, paths_figure, said_of, shown
from patchkit.report._tables import Cell, Table, head_cell, number_cell
from patchkit.report._words import where
from patchkit.results.manifest import Manifest
from patchkit.results.paths import PathEffect, PathResult, Stage

SHOWN = 15
_HEAD = re.compile(r"a(\d+)\.h(\d+)")
_MLP = re.compile(r"m(\d+)")
_WORDS = {"q": "queries", "k": "keys", "v": "values"}


def runs(found: PathResult) -> tuple[str, str]:
    """(base, source): which prompts are run and which the activations come from."""
    return ("clean", "corrupt") if found.convention.direction == "noise" else ("corrupt", "clean")


def headline(found: PathResult) -> str:
    """Who acts on the logits, and who acts on these."""
    metric = found.convention.metric
    told = [(stage, shown(stage)[0]) for stage in found.stages]
    if not any(listed for _, listed in told):
        return f"No sender changes {metric} along the paths that were patched."
    if not found.iterative:
        stage, listed = told[0]
        top = listed[0]
        several = ", ".join(effect.sender for effect in listed[:3])
        return (
            f"Of {count(len(stage.effects))} senders, {several} act most on {_receivers(stage)}: patching "
            f"{top.sender} along these paths changes {metric} by {_amount(top)}."
        )
    parts = []
    for place, (stage, listed) in enumerate(told):
        if not listed:
            continue
        target = "the logits" if place == 0 else f"{told[place - 1][0].name}'s {_inputs(stage)}"
        group = ", ".join(effect.sender for effect in listed[:4]) + (" and others" if len(listed) > 4 else "")
        parts.append(f"{stage.name} ({group}) act on {target}")
    first = next(listed[0] for _, listed in told if listed)
    change = f"Patching {first.sender} along its paths changes {metric} by {_amount(first)}."
    return f"From the logits backwards: {'; '.join(parts)}. {change}"


def _amount(effect: PathEffect) -> str:
    places = decimals(abs(effect.effect))
    share = "" if effect.share is None else f" ({said_of(effect)} of the whole difference)"
    return f"{signed(effect.effect, places, plus=True)}{share}"


def _receivers(stage: Stage) -> str:
    if stage.receivers == ["logits"]:
        return "the logits"
    return f"{', '.join(stage.receivers[:3])}{' and others' if len(stage.receivers) > 3 else ''}"


def _inputs(stage: Stage) -> str:
    letters = [_WORDS[letter] for letter in letters_of(stage)]
    return " and ".join(letters) if letters else "input"


def warnings(found: PathResult) -> list[str]:
    """What forbids reading the effects as a finding."""
    clean, corrupt = _means(found)
    if clean > corrupt:
        return []
    return [
        f"This says little: {found.convention.metric} of the clean prompts ({signed(clean, 2)}) is not above that of "
        f"the corrupt ones ({signed(corrupt, 2)}), so the model does not show the behaviour here."
    ]


def _means(found: PathResult) -> tuple[float, float]:
    base, source = found.base_metric, found.source_metric
    return (base, source) if found.convention.direction == "noise" else (source, base)


def tiles(found: PathResult) -> str:
    """The numbers one looks for first."""
    metric, base = found.convention.metric, runs(found)[0]
    clean, corrupt = _means(found)
    chosen = sum(len(stage.chosen) for stage in found.stages)
    scored = sum(len(stage.effects) for stage in found.stages)
    best = max(
        (e for stage in found.stages for e in stage.effects), key=lambda e: abs(e.effect), default=None
    )
    shown_tiles = [("tile main", said_of(best), f"largest share, {best.sender}")] if best is not None else []
    if found.iterative:
        shown_tiles.append(("tile", count(len(found.stages)), "stages"))
        shown_tiles.append(("tile", count(chosen), "senders chosen"))
    shown_tiles += [
        ("tile", signed(value, 2), f"{metric}, {name}{' (base)' if name == base else ''}")
        for name, value in (("clean", clean), ("corrupt", corrupt))
    ]
    shown_tiles += [
        ("tile", count(len(found.pair_ids)), "pairs" if len(found.pair_ids) != 1 else "pair"),
        ("tile", count(scored), "paths patched"),
        ("tile", f"{found.cost:,.1f}", "forward-equivalents"),
    ]
    return tile_row(shown_tiles)


def picture(found: PathResult) -> str:
    """The stages in columns."""
    if not any(shown(stage)[0] for stage in found.stages):
        return ""
    alt = "Stages of path patching from the logits backwards. " + "; ".join(
        f"{stage.name}: {', '.join(effect.sender for effect in shown(stage)[0][:6])}"
        for stage in found.stages
    )
    caption = (
        "Every sender of a column was patched along its paths to all receivers of the column's stage together. Per "
        "cent: effect as a share of the difference between clean and corrupt run; 100 % is all of the behaviour."
    )
    if any(shown(stage)[1] for stage in found.stages):
        caption += f" At most {MOST_PILLS} a column."
    title = "Stage by stage, from the logits backwards" if found.iterative else "Who acts on the receivers"
    return section(
        "stages", title, "Picture", figure(to_svg(paths_figure(found), alt, "paths"), caption, wide=True)
    )


def stages(found: PathResult) -> list[str]:
    """A section for each stage: a map of all senders and a table of the largest."""
    return [_stage(found, stage, place) for place, stage in enumerate(found.stages)]


def _stage(found: PathResult, stage: Stage, place: int) -> str:
    told = f"Receivers: {names(stage.receivers, 12)}"
    drawn = stage_figure(stage)
    picture = ""
    if drawn is not None:
        maps, rows = drawn
        top = ", ".join(effect.sender for effect in _largest(stage)[:5])
        alt = f"Heat map of each sender's share by layer and head, {stage.name}. Largest: {top}."
        shares = all(effect.share is not None for effect in stage.effects)
        svg = to_svg(
            matrix_figure(maps, rows, down="layer", outline="chosen", percent=shares, widest=0.46),
            alt,
            f"stage{place}",
        )
        picture = figure(svg, "Blue raises the metric when patched, orange lowers it.", wide=True)
    heading = (
        f"{stage.name}: who acts on {_receivers(stage)}?"
        if found.iterative
        else f"Paths to {_receivers(stage)}"
    )
    short = f"Stage {place + 1}" if found.iterative else "Effects"
    body = f'<div class="beside">{picture}<div>{_table(found, stage)}</div></div>'
    return section(f"stage{place + 1}", heading, short, f"<p>{told}</p>", body)


def _largest(stage: Stage) -> list[PathEffect]:
    return sorted(stage.effects, key=lambda effect: -abs(effect.effect))


def stage_figure(stage: Stage) -> tuple[list[Matrix], list[str]] | None:
    """Maps of a stage, heads and MLPs and the input, with the layers' names; None where no effect is of one of these."""
    value = {
        effect.sender: effect.effect if effect.share is None else effect.share for effect in stage.effects
    }
    heads = {(int(m[1]), int(m[2])): value[name] for name in value if (m := _HEAD.fullmatch(name))}
    mlps = {int(m[1]): value[name] for name in value if (m := _MLP.fullmatch(name))}
    layers = 1 + max([layer for layer, _ in heads] + list(mlps), default=-1)
    if layers == 0:
        return None
    maps = []
    if heads:
        width = 1 + max(head for _, head in heads)
        cells = torch.full((layers, width), torch.nan)
        for (layer, head), share in heads.items():
            cells[layer, head] = share
        marked = [_HEAD.fullmatch(name) for name in stage.chosen]
        outlined = frozenset((int(m[1]), int(m[2])) for m in marked if m)
        maps.append(Matrix("heads", cells, [str(head) for head in range(width)], "head", outlined))
    if mlps:
        column = torch.full((layers, 1), torch.nan)
        for layer, share in mlps.items():
            column[layer, 0] = share
        marked = [_MLP.fullmatch(name) for name in stage.chosen]
        maps.append(Matrix("MLP", column, [""], "", frozenset((int(m[1]), 0) for m in marked if m)))
    return maps, [str(layer) for layer in range(layers)]


def _table(found: PathResult, stage: Stage) -> str:
    listed = _largest(stage)[:SHOWN]
    places = decimals(max((abs(effect.effect) for effect in listed), default=1.0)) + 1
    scale = max((abs(effect.effect) for effect in listed), default=0.0) or 1.0
    several = len(found.pair_ids) > 1
    rows = []
    for effect in listed:
        cells = [
            head_cell(effect.sender),
            Cell(signed(effect.effect, places, plus=True), heat=effect.effect / scale, number=True),
        ]
        if several:
            span = effect.interval
            cells.append(
                number_cell(f"{signed(span[0], places)} to {signed(span[1], places)}" if span else ABSENT)
            )
        cells.append(number_cell(signed(effect.effect_abs, places)))
        cells.append(
            number_cell(ABSENT if effect.share is None else percent(moved(effect), sign=True), "key")
        )
        rows.append(cells)
    columns = ["sender", "mean effect", "95 % interval", "mean |effect|"]
    columns = [*(columns if several else ["sender", "effect", "|effect|"]), "share, %"]
    told = f"The {count(len(rows))} largest of {count(len(stage.effects))} senders."
    told += " Tinted: chosen for this stage." if stage.chosen else ""
    marks = ["mine" if effect.sender in stage.chosen else "" for effect in listed]
    return (
        Table(told, columns, rows, row_marks=marks).render() if rows else paragraph("No sender was patched.")
    )


def notes(found: PathResult) -> str:
    """What a reader must know."""
    said = list(found.notes)
    said.append(
        "A sender was patched alone: backups that step in for each other look weak, here as in any single patch."
    )
    if found.mlps == "recomputed":
        said.append(
            "MLPs on the way were recomputed: a path through them counts as the sender's. `--mlps frozen` holds them, "
            "and a path to one receiver is then one edge."
        )
    if len(found.pair_ids) == 1:
        said.append("There is one pair: nothing here says how another prompt would come out.")
    items = "".join(f"<li>{rich(note)}</li>" for note in said)
    return section("notes", "To keep in mind", "Notes", f"<ul>{items}</ul>")


def reading(found: PathResult, manifest: Manifest | None) -> str:
    """The conventions behind every number."""
    base, source = runs(found)
    kept = found.convention
    entries = [
        ("effect", "metric(base run in which the receivers read what they read when the sender alone is replaced) - "
         "metric(base run). Other heads are held at their base values on the way."),
        ("share", "effect / |base metric - source metric|, in per cent: at "
         f"{'−' if base == 'clean' else '+'}100 % the metric has moved all the way to the {source} run's."),
        ("metric", f"{kept.metric}; higher is more of the behaviour, and it is never negated."),
        ("direction", f"{kept.direction}: the {base} prompt is run (base), the {source} prompt is the source."),
        ("ablation", f"{kept.ablation}: the sender is replaced by {put_in(kept.ablation, source)}."),
        ("MLPs", "recomputed on the way from sender to receivers." if found.mlps == "recomputed"
         else "held at their base values on the way."),
        ("positions", f"senders are patched {where(found.positions)}; positions count real tokens, not padding."),
        ("95 % interval", "of the mean effect: percentile bootstrap over pairs."),
        ("cost", f"{found.cost:,.1f} forward-equivalents; 1 is one forward over every base prompt."),
    ]  # fmt: skip
    if manifest is not None:
        extra = (
            ("seed", None if manifest.seed is None else str(manifest.seed)),
            ("time", duration(manifest.seconds) if manifest.seconds else None),
        )
        entries += [(term, said) for term, said in extra if said]
    listed = definitions((term, escape(said)) for term, said in entries)
    return section("conventions", "How to read the numbers", "Conventions", listed)
