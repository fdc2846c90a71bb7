"""Pictures of how faithful circuits are: against their size, and along the whole curve whose areas are CPR and CMD."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from patchkit.report._canvas import figure_of, label, log_axis, quiet_axes, style
from patchkit.report._palette import LIGHT, series
from patchkit.results.evaluation import CircuitRun, Curve, Evaluation

DASHES = ("-", "--", "-.", ":")
# Values beyond are drawn at the edge of the picture: one wild number must not flatten all others.
_LOW, _HIGH = -100.0, 300.0


@style()
def faithfulness_figure(found: Evaluation) -> Figure:
    """Faithfulness against the number of edges that survive pruning, with its interval; crosses are empty circuits.

    A grey line leads from each circuit to the size that was asked for.
    """
    figure = figure_of(6.2, 3.7)
    axes = figure.subplots()
    known = sorted(
        (run for run in found.circuits if not run.empty and run.faithfulness is not None),
        key=lambda run: run.n_edges,
    )
    sizes = [run.n_edges for run in known]
    values = [100 * (run.faithfulness or 0.0) for run in known]
    for run, value in zip(known, values, strict=True):
        if run.requested is not None and run.requested > run.n_edges:
            axes.plot([run.n_edges, run.requested], [value, value], color=LIGHT["line"], lw=1.2, zorder=1)
            axes.plot(run.requested, value, "|", color=LIGHT["soft"], ms=7, zorder=2)
    spans = [run.faithfulness_interval for run in known]
    if any(spans):
        held = [
            (n, 100 * span[0], 100 * span[1])
            for n, span in zip(sizes, spans, strict=True)
            if span is not None
        ]
        axes.fill_between(
            [n for n, _, _ in held], [low for _, low, _ in held], [high for _, _, high in held],
            color=LIGHT["s0"], alpha=0.16, lw=0, label="95 % interval over pairs",
        )  # fmt: skip
        for n, low, high in held:
            axes.plot([n, n], [low, high], color=LIGHT["s0"], lw=1.2, alpha=0.7)
    axes.plot(sizes, values, "o-", color=LIGHT["s0"], label="circuit", zorder=3)
    empty = [run.requested or 1 for run in found.circuits if run.empty]
    if empty:
        axes.plot(empty, [0.0] * len(empty), "x", color=LIGHT["chosen"], ms=7, mew=1.8, label="empty after pruning",
                  zorder=4)  # fmt: skip
    every = [*sizes, *empty, *(run.requested or 1 for run in known)]
    _size_axis(axes, every, found.graph_edges)
    level(axes, [*values, *(100 * end for span in spans if span for end in span)])
    axes.set_xlabel(f"edges after pruning, of {found.graph_edges:,}")
    axes.set_ylabel("faithfulness, %")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


@style()
def curve_figure(curves: Sequence[Curve]) -> Figure:
    """f(k) of each curve against the share of edges asked for: on the axis of the areas, and on a logarithmic one."""
    figure = figure_of(9.8, 3.9)
    # The page cuts a little off the top and the left of a wide picture.
    figure.set_layout_engine("constrained", h_pad=0.12, w_pad=0.2)
    left, right = figure.subplots(1, 2, sharey=True)
    values = [100 * f for curve in curves for f in curve.f if f is not None]
    for axes in (left, right):
        for place, curve in enumerate(curves):
            role, marker = series(place)
            kept = [
                (100 * k, 100 * f) for k, f in zip(curve.fractions, curve.f, strict=True) if f is not None
            ]
            axes.plot(
                [k for k, _ in kept],
                [f for _, f in kept],
                color=LIGHT[role],
                marker=marker,
                ls=DASHES[place % len(DASHES)],
                label=curve_name(curve, curves),
                zorder=3,
            )
        level(axes, values)
    left.set_xlim(0, 102)
    left.set_xlabel("edges asked for, % of all")
    left.set_ylabel("faithfulness, %")
    left.set_title("as CPR and CMD weigh it", size=9, color=LIGHT["soft"])
    right.set_xscale("log")
    _percents(right, [100 * k for curve in curves for k in curve.fractions])
    right.set_xlabel("edges asked for, % of all, logarithmic")
    right.set_title("on a logarithmic axis: small circuits", size=9, color=LIGHT["soft"])
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3, handlelength=2.8)
    return figure


def curve_name(curve: Curve, among: Sequence[Curve]) -> str:
    """What tells a curve from the others."""
    parts = ["ranked by |score|" if curve.absolute else "ranked by signed score"]
    for field in ("selection", "ablation", "patching"):
        if len({getattr(each, field) for each in among}) > 1:
            parts.append(f"{getattr(curve, field)}")
    return label(", ".join(parts), 60)


def runs_by_kind(runs: Sequence[CircuitRun]) -> dict[str, list[CircuitRun]]:
    """Runs that differ in more than their size, apart: what they share -> the runs."""
    found: dict[str, list[CircuitRun]] = {}
    for run in runs:
        ranked = "|score|" if run.absolute else "signed score"
        found.setdefault(f"{run.selection}, {ranked}, {run.ablation}, {run.patching}", []).append(run)
    return found


def level(axes: Axes, values: Sequence[float]) -> None:
    """The scale of faithfulness in per cent, with lines at the whole model's and at that of every edge cut."""
    inside = [min(_HIGH, max(_LOW, value)) for value in values]
    low, high = min([0.0, *inside]), max([100.0, *inside])
    room = 0.06 * (high - low)
    axes.set_ylim(low - room, high + room)
    axes.axhline(100, color=LIGHT["soft"], lw=1, ls="--", zorder=1)
    axes.axhline(0, color=LIGHT["soft"], lw=1, ls=":", zorder=1)
    end = axes.get_yaxis_transform()
    # Curves come from the lower left: there the upper line is free, and on the right the lower one.
    for x, height, side, said in ((0, 100, "left", "whole model"), (1, 0, "right", "every edge cut")):
        away = 3 if side == "left" else -3
        axes.annotate(
            said, (x, height), xycoords=end, xytext=(away, 3), textcoords="offset points", ha=side, size=8,
            color=LIGHT["soft"],
        )  # fmt: skip
    quiet_axes(axes)


def _size_axis(axes: Axes, sizes: Sequence[int], total: int) -> None:
    largest, least = max(sizes, default=1), max(1, min(sizes, default=1))
    if largest > 12 * least:
        log_axis(axes, "x")
        axes.set_xlim(0.7 * least, min(1.5 * largest, max(1.05 * largest, 1.2 * total)))
    else:
        axes.set_xlim(0, 1.1 * largest)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def _percents(axes: Axes, values: Sequence[float]) -> None:
    axes.xaxis.set_major_locator(FixedLocator(sorted(set(values))))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
