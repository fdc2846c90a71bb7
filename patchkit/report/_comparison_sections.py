"""The sections of the page of a comparison of two models. Each returns HTML, empty without content."""

from __future__ import annotations

from patchkit.report._canvas import to_svg
from patchkit.report._comparison_plots import across_maps, gap_figure
from patchkit.report._edge_sections import tile_row
from patchkit.report._html import (
    ABSENT,
    count,
    definitions,
    duration,
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
from patchkit.report._tables import Cell, Table, head_cell, heat_cell, number_cell, random_cell
from patchkit.results.comparison import WHICH, Across, Comparison, Which
from patchkit.results.evaluation import CircuitRun

# Nodes of a table; comparison.json has all.
_NODES = 16


def headline(found: Comparison) -> str:
    """What the two share and how much the activations of one do for the other."""
    size = found.circuits[-1].run.requested
    shared = next(each for each in found.overlaps if (each.requested, each.level) == (size, "edge")).jaccard
    crossed = [_run(found, "first", "second", size), _run(found, "second", "first", size)]
    whole = [across.groups[-1].share for across in found.across]
    return (
        f"Circuits of {count(size or 0)} edges share {unit(shared)} of their edges; in the other model they keep "
        f"{unit(crossed[0].faithfulness)} and {unit(crossed[1].faithfulness)} of the behaviour. All of the "
        f"second's heads and MLPs put into the first close {unit(whole[0])} of the gap, the reverse {unit(whole[1])}."
    )


def tiles(found: Comparison) -> str:
    """The numbers one looks for first."""
    first, second = found.models
    return tile_row(
        [
            (
                "tile main",
                f"{percent(first.accuracy)} → {percent(second.accuracy)} %",
                "accuracy, first → second",
            ),
            (
                "tile",
                f"{signed(first.clean, 2)} → {signed(second.clean, 2)}",
                f"{found.convention.metric}, clean",
            ),
            ("tile", signed(found.rank_correlation_abs, 2), "rank correlation of |scores|"),
            ("tile", count(len(found.held_out)), "held-out pairs"),
        ]
    )


def told(found: Comparison) -> str:
    """The findings, and what a reader must know."""
    items = "".join(f"<li>{rich(said)}</li>" for said in (*found.findings, *found.notes))
    return section("findings", "What was found", "Findings", f"<ul>{items}</ul>") if items else ""


def behaviour(found: Comparison) -> str:
    """Each model on the same prompts."""
    rows = [
        [
            head_cell(f"the {which}", each.model),
            number_cell(signed(each.clean, 3)),
            number_cell(_interval(each.clean_interval)),
            number_cell(signed(each.corrupt, 3)),
            heat_cell(each.accuracy),
        ]
        for which, each in zip(WHICH, found.models, strict=True)
    ]
    columns = ["model", "clean", "95 % interval", "corrupt", "accuracy, %"]
    said = f"{found.convention.metric} of clean and corrupt prompts, and how often the answer is the most likely token."
    return section("behaviour", "What each does", "Behaviour", Table(said, columns, rows).render())


def circuits(found: Comparison) -> str:
    """Every circuit in both models."""
    rows = []
    for source in WHICH:
        mine = [each for each in found.circuits if each.found_in == source]
        for size in dict.fromkeys(each.run.requested for each in mine):
            runs = [_run(found, source, place, size) for place in WHICH]
            rows.append(
                [
                    head_cell(f"of the {source}"),
                    number_cell(count(size or 0)),
                    number_cell("empty" if runs[0].empty else count(runs[0].n_edges)),
                    *(_share(run) for run in runs),
                ]
            )
    columns = ["circuit", "asked for", "edges left", "in the first, %", "in the second, %"]
    said = (
        "Faithfulness on held-out pairs, 95 % interval below: 100 % is the whole model that it is run in, 0 % every edge "
        "cut."
    )
    return section("circuits", "Each circuit in both models", "Circuits", Table(said, columns, rows).render())


def overlaps(found: Comparison) -> str:
    """What the circuits have in common."""
    rows = [
        [
            head_cell(f"{each.level}s"),
            number_cell(count(each.requested or 0)),
            *(number_cell(count(value)) for value in (each.found, each.truth, each.common)),
            *(number_cell(percent(value)) for value in (each.precision, each.recall)),
            Cell(signed(each.jaccard, 3), heat=each.jaccard, number=True),
        ]
        for each in found.overlaps
    ]
    columns = ["of", "asked for", "first", "second", "common", "precision, %", "recall, %", "Jaccard"]
    said = (
        "The first's circuit against the second's of as many edges: precision is the share of the first's that "
        f"the second has. Over all edges the rank correlation of importances is {signed(found.rank_correlation, 2)}, of "
        f"mean |effect| {signed(found.rank_correlation_abs, 2)}."
    )
    return section("overlap", "What the circuits share", "Overlap", Table(said, columns, rows).render())


def across(found: Comparison) -> str:
    """The maps of single nodes, and the largest by name."""
    maps, rows = across_maps(found)
    alt = "Heat maps of the effect of putting one node's activation across, layer by head. " + "; ".join(
        f"{each.donor} into {each.model}: largest {_largest(each)}" for each in found.across
    )
    caption = (
        f"Effect on the {found.convention.metric} of the model that is run, when one node holds what it holds "
        f"in the other model on the same prompt (tokens: {found.positions}). Blue raises it, orange lowers it."
    )
    tables = "".join(_nodes(each) for each in found.across)
    return section(
        "across",
        "Activations put across, node by node",
        "Nodes",
        figure(to_svg(matrix_figure(maps, rows, down="layer"), alt, "across"), caption, wide=True),
        f"<details><summary>The largest</summary>{tables}</details>",
    )


def _largest(across: Across) -> str:
    best = max(across.nodes, key=lambda node: abs(node.effect))
    return f"{best.node} {signed(best.effect, 3, plus=True)}"


def _nodes(across: Across) -> str:
    ranked = sorted(across.nodes, key=lambda node: -abs(node.effect))[:_NODES]
    rows = [
        [
            head_cell(node.node),
            number_cell(signed(node.effect, 3, plus=True)),
            number_cell(signed(node.effect_abs, 3)),
            heat_cell(node.share, sign=True),
        ]
        for node in ranked
    ]
    said = f"The {across.donor}'s activations in the {across.model}; share of the gap in per cent."
    return Table(said, ["node", "effect", "mean |effect|", "share"], rows).render()


def groups(found: Comparison) -> str:
    """Groups put across at once, beside random ones."""
    rows = [
        [
            head_cell(group.group, f"{each.donor} into {each.model}"),
            number_cell(count(len(group.nodes))),
            number_cell(signed(group.effect, 3, plus=True)),
            number_cell(_interval(group.interval)),
            heat_cell(group.share, sign=True),
            random_cell([value for value in group.random if value is not None]),
        ]
        for each in found.across
        for group in each.groups
    ]
    columns = ["group", "nodes", "effect", "95 % interval", "share, %", "random, %"]
    said = (
        "A group's nodes together hold what they hold in the other model. Share: of the gap between the two "
        "models' metrics; random: mean and range of groups of as many heads and MLPs, where there is more than "
        "one such group."
    )
    alt = "Shares of the gap that groups close: " + "; ".join(
        f"{group.group} {unit(group.share)} ({each.donor} into {each.model})"
        for each in found.across
        for group in each.groups
    )
    caption = "Lines are 95 % intervals over pairs, grey bars the range of random groups. At 100 % the gap is closed."
    return section(
        "groups",
        "Groups put across",
        "Groups",
        figure(to_svg(gap_figure(found), alt, "gap"), caption),
        Table(said, columns, rows).render(),
    )


def desiderata(found: Comparison) -> str:
    """Every group patched at the last token, from either model."""
    if not found.desiderata:
        return ""
    asked = list(found.triples)
    rows = [
        [
            head_cell(each.group, f"runs in the {each.model}, alternates from the {each.donor}"),
            *(heat_cell(each.scores.get(name)) for name in asked),
            heat_cell(min(each.scores.values(), default=None), mark="key"),
        ]
        for each in sorted(found.desiderata, key=lambda each: _order(found, each.group))
    ]
    listed = ", ".join(f"{name} {count(size)}" for name, size in found.triples.items())
    said = (
        "Per cent of held-out triples whose answer is the target when the group is patched at the last token; the last "
        f"column is the least. Triples: {listed}."
    )
    return section(
        "desiderata",
        "What each group carries, by desiderata",
        "Desiderata",
        Table(said, ["group", *(name.replace("_", " ") for name in asked), "least"], rows).render(),
    )


def _order(found: Comparison, group: str) -> int:
    names = list(dict.fromkeys(each.group for each in found.desiderata))
    return names.index(group)


def protocol(found: Comparison) -> str:
    """The conventions behind every number."""
    kept = found.convention
    first, second = found.models
    entries = [
        ("the first", escape(first.model)),
        ("the second", escape(second.model)),
        (
            "effect",
            "metric(model with the other's activation put in) - metric(model), on clean prompts; positive: it raises the "
            "metric of the model that is run.",
        ),
        ("share", "effect / (the other's metric - the model's), of means over pairs."),
        (
            "pairs",
            f"edges scored on {count(found.pairs)}, all else measured on {count(len(found.held_out))} others.",
        ),
        (
            "circuits",
            f"edges by {found.method}, ranked by {'|score|' if found.absolute else 'signed score'}; {kept.metric}, "
            f"{kept.direction}, a cut edge carries what the corrupt prompt's run has ({kept.ablation}).",
        ),
        ("cost", f"{found.cost:,.0f} forwards over the held-out prompts, {duration(found.seconds)}."),
    ]
    shown = [(term, escape(said)) for term, said in entries]
    if found.command:
        shown.append(("command", f"<code>{escape(found.command)}</code>"))
    return section("protocol", "The protocol", "Protocol", definitions(shown))


def question(found: Comparison) -> str:
    """What was asked."""
    first, second = (each.model for each in found.models)
    return section(
        "question",
        "The question",
        "Question",
        paragraph(
            f"`{first}` and `{second}` have one architecture and one vocabulary. Do they do the same in the "
            "same places? And where they differ, in which nodes is what one has and the other lacks?"
        ),
    )


def _run(found: Comparison, source: Which, place: Which, size: int | None) -> CircuitRun:
    return next(
        each.run
        for each in found.circuits
        if (each.found_in, each.run_in, each.run.requested) == (source, place, size)
    )


def _share(run: CircuitRun) -> Cell:
    heat = None if run.faithfulness is None or run.empty else max(0.0, 1 - abs(1 - run.faithfulness))
    interval = run.faithfulness_interval
    below = "" if interval is None else f"{percent(interval[0])} to {percent(interval[1])}"
    return Cell(f"{percent(run.faithfulness)}<br><small>{below}</small>", heat=heat, number=True)


def _interval(found: tuple[float, float] | None) -> str:
    return ABSENT if found is None else f"{signed(found[0], 3)} to {signed(found[1], 3)}"
