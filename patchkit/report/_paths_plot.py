"""Path patching as a staged picture: who acts on the logits, who acts on these, and so on, with the logits on the right.

Senders of a stage are patched along their paths to all of its receivers together, so their lines meet in a point, from
which one line goes to each receiver. A pill has the tint of its effect, a line its width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, PathPatch
from matplotlib.path import Path

from patchkit.report._canvas import label, style
from patchkit.report._circuit_layout import KIND_ROLE
from patchkit.report._html import count, decimals, signed
from patchkit.report._matrix_plot import tint
from patchkit.report._palette import LIGHT
from patchkit.results.paths import PathEffect, PathResult, Stage

#: Senders of a column; of more only the largest.
MOST_PILLS = 14

_WIDE, _TALL, _APART, _BETWEEN = 1.3, 0.27, 0.1, 0.95
_HEADER, _FOOTER, _SIDE = 0.66, 0.42, 0.2
_THINNEST, _THICKEST = 0.8, 4.5


@dataclass(frozen=True)
class _Pill:
    name: str
    effect: PathEffect | None = None


@dataclass(frozen=True)
class _Column:
    """One column: what it is called, its pills, and how many more there would be."""

    title: str
    under: str
    pills: list[_Pill]
    more: int = 0


@style()
def paths_figure(found: PathResult) -> Figure:
    """The stages as columns, the first beside its receivers on the right."""
    columns = _columns(found)
    tallest = max(len(column.pills) + bool(column.more) for column in columns)
    height = _HEADER + _FOOTER + max(1, tallest) * (_TALL + _APART) + 0.1
    # What stands under a column's title is wider than the column.
    width = max(4.6, 3.5 * _SIDE + len(columns) * _WIDE + (len(columns) - 1) * _BETWEEN)
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, width)
    axes.set_ylim(0, height)
    axes.axis("off")
    middle = _FOOTER + (height - _HEADER - _FOOTER) / 2
    rights = [width - _SIDE - place * (_WIDE + _BETWEEN) for place in range(len(columns))]
    largest = max((_size(pill) for column in columns for pill in column.pills), default=0.0)
    heights = [_heights(column, middle) for column in columns]
    for place, stage in enumerate(found.stages):
        _join(axes, stage, columns[place : place + 2], heights[place : place + 2], rights[place], largest)
    for column, right, at in zip(columns, rights, heights, strict=True):
        x = right - _WIDE / 2
        axes.text(x, height - 0.2, label(column.title, 20), ha="center", va="center", size=9.5, weight="bold")
        axes.text(
            x, height - 0.42, label(column.under, 38), ha="center", va="center", size=8, color=LIGHT["soft"]
        )
        for pill, y in zip(column.pills, at, strict=False):
            _pill(axes, pill, x, y, largest)
        if column.more or not column.pills:
            said = f"and {count(column.more)} more" if column.more else "none"
            axes.text(x, at[-1], said, ha="center", va="center", size=8, color=LIGHT["soft"])
    _key(axes, columns)
    return figure


def shown(stage: Stage) -> tuple[list[PathEffect], int]:
    """The senders that a stage's column shows, and how many it leaves out: those chosen, else the largest."""
    of = {effect.sender: effect for effect in stage.effects}
    listed = [of[name] for name in stage.chosen if name in of]
    if not stage.chosen:
        listed = sorted((e for e in stage.effects if e.effect != 0), key=lambda effect: -abs(effect.effect))
    most = MOST_PILLS if len(listed) <= MOST_PILLS else MOST_PILLS - 1
    return listed[:most], len(listed[most:])


def letters_of(stage: Stage) -> str:
    """Which inputs of heads are receivers, in the order q, k, v."""
    return "".join(
        letter for letter in "qkv" if any(name.endswith(f"<{letter}>") for name in stage.receivers)
    )


def _columns(found: PathResult) -> list[_Column]:
    """From the right: the first stage's receivers, then the senders of each stage."""
    if not found.stages:
        return [_Column("no stage", "", [])]
    receivers = found.stages[0].receivers
    lone = receivers == ["logits"]
    columns = [
        _Column(
            "the end" if lone else "receivers",
            "" if lone else f"{count(len(receivers))} together",
            [_Pill(name) for name in receivers[:MOST_PILLS]],
            max(0, len(receivers) - MOST_PILLS),
        )
    ]
    for place, stage in enumerate(found.stages):
        listed, more = shown(stage)
        before = (
            "logits" if place == 0 and lone else "receivers" if place == 0 else found.stages[place - 1].name
        )
        words = {"q": "queries", "k": "keys", "v": "values"}
        inputs = ", ".join(words[letter] for letter in letters_of(stage))
        under = f"to {inputs} of {before}" if inputs and place else f"to {before}"
        columns.append(_Column(stage.name, under, [_Pill(effect.sender, effect) for effect in listed], more))
    return columns


def _size(pill: _Pill) -> float:
    if pill.effect is None:
        return 0.0
    return abs(pill.effect.effect)


def _heights(column: _Column, middle: float) -> list[float]:
    rows = max(1, len(column.pills) + bool(column.more))
    top = middle + (rows - 1) * (_TALL + _APART) / 2
    return [top - row * (_TALL + _APART) for row in range(rows)]


def _join(
    axes: Axes,
    stage: Stage,
    columns: Sequence[_Column],
    heights: Sequence[Sequence[float]],
    right: float,
    largest: float,
) -> None:
    """Lines from a stage's senders to their meeting point and on to its receivers; `right` is that of the receivers."""
    (receivers, senders), (ends, starts) = columns, heights
    if not senders.pills:
        return
    left = right - _WIDE
    knot = (left - 0.45 * _BETWEEN, sum(ends[: len(receivers.pills)]) / max(1, len(receivers.pills)))
    for pill, y in zip(senders.pills, starts, strict=False):
        effect = pill.effect.effect if pill.effect is not None else 0.0
        share = abs(effect) / largest if largest else 0.0
        path = _bow((left - _BETWEEN, y), knot)
        axes.add_patch(
            PathPatch(path, fc="none", ec=LIGHT["against" if effect < 0 else "heat"], alpha=0.85, zorder=1,
                      lw=_THINNEST + (_THICKEST - _THINNEST) * share)
        )  # fmt: skip
    letters = letters_of(stage)
    for pill, y in zip(receivers.pills, ends, strict=False):
        axes.add_patch(
            PathPatch(_bow(knot, (left, y)), fc="none", ec=LIGHT["soft"], lw=1.0, alpha=0.8, zorder=1)
        )
        # Receivers of a column of their own have the letter in their name.
        said = letters if pill.effect is not None and pill.name.startswith("a") else ""
        # On the side from which the line does not come.
        aside = 0.085 if y >= knot[1] else -0.085
        for place, letter in enumerate(said):
            axes.text(left - 0.07 - 0.09 * (len(said) - 1 - place), y + aside, letter, ha="center", va="center", size=8,
                      weight="bold", color=LIGHT[KIND_ROLE[letter]], zorder=4)  # fmt: skip
    axes.plot(*knot, "o", ms=5, color=LIGHT["soft"], zorder=3)


def _bow(start: tuple[float, float], end: tuple[float, float]) -> Path:
    """A curve that is level at both ends."""
    half = 0.55 * (end[0] - start[0])
    points = [start, (start[0] + half, start[1]), (end[0] - half, end[1]), end]
    return Path(points, [Path.MOVETO, Path.CURVE4, Path.CURVE4, Path.CURVE4])


def _pill(axes: Axes, pill: _Pill, x: float, y: float, largest: float) -> None:
    corner = (x - _WIDE / 2, y - _TALL / 2)
    shape = f"round,pad=0,rounding_size={_TALL / 2}"
    axes.add_patch(
        FancyBboxPatch(corner, _WIDE, _TALL, boxstyle=shape, fc=LIGHT["panel"], ec="none", zorder=2)
    )
    fill = LIGHT["grid"] if pill.effect is None else tint(pill.effect.effect, largest or 1.0)
    axes.add_patch(
        FancyBboxPatch(corner, _WIDE, _TALL, boxstyle=shape, fc=fill, ec=LIGHT["soft"], lw=0.9, zorder=3)
    )
    if pill.effect is None:
        axes.text(x, y, label(pill.name, 18), ha="center", va="center", size=8.5, weight="bold", zorder=4)
        return
    axes.text(x - _WIDE / 2 + 0.12, y, label(pill.name, 12), va="center", size=8.5, weight="bold", zorder=4)
    axes.text(x + _WIDE / 2 - 0.12, y, said_of(pill.effect), ha="right", va="center", size=8, zorder=4)


def moved(effect: PathEffect) -> float:
    """The effect as a share of the difference of the runs, with the effect's sign; itself where there is no share."""
    return effect.effect if effect.share is None else math.copysign(abs(effect.share), effect.effect)


def said_of(effect: PathEffect) -> str:
    """A sender's effect in few letters: its share in per cent where there is one."""
    if effect.share is None:
        return signed(effect.effect, decimals(abs(effect.effect)), plus=True)
    share = 100 * moved(effect)
    places = 1 if abs(share) >= 0.1 or share == 0 else 4
    return f"{signed(share, places, plus=True)}\u00a0%"


def _key(axes: Axes, columns: Sequence[_Column]) -> None:
    effects = [pill.effect.effect for column in columns for pill in column.pills if pill.effect is not None]
    x = _SIDE
    for role, said, there in (
        ("against", "lowers the metric", any(effect < 0 for effect in effects)),
        ("heat", "raises it", any(effect > 0 for effect in effects)),
    ):
        if there:
            axes.plot([x, x + 0.3], [0.18, 0.18], color=LIGHT[role], lw=2.6, solid_capstyle="butt")
            axes.text(x + 0.36, 0.18, said, va="center", size=8, color=LIGHT["soft"])
            x += 0.36 + 0.062 * len(said) + 0.2
    if effects:
        axes.text(x, 0.18, "the wider, the more", va="center", size=8, color=LIGHT["soft"])
