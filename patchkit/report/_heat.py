"""The heat map of a mask: layer x head, with columns for kinds that have one component a layer."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator

from patchkit.report._canvas import label, style, ticks
from patchkit.report._palette import HEAT_MAX, LIGHT, fractions
from patchkit.report._places import Place, grid, locate, title_of
from patchkit.results.mask import MaskResult

# Wider kinds (neurons) would have cells thinner than a pixel: only components that are patched are drawn, as
# dots.
WIDEST = 128
MOST_NAMES = 40

_MARGIN = {"left": 0.55, "right": 0.15, "top": 0.45, "bottom": 0.75}
_GAP = 0.22

Box = tuple[float, float, float, float]


@style()
def mask_figure(result: MaskResult) -> Figure:
    """Learned values of every component: the stronger the tint, the more of the alternate's activation is put in (1 - w).

    Rows are layers, the first on top. Chosen components are outlined and named (up to 40 names), those
    dropped by pruning crossed. Raises InputError when a chosen name has no learned value.
    """
    kinds = sorted(result.values, key=lambda kind: grid(result.values[kind]).shape[1] == 1)
    layers = max(grid(result.values[kind]).shape[0] for kind in kinds)
    drawn = [min(grid(result.values[kind]).shape[1], WIDEST) for kind in kinds]
    wide = min(0.6, max(0.2, 7.6 / sum(drawn)))
    if max(drawn) == WIDEST:
        wide = 7.6 / sum(drawn)
    tall = min(0.44, max(0.2, 6.0 / layers))
    # A lone column of wide cells (MLPs beside forty heads) stays wide enough for its title and for a name.
    widths = [max(width * wide, _column(kind)) for kind, width in zip(kinds, drawn, strict=True)]
    total_width = max(4.2, sum(widths) + _GAP * (len(kinds) - 1) + _MARGIN["left"] + _MARGIN["right"])
    total_height = layers * tall + _MARGIN["top"] + _MARGIN["bottom"]
    figure = Figure(figsize=(total_width, total_height))
    chosen = {place: name for name in result.chosen for place in [locate(result, name)]}
    pruned = [locate(result, name) for name in result.pruned]
    left = _MARGIN["left"]
    axes_of: dict[str, Axes] = {}
    for kind, width in zip(kinds, widths, strict=True):
        axes = figure.add_axes(
            (
                left / total_width,
                _MARGIN["bottom"] / total_height,
                width / total_width,
                layers * tall / total_height,
            )
        )
        _panel(axes, result, kind, layers, first=kind == kinds[0])
        axes_of[kind] = axes
        left += width + _GAP
    for place, name in chosen.items():
        _outline(axes_of[place.kind], place, name, result)
    for place in pruned:
        axes_of[place.kind].plot(
            place.index, place.layer, "x", color=LIGHT["soft"], markersize=6, markeredgewidth=1.3
        )
    if 0 < len(chosen) <= MOST_NAMES:
        _name_all(figure, axes_of, chosen, wide, tall, result)
    _key(figure, total_width, total_height, bool(pruned))
    return figure


def _column(kind: str) -> float:
    """Inches that a lone column needs for its title."""
    return max(0.34, 0.09 * len(title_of(kind)))


def _panel(axes: Axes, result: MaskResult, kind: str, layers: int, first: bool) -> None:
    values = grid(result.values[kind]).detach().cpu().tolist()
    width = len(values[0])
    axes.set_xlim(-0.5, width - 0.5)
    axes.set_ylim(layers - 0.5, -0.5)
    if width > WIDEST:
        dots = [(i, layer, 1 - w) for layer, row in enumerate(values) for i, w in enumerate(row) if w < 0.99]
        color = [(*fractions(LIGHT["heat"]), max(0.15, amount)) for _, _, amount in dots]
        axes.scatter(
            [i for i, _, _ in dots], [layer for _, layer, _ in dots], s=9, c=color or None, linewidths=0
        )
        for side in ("top", "right"):
            axes.spines[side].set_visible(True)
    else:
        cells = [
            Rectangle((i - 0.5, layer - 0.5), 1, 1)
            for layer, row in enumerate(values)
            for i in range(len(row))
        ]
        tints = [
            (*fractions(LIGHT["heat"]), HEAT_MAX * min(1.0, max(0.0, 1 - w))) for row in values for w in row
        ]
        axes.add_collection(
            PatchCollection(
                cells, facecolors=tints, edgecolors=LIGHT["line"], linewidths=0.6, match_original=False
            )
        )
        for spine in axes.spines.values():
            spine.set_visible(False)
    axes.set_title(title_of(kind), pad=5)
    axes.xaxis.set_major_locator(FixedLocator(ticks(width) if width > 1 else []))
    axes.yaxis.set_major_locator(FixedLocator(ticks(layers) if first else []))
    if first:
        axes.set_ylabel("layer")


def _outline(axes: Axes, place: Place, name: str, result: MaskResult) -> None:
    if grid(result.values[place.kind]).shape[1] > WIDEST:
        axes.plot(
            place.index, place.layer, "o", mec=LIGHT["chosen"], mfc="none", markersize=7, markeredgewidth=1.5
        )
        return
    box = Rectangle(
        (place.index - 0.5, place.layer - 0.5), 1, 1, fill=False, ec=LIGHT["chosen"], lw=2.0, zorder=4
    )
    box.set_clip_on(False)
    box.set_gid(name)
    axes.add_patch(box)


def _name_all(
    figure: Figure,
    axes_of: dict[str, Axes],
    chosen: dict[Place, str],
    wide: float,
    tall: float,
    result: MaskResult,
) -> None:
    """Writes each name in its cell when it fits there, else beside it where it hides no other chosen cell or name."""
    size = 8.0
    taken: list[Box] = []
    centres = {place: _centre(figure, axes_of[place.kind], place) for place in chosen}
    for place, name in chosen.items():
        axes, (x, y) = axes_of[place.kind], centres[place]
        text = label(name, 14)
        needed = len(text) * size * 0.62 / 72
        column = max(wide, _column(place.kind)) if grid(result.values[place.kind]).shape[1] == 1 else wide
        if needed < column - 0.06 and tall >= 0.24:
            value = float(grid(result.values[place.kind])[place.layer, place.index])
            two = tall >= 0.36
            axes.text(
                place.index,
                place.layer - (0.17 if two else 0),
                text,
                ha="center",
                va="center",
                size=size,
                weight="bold",
            )
            if two:
                axes.text(place.index, place.layer + 0.24, f"{value:.2f}", ha="center", va="center", size=7.0)
            continue
        others = [_around(*centre, column, tall) for other, centre in centres.items() if other != place]
        spot = _free_spot(x, y, needed, column, tall, float(figure.get_size_inches()[0]), others + taken)
        taken.append(_around(*spot, needed, 0.14))
        width, height = figure.get_size_inches()
        figure.text(
            spot[0] / width,
            spot[1] / height,
            text,
            ha="center",
            va="center",
            size=size,
            weight="bold",
            zorder=6,
            bbox={"boxstyle": "square,pad=0.08", "fc": LIGHT["panel"], "ec": "none", "alpha": 0.88},
        )


def _centre(figure: Figure, axes: Axes, place: Place) -> tuple[float, float]:
    """Middle of a cell in inches from the figure's lower left corner."""
    width, height = figure.get_size_inches()
    box = axes.get_position()
    low, high = axes.get_xlim()
    bottom, top = axes.get_ylim()
    x = box.x0 + box.width * (place.index - low) / (high - low)
    y = box.y0 + box.height * (place.layer - bottom) / (top - bottom)
    return float(x * width), float(y * height)


def _free_spot(
    x: float, y: float, needed: float, wide: float, tall: float, right: float, taken: Sequence[Box]
) -> tuple[float, float]:
    """The first place around a cell whose name would cover nothing in `taken`; to the right when none is free."""
    aside = (wide + needed) / 2 + 0.05
    above = tall / 2 + 0.1
    spots = [(x + aside, y), (x - aside, y), (x, y + above), (x, y - above)]
    spots += [(x + aside, y + above), (x - aside, y + above), (x + aside, y - above), (x - aside, y - above)]
    inside = [spot for spot in spots if needed / 2 < spot[0] < right - needed / 2]
    free = [spot for spot in inside if not any(_meet(_around(*spot, needed, 0.14), box) for box in taken)]
    return (free or inside or spots)[0]


def _around(x: float, y: float, width: float, height: float) -> Box:
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def _meet(one: Box, two: Box) -> bool:
    return one[0] < two[2] and two[0] < one[2] and one[1] < two[3] and two[1] < one[3]


def _key(figure: Figure, width: float, height: float, pruned: bool) -> None:
    """The scale of tints and what the outline and the cross mean, along the bottom."""
    y, steps, length = 0.14 / height, 24, 0.9 / width
    start = (_MARGIN["left"] + 0.42) / width
    for step in range(steps):
        tint = (*fractions(LIGHT["heat"]), HEAT_MAX * (step + 0.5) / steps)
        figure.add_artist(
            Rectangle(
                (start + length * step / steps, y), length / steps, 0.13 / height, fc=tint, ec="none", lw=0
            )
        )
    text = {"size": 8.0, "va": "center", "color": LIGHT["soft"]}
    middle = y + 0.065 / height
    figure.text(start - 0.06 / width, middle, "w = 1", ha="right", **text)
    figure.text(start + length + 0.06 / width, middle, "0, patched", ha="left", **text)
    x = start + length + 0.95 / width
    figure.add_artist(Rectangle((x, y), 0.17 / width, 0.13 / height, fill=False, ec=LIGHT["chosen"], lw=1.8))
    figure.text(x + 0.23 / width, middle, "chosen", ha="left", **text)
    if pruned:
        figure.text(x + 0.85 / width, middle, "× pruned", ha="left", **text)
