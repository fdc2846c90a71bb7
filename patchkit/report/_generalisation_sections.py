"""The sections of the page of generalisation, and its matrices as pictures. Each section is empty without content."""

from __future__ import annotations

import torch
from matplotlib.figure import Figure

from patchkit.report._canvas import to_svg
from patchkit.report._edge_sections import tile_row
from patchkit.report._html import (
    count,
    definitions,
    duration,
    escape,
    figure,
    percent,
    rich,
    section,
    signed,
    unit,
)
from patchkit.report._matrix_plot import Matrix, matrix_figure
from patchkit.report._tables import Cell, Table, head_cell, heat_cell, number_cell, text_cell
from patchkit.results.evaluation import CircuitRun
from patchkit.results.generalisation import Generalisation, SizeMatrix


def headline(found: Generalisation) -> str:
    """Own sets against others, of the largest size."""
    matrix = found.sizes[-1]
    own, crossed = [], []
    for row in matrix.rows:
        for each, run in zip(found.sets, row.runs, strict=True):
            if row.kind == "set" and run.faithfulness is not None and each.defined:
                (own if each.name == row.circuit else crossed).append(run.faithfulness)
    if not own or not crossed:
        return "On no set do clean and corrupt prompts differ by more than chance, so no share can be given."
    return (
        f"Circuits of {count(matrix.requested)} edges keep {unit(sum(own) / len(own))} of the behaviour on "
        f"prompts of their own set and {unit(sum(crossed) / len(crossed))} on those of others, "
        f"{unit(min(crossed))} at worst."
    )


def tiles(found: Generalisation) -> str:
    """The numbers one looks for first."""
    shared = [
        cell.jaccard
        for place, row in enumerate(found.sizes[-1].overlaps[: len(found.sets)])
        for cell in row[:place]
        if cell.jaccard is not None
    ]
    return tile_row(
        [
            ("tile main", count(len(found.sets)), "sets of prompts"),
            ("tile", count(found.sizes[-1].requested), "edges asked for"),
            ("tile", signed(sum(shared) / len(shared), 2) if shared else "–", "mean Jaccard of two circuits"),
            ("tile", count(sum(len(each.held_out) for each in found.sets)), "held-out pairs"),
        ]
    )


def told(found: Generalisation) -> str:
    """The findings, and what a reader must know."""
    items = "".join(f"<li>{rich(said)}</li>" for said in (*found.findings, *found.notes))
    return section("findings", "What was found", "Findings", f"<ul>{items}</ul>") if items else ""


def generalisation_figure(found: Generalisation, matrix: SizeMatrix) -> Figure:
    """Two maps with the same rows: faithfulness on every set, and the edges shared with every set's circuit."""
    rows = [row.circuit for row in matrix.rows]
    names = [each.name for each in found.sets]
    cells = [[_value(run) for run in row.runs] for row in matrix.rows]
    shared = [[_known(cell.jaccard) for cell in row[: len(names)]] for row in matrix.overlaps]
    if matrix.random is not None:
        rows.append(f"random, mean of {matrix.random.count}")
        cells.append([_mean(cell) for cell in matrix.random.faithfulness])
        shared.append([torch.nan] * len(names))
    own = frozenset((place, place) for place in range(len(names)))
    maps = [
        Matrix("faithfulness, %", torch.tensor(cells), names, "held-out prompts of", own),
        Matrix("edges shared (Jaccard), %", torch.tensor(shared), names, "circuit of", own),
    ]
    return matrix_figure(maps, rows, down="circuit found on", outline="its own set", percent=True)


def _value(run: CircuitRun) -> float:
    return _known(run.faithfulness)


def _known(value: float | None) -> float:
    return torch.nan if value is None else value


def _mean(values: list[float | None]) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else torch.nan


def matrices(found: Generalisation) -> str:
    """A picture and a table of every size."""
    parts = []
    for matrix in found.sizes:
        said = "; ".join(
            f"{row.circuit}: "
            + ", ".join(
                f"{each.name} {unit(run.faithfulness)}"
                for each, run in zip(found.sets, row.runs, strict=True)
            )
            for row in matrix.rows
        )
        caption = (
            f"Circuits of {count(matrix.requested)} edges. Left: how much of the behaviour a circuit keeps on each set's "
            "held-out prompts; 100 % is the whole model. Right: the edges that it shares with each set's circuit."
        )
        alt = f"Matrices of faithfulness and overlap at {matrix.requested} edges. {said}."
        drawn = generalisation_figure(found, matrix)
        parts.append(figure(to_svg(drawn, alt, f"m{matrix.requested}"), caption, wide=True))
        parts.append(_table(found, matrix))
    return section("matrix", "Every circuit on every set", "Matrix", *parts)


def _table(found: Generalisation, matrix: SizeMatrix) -> str:
    rows = [
        [head_cell(row.circuit), number_cell(count(row.runs[0].n_edges)), *map(_share, row.runs)]
        for row in matrix.rows
    ]
    if matrix.random is not None:
        rows.append(
            [
                head_cell("random", f"{count(matrix.random.count)} circuits"),
                number_cell(count(matrix.random.n_edges)),
                *(_range(cell) for cell in matrix.random.faithfulness),
            ]
        )
    said = (
        f"Faithfulness in per cent, {count(matrix.requested)} edges asked for; below it the 95 % interval over "
        "held-out pairs, of random circuits the range."
    )
    columns = ["circuit found on", "edges left", *(each.name for each in found.sets)]
    return Table(said, columns, rows).render()


def _share(run: CircuitRun) -> Cell:
    heat = None if run.faithfulness is None or run.empty else max(0.0, 1 - abs(1 - run.faithfulness))
    interval = run.faithfulness_interval
    below = (
        "empty"
        if run.empty
        else ""
        if interval is None
        else f"{percent(interval[0])} to {percent(interval[1])}"
    )
    return Cell(f"{percent(run.faithfulness)}<br><small>{below}</small>", heat=heat, number=True)


def _range(values: list[float | None]) -> Cell:
    known = [value for value in values if value is not None]
    if not known:
        return heat_cell(None)
    below = f"{percent(min(known))} to {percent(max(known))}"
    return Cell(f"{percent(_mean(values))}<br><small>{below}</small>", number=True)


def sets(found: Generalisation) -> str:
    """What each set is, and what the whole model does on it."""
    rows = [
        [
            head_cell(each.name),
            number_cell(count(each.pairs)),
            number_cell(count(len(each.held_out))),
            number_cell(signed(each.clean, 3)),
            number_cell(signed(each.corrupt, 3)),
            heat_cell(each.accuracy),
            text_cell("yes" if each.defined else "no: clean and corrupt differ by no more than chance"),
        ]
        for each in found.sets
    ]
    columns = ["set", "to find", "held out", "clean", "corrupt", "accuracy, %", "says something"]
    said = f"{found.convention.metric} of the whole model on held-out prompts, and with every edge cut."
    return section("sets", "The sets of prompts", "Sets", Table(said, columns, rows).render())


def overlaps(found: Generalisation) -> str:
    """Edges, nodes and ranks that circuits share."""
    matrix = found.sizes[-1]
    parts = []
    for said, cells in (
        ("Jaccard index of edges", matrix.overlaps),
        ("Jaccard index of nodes", matrix.node_overlaps),
    ):
        rows = [
            [head_cell(row.circuit), *(Cell(signed(c.jaccard, 2), heat=c.jaccard, number=True) for c in line)]
            for row, line in zip(matrix.rows, cells, strict=True)
        ]
        columns = ["circuit", *(row.circuit for row in matrix.rows)]
        parts.append(Table(f"{said}, {count(matrix.requested)} edges asked for.", columns, rows).render())
    ranks = [
        [head_cell(each.name), *(Cell(signed(value, 2), heat=value, number=True) for value in line)]
        for each, line in zip(found.sets, found.rank_correlations, strict=True)
    ]
    said = "Rank correlation (Spearman) of all edges' mean |effect|."
    parts.append(Table(said, ["scores on", *(each.name for each in found.sets)], ranks).render())
    return section("overlap", "What the circuits share", "Overlap", *parts)


def protocol(found: Generalisation) -> str:
    """The conventions behind every number."""
    kept = found.convention
    entries = [
        ("model", f"{found.model}{f', task {found.task}' if found.task else ''}"),
        (
            "faithfulness",
            "(circuit - every edge cut) / (whole model - every edge cut), of means over held-out pairs.",
        ),
        (
            "circuits",
            f"edges by {found.method}, ranked by {'|score|' if found.absolute else 'signed score'}; {kept.metric}, "
            f"{kept.direction}, a cut edge carries what the corrupt prompt's run has ({kept.ablation}).",
        ),
        ("all sets", "the circuit of the mean scores over all sets' pairs."),
        (
            "random",
            "circuits without dead ends of as many edges as that of all sets, spread alike over layers and inputs.",
        ),
        ("cost", f"{found.cost:,.0f} forwards over the held-out prompts, {duration(found.seconds)}."),
    ]
    shown = [(term, escape(said)) for term, said in entries]
    if found.command:
        shown.append(("command", f"<code>{escape(found.command)}</code>"))
    return section("protocol", "The protocol", "Protocol", definitions(shown))
