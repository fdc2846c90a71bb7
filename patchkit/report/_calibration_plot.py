"""The calibration of an attribution: estimate against exact effect of the nodes that were patched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from patchkit.report._canvas import figure_of, label, log_axis, quiet_axes, style
from patchkit.report._palette import LIGHT
from patchkit.results.verification import Verification

# Names written beside dots: the missed, and the worst of the rest.
NAMED = 5
_MARKS = {"top": ("s0", "o", "top by estimate"), "sample": ("s1", "^", "sample of the rest")}


@style()
def calibration_figure(found: Verification) -> Figure:
    """Two panels, estimate on x and exact on y: mean |effect|, by which nodes are ranked, and the signed means.

    Dots on the line are estimated exactly; above it in the left panel, underestimated.
    """
    figure = figure_of(9.6, 4.7)
    # The page cuts a little off the top of a wide picture.
    figure.set_layout_engine("constrained", h_pad=0.12)
    left, right = figure.subplots(1, 2)
    sizes = {node.node: (node.estimate, node.exact) for node in found.nodes}
    positive = [value for pair in sizes.values() for value in pair if value > 0]
    # Sampled nodes are often 100 times smaller than the top: on a straight axis they would be one dot.
    wide = bool(positive) and max(positive) > 30 * min(positive)
    if wide:
        floor = max(min(positive), max(positive) * 1e-6)
        sizes = {name: (max(x, floor), max(y, floor)) for name, (x, y) in sizes.items()}
    _scatter(left, found, sizes, wide)
    left.set_title("mean |effect|")
    _scatter(right, found, {node.node: (node.signed, node.exact_signed) for node in found.nodes}, wide=False)
    right.set_title("mean effect, signed")
    off = sorted(found.nodes, key=lambda node: abs(node.exact - node.estimate), reverse=True)
    _name(left, sizes, list(dict.fromkeys([*found.missed, *(node.node for node in off)])))
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def _scatter(axes: Axes, found: Verification, points: Mapping[str, tuple[float, float]], wide: bool) -> None:
    for group, (role, marker, what) in _MARKS.items():
        mine = [points[node.node] for node in found.nodes if node.group == group]
        axes.plot(
            [x for x, _ in mine],
            [y for _, y in mine],
            marker,
            color=LIGHT[role],
            mec=LIGHT["panel"],
            mew=0.5,
            ms=5.5,
            label=f"{what} ({len(mine)})",
            zorder=3,
        )
    every = [value for pair in points.values() for value in pair] or [0.0]
    if wide:
        span = (min(every) / 1.5, max(every) * 1.8)
        log_axis(axes, "x")
        log_axis(axes, "y")
    else:
        low, high = min(0.0, *every), max(0.0, *every)
        room = 0.06 * ((high - low) or 1.0)
        span = (low - room, high + room)
    axes.plot(span, span, color=LIGHT["soft"], lw=1, ls="--", label="estimate = exact", zorder=1)
    axes.set_xlim(*span)
    axes.set_ylim(*span)
    axes.set_aspect("equal", adjustable="box")
    axes.set_xlabel("estimate")
    axes.set_ylabel("exact, by patching")
    quiet_axes(axes, "both")


def _name(axes: Axes, points: Mapping[str, tuple[float, float]], names: Sequence[str]) -> None:
    """Names the first few dots that do not lie under a name; a value's and its head's often share a place."""
    taken: list[tuple[float, float]] = []
    for name in names:
        if name not in points or len(taken) == NAMED:
            continue
        x, y = axes.transAxes.inverted().transform(axes.transData.transform(points[name]))
        if all(abs(x - other) > 0.2 or abs(y - beside) > 0.04 for other, beside in taken):
            taken.append((x, y))
            axes.annotate(label(name, 16), points[name], xytext=(6, 3), textcoords="offset points", size=7.5)
