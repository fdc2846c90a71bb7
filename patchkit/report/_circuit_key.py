"""What stands around the picture of a circuit: its key below, and beside it the edges that are only counted, as arcs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch, PathPatch
from matplotlib.path import Path
from torch import Tensor

from patchkit.model.edges import EdgeGraph
from patchkit.report._circuit_layout import DASHED, DOTTED, KIND_ROLE, Drawn
from patchkit.report._html import count, decimals
from patchkit.report._html import signed as signed_number
from patchkit.report._palette import LIGHT

KEY_HEIGHT = 0.84
#: Most arcs of edges that are not drawn one by one.
BUNDLES = 40
_FARTHEST = 1.35
_COUNTED = 4


@dataclass(frozen=True)
class Bundle:
    """All edges between two layers that are not drawn: how many, and the sum of their sizes. The input is layer -1."""

    start: int
    end: int
    edges: int
    size: float

    def ends(self, n_layers: int) -> list[int]:
        """Its layers, without the input and the logits, which have rows of their own."""
        return [layer for layer in (self.start, self.end) if -1 < layer < n_layers]


def bundles(
    graph: EdgeGraph,
    rest: Bool[Tensor, "senders receivers"],
    sizes: Float[Tensor, "senders receivers"] | None,
) -> list[Bundle]:
    """The edges left over, added up by layer of sender and receiver; the largest sum of |size| (or number) first."""
    sender, receiver = rest.nonzero(as_tuple=True)
    if not len(sender):
        return []
    layers = graph.n_layers + 1
    # Layers of senders from 0 for the input, so that both ends count from 0.
    starts = torch.where(sender == 0, 0, (sender - 1) // (graph.n_heads + 1) + 1)
    ends = receiver // graph.receivers_a_layer
    number = starts * layers + ends
    edges = torch.zeros(layers * layers, dtype=torch.long).index_add_(0, number, torch.ones_like(number))
    size = edges.double()
    if sizes is not None:
        found = sizes[sender, receiver].double().abs().nan_to_num(nan=0.0)
        size = torch.zeros(layers * layers, dtype=torch.float64).index_add_(0, number, found)
    order = torch.sort(torch.where(edges > 0, size, -1.0), descending=True, stable=True).indices
    return [
        Bundle(place // layers - 1, place % layers, int(edges[place]), float(size[place]))
        for place in order[: int((edges > 0).sum())].tolist()
    ]


def draw_bundles(
    axes: Axes, grouped: Sequence[Bundle], heights: Mapping[int, float], x: float, n_layers: int
) -> None:
    """Arcs to the right of a column of dots, one dot a layer; the wider, the larger the sum of sizes."""
    largest = max(bundle.size for bundle in grouped) or 1.0
    span = max(heights.values()) - min(heights.values()) or 1.0
    used = {layer for bundle in grouped for layer in (bundle.start, bundle.end)}
    for layer in sorted(used):
        axes.plot(x, heights[layer], "o", ms=4.5, color=LIGHT["soft"], mec=LIGHT["panel"], zorder=5)
        name = {-1: "input", n_layers: "logits"}.get(layer, str(layer))
        axes.text(x - 0.09, heights[layer], name, ha="right", va="center", size=7, color=LIGHT["soft"])
    counted: list[float] = []
    for place, bundle in enumerate(grouped):
        low, high = heights[bundle.start], heights[bundle.end]
        width = 0.5 + 4.5 * bundle.size / largest
        far = x + max(0.12, _FARTHEST * ((high - low) / span) ** 0.6)
        if bundle.start == bundle.end:
            path = Path([(x, low - 0.05), (x + 0.16, low - 0.07), (x + 0.16, low + 0.07), (x, low + 0.05)],
                        [Path.MOVETO, Path.CURVE4, Path.CURVE4, Path.CURVE4])  # fmt: skip
            far = x + 0.12
        else:
            reach = x + (far - x) / 0.75
            path = Path([(x, low), (reach, low), (reach, high), (x, high)],
                        [Path.MOVETO, Path.CURVE4, Path.CURVE4, Path.CURVE4])  # fmt: skip
        axes.add_patch(PathPatch(path, fc="none", ec=LIGHT["s5"], lw=width, alpha=0.55, zorder=4))
        if place < _COUNTED and all(abs((low + high) / 2 - other) > 0.16 for other in counted):
            counted.append((low + high) / 2)
            axes.text(far + 0.04, (low + high) / 2, count(bundle.edges), va="center", size=7, zorder=6,
                      bbox={"boxstyle": "square,pad=0.1", "fc": LIGHT["panel"], "ec": "none", "alpha": 0.8})  # fmt: skip


def draw_key(
    axes: Axes,
    drawn: Sequence[Drawn],
    *,
    signed: bool,
    dead: bool,
    scored: bool,
    what: str,
    width_of: Callable[[float], float],
) -> None:
    """What colours, dashes, widths and dotted boxes mean, in lines along the bottom."""
    x = 0.16
    words = {"q": "into a query", "k": "into a key", "v": "into a value", "": "into an MLP or the logits"}
    for letter, said in words.items():
        if any(edge.letter == letter for edge in drawn):
            x = _sample(axes, x, 0.62, said, color=LIGHT[KIND_ROLE[letter]], lw=2.2)
    x = 0.16
    if signed and drawn:
        x = _sample(axes, x, 0.39, "helps", color=LIGHT["soft"], lw=1.6)
        if not all(edge.helps for edge in drawn):
            x = _sample(axes, x, 0.39, "works against it", color=LIGHT["soft"], lw=1.6, ls=DASHED)
    if scored:
        _widths(axes, x, drawn, what, width_of)
    if dead:
        axes.add_patch(
            FancyBboxPatch((0.16, 0.09), 0.3, 0.14, boxstyle="round,pad=0,rounding_size=0.05", fc=LIGHT["panel"],
                           ec=LIGHT["soft"], lw=0.9, ls=DOTTED)
        )  # fmt: skip
        axes.text(
            0.52, 0.16, "on no path from the input to the logits", va="center", size=7.5, color=LIGHT["soft"]
        )


def _widths(
    axes: Axes, x: float, drawn: Sequence[Drawn], what: str, width_of: Callable[[float], float]
) -> None:
    sizes = [edge.size for edge in drawn]
    places = decimals(max(sizes))
    shown = dict.fromkeys(signed_number(size, places) for size in (min(sizes), max(sizes)))
    for place, said in enumerate(shown):
        size = min(sizes) if place == 0 and len(shown) > 1 else max(sizes)
        words = f"{what} {said}" if place == 0 else said
        x = _sample(axes, x, 0.39, words, color=LIGHT["soft"], lw=width_of(size))


def _sample(axes: Axes, x: float, y: float, said: str, **line: object) -> float:
    """A short line with what it means; returns where the next may begin."""
    axes.plot([x, x + 0.3], [y, y], solid_capstyle="butt", **line)  # pyright: ignore[reportArgumentType]
    axes.text(x + 0.36, y, said, va="center", size=7.5, color=LIGHT["soft"])
    return x + 0.36 + 0.058 * len(said) + 0.2
