"""Pictures of a comparison: what each node carries across, layer by unit, and how much of the gap groups close."""

from __future__ import annotations

import torch
from matplotlib.figure import Figure

from patchkit.report._canvas import figure_of, label, quiet_axes, style
from patchkit.report._matrix_plot import Matrix
from patchkit.report._palette import LIGHT, series
from patchkit.results.comparison import Across, Comparison

_TALL = 0.42
#: What units of a kind are called under their map.
_UNITS = {"z": ("heads", "head"), "mlp_out": ("MLP", "")}


def across_maps(found: Comparison) -> tuple[list[Matrix], list[str]]:
    """A map a direction and kind of node: the effect on the metric, `[layer, unit]`; and the names of the rows."""
    layers = 1 + max(node.layer for across in found.across for node in across.nodes)
    maps = [
        _map(across, kind, layers)
        for across in found.across
        for kind in dict.fromkeys(node.kind for node in across.nodes)
    ]
    return maps, [str(layer) for layer in range(layers)]


def _map(across: Across, kind: str, layers: int) -> Matrix:
    mine = [node for node in across.nodes if node.kind == kind]
    units = 1 + max(node.unit for node in mine)
    cells = torch.full((layers, units), torch.nan)
    for node in mine:
        cells[node.layer, node.unit] = node.effect
    what, over = _UNITS.get(kind, (kind, "unit"))
    title = f"{what}, {across.donor} into {across.model}" if units > 1 else what
    columns = [str(unit) for unit in range(units)] if units > 1 else [""]
    return Matrix(title, cells, columns, over if units > 1 else "")


@style()
def gap_figure(found: Comparison) -> Figure:
    """The share of the gap that each group closes, a mark a direction with its interval.

    A grey bar is the range of random groups of as many heads and MLPs.
    """
    names = [group.group for group in found.across[0].groups]
    figure = figure_of(7.4, 1.3 + _TALL * len(names))
    axes = figure.subplots()
    for number, across in enumerate(found.across):
        role, marker = series(number)
        for y, group in enumerate(across.groups):
            if group.share is None:
                continue
            at = y + (number - 0.5) * 0.34
            chance = [100 * value for value in group.random if value is not None]
            if chance:
                axes.plot([min(chance), max(chance)], [at, at], color=LIGHT["line"], lw=7, zorder=1,
                          solid_capstyle="butt", label="random groups" if not (number or y) else "")  # fmt: skip
            if group.share_interval is not None:
                low, high = group.share_interval
                axes.plot([100 * low, 100 * high], [at, at], color=LIGHT[role], lw=1.2, zorder=2)
            axes.plot(100 * group.share, at, marker, color=LIGHT[role], ms=6, zorder=3,
                      label="" if y else f"the {across.donor}'s activations in the {across.model}")  # fmt: skip
    for value, dash in ((0.0, "-"), (100.0, "--")):
        axes.axvline(value, color=LIGHT["soft"], lw=0.9, ls=dash, zorder=0)
    axes.set_yticks(range(len(names)), [label(name, 30) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlabel("share of the gap between the two models' metrics, %")
    axes.spines["left"].set_visible(False)
    quiet_axes(axes, "x")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure
