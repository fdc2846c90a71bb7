"""The sections of the page of scores. Each returns HTML, empty when it has nothing to show."""

from __future__ import annotations

from patchkit.report._calibration_plot import calibration_figure
from patchkit.report._canvas import to_svg
from patchkit.report._html import (
    count,
    decimals,
    definitions,
    escape,
    figure,
    names,
    paragraph,
    percent,
    rich,
    section,
    signed,
)
from patchkit.report._scores_maps import OUTLINED, Block
from patchkit.report._scores_maps import blocks as maps_of
from patchkit.report._scores_plots import block_figure
from patchkit.report._scores_words import blind_spots, conventions, means, method_name, runs
from patchkit.report._tables import Cell, Table, head_cell, number_cell, text_cell
from patchkit.results.manifest import Manifest
from patchkit.results.scores import Scores
from patchkit.results.verification import Bound, Verification

SHOWN = 25
# Rows of a table that stands open; longer ones fold.
_OPEN = 12
_GROUPS = {"top": "top K by estimate", "sample": "sample of the rest", "all": "both"}


def tiles(scores: Scores) -> str:
    """The numbers one looks for first."""
    metric = means(scores)
    top = scores.top(1)
    size = top[0][2] if top else 0.0
    base = runs(scores)[0]
    shown = [
        (
            "tile main",
            signed(size, decimals(size)),
            f"largest mean |effect|{f', {top[0][0]}' if top else ''}",
        ),
        *(
            (
                "tile",
                signed(value, 2),
                f"{scores.convention.metric}, {name}{' (base)' if name == base else ''}",
            )
            for name, value in metric.items()
        ),
        ("tile", count(len(scores.pair_ids)), "pairs" if len(scores.pair_ids) > 1 else "pair"),
        ("tile", count(int(scores.computed.sum())), "nodes"),
    ]
    if scores.verification is not None:
        correlation = scores.verification.rank_correlation.get("all")
        shown.append(("tile", signed(correlation, 2), "rank correlation with exact effects"))
    else:
        shown.append(("tile", f"{scores.cost:,.1f}", "forward-equivalents"))
    inside = "".join(
        f'<div class="{css}"><b>{escape(value)}</b><span>{escape(what)}</span></div>'
        for css, value, what in shown
    )
    return f'<div class="tiles" role="group" aria-label="Main numbers">{inside}</div>'


def maps(scores: Scores) -> str:
    """A picture per kind of node: signed means, and folded below them mean |effect| where it says something else."""
    told = (
        f"Mean effect on {scores.convention.metric} over pairs: blue raises it, orange lowers it. Each kind has a scale "
        f"of its own. Outlined: the {OUTLINED} nodes with the largest mean |effect| of all kinds."
    )
    if not bool(scores.computed.all()):
        told += " Blank cells were not asked for."
    pictures = [_block(scores, block) for block in maps_of(scores)]
    parts = [paragraph(told, "note"), f'<div class="beside">{"".join(pictures)}</div>']
    size, mean = scores.mean_abs().nan_to_num(), scores.mean().nan_to_num().abs()
    if bool(((size - mean) > 0.2 * size.max()).any()):
        told = (
            "Mean |effect|, which ranks the nodes; more than the mean in size where pairs or drops disagree."
        )
        drawn = [_block(scores, block, "abs") for block in maps_of(scores, size=True) if block.panels]
        if drawn:
            parts.append(
                f"<details><summary>The same maps of mean |effect|</summary>{paragraph(told, 'note')}"
                f'<div class="beside">{"".join(drawn)}</div></details>'
            )
    return section("maps", "Where are the effects?", "Maps", *parts)


def _block(scores: Scores, block: Block, prefix: str = "map") -> str:
    drawn = block_figure(scores, block)
    if not block.panels:
        caption = "Too many for a map: sizes by rank, and the largest of each layer by sign."
        alt = f"Two panels: mean |effect| of neurons by rank, and the largest of each layer. {block.alt.split('. ')[-1]}"
    else:
        caption, alt = "", block.alt
    return figure(to_svg(drawn, alt, f"{prefix}-{block.name}"), caption, wide=True)


def table(scores: Scores) -> str:
    """The top nodes with intervals, and their exact effects where these are known."""
    numbers = scores.order()[:SHOWN]
    listed = numbers.tolist()
    if not listed:
        return ""
    pairs = len(scores.pair_ids)
    mean, size = scores.mean()[numbers].tolist(), scores.mean_abs()[numbers].tolist()
    scale = max(size)
    places = decimals(scale) + 1
    # Columns of cells; one pair has neither an interval nor a share.
    columns: dict[str, list[Cell]] = {
        "": [number_cell(str(rank + 1)) for rank in range(len(listed))],
        "node": [head_cell(name) for name in scores.grid.names(listed)],
        "mean effect" if pairs > 1 else "effect": [
            Cell(signed(value, places, plus=True), heat=value / scale if scale else 0.0, number=True)
            for value in mean
        ],
    }
    if pairs > 1:
        limits = zip(*(end.tolist() for end in scores.interval(of=numbers)), strict=True)
        columns["95 % interval"] = [
            number_cell(f"{signed(low, places)} to {signed(high, places)}") for low, high in limits
        ]
    columns["mean |effect|" if pairs > 1 else "|effect|"] = [
        number_cell(signed(value, places), "key") for value in size
    ]
    if pairs > 1:
        effects = scores.effects[:, numbers]
        same = (effects.sign() == effects.double().mean(0).sign()).double().mean(0).tolist()
        columns["pairs of this sign, %"] = [number_cell(percent(share)) for share in same]
    if scores.verification is not None:
        checked = {node.number: node for node in scores.verification.nodes}
        found = [checked.get(number) for number in listed]
        columns["exact effect"] = [
            number_cell(signed(node and node.exact_signed, places, plus=True)) for node in found
        ]
        columns["exact |effect|"] = [number_cell(signed(node and node.exact, places)) for node in found]
    up, down = sum(value > 0 for value in mean), sum(value < 0 for value in mean)
    what = "Estimated effects" if scores.method != "exact" else "Exact effects"
    over = f"means over {count(pairs)} pairs" if pairs > 1 else "one pair"
    exact = " Exact: by patching, where it was verified." if scores.verification is not None else ""
    made = Table(
        f"{what} on {scores.convention.metric}, {over}, by |effect|; {up} of these nodes raise it, {down} lower it."
        f"{exact}",
        list(columns),
        list(zip(*columns.values(), strict=True)),
    )
    return section("top", f"The {len(listed)} nodes with the largest effects", "Top nodes", made.render())


def verification(scores: Scores) -> str:
    """Estimates against exact patching: the calibration, how ranks and signs agree, and what was missed."""
    found = scores.verification
    if found is None:
        return ""
    said = _agreement(found)
    alt = (
        f"Scatter plot of estimate against exact effect of {len(found.nodes)} nodes; "
        f"rank correlation {signed(found.rank_correlation.get('all'), 2)}."
    )
    picture = figure(
        to_svg(calibration_figure(found), alt, "cal"),
        "Each mark is a node that was also patched exactly. Above the dashed line on the left: the effect is larger than "
        "estimated.",
        wide=True,
    )
    rows = [
        [
            head_cell(_GROUPS[group]),
            number_cell(count(sum(node.group == group or group == "all" for node in found.nodes))),
            number_cell(signed(found.rank_correlation.get(group), 3)),
            number_cell(percent(found.sign_agreement.get(group))),
        ]
        for group in _GROUPS
    ]
    agree = Table(
        "Rank correlation: Spearman's, of estimated and exact mean |effect|. Sign: share of nodes whose signed means "
        "agree, of those with an exact effect.",
        ["nodes", "checked", "rank correlation", "same sign, %"],
        rows,
    )
    missed = f"<p>Missed: {names(found.missed)}</p>" if found.missed else ""
    return section(
        "verification",
        "Do the estimates hold?",
        "Verification",
        paragraph(said),
        missed,
        picture,
        agree.render(),
        _checked(found),
    )


def _agreement(found: Verification) -> str:
    said = (
        f"The top {count(found.k)} by estimate and {count(found.sampled)} drawn from every kind and layer of the rest "
        f"were patched exactly; {count(found.unverified)} nodes were not."
    )
    if not found.sampled:
        return said
    if not found.missed:
        return (
            f"{said} No sampled node has a larger exact |effect| than the least of the top {count(found.k)}."
        )
    return (
        f"{said} {count(len(found.missed))} of the sampled have a larger exact |effect| than the least of the top "
        f"{count(found.k)}: the estimate missed them, and others like them may be among the unverified."
    )


def _checked(found: Verification) -> str:
    ordered = sorted(found.nodes, key=lambda node: -node.exact)
    places = decimals(max((node.exact for node in ordered), default=1.0))
    rows = [
        [
            head_cell(node.node),
            text_cell("top" if node.group == "top" else "sample"),
            *(number_cell(signed(value, places)) for value in (node.estimate, node.exact)),
            *(number_cell(signed(value, places, plus=True)) for value in (node.signed, node.exact_signed)),
        ]
        for node in ordered
    ]
    columns = ["node", "from", "estimate, |effect|", "exact, |effect|", "estimate, signed", "exact, signed"]
    listed = Table("Every node that was patched exactly, largest first.", columns, rows).render()
    return (
        f"<details><summary>All {count(len(rows))} checked nodes</summary>{listed}</details>" if rows else ""
    )


def bound(scores: Scores) -> str:
    """What the unverified nodes can have at most."""
    found = scores.bound
    if found is None:
        return ""
    parts = [paragraph(sentence) for sentence in found.sentences]
    top = scores.top(1)
    if top and found.unverified:
        places = decimals(top[0][2])
        parts.append(
            paragraph(
                f"For comparison, the largest mean |effect| on this page is {signed(top[0][2], places)} ({top[0][0]}).",
                "note",
            )
        )
    if found.strata:
        parts.append(_strata(found))
    if found.largest:
        places = decimals(max(limit for _, _, limit in found.largest))
        rows = [
            [
                head_cell(name),
                number_cell(signed(delta, places, plus=True)),
                number_cell(signed(limit, places)),
            ]
            for name, delta, limit in found.largest
        ]
        told = "The unverified nodes with the largest bounds. Difference: mean with the node in the subset - without."
        parts.append(Table(told, ["node", "difference", "bound"], rows).render())
    return section("bound", "What can have been missed?", "Bound", *parts)


def _strata(found: Bound) -> str:
    places = decimals(max(stratum.familywise for stratum in found.strata))
    rows = [
        [
            head_cell(stratum.name),
            number_cell(count(stratum.nodes)),
            number_cell(count(stratum.draws)),
            number_cell(f"{stratum.p:.3g}"),
            number_cell(signed(stratum.bound, places)),
            number_cell(signed(stratum.familywise, places), "key"),
        ]
        for stratum in found.strata
    ]
    told = (
        "Random subsets of the unverified nodes of each kind and layer were patched; each node is in a subset with "
        "probability p."
    )
    columns = ["kind and layer", "nodes", "subsets", "p", "bound for one node", "bound for all at once"]
    listed = Table(told, columns, rows).render()
    if len(rows) <= _OPEN:
        return listed
    return f"<details><summary>By kind and layer ({count(len(rows))})</summary>{listed}</details>"


def notes(scores: Scores) -> str:
    """What these numbers cannot show."""
    items = "".join(f"<li>{rich(note)}</li>" for note in blind_spots(scores))
    title = f"What {method_name(scores)} cannot show"
    return section("notes", title, "Blind spots", f"<ul>{items}</ul>") if items else ""


def reading(scores: Scores, manifest: Manifest | None) -> str:
    """The conventions behind every number."""
    entries = [(term, escape(said)) for term, said in conventions(scores, manifest)]
    return section("conventions", "How to read the numbers", "Conventions", definitions(entries))
