"""Pictures of scores: a heat map per node kind, the tint's hue for the sign of the effect, and its key.

`_scores_maps` says which maps there are. Neurons are too many for a map: `_neuron_plots` draws them.
"""

from __future__ import annotations

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator

from patchkit.report._canvas import label, style, ticks
from patchkit.report._html import decimals, signed
from patchkit.report._neuron_plots import NEURON_SIZE, draw_neurons
from patchkit.report._palette import HEAT_MAX, LIGHT, fractions
from patchkit.report._scores_maps import OUTLINED, Block, Panel, blocks
from patchkit.results.scores import Scores

# More cells than this are drawn as one picture: the page would grow by 100 bytes a cell.
MOST_CELLS = 3000

_WIDEST, _NARROWEST, _LEFT, _GAP = 10.4, 3.3, 0.62, 0.5
# A digit is about `_LETTER` inches wide; names of columns are cut to `_LONGEST` letters.
_LETTER, _LONGEST = 0.059, 14
# Above a map: the block's title, and the map's own. Below it: the columns' names, what they are, and the key.
_TITLE, _SUBTITLE, _COLUMNS, _ACROSS, _KEY = 0.38, 0.22, 0.26, 0.2, 0.3


@style()
def block_figure(scores: Scores, block: Block) -> Figure:
    """One block of `blocks` as a figure of its own."""
    width, height = _size(scores, block)
    figure = Figure(figsize=(width, height))
    _draw(figure, scores, block, 0.0, height)
    return figure


@style()
def scores_figure(scores: Scores) -> Figure:
    """Every kind of node: blocks in rows, as many beside each other as fit."""
    rows: list[list[tuple[Block, float, float]]] = [[]]
    for block in blocks(scores):
        width, height = _size(scores, block)
        if rows[-1] and sum(entry[1] for entry in rows[-1]) + width > _WIDEST + 0.6:
            rows.append([])
        rows[-1].append((block, width, height))
    wide = max(sum(width for _, width, _ in row) for row in rows)
    tall = sum(max(height for _, _, height in row) for row in rows)
    figure = Figure(figsize=(wide, tall))
    top = tall
    for row in rows:
        left = 0.0
        for block, width, _ in row:
            _draw(figure, scores, block, left, top)
            left += width
        top -= max(height for _, _, height in row)
    return figure


def _cell(block: Block) -> tuple[float, float]:
    """Width and height of a cell in inches."""
    columns = sum(panel.width for panel in block.panels)
    room = _WIDEST - _LEFT - _GAP * len(block.panels)
    widest = 0.8 if all(panel.named for panel in block.panels) else 0.48
    return min(widest, room / columns), min(0.3, max(0.11, 6.0 / len(block.panels[0].cells)))


def _size(scores: Scores, block: Block) -> tuple[float, float]:
    if not block.panels:
        return NEURON_SIZE
    wide, tall = _cell(block)
    width = _LEFT + sum(panel.width * wide for panel in block.panels) + _GAP * (len(block.panels) - 1) + 0.25
    return max(_NARROWEST, width), _above(block) + len(block.panels[0].cells) * tall + _below(block)


def _above(block: Block) -> float:
    return _TITLE + _SUBTITLE * any(panel.title for panel in block.panels)


def _below(block: Block) -> float:
    wide = _cell(block)[0]
    turned = [min(_LONGEST, len(n)) for panel in block.panels if _turned(panel, wide) for n in panel.columns]
    across = _ACROSS * any(panel.across for panel in block.panels)
    return _COLUMNS + across + _KEY + 0.08 * max(turned, default=0)


def _draw(figure: Figure, scores: Scores, block: Block, left: float, top: float) -> None:
    """Draws a block whose upper left corner is at `left`, `top` inches from the figure's lower left."""
    if not block.panels:
        draw_neurons(figure, scores, left, top)
        return
    total_width, total_height = figure.get_size_inches()
    wide, tall = _cell(block)
    layers = len(block.panels[0].cells)
    sizes = [panel.cells.abs().nan_to_num(nan=0.0, posinf=0.0).max().item() for panel in block.panels]
    scale = max(sizes) or 1.0
    negative = any(bool((panel.cells < 0).any()) for panel in block.panels)
    x = left + _LEFT
    for place, panel in enumerate(block.panels):
        axes = figure.add_axes(
            (
                x / total_width,
                (top - _above(block) - layers * tall) / total_height,
                panel.width * wide / total_width,
                layers * tall / total_height,
            )
        )
        _map(axes, panel, scale, wide, tall)
        if place == 0:
            axes.set_ylabel("layer")
            axes.yaxis.set_major_locator(FixedLocator(ticks(layers)))
        x += panel.width * wide + _GAP
    figure.text(
        (left + _LEFT) / total_width,
        (top - 0.18) / total_height,
        block.title,
        weight="bold",
        va="center",
        size=10,
    )
    bottom = top - _above(block) - layers * tall - _below(block)
    _key(figure, left + _LEFT, bottom + 0.1, scale, negative)


def _map(axes: Axes, panel: Panel, scale: float, wide: float, tall: float) -> None:
    layers, width = panel.cells.shape
    axes.set_xlim(-0.5, width - 0.5)
    axes.set_ylim(layers - 0.5, -0.5)
    if layers * width > MOST_CELLS:
        _picture(axes, panel, scale)
    else:
        _rectangles(axes, panel, scale)
        if tall >= 0.2:
            _numbers(axes, panel, scale, wide)
    for layer, column in panel.outlined:
        box = Rectangle((column - 0.5, layer - 0.5), 1, 1, fill=False, ec=LIGHT["chosen"], lw=1.6, zorder=4)
        box.set_clip_on(False)
        axes.add_patch(box)
    axes.set_title(panel.title, pad=4, size=9, color=LIGHT["soft"])
    _columns(axes, panel, wide)
    axes.yaxis.set_major_locator(FixedLocator([]))


def _columns(axes: Axes, panel: Panel, wide: float) -> None:
    shown = list(range(panel.width)) if panel.named else ticks(panel.width)
    axes.set_xticks(shown, [label(panel.columns[column], _LONGEST) for column in shown])
    if _turned(panel, wide):
        axes.tick_params(axis="x", rotation=90)
    axes.set_xlabel(panel.across)


def _turned(panel: Panel, wide: float) -> bool:
    """Whether the columns' names are too long to stand beside each other."""
    return panel.named and max(len(name) for name in panel.columns) * 0.075 > wide


def _tint(value: float, scale: float) -> tuple[float, float, float, float]:
    hue = LIGHT["against"] if value < 0 else LIGHT["heat"]
    return (*fractions(hue), HEAT_MAX * min(1.0, abs(value) / scale))


def _rectangles(axes: Axes, panel: Panel, scale: float) -> None:
    cells = [
        (layer, column, value)
        for layer, row in enumerate(panel.cells.tolist())
        for column, value in enumerate(row)
        if not math.isnan(value)
    ]
    boxes = [Rectangle((column - 0.5, layer - 0.5), 1, 1) for layer, column, _ in cells]
    tints = [_tint(value, scale) for _, _, value in cells]
    axes.add_collection(PatchCollection(boxes, facecolors=tints, edgecolors=LIGHT["line"], linewidths=0.5))
    for spine in axes.spines.values():
        spine.set_visible(False)


def _picture(axes: Axes, panel: Panel, scale: float) -> None:
    values = panel.cells.double().numpy()
    tint = np.zeros((*values.shape, 4))
    tint[..., :3] = np.where((values < 0)[..., None], fractions(LIGHT["against"]), fractions(LIGHT["heat"]))
    tint[..., 3] = np.nan_to_num(HEAT_MAX * np.minimum(1.0, np.abs(values) / scale))
    axes.imshow(
        tint,
        aspect="auto",
        interpolation="nearest",
        extent=(-0.5, panel.width - 0.5, len(values) - 0.5, -0.5),
    )
    for side in ("top", "right"):
        axes.spines[side].set_visible(True)


def _numbers(axes: Axes, panel: Panel, scale: float, wide: float) -> None:
    """Writes the effects into their cells where they fit; the faint ones stay blank."""
    shown = [
        (column, layer, value)
        for layer, row in enumerate(panel.cells.tolist())
        for column, value in enumerate(row)
        if math.isfinite(value) and abs(value) >= 0.05 * scale
    ]
    places = decimals(scale)
    for fewer in (places, max(0, places - 1)):
        texts = [signed(value, fewer) for _, _, value in shown]
        if max((len(text) for text in texts), default=0) * _LETTER <= wide - 0.02:
            for (column, layer, _), text in zip(shown, texts, strict=True):
                axes.text(column, layer, text, ha="center", va="center", size=7.0)
            return


def _key(figure: Figure, left: float, y: float, scale: float, negative: bool) -> None:
    """The scale of tints and what the outline means, below a block; `left`, `y` in inches."""
    width, height = figure.get_size_inches()
    length, steps = 0.9, 32
    places = decimals(scale)
    low = -scale if negative else 0.0
    text = {"size": 8.0, "va": "center", "color": LIGHT["soft"]}
    start = signed(low, places) if negative else "0"
    x = left + 0.075 * len(start)
    middle = (y + 0.065) / height
    figure.text((x - 0.05) / width, middle, start, ha="right", **text)
    for step in range(steps):
        value = low + (scale - low) * (step + 0.5) / steps
        corner = ((x + length * step / steps) / width, y / height)
        figure.add_artist(
            Rectangle(corner, length / steps / width, 0.13 / height, fc=_tint(value, scale), ec="none", lw=0)
        )
    end = signed(scale, places)
    figure.text((x + length + 0.05) / width, middle, end, ha="left", **text)
    x += length + 0.075 * len(end) + 0.25
    figure.add_artist(
        Rectangle(
            (x / width, y / height), 0.17 / width, 0.13 / height, fill=False, ec=LIGHT["chosen"], lw=1.6
        )
    )
    figure.text((x + 0.23) / width, middle, f"top {OUTLINED}", ha="left", **text)
