"""Pictures of the study of circuits: faithfulness and overlap against size, a line a method; the areas of the curves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from patchkit.report._canvas import figure_of, label, log_axis, quiet_axes, style
from patchkit.report._edge_words import METHODS
from patchkit.report._evaluation_plots import DASHES, level, runs_by_kind
from patchkit.report._palette import LIGHT, series
from patchkit.results.circuit_study import CircuitStudy, MethodRow
from patchkit.results.evaluation import CircuitRun, Curve, Overlap

#: The method that the others are measured against.
EXACT = "exact"


@dataclass(frozen=True)
class Line:
    """One method, or one way of selecting by its scores: a line of the pictures and a row of the tables."""

    name: str
    row: MethodRow
    runs: list[CircuitRun]
    place: int


def spoken(method: str) -> str:
    """A method's name as a person says it."""
    name, comma, more = method.partition(",")
    return f"{METHODS.get(name, name)}{comma}{more}"


def lines(study: CircuitStudy) -> list[Line]:
    """A line a method; where its circuits were selected in several ways, one for each."""
    made = []
    for row in study.methods:
        kinds = runs_by_kind(row.runs) or {"": []}
        for kind, runs in kinds.items():
            name = spoken(row.method) if len(kinds) == 1 else f"{spoken(row.method)}: {kind}"
            made.append(
                Line(name, row, sorted(runs, key=lambda run: run.requested or run.n_edges), len(made))
            )
    return made


def overlap_of(row: MethodRow, run: CircuitRun, level_of: str) -> Overlap | None:
    """The overlap of one circuit with the exact one; None where it was not measured."""
    for overlap in row.overlap:
        if overlap.level == level_of and overlap.requested == run.requested and overlap.requested is not None:
            return overlap
    alike = [overlap for overlap in row.overlap if overlap.level == level_of and overlap.requested is None]
    sizes = [overlap for overlap in alike if overlap.found == run.n_edges]
    return sizes[0] if sizes and level_of == "edge" else None


@style()
def methods_figure(study: CircuitStudy) -> Figure:
    """Two panels on a logarithmic axis of size: faithfulness, and the Jaccard overlap with exact's circuits."""
    figure = figure_of(9.8, 4.0 + 0.18 * -(-len(lines(study)) // 3))
    # The page cuts a little off the top and the left of a wide picture.
    figure.set_layout_engine("constrained", h_pad=0.12, w_pad=0.2)
    left, right = figure.subplots(1, 2)
    values = []
    for line in lines(study):
        known = [run for run in line.runs if not run.empty and run.faithfulness is not None]
        values += [100 * (run.faithfulness or 0.0) for run in known]
        _draw(left, line, [(float(run.n_edges), 100 * (run.faithfulness or 0.0)) for run in known])
        role, _ = series(line.place)
        spans = [(r.n_edges, *r.faithfulness_interval) for r in known if r.faithfulness_interval is not None]
        for n, low, high in spans:
            left.plot([n, n], [100 * low, 100 * high], color=LIGHT[role], lw=1, alpha=0.5, zorder=2)
        both = [(run, overlap_of(line.row, run, "edge")) for run in line.runs]
        _draw(right, line, [(float(run.n_edges), o.jaccard) for run, o in both if o is not None and o.jaccard is not None
                            and run.n_edges > 0])  # fmt: skip
    level(left, values)
    left.set_ylabel("faithfulness, %")
    left.set_title("how faithful", size=9, color=LIGHT["soft"])
    right.set_ylim(-0.03, 1.03)
    right.set_ylabel("Jaccard index")
    right.set_title("overlap with the exact circuit of as many edges", size=9, color=LIGHT["soft"])
    quiet_axes(right, "y")
    sizes = [run.n_edges for line in lines(study) for run in line.runs if not run.empty]
    for axes in (left, right):
        if sizes:
            log_axis(axes, "x")
            axes.set_xlim(0.7 * min(sizes), 1.4 * max(sizes))
        axes.set_xlabel("edges after pruning")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3, handlelength=2.8)
    return figure


def _draw(axes: Axes, line: Line, points: Sequence[tuple[float, float]]) -> None:
    role, marker = series(line.place)
    exact = line.row.method == EXACT
    axes.plot(
        [x for x, _ in points],
        [y for _, y in points],
        color=LIGHT["ink" if exact else role],
        marker=marker,
        ls=DASHES[line.place % len(DASHES)],
        # What the others are measured against stands out.
        lw=2.4 if exact else 1.4,
        ms=5,
        label=label(line.name, 44),
        zorder=4 if exact else 3,
    )


def best_curve(row: MethodRow, absolute: bool) -> Curve | None:
    """The curve by signed or by absolute scores; the other where there is only that."""
    alike = [curve for curve in row.curves if curve.absolute == absolute]
    return (alike or row.curves or [None])[0]


@style()
def areas_figure(study: CircuitStudy) -> Figure:
    """Dots: CPR (by signed scores, more is better) and CMD (by |scores|, less is better), full on the linear axis, hollow
    on the logarithmic one.
    """
    rows = [row for row in study.methods if row.curves]
    figure = figure_of(9.8, 1.5 + 0.26 * len(rows))
    figure.set_layout_engine("constrained", h_pad=0.12, w_pad=0.2)
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, absolute, title, chance in (
        (left, False, "CPR, higher is better", 0.25),
        (right, True, "CMD, lower is better", 0.75),
    ):
        for y, row in enumerate(rows):
            curve = best_curve(row, absolute)
            if curve is None:
                continue
            linear, log = (curve.cmd, curve.cmd_log) if absolute else (curve.cpr, curve.cpr_log)
            if linear is not None and log is not None:
                axes.plot([linear, log], [y, y], color=LIGHT["line"], lw=1.2, zorder=1)
            if linear is not None:
                axes.plot(
                    linear, y, "o", color=LIGHT["s0"], ms=7, zorder=3, label="linear axis" if y == 0 else ""
                )
            if log is not None:
                axes.plot(log, y, "D", mfc=LIGHT["panel"], mec=LIGHT["s1"], mew=1.5, ms=6, zorder=3,
                          label="logarithmic axis" if y == 0 else "")  # fmt: skip
        axes.axvline(chance, color=LIGHT["soft"], lw=1, ls=":", zorder=1)
        axes.annotate("nothing until 100 %", (chance, 1), xycoords=("data", "axes fraction"), xytext=(0, 2),
                      textcoords="offset points", ha="center", size=8, color=LIGHT["soft"])  # fmt: skip
        axes.axvline(0 if absolute else 1, color=LIGHT["soft"], lw=1, ls="--", zorder=1)
        axes.set_xlabel(title)
        axes.spines["left"].set_visible(False)
        quiet_axes(axes, "x")
    left.set_yticks(range(len(rows)), [label(spoken(row.method), 26) for row in rows])
    left.set_ylim(len(rows) - 0.4, -0.6)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure
