"""Heat maps beside each other, with the same rows and one scale: the hue is the sign, the strength the size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from patchkit.report._canvas import label, style, ticks
from patchkit.report._html import decimals, signed
from patchkit.report._palette import HEAT_MAX, LIGHT, fractions

# Maps of more cells are drawn as one picture: the page would grow by 100 bytes a cell, and their frames would be all
# that one sees.
MOST_CELLS = 800

_WIDEST, _NARROWEST, _GAP = 10.4, 3.6, 0.32
_LETTER, _LONGEST = 0.062, 26
_TOP, _KEY = 0.34, 0.36
# A lone column stays wide enough for its title.
_COLUMN = 0.34


@dataclass(frozen=True)
class Matrix:
    """One map: cells `[row, column]`, NaN where there is nothing, and the cells to outline."""

    title: str
    cells: Float[Tensor, "row column"]
    columns: Sequence[str]
    across: str = ""
    outlined: frozenset[tuple[int, int]] = frozenset()

    @property
    def named(self) -> bool:
        """Whether columns have names, and not numbers."""
        return not all(name.lstrip("+-").isdigit() for name in self.columns)


@style()
def matrix_figure(
    maps: Sequence[Matrix],
    rows: Sequence[str],
    *,
    down: str = "",
    outline: str = "",
    percent: bool = False,
    widest: float = 0.5,
) -> Figure:
    """The maps as one figure.

    Args:
        rows: names of the rows of every map, the first on top.
        down: what rows are.
        outline: what an outlined cell is, for the key.
        percent: cells are fractions, written in per cent.
        widest: inches of a cell at most.
    """
    wide, tall = _cell(maps, rows, widest)
    left = 0.2 + 0.24 * bool(down) + _LETTER * max((min(len(name), _LONGEST) for name in rows), default=0)
    below = _below(maps, wide)
    widths = [max(_COLUMN, len(panel.columns) * wide) for panel in maps]
    drawn = sum(widths) + _GAP * (len(maps) - 1)
    width, height = max(_NARROWEST, left + drawn + 0.3), _TOP + len(rows) * tall + below + _KEY
    figure = Figure(figsize=(width, height))
    scale = (
        max((float(panel.cells.abs().nan_to_num(nan=0.0, posinf=0.0).max()) for panel in maps), default=0.0)
        or 1.0
    )
    x = left
    for place, (panel, broad) in enumerate(zip(maps, widths, strict=True)):
        box = (
            x / width,
            (below + _KEY) / height,
            broad / width,
            len(rows) * tall / height,
        )
        axes = figure.add_axes(box)
        _map(axes, panel, scale, wide, tall, percent)
        if place == 0:
            shown = list(range(len(rows))) if tall >= 0.14 else ticks(len(rows))
            axes.set_yticks(shown, [label(rows[row], _LONGEST) for row in shown])
            axes.set_ylabel(down)
        x += broad + _GAP
    negative = any(bool((panel.cells < 0).any()) for panel in maps)
    _key(figure, left, scale, negative, outline if any(panel.outlined for panel in maps) else "", percent)
    return figure


def tint(value: float, scale: float) -> tuple[float, float, float, float]:
    """The colour of a cell, as strong as its value is large."""
    hue = LIGHT["against"] if value < 0 else LIGHT["heat"]
    return (*fractions(hue), HEAT_MAX * min(1.0, abs(value) / scale))


def _cell(maps: Sequence[Matrix], rows: Sequence[str], widest: float) -> tuple[float, float]:
    left = 0.5 + _LETTER * max((min(len(name), _LONGEST) for name in rows), default=0)
    columns = max(1, sum(len(panel.columns) for panel in maps))
    wide = min(widest, (_WIDEST - left - _GAP * len(maps)) / columns)
    # Tall slivers would say that columns matter less than rows.
    return wide, min(0.28, max(0.11, 7.0 / max(1, len(rows))), max(0.13, 2 * wide))


def _below(maps: Sequence[Matrix], wide: float) -> float:
    turned = [min(_LONGEST, len(name)) for panel in maps if _turned(panel, wide) for name in panel.columns]
    return 0.24 + 0.2 * any(panel.across for panel in maps) + 0.08 * max(turned, default=0)


def _turned(panel: Matrix, wide: float) -> bool:
    return panel.named and len(panel.columns) > 1 and max(map(len, panel.columns)) * 0.075 > wide


def _map(axes: Axes, panel: Matrix, scale: float, wide: float, tall: float, percent: bool) -> None:
    rows, columns = panel.cells.shape
    axes.set_xlim(-0.5, columns - 0.5)
    axes.set_ylim(rows - 0.5, -0.5)
    if rows * columns > MOST_CELLS:
        _picture(axes, panel, scale)
    else:
        _rectangles(axes, panel, scale)
        if tall >= 0.18:
            _numbers(axes, panel, scale, wide, percent)
    for row, column in sorted(panel.outlined):
        box = Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, ec=LIGHT["chosen"], lw=1.6, zorder=4)
        box.set_clip_on(False)
        axes.add_patch(box)
    axes.set_title(panel.title, pad=4, size=9)
    shown = list(range(columns)) if panel.named else _apart(columns, wide)
    axes.set_xticks(shown, [label(panel.columns[column], _LONGEST) for column in shown])
    if _turned(panel, wide):
        axes.tick_params(axis="x", rotation=90)
    axes.set_xlabel(panel.across)
    axes.set_yticks([])


def _apart(columns: int, wide: float) -> list[int]:
    """Which columns have their number written: so few that the numbers do not touch."""
    every = next(
        step
        for step in (1, 2, 4, 5, 8, 10, 16, 20, 32, 64, columns)
        if step * wide >= 0.22 or step == columns
    )
    return list(range(0, columns, every))


def _rectangles(axes: Axes, panel: Matrix, scale: float) -> None:
    cells = [
        (row, column, value)
        for row, values in enumerate(panel.cells.tolist())
        for column, value in enumerate(values)
        if not math.isnan(value)
    ]
    boxes = [Rectangle((column - 0.5, row - 0.5), 1, 1) for row, column, _ in cells]
    tints = [tint(value, scale) for _, _, value in cells]
    axes.add_collection(PatchCollection(boxes, facecolors=tints, edgecolors=LIGHT["line"], linewidths=0.5))
    for spine in axes.spines.values():
        spine.set_visible(False)


def _picture(axes: Axes, panel: Matrix, scale: float) -> None:
    values = panel.cells.double().numpy()
    colours = np.zeros((*values.shape, 4))
    colours[..., :3] = np.where(
        (values < 0)[..., None], fractions(LIGHT["against"]), fractions(LIGHT["heat"])
    )
    colours[..., 3] = np.nan_to_num(HEAT_MAX * np.minimum(1.0, np.abs(values) / scale))
    rows, columns = values.shape
    axes.imshow(
        colours, aspect="auto", interpolation="nearest", extent=(-0.5, columns - 0.5, rows - 0.5, -0.5)
    )
    for side in ("top", "right"):
        axes.spines[side].set_visible(True)


def _numbers(axes: Axes, panel: Matrix, scale: float, wide: float, percent: bool) -> None:
    """Writes values into their cells where they fit; the faint ones stay blank."""
    shown = [
        (column, row, value)
        for row, values in enumerate(panel.cells.tolist())
        for column, value in enumerate(values)
        if math.isfinite(value) and abs(value) >= 0.05 * scale
    ]
    factor, places = (100.0, 1 if scale < 0.0995 else 0) if percent else (1.0, decimals(scale))
    for fewer in (places, max(0, places - 1)):
        texts = [signed(factor * value, fewer) for _, _, value in shown]
        if max((len(text) for text in texts), default=0) * _LETTER <= wide - 0.02:
            for (column, row, _), text in zip(shown, texts, strict=True):
                axes.text(column, row, text, ha="center", va="center", size=7.0)
            return


def _key(figure: Figure, left: float, scale: float, negative: bool, outline: str, percent: bool) -> None:
    """The scale of tints and what the outline means, along the bottom."""
    width, height = figure.get_size_inches()
    length, steps, y = 0.9, 32, 0.1
    unit = " %" if percent else ""
    factor, places = (100.0, 1) if percent else (1.0, decimals(scale))
    start = f"{signed(-factor * scale, places)}{unit}" if negative else "0"
    low = -scale if negative else 0.0
    text = {"size": 8.0, "va": "center", "color": LIGHT["soft"]}
    x = max(left, 0.1) + 0.075 * len(start)
    middle = (y + 0.065) / height
    figure.text((x - 0.05) / width, middle, start, ha="right", **text)
    for step in range(steps):
        value = low + (scale - low) * (step + 0.5) / steps
        corner = ((x + length * step / steps) / width, y / height)
        figure.add_artist(
            Rectangle(corner, length / steps / width, 0.13 / height, fc=tint(value, scale), ec="none", lw=0)
        )
    end = f"{signed(factor * scale, places)}{unit}"
    figure.text((x + length + 0.05) / width, middle, end, ha="left", **text)
    if outline:
        x += length + 0.075 * len(end) + 0.25
        corner = (x / width, y / height)
        figure.add_artist(
            Rectangle(corner, 0.17 / width, 0.13 / height, fill=False, ec=LIGHT["chosen"], lw=1.6)
        )
        figure.text((x + 0.23) / width, middle, outline, ha="left", **text)
