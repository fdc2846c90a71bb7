"""The sections of the page of an evaluation that test one circuit. Each returns HTML, empty when it was not tested."""

from __future__ import annotations

from patchkit.report._canvas import to_svg
from patchkit.report._circuit_tests_plots import (
    MOST_NODES,
    REPAIRED,
    completeness_figure,
    minimality_figure,
    random_figure,
    repair_figure,
)
from patchkit.report._evaluation_words import in_words, tested_run
from patchkit.report._html import (
    ABSENT,
    arrows,
    count,
    decimals,
    figure,
    names,
    paragraph,
    percent,
    section,
    signed,
    unit,
)
from patchkit.report._tables import Cell, Table, head_cell, number_cell, text_cell
from patchkit.results.evaluation import Evaluation, Overlap

SHOWN, FEWEST = 25, 12


def completeness(found: Evaluation) -> str:
    """Whether the circuit and the model suffer alike when the same nodes are taken away."""
    made = found.completeness
    if made is None:
        return ""
    metric = found.convention.metric
    share = f", {unit(made.worst_share)} of the behaviour" if made.worst_share is not None else ""
    told = (
        "The same nodes K are taken away from the circuit and from the whole model. If the circuit lacks nothing, both "
        f"suffer alike. They differ by up to {signed(made.worst, 2)}{share}."
    )
    rows = [
        [
            text_cell(removal.how),
            number_cell(count(len(removal.nodes))),
            number_cell(signed(removal.circuit_metric, 2)),
            number_cell(signed(removal.model_metric, 2)),
            number_cell(signed(removal.gap, 2), "key"),
            Cell(names(removal.nodes, 6)),
        ]
        for removal in sorted(made.removals, key=lambda removal: -removal.gap)[:SHOWN]
    ]
    listed = Table(
        f"The sets K with the largest gaps, {count(len(rows))} of {count(len(made.removals))}; {metric} without them.",
        ["K", "nodes", "circuit", "model", "gap", "which"],
        rows,
    ).render()
    alt = f"Scatter plot of {metric} of circuit against model without the same nodes; largest gap {made.worst:.3g}."
    caption = (
        "On the dashed line both are alike; above it the circuit does better without K than the model does."
    )
    picture = figure(to_svg(completeness_figure(made, metric), alt, "complete"), caption)
    beside = (
        f'<div class="pair">{picture}<div>{paragraph(told)}</div></div>' if made.removals else paragraph(told)
    )
    return section(
        "completeness",
        "Is anything missing?",
        "Completeness",
        beside,
        f"<details><summary>The sets</summary>{listed}</details>" if rows else "",
    )


def minimality(found: Evaluation) -> str:
    """Whether every node of the circuit can be shown to be needed."""
    made = found.minimality
    if made is None or not made.nodes:
        return ""
    spare, limit = made.superfluous, f"{100 * made.limit:g} %"
    alt = f"Dot plot of the largest change each of {len(made.nodes)} nodes makes; {len(spare)} stay below {limit}."
    caption = (
        f"For each node the set K of those tried, without which it matters most. Below {limit}: superfluous."
    )
    if len(made.nodes) > MOST_NODES:
        half = MOST_NODES // 2
        caption += f" Drawn: the {half} largest and the {half} smallest of {count(len(made.nodes))}."
    said = (
        f"Each of {count(len(made.nodes))} nodes changes at least {limit} of the behaviour in some context."
    )
    if spare:
        said = (
            f"{count(len(spare))} of {count(len(made.nodes))} nodes change less than {limit} of the behaviour in every "
            "context tried: nothing shows that they belong."
        )
    picture = figure(to_svg(minimality_figure(made), alt, "minimal"), caption)
    words = f"<div>{paragraph(said)}{f'<p>Superfluous: {names(spare)}</p>' if spare else ''}</div>"
    rows = [
        [
            head_cell(node.node),
            number_cell(signed(node.change, decimals(abs(found.clean_metric)) + 1, plus=True)),
            number_cell(percent(node.share)),
            Cell(names(node.removed, 8)),
        ]
        for node in sorted(made.nodes, key=lambda node: -abs(node.share or 0.0))
    ]
    listed = Table("K: what else was away.", ["node", "change", "% of the behaviour", "K"], rows).render()
    return section(
        "minimality",
        "Is every node needed?",
        "Minimality",
        f'<div class="pair">{picture}{words}</div>',
        f"<details><summary>All {count(len(rows))} nodes</summary>{listed}</details>",
    )


def random(found: Evaluation) -> str:
    """Whether random circuits of the same size do as well."""
    made = found.random
    if made is None:
        return ""
    run = tested_run(found)
    own = None if run is None else run.faithfulness
    empty = sum(size == 0 for size in made.n_edges)
    said = [in_words(made), f"They have in common with it: {made.matched}."]
    if empty:
        said.append(
            f"{count(empty)} of them are empty after pruning, and count with the metric of every edge cut."
        )
    known = [value for value in made.faithfulness if value is not None]
    spread = f"{unit(min(known))} to {unit(max(known))}" if known else "not defined"
    alt = f"Histogram of the faithfulness of {made.count} random circuits, {spread}; the circuit has {unit(own)}."
    picture = figure(to_svg(random_figure(made, own), alt, "random"), "")
    words = f"<div>{''.join(paragraph(each) for each in said)}{paragraph(f'Their range: {spread}.', 'note')}</div>"
    return section(
        "random", "Is it better than chance?", "Chance", f'<div class="pair">{picture}{words}</div>'
    )


def overlaps(found: Evaluation) -> str:
    """The circuits against references."""
    return (
        section("overlap", "Against a reference", "Overlap", overlap_table(found.overlaps))
        if found.overlaps
        else ""
    )


def overlap_table(listed: list[Overlap]) -> str:
    """Precision, recall, Jaccard and AUROC of circuits, a row a reference and level."""
    asked = any(overlap.requested is not None for overlap in listed)
    rows = [
        [
            head_cell(overlap.reference),
            text_cell(f"{overlap.level}s"),
            *(
                [number_cell(count(overlap.requested) if overlap.requested is not None else ABSENT)]
                if asked
                else []
            ),
            *(number_cell(count(value)) for value in (overlap.found, overlap.truth, overlap.common)),
            *(number_cell(percent(value)) for value in (overlap.precision, overlap.recall)),
            number_cell(signed(overlap.jaccard, 3)),
            number_cell(signed(overlap.auroc, 3)),
        ]
        for overlap in listed
    ]
    told = (
        "Precision: share of the circuit that is in the reference; recall: share of the reference that is found. "
        "AUROC: of |score| against the reference, whatever the size."
    )
    columns = ["reference", "of", *(["asked for"] if asked else []), "circuit", "reference", "common", "precision, %",
               "recall, %", "Jaccard", "AUROC"]  # fmt: skip
    return Table(told, columns, rows).render()


def stability(found: Evaluation) -> str:
    """Whether bootstraps of the pairs lead to the same edges."""
    made = found.stability
    if made is None:
        return ""
    low, high = made.interval
    always = sum(share >= 1.0 for _, share in made.frequency)
    rarely = sum(share < 0.5 for _, share in made.frequency)
    said = (
        f"The same selection of {count(made.requested)} edges on {count(made.draws)} bootstraps of the pairs: two of "
        f"them share {made.jaccard:.2f} of their edges on average (Jaccard index after pruning; 95 % of them {low:.2f} "
        f"to {high:.2f}). Edges of the circuit that every draw holds: {count(always)} of {count(len(made.frequency))}; "
        f"that fewer than half hold: {count(rarely)}."
    )
    ordered = sorted(made.frequency, key=lambda entry: entry[1])
    rows = [
        [Cell(arrows(name), head=True), Cell(percent(share), heat=share, number=True)]
        for name, share in ordered[:FEWEST]
    ]
    told = f"The {count(len(rows))} edges of the circuit that the fewest draws hold, in per cent of draws."
    listed = Table(told, ["edge", "draws, %"], rows).render() if rows else ""
    return section(
        "stability", "Would other pairs give the same circuit?", "Stability", paragraph(said), listed
    )


def repair(found: Evaluation) -> str:
    """Which nodes make up for a group that is knocked out."""
    made = found.repair
    if made is None:
        return ""
    metric, places = found.convention.metric, decimals(max(abs(made.clean), abs(made.knocked_out)))
    said = (
        f"Knocking out the group moves {metric} from {signed(made.clean, places)} to "
        f"{signed(made.knocked_out, places)}. If the others had not moved, it would be {signed(made.expected, places)}. "
    )
    if made.repaired is None:
        said += "The group has no direct effect that others could make up for."
    elif made.repaired >= 0:
        said += f"The others made up {unit(made.repaired)} of the direct loss."
    else:
        said += f"The others did not make up for it: what they lost is another {unit(-made.repaired)} of the direct loss."
    rows = [
        [
            head_cell(node.node),
            number_cell(signed(node.before, places + 1, plus=True)),
            number_cell(signed(node.after, places + 1, plus=True)),
            number_cell(signed(node.change, places + 1, plus=True), "key"),
            number_cell(
                ABSENT
                if node.interval is None
                else f"{signed(node.interval[0], places + 1)} to {signed(node.interval[1], places + 1)}"
            ),
        ]
        for node in made.nodes[:SHOWN]
    ]
    told = "By size of the change. Interval: 95 % of the change, over pairs."
    listed = Table(told, ["node", "before", "after", "change", "interval"], rows).render() if rows else ""
    moved = ", ".join(f"{node.node} {signed(node.change, places, plus=True)}" for node in made.nodes[:4])
    alt = f"Dumbbell chart of direct effects before and after the knock-out. Largest changes: {moved}."
    helps = -1 if found.convention.direction == "noise" else 1
    caption = (
        f"Direct effect of a node: {metric} with nothing but its edge to the logits cut, less {metric}; "
        f"{'negative' if helps < 0 else 'positive'} for a node that helps. The {min(REPAIRED, len(made.nodes))} nodes "
        "that change most."
    )
    picture = figure(to_svg(repair_figure(made, metric, helps), alt, "repair"), caption) if made.nodes else ""
    group = f"<p>Knocked out: {names(made.group)}</p>"
    return section(
        "repair",
        "Who makes up for a loss?",
        "Self-repair",
        paragraph(said),
        group,
        f'<div class="pair">{picture}{listed}</div>',
    )
