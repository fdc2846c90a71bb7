"""Pictures of the tests of a circuit: what is missing, what is not needed, what chance does, who makes up for a loss."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from patchkit.report._canvas import figure_of, label, log_axis, quiet_axes, style
from patchkit.report._palette import LIGHT
from patchkit.results.evaluation import Completeness, Minimality, MinimalNode, RandomTest, SelfRepair

#: Nodes of a picture; of more, those at both ends.
MOST_NODES = 48
#: Nodes whose direct effect is drawn before and after.
REPAIRED = 24

_FLOOR = 1e-4


@style()
def completeness_figure(found: Completeness, metric: str) -> Figure:
    """F(C without K) against F(M without K), one mark a set K; a complete circuit lies on the diagonal."""
    figure = figure_of(4.7, 4.4)
    axes = figure.subplots()
    for how, role, marker in (("random", "s5", "o"), ("greedy", "s1", "D")):
        mine = [removal for removal in found.removals if removal.how == how]
        if mine:
            axes.plot([r.model_metric for r in mine], [r.circuit_metric for r in mine], marker, color=LIGHT[role],
                      mec=LIGHT["panel"], mew=0.5, ms=6, label=f"{how} K ({len(mine)})", zorder=3)  # fmt: skip
    every = [
        value for removal in found.removals for value in (removal.model_metric, removal.circuit_metric)
    ] or [0.0]
    low, high = min(every), max(every)
    room = 0.08 * ((high - low) or 1.0)
    span = (low - room, high + room)
    axes.plot(span, span, color=LIGHT["soft"], lw=1, ls="--", zorder=1, label="alike")
    worst = max(found.removals, key=lambda removal: removal.gap, default=None)
    if worst is not None:
        x, y = worst.model_metric, worst.circuit_metric
        axes.plot([x, x], [x, y], color=LIGHT["chosen"], lw=1.2, zorder=2)
        left = x > (low + high) / 2
        axes.annotate(f"largest gap, {worst.gap:.2f}", (x, (x + y) / 2), xytext=(-5 if left else 5, 0),
                      textcoords="offset points", ha="right" if left else "left", va="center", size=8,
                      color=LIGHT["chosen"], zorder=4,
                      bbox={"boxstyle": "square,pad=0.1", "fc": LIGHT["panel"], "ec": "none", "alpha": 0.88})  # fmt: skip
    axes.set_xlim(*span)
    axes.set_ylim(*span)
    axes.set_aspect("equal", adjustable="box")
    axes.set_xlabel(f"model without K, {label(metric, 24)}")
    axes.set_ylabel(f"circuit without K, {label(metric, 24)}")
    quiet_axes(axes, "both")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


@style()
def minimality_figure(found: Minimality) -> Figure:
    """What each node changes at most, in per cent of the behaviour on a logarithmic axis, and the limit it must pass."""
    nodes = sorted(found.nodes, key=lambda node: -_share(node))
    if len(nodes) > MOST_NODES:
        nodes = [*nodes[: MOST_NODES // 2], *nodes[-(MOST_NODES // 2) :]]
    figure = figure_of(5.4, 1.1 + 0.19 * len(nodes))
    axes = figure.subplots()
    floor = 100 * min([found.limit / 10, *(max(_FLOOR, _share(node)) for node in nodes)])
    for y, node in enumerate(nodes):
        value = max(floor, 100 * _share(node))
        needed = _share(node) >= found.limit
        role, marker = ("s0", "o") if needed else ("s1", "D")
        axes.plot([floor * 0.8, value], [y, y], color=LIGHT["line"], lw=1.2, zorder=1)
        axes.plot(value, y, marker, color=LIGHT[role], ms=5.5, zorder=3)
    axes.axvline(100 * found.limit, color=LIGHT["chosen"], lw=1.2, ls="--", zorder=2)
    axes.annotate(f"needed from {100 * found.limit:g} %", (100 * found.limit, 1), xycoords=("data", "axes fraction"),
                  xytext=(4, 2), textcoords="offset points", size=8, color=LIGHT["chosen"])  # fmt: skip
    log_axis(axes, "x")
    axes.set_xlim(floor * 0.8, 1.5 * max([100 * found.limit, *(100 * _share(node) for node in nodes)]))
    _names(axes, [node.node for node in nodes])
    axes.set_xlabel("largest change seen, % of the behaviour")
    quiet_axes(axes, "x")
    return figure


def _share(node: MinimalNode) -> float:
    return abs(node.share) if node.share is not None else 0.0


@style()
def random_figure(found: RandomTest, circuit: float | None) -> Figure:
    """How faithful random circuits of the same size are, and where the circuit stands."""
    figure = figure_of(5.6, 2.9)
    axes = figure.subplots()
    known = [100 * value for value in found.faithfulness if value is not None]
    marks = [*known, 100.0] if circuit is None else [*known, 100.0, 100 * circuit]
    low, high = min([0.0, *marks]), max(marks)
    edges = np.linspace(low - 0.02 * (high - low), high + 0.02 * (high - low), 41)
    heights, _ = np.histogram(known, edges)
    axes.bar(edges[:-1], heights, width=np.diff(edges), align="edge", color=LIGHT["s5"], ec=LIGHT["panel"], lw=0.5,
             label=f"random circuits ({len(known)})")  # fmt: skip
    axes.axvline(100, color=LIGHT["soft"], lw=1, ls="--", label="whole model")
    if circuit is not None:
        axes.axvline(100 * circuit, color=LIGHT["s0"], lw=2.2, label=f"the circuit, {100 * circuit:.1f} %")
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.set_xlabel("faithfulness, %")
    axes.set_ylabel("circuits")
    quiet_axes(axes)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


@style()
def repair_figure(found: SelfRepair, metric: str, helps: int) -> Figure:
    """Direct effects before (hollow) and after (full) the knock-out: blue where a node helps more now, orange if less.

    `helps` is the sign of the effect of a node that helps.
    """
    nodes = found.nodes[:REPAIRED]
    figure = figure_of(5.6, 1.3 + 0.21 * len(nodes))
    axes = figure.subplots()
    for y, node in enumerate(nodes):
        more = node.change * helps >= 0
        role = "heat" if more else "against"
        axes.plot([node.before, node.after], [y, y], color=LIGHT[role], lw=2, zorder=2)
        axes.plot(node.before, y, "o", mfc=LIGHT["panel"], mec=LIGHT["soft"], ms=6, zorder=3)
        axes.plot(node.after, y, "o" if more else "D", color=LIGHT[role], ms=5.5, zorder=3)
    axes.plot([], [], "o", mfc=LIGHT["panel"], mec=LIGHT["soft"], label="before")
    axes.plot([], [], "o-", color=LIGHT["heat"], label="after, helps more")
    axes.plot([], [], "D-", color=LIGHT["against"], label="after, helps less")
    axes.axvline(0, color=LIGHT["line"], lw=0.9, zorder=1)
    _names(axes, [node.node for node in nodes])
    axes.set_xlabel(f"direct effect on {label(metric, 24)}; {'negative' if helps < 0 else 'positive'} helps")
    quiet_axes(axes, "x")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def _names(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), [label(name, 16) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.spines["left"].set_visible(False)
