"""The sections of the page of an evaluation that say how faithful circuits are. Each returns HTML, or nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from patchkit.report._canvas import to_svg
from patchkit.report._edge_sections import tile_row
from patchkit.report._edge_words import put_in
from patchkit.report._evaluation_plots import curve_figure, curve_name, faithfulness_figure, runs_by_kind
from patchkit.report._evaluation_words import (
    ABOVE,
    CHANCE,
    COMPLETE,
    FAITHFUL,
    STABLE,
    WIDE,
    checks,
    main_run,
    method_name,
    tested_run,
)
from patchkit.report._html import (
    ABSENT,
    count,
    decimals,
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
from patchkit.report._tables import Cell, Table, head_cell, number_cell
from patchkit.results.evaluation import CircuitRun, Curve, Evaluation
from patchkit.results.manifest import Manifest


def tiles(found: Evaluation) -> str:
    """The numbers one looks for first."""
    run, metric = main_run(found), found.convention.metric
    shown = []
    if run is not None:
        shown += [
            ("tile main", unit(run.faithfulness), "faithfulness"),
            ("tile", count(run.n_edges), f"of {count(found.graph_edges)} edges"),
            ("tile", signed(run.circuit_metric, 2), f"{metric}, circuit"),
        ]
    shown += [
        ("tile", signed(found.clean_metric, 2), f"{metric}, whole model"),
        ("tile", signed(found.corrupt_metric, 2), f"{metric}, every edge cut"),
        ("tile", count(len(found.pair_ids)), "pairs" if len(found.pair_ids) != 1 else "pair"),
    ]
    if found.random is not None:
        shown.append(("tile", f"{found.random.p_value:.2g}", "p against random circuits"))
    return tile_row(shown)


def belief(found: Evaluation) -> str:
    """Question by question, what speaks for the circuit and what against it."""
    listed = checks(found)
    run = tested_run(found) or main_run(found)
    if run is None:
        return ""
    words = {True: '<span class="yes">yes</span>', False: '<span class="no">no</span>', None: "–"}
    rows = [[head_cell(each.question), Cell(words[each.good]), Cell(rich(each.found))] for each in listed]
    told = f"About the circuit of {count(run.n_edges)} edges."
    limits = (
        f"Yes means: faithfulness from {100 * FAITHFUL:.0f} to {100 * ABOVE:.0f} %; an interval of at most "
        f"{100 * WIDE:.0f} points; at least half of the edges left after pruning; p below {CHANCE:g}; no removal that "
        f"tells circuit and model apart by more than {100 * COMPLETE:.0f} % of the behaviour; no superfluous node; a "
        f"mean Jaccard index of at least {STABLE:g}. These limits are conventions of this page."
    )
    return section(
        "belief",
        "Should it be believed?",
        "Belief",
        Table(told, ["question", "", "found"], rows).render(),
        paragraph(limits, "note"),
    )


def sizes(found: Evaluation) -> str:
    """Faithfulness against size, and every circuit as a row."""
    if not found.circuits:
        return ""
    known = [run for run in found.circuits if not run.empty and run.faithfulness is not None]
    drawn = ""
    if known:
        said = ", ".join(
            f"{percent(run.faithfulness)} % with {count(run.n_edges)} edges" for run in known[:8]
        )
        alt = f"Line chart of faithfulness against the number of edges: {said}."
        caption = (
            "0 % is the metric with every edge cut, 100 % that of the whole model. Grey lines lead to the number of "
            "edges that was asked for; crosses, at that number, are empty circuits."
        )
        drawn = figure(to_svg(faithfulness_figure(found), alt, "faith"), caption)
    kinds = runs_by_kind(found.circuits)
    tables = "".join(_runs_table(kind, runs, len(kinds) > 1, found) for kind, runs in kinds.items())
    title = "How faithful at which size?" if len(found.circuits) > 1 else "How faithful is it?"
    return section("sizes", title, "Faithfulness", drawn, tables)


def _runs_table(kind: str, runs: Sequence[CircuitRun], several: bool, found: Evaluation) -> str:
    places = decimals(max(abs(found.clean_metric), abs(found.corrupt_metric)))
    main = main_run(found)
    rows, marks = [], []
    for run in sorted(runs, key=lambda run: (run.n_edges, run.requested or 0)):
        left = "empty" if run.empty else count(run.n_edges)
        rows.append(
            [
                number_cell(count(run.requested) if run.requested is not None else "as given"),
                Cell(f"{escape(left)}", number=True, mark="key"),
                number_cell(unit(run.n_edges / found.graph_edges) if found.graph_edges else ABSENT),
                number_cell(count(run.n_nodes)),
                number_cell(signed(run.circuit_metric, places)),
                number_cell(_range(run.interval, lambda value: signed(value, places))),
                number_cell(signed(run.gap, places)),
                number_cell(percent(run.faithfulness), "key"),
                number_cell(_range(run.faithfulness_interval, percent)),
            ]
        )
        marks.append("mine" if run is main else "")
    told = (
        (f"{kind}: " if several else "")
        + "Asked for and left: edges before and after pruning. Gap: |whole model - circuit|. Intervals: 95 %, over pairs."
    )
    columns = [
        "asked for",
        "left",
        "of all",
        "nodes",
        "metric",
        "interval",
        "gap",
        "faithfulness, %",
        "interval",
    ]
    return Table(told, columns, rows, row_marks=marks).render()


def _range(span: tuple[float, float] | None, shown: Callable[[float], str]) -> str:
    return ABSENT if span is None else f"{shown(span[0])} to {shown(span[1])}"


def curves(found: Evaluation) -> str:
    """The whole curve f(k) and its areas."""
    return curve_section(found.curves)


def curve_section(listed: Sequence[Curve]) -> str:
    """CPR and CMD of some curves, with the curves themselves on both axes."""
    if not listed:
        return ""
    said = "; ".join(
        f"{curve_name(curve, listed)}: CPR {_area(curve.cpr)}, CMD {_area(curve.cmd)}" for curve in listed
    )
    alt = (
        f"Line charts of faithfulness against the share of edges, on a linear and a logarithmic axis. {said}."
    )
    told = (
        "CPR is the area under f, best with signed scores; CMD the area under |1 - f|, best with |scores|. Both give "
        "most of their weight to large circuits: circuits that keep nothing below 100 % have CPR 0.25 and CMD 0.75 on "
        "MIB's fractions. On the logarithmic axis every factor of size weighs alike; f = 1 throughout gives 1 and 0."
    )
    return section(
        "curve",
        "From few edges to all",
        "Curve",
        figure(to_svg(curve_figure(listed), alt, "curve"), "", wide=True),
        paragraph(told, "note"),
        areas_table([(curve_name(curve, listed), curve) for curve in listed]),
        *(_points(curve_name(curve, listed), curve) for curve in listed),
    )


def areas_table(listed: Sequence[tuple[str, Curve]]) -> str:
    """CPR and CMD on both axes."""
    rows = [
        [
            head_cell(name),
            number_cell(_area(curve.cpr), "" if curve.absolute else "key"),
            number_cell(_area(curve.cmd), "key" if curve.absolute else ""),
            number_cell(_area(curve.cpr_log)),
            number_cell(_area(curve.cmd_log)),
        ]
        for name, curve in listed
    ]
    told = "Bold: the area that this ranking is judged by. CPR: higher is better; CMD: lower."
    groups = [("", 1), ("linear axis", 2), ("logarithmic axis", 2)]
    return Table(told, ["curve", "CPR", "CMD", "CPR", "CMD"], rows, groups=groups).render()


def _area(value: float | None) -> str:
    return signed(value, 3)


def _points(name: str, curve: Curve) -> str:
    rows = [
        [
            number_cell(f"{100 * fraction:.3g}"),
            number_cell(count(asked)),
            number_cell(count(left) if left else "empty"),
            number_cell(percent(f), "key"),
        ]
        for fraction, asked, left, f in zip(
            curve.fractions, curve.requested, curve.n_edges, curve.f, strict=True
        )
    ]
    made = Table(
        f"{name}: {curve.selection}, ablation {curve.ablation}, {curve.patching} patching.",
        ["% of all edges", "asked for", "left", "faithfulness, %"],
        rows,
    )
    return f"<details><summary>The points: {escape(name)}</summary>{made.render()}</details>"


def notes(found: Evaluation) -> str:
    """What a reader must know."""
    items = "".join(f"<li>{rich(note)}</li>" for note in found.notes)
    return section("notes", "To keep in mind", "Notes", f"<ul>{items}</ul>") if items else ""


def protocol(found: Evaluation, manifest: Manifest | None) -> str:
    """Everything a faithfulness number depends on, spelled out."""
    kept = found.convention
    base, source = ("clean", "corrupt") if kept.direction == "noise" else ("corrupt", "clean")
    every = found.circuits
    entries = [
        ("circuit", f"{found.source}; edges scored by {method_name(found)}."),
        ("faithfulness", "(circuit - every edge cut) / (whole model - every edge cut), of means over pairs."),
        ("metric", f"{kept.metric}; higher is more of the behaviour, and it is never negated."),
        ("direction", f"{kept.direction}: the {base} prompt is run; the {source} prompt is what edges are cut to."),
        ("ablation", _each(every, "ablation", kept.ablation) + f": a cut edge carries {put_in(kept.ablation, source)}."),
        ("patching", _patching(_each(every, "patching", kept.patching))),
        ("selection", _selection(every)),
        ("positions", f"{kept.positions}: edges are cut there; elsewhere they are whole."
         if kept.positions != "all" else "all: edges are cut at every token."),
        ("pruning", "edges that lie on no path from the input to the logits are dropped before a circuit is run."),
        ("pairs", f"{count(len(found.pair_ids))}; intervals are percentile bootstraps over them."),
        ("cost", f"{found.cost:,.1f} forward-equivalents; 1 is one forward over every base prompt."),
    ]  # fmt: skip
    if manifest is not None:
        extra = (
            ("seed", None if manifest.seed is None else str(manifest.seed)),
            ("time", duration(manifest.seconds) if manifest.seconds else None),
        )
        entries += [(term, said) for term, said in extra if said]
    told = (
        "The same circuit can score from below 0 to above 100 % under another protocol: none of these may be left out "
        "when a number is quoted."
    )
    listed = definitions((term, escape(said)) for term, said in entries)
    return section("protocol", "The protocol", "Protocol", paragraph(told), listed)


def _each(runs: Sequence[CircuitRun], field: str, otherwise: str) -> str:
    return ", ".join(dict.fromkeys(str(getattr(run, field)) for run in runs)) or otherwise


def _patching(kind: str) -> str:
    said = {
        "edge": "edge: every edge outside the circuit is cut by itself; a node may be whole for one reader and cut for "
        "another.",
        "node": "node: nodes outside the circuit are replaced for all that read them; edges among the rest are whole.",
    }
    return said.get(kind, kind)


def _selection(runs: Sequence[CircuitRun]) -> str:
    how = {
        "top": "top: the edges with the highest scores",
        "greedy": "greedy: from the logits backwards, always the best edge into a node that is in already",
        "threshold": "threshold: every edge of at least a score",
        "given": "given: the circuit as it came",
        "acdc": "acdc: what ACDC kept",
    }
    kinds = dict.fromkeys((run.selection, run.absolute) for run in runs)
    ranked = {True: ", ranked by |score|", False: ", ranked by signed score"}
    said = [
        how.get(selection, selection)
        + (ranked[absolute] if selection in ("top", "greedy", "threshold") else "")
        for selection, absolute in kinds
    ]
    return "; ".join(said) + "." if said else "none."
