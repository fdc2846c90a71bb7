"""Pictures of a scoreboard: overlap against faithfulness, cost against AUROC, and faithfulness against size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from patchkit.report._canvas import figure_of, label, log_axis, quiet_axes, style
from patchkit.report._palette import LIGHT, series
from patchkit.report._scoreboard_tables import of_kind
from patchkit.results.scoreboard import Scoreboard

_DASHES = ("-", "--", "-.", ":")
# What has an axis of costs to itself: scores that cost nothing have no place on a logarithmic one.
_LEAST_COST = 0.5
Look = dict[str, Any]


def looks(board: Scoreboard) -> dict[str, Look]:
    """Colour, marker and dash of each method, the same in all pictures; no two of one kind share all of them."""
    found: dict[str, Look] = {}
    for edges in (False, True):
        for place, method in enumerate(of_kind(board, edges)):
            role, marker = series(place)
            found[method] = {"color": LIGHT[role], "marker": marker, "ls": _DASHES[place // 6 % len(_DASHES)]}
    return found


@style()
def circuits_figure(board: Scoreboard) -> Figure:
    """A row for methods of nodes and one for methods of edges, a panel a family: is what is found also faithful?"""
    panels = [
        (edges, family, points)
        for edges in (False, True)
        for family in board.families
        if (points := _pairs_of_means(board, edges, family))
    ]
    return _scattered(board, panels, "overlap with the true circuit (Jaccard)", "faithfulness", level=1.0)


def _pairs_of_means(board: Scoreboard, edges: bool, family: str) -> dict[str, tuple[float, float]]:
    found = {}
    for method in of_kind(board, edges):
        x, y = board.mean_of(method, "overlap", family), board.mean_of(method, "faithfulness", family)
        if x is not None and y is not None:
            found[method] = (x.mean, y.mean)
    return found


def has_circuits(board: Scoreboard) -> bool:
    """Whether there is anything to draw of overlap and faithfulness."""
    return any(_pairs_of_means(board, edges, family) for edges in (False, True) for family in board.families)


@style()
def costs_figure(board: Scoreboard) -> Figure:
    """AUROC against cost over all families: of nodes by node methods, of edges by edge methods."""
    panels = [
        (edges, title, points)
        for edges, title, measure in _COSTED
        if (points := _costed(board, edges, measure))
    ]
    return _scattered(board, panels, "forwards a pair", "AUROC", level=0.5, log=True)


_COSTED = (
    (False, "heads and MLPs", "node auroc"),
    (False, "their inputs", "input auroc"),
    (True, "edges", "edge auroc"),
)


def has_costs(board: Scoreboard) -> bool:
    """Whether any method has both a cost and an AUROC of what it scores."""
    return any(_costed(board, edges, measure) for edges, _, measure in _COSTED)


def _costed(board: Scoreboard, edges: bool, measure: str) -> dict[str, tuple[float, float]]:
    found = {}
    for method in of_kind(board, edges):
        x, y = board.mean_of(method, "cost"), board.mean_of(method, measure)
        if x is not None and y is not None:
            found[method] = (max(x.mean, _LEAST_COST), y.mean)
    return found


@style()
def curves_figure(board: Scoreboard) -> Figure:
    """Mean faithfulness of the cases of a family against the fraction of all edges, a line a method."""
    kinds = [edges for edges in (False, True) if any(_curves(board, edges, f) for f in board.families)]
    figure, grid = _grid(board, kinds, board.families)
    drawn = looks(board)
    for edges, panels in zip(kinds, grid, strict=True):
        for family, axes in zip(board.families, panels[:-1], strict=True):
            for method, (x, y) in _curves(board, edges, family).items():
                axes.plot(x, y, label=label(method, 26), ms=3.5, lw=1.3, **drawn[method])
            axes.axhline(1, color=LIGHT["soft"], lw=1, ls=(0, (1, 2)), zorder=1)
            log_axis(axes, "x")
            axes.set_title(f"{family}, {'methods of edges' if edges else 'methods of nodes'}")
            axes.set_xlabel("fraction of all edges")
            quiet_axes(axes, "both")
        panels[0].set_ylabel("faithfulness")
        _legend(panels)
    return figure


def has_curves(board: Scoreboard) -> bool:
    """Whether any method has a curve."""
    return any(_curves(board, edges, family) for edges in (False, True) for family in board.families)


def _curves(board: Scoreboard, edges: bool, family: str) -> dict[str, tuple[list[float], list[float]]]:
    found = {}
    for method in of_kind(board, edges):
        rows = [row for case in board.cases if case.family == family and (row := case.of(method)) is not None]
        x, y = [], []
        for place, fraction in enumerate(board.fractions):
            at = [value for row in rows if len(row.curve) > place and (value := row.curve[place]) is not None]
            if at:
                x.append(fraction)
                y.append(sum(at) / len(at))
        if x:
            found[method] = (x, y)
    return found


def _scattered(
    board: Scoreboard,
    panels: Sequence[tuple[bool, str, Mapping[str, tuple[float, float]]]],
    across: str,
    up: str,
    *,
    level: float,
    log: bool = False,
) -> Figure:
    """A panel of points each, methods of nodes in the upper row, those of edges in the lower."""
    kinds = [edges for edges in (False, True) if any(each[0] == edges for each in panels)]
    columns = {edges: [each for each in panels if each[0] == edges] for edges in kinds}
    widest = max((len(held) for held in columns.values()), default=1)
    figure, grid = _grid(board, kinds, range(widest))
    drawn = looks(board)
    for edges, row in zip(kinds, grid, strict=True):
        for axes, (_, title, points) in zip(row, columns[edges], strict=False):
            for method, (x, y) in points.items():
                look = {**drawn[method], "ls": ""}
                axes.plot([x], [y], label=label(method, 26), ms=7, mec=LIGHT["panel"], mew=0.3, **look)
            axes.axhline(level, color=LIGHT["soft"], lw=1, ls=(0, (1, 2)), zorder=1)
            if log:
                log_axis(axes, "x")
            axes.set_title(f"{title}, {'methods of edges' if edges else 'methods of nodes'}")
            axes.set_xlabel(across)
            quiet_axes(axes, "both")
        for axes in row[len(columns[edges]) :]:
            axes.set_axis_off()
        row[0].set_ylabel(up)
        _legend(row)
    return figure


def _grid(
    board: Scoreboard, kinds: Sequence[bool], columns: Sequence[object]
) -> tuple[Figure, list[list[Axes]]]:
    """Rows of panels, the last of each for the legend, as high as the legend needs."""
    many = max((len(of_kind(board, edges)) for edges in kinds), default=1)
    tall = max(2.9, 0.6 + 0.19 * many)
    figure = figure_of(2.9 * len(columns) + 2.2, tall * max(1, len(kinds)))
    # The page cuts a little off the top and the left of a wide picture.
    figure.set_layout_engine("constrained", h_pad=0.12, w_pad=0.2)
    widths = [1.0] * len(columns) + [0.7]
    grid = figure.subplots(max(1, len(kinds)), len(columns) + 1, squeeze=False, width_ratios=widths)
    return figure, [list(row) for row in grid]


def _legend(row: Sequence[Axes]) -> None:
    """The names of all lines of a row, in the panel at its end."""
    handles: dict[str, Artist] = {}
    for axes in row:
        for handle, said in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(said, handle)
    row[-1].set_axis_off()
    row[-1].legend(
        list(handles.values()), list(handles), loc="center left", handlelength=2.4, borderaxespad=0
    )
