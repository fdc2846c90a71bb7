"""The sections of the page of the study of circuits: methods of scoring edges beside each other."""

from __future__ import annotations

from patchkit.report._canvas import to_svg
from patchkit.report._circuits_plots import (
    EXACT,
    Line,
    areas_figure,
    best_curve,
    lines,
    methods_figure,
    overlap_of,
    spoken,
)
from patchkit.report._edge_sections import tile_row
from patchkit.report._edge_words import put_in
from patchkit.report._evaluation_sections import areas_table
from patchkit.report._evaluation_words import FAITHFUL, near
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
from patchkit.report._study_sections import escape_lines, provenance
from patchkit.report._tables import Cell, Table, head_cell, number_cell
from patchkit.results.circuit_study import CircuitStudy
from patchkit.results.evaluation import CircuitRun
from patchkit.results.manifest import Manifest

# Methods of the sentence on top, and rows of a table that stands open.
_NAMED, _OPEN = 4, 12


def headline(study: CircuitStudy) -> str:
    """How many edges each method needs for most of the behaviour."""
    need = [(line, _enough(line)) for line in lines(study)]
    found = sorted(((line, n) for line, n in need if n is not None), key=lambda entry: entry[1])
    missed = [line.name for line, n in need if n is None]
    goal = f"within {100 * (1 - FAITHFUL):.0f} points of the whole model"
    if not found:
        return f"No method's circuit comes {goal} at any size that was run."
    said = ", ".join(f"{line.name} {count(n)}" for line, n in found[:_NAMED])
    if len(found) > _NAMED:
        said += f" and {count(len(found) - _NAMED)} more with up to {count(found[-1][1])}"
    none = f"; not at any size: {', '.join(missed)}" if missed else ""
    return f"Edges needed to come {goal}: {said}{none}."


def _enough(line: Line) -> int | None:
    sizes = [run.n_edges for run in line.runs if not run.empty and near(run.faithfulness)]
    return min(sizes, default=None)


def tiles(study: CircuitStudy) -> str:
    """The numbers one looks for first."""
    signed_curves = [(row, best_curve(row, False)) for row in study.methods]
    absolute = [(row, best_curve(row, True)) for row in study.methods]
    cpr = [
        (curve.cpr, row.method) for row, curve in signed_curves if curve is not None and curve.cpr is not None
    ]
    cmd = [(curve.cmd, row.method) for row, curve in absolute if curve is not None and curve.cmd is not None]
    shown = []
    if cpr:
        shown.append(("tile main", signed(max(cpr)[0], 3), f"highest CPR, {spoken(max(cpr)[1])}"))
    if cmd:
        shown.append(("tile", signed(min(cmd)[0], 3), f"lowest CMD, {spoken(min(cmd)[1])}"))
    shown += [
        ("tile", count(len(study.methods)), "methods"),
        ("tile", count(study.pairs), "pairs"),
    ]
    return tile_row(shown)


def question(study: CircuitStudy) -> str:
    """What was asked."""
    return (
        section("question", "The question", "Question", paragraph(study.question)) if study.question else ""
    )


def table(study: CircuitStudy) -> str:
    """Method by size: faithfulness; then CPR, CMD, overlap with the exact circuit, rank correlation and cost."""
    made = lines(study)
    sizes = sorted({_size(run) for line in made for run in line.runs})
    best = {size: _best(made, size) for size in sizes}
    rows, marks = [], []
    for line in made:
        at = {_size(run): run for run in line.runs}
        cells = [head_cell(line.name)]
        for size in sizes:
            cells.append(_cell(at.get(size), best[size]))
        by_sign, by_size = best_curve(line.row, False), best_curve(line.row, True)
        cells.append(number_cell(signed(by_sign.cpr if by_sign is not None else None, 3), "key"))
        cells.append(number_cell(signed(by_size.cmd if by_size is not None else None, 3), "key"))
        cells.append(number_cell(_jaccard(study, line)))
        cells.append(number_cell(signed(line.row.rank_correlation, 2)))
        cells.append(number_cell(f"{line.row.cost:,.1f}"))
        rows.append(cells)
        marks.append("mine" if line.row.method == EXACT else "")
    told = (
        "Faithfulness in per cent by edges asked for, under it the edges left after pruning; bold: nearest to 100 %. "
        "CPR: by signed scores, higher is better; CMD: by |scores|, lower is better. Jaccard: edges shared with exact's "
        f"circuit of as many edges, {count(study.exact_size)} or the size nearest to it, AUROC in brackets. Rank: "
        "Spearman's, of |effect|, with exact. Cost: of the scores, in forward-equivalents."
    )
    columns = ["method", *(count(size) for size in sizes), "CPR", "CMD", "Jaccard", "rank", "cost"]
    groups = [("", 1), ("edges asked for", len(sizes)), ("all sizes", 2), ("with exact", 2), ("", 1)]
    listed = Table(told, columns, rows, groups=groups if sizes else (), row_marks=marks).render()
    return section("methods", "Every method at every size", "Table", listed)


def _size(run: CircuitRun) -> int:
    return run.requested if run.requested is not None else run.n_edges


def _best(made: list[Line], size: int) -> float | None:
    """The faithfulness nearest to 1 at a size."""
    known = [r.faithfulness for line in made for r in line.runs if _size(r) == size and not r.empty]
    return min((f for f in known if f is not None), key=lambda f: abs(1 - f), default=None)


def _cell(run: CircuitRun | None, best: float | None) -> Cell:
    if run is None:
        return number_cell(ABSENT)
    left = "empty" if run.empty else count(run.n_edges)
    share = run.faithfulness
    heat = None if share is None or run.empty else max(0.0, 1 - abs(1 - share))
    mark = "key" if share is not None and share == best and not run.empty else ""
    return Cell(f"{percent(share)}<br><small>{left}</small>", heat=heat, number=True, mark=mark)


def _jaccard(study: CircuitStudy, line: Line) -> str:
    both = [(run, overlap_of(line.row, run, "edge")) for run in line.runs]
    known = [(run, found) for run, found in both if found is not None and found.jaccard is not None]
    if not known:
        return ABSENT
    _, found = min(known, key=lambda entry: abs(_size(entry[0]) - study.exact_size))
    auroc = f" ({signed(found.auroc, 2)})" if found.auroc is not None else ""
    return f"{signed(found.jaccard, 2)}{auroc}"


def faithfulness(study: CircuitStudy) -> str:
    """Lines of faithfulness and of overlap against size."""
    made = lines(study)
    if not any(run.n_edges and run.faithfulness is not None for line in made for run in line.runs):
        return ""
    said = "; ".join(
        f"{line.name} {percent(line.runs[-1].faithfulness)} % with {count(line.runs[-1].n_edges)} edges"
        for line in made
        if line.runs
    )
    alt = f"Two line charts against the number of edges: faithfulness and overlap with the exact circuit. {said}."
    caption = (
        "Each mark is a circuit that was run; thin lines are 95 % intervals over pairs. Circuits that are empty after "
        "pruning are not drawn."
    )
    return section(
        "faithfulness",
        "How faithful, and how like the exact circuit?",
        "Faithfulness",
        figure(to_svg(methods_figure(study), alt, "methods"), caption, wide=True),
    )


def areas(study: CircuitStudy) -> str:
    """CPR and CMD of every method, on both axes."""
    rows = [row for row in study.methods if row.curves]
    if not rows:
        return ""
    said = "; ".join(
        f"{spoken(row.method)} {signed(curve.cpr, 3)}"
        for row in rows
        if (curve := best_curve(row, False)) is not None
    )
    alt = f"Dot plots of CPR and CMD of every method. CPR: {said}."
    listed = [
        (f"{spoken(row.method)}, {'|score|' if curve.absolute else 'signed'}", curve)
        for row in rows
        for curve in row.curves
    ]
    caption = (
        "Full: the areas as MIB has them, most of which is at large circuits; hollow: on a logarithmic axis, where "
        "small circuits weigh alike. Dashed: a circuit that is faithful at every size."
    )
    return section(
        "areas",
        "Over all sizes: CPR and CMD",
        "CPR and CMD",
        figure(to_svg(areas_figure(study), alt, "areas"), caption, wide=True),
        f"<details><summary>The numbers</summary>{areas_table(listed)}</details>",
    )


def overlaps(study: CircuitStudy) -> str:
    """What every circuit shares with the exact one."""
    rows = []
    for row in study.methods:
        for found in row.overlap:
            rows.append(
                [
                    head_cell(spoken(row.method)),
                    Cell(f"{found.level}s"),
                    number_cell(count(found.requested) if found.requested is not None else ABSENT),
                    *(number_cell(count(value)) for value in (found.found, found.truth, found.common)),
                    *(number_cell(percent(value)) for value in (found.precision, found.recall)),
                    Cell(signed(found.jaccard, 3), heat=found.jaccard, number=True),
                    number_cell(signed(found.auroc, 3)),
                ]
            )
    if not rows:
        return ""
    told = (
        "Against the circuit that exact effects give for as many edges. Precision: share of the "
        "circuit that is in it; recall: share of it that is found."
    )
    columns = [
        "method",
        "of",
        "asked for",
        "circuit",
        "exact",
        "common",
        "precision, %",
        "recall, %",
        "Jaccard",
        "AUROC",
    ]
    listed = Table(told, columns, rows).render()
    if len(rows) > _OPEN:
        listed = f"<details><summary>All {count(len(rows))} circuits</summary>{listed}</details>"
    return section("overlap", "Overlap with exact edge patching", "Overlap", listed)


def findings(study: CircuitStudy) -> str:
    """The study's own sentences."""
    items = "".join(f"<li>{rich(said)}</li>" for said in study.findings)
    return section("findings", "What was found", "Findings", f"<ul>{items}</ul>") if items else ""


def reading(study: CircuitStudy) -> str:
    """The protocol behind every number."""
    kept = study.convention
    base, source = ("clean", "corrupt") if kept.direction == "noise" else ("corrupt", "clean")
    runs = [run for row in study.methods for run in row.runs]
    how = ", ".join(
        dict.fromkeys(f"{r.selection}, by {'|score|' if r.absolute else 'signed score'}" for r in runs)
    )
    entries = [
        ("model, task", f"{study.model}, {study.task}; {count(study.pairs)} pairs."),
        ("faithfulness", "(circuit - every edge cut) / (whole model - every edge cut), of means over pairs."),
        ("metric", f"{kept.metric}; higher is more of the behaviour, and it is never negated."),
        (
            "direction",
            f"{kept.direction}: the {base} prompt is run; the {source} prompt is what edges are cut to.",
        ),
        ("ablation", f"{kept.ablation}: a cut edge carries {put_in(kept.ablation, source)}."),
        ("patching", ", ".join(dict.fromkeys(run.patching for run in runs)) or kept.patching),
        ("positions", kept.positions),
        ("selection", how or "none"),
        (
            "enough",
            f"the sentence on top asks for {unit(FAITHFUL)} to {unit(2 - FAITHFUL)}: a convention of this page.",
        ),
    ]
    return section(
        "protocol",
        "The protocol",
        "Protocol",
        definitions((term, escape(said)) for term, said in entries),
    )


def again(study: CircuitStudy, manifest: Manifest | None, place: str) -> str:
    """The command that makes this again."""
    commands = [study.command] + ([f"patchkit rerun {place}"] if manifest is not None else [])
    shown = [f'<pre tabindex="0" aria-label="command">{escape_lines(command)}</pre>' for command in commands]
    if len(shown) == 2:
        shown.insert(1, paragraph("or, from this directory's manifest:", "note"))
    entries = [("study time", escape(duration(study.seconds)))]
    entries += provenance(manifest, "pairs") if manifest is not None else []
    return section("again", "Make it again", "Again", *shown, definitions(entries))
