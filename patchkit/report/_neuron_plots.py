"""Pictures of neurons' scores, which are too many for a heat map: how the effects fall off, and where the largest are."""

from __future__ import annotations

import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator
from torch import Tensor

from patchkit.report._canvas import log_axis, quiet_axes, ticks
from patchkit.report._palette import LIGHT
from patchkit.results.scores import Scores

#: Inches of the picture.
NEURON_SIZE = (9.4, 3.5)
# Dots of a layer: its largest neurons.
SHOWN_A_LAYER = 12
# Points of the curve; more lie on top of each other.
_POINTS = 400


def draw_neurons(figure: Figure, scores: Scores, left: float, top: float) -> None:
    """Two panels: mean |effect| by rank, and the signed effects of the largest neurons of each layer.

    `left` and `top` are the upper left corner, in inches from the figure's lower left.
    """
    width, height = figure.get_size_inches()
    bottom = (top - NEURON_SIZE[1] + 0.62) / height
    tall = (NEURON_SIZE[1] - 1.24) / height
    first = figure.add_axes(((left + 0.72) / width, bottom, 3.6 / width, tall))
    second = figure.add_axes(((left + 5.2) / width, bottom, 4.0 / width, tall))
    figure.text((left + 0.62) / width, (top - 0.18) / height, "neuron", weight="bold", va="center", size=10)
    start, size = scores.grid.start("neuron"), scores.grid.size("neuron")
    _fall_off(first, scores.mean_abs()[start : start + size])
    shape = scores.grid.full_shape("neuron")
    _layers(
        second,
        scores.mean()[start : start + size].reshape(shape[0], -1),
        scores.mean_abs()[start : start + size].reshape(shape[0], -1),
    )


def _fall_off(axes: Axes, sizes: Float[Tensor, " nodes"]) -> None:
    found = sizes[~sizes.isnan()].sort(descending=True).values
    ranks = torch.logspace(0, torch.tensor(float(len(found))).log10().item(), _POINTS).round().long().unique()
    ranks = ranks.clamp(1, max(1, len(found)))
    heights = found[ranks - 1]
    axes.plot(ranks[heights > 0].tolist(), heights[heights > 0].tolist(), color=LIGHT["s0"])
    if bool((heights > 0).any()):
        log_axis(axes, "y")
    log_axis(axes, "x")
    axes.set_xlabel("rank among neurons")
    axes.set_ylabel("mean |effect|")
    axes.set_title("how fast effects fall off", size=9, color=LIGHT["soft"])
    quiet_axes(axes, "both")


def _layers(axes: Axes, signed: Float[Tensor, "layer nodes"], sizes: Float[Tensor, "layer nodes"]) -> None:
    layers, nodes = signed.shape
    largest = sizes.nan_to_num(nan=-1.0).topk(min(SHOWN_A_LAYER, nodes), dim=1)
    for layer in range(layers):
        values = signed[layer, largest.indices[layer][largest.values[layer] >= 0]]
        for role, marker, part in (
            ("heat", "o", values[values >= 0]),
            ("against", "D", values[values < 0]),
        ):
            axes.plot(
                part.tolist(), [layer] * len(part), marker, color=LIGHT[role], ms=4.5, alpha=0.6, mec="none"
            )
    axes.axvline(0, color=LIGHT["line"], lw=0.9, zorder=1)
    axes.set_ylim(layers - 0.5, -0.5)
    axes.yaxis.set_major_locator(FixedLocator(ticks(layers)))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_ylabel("layer")
    axes.set_xlabel("mean effect, signed")
    axes.set_title(f"the {SHOWN_A_LAYER} largest of each layer", size=9, color=LIGHT["soft"])
    quiet_axes(axes, "x")
