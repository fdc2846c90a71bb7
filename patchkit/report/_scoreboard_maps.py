"""The heat map of a scoreboard: AUROC of every method on every case, families apart."""

from __future__ import annotations

from typing import Literal

from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from patchkit.report._canvas import label, style
from patchkit.report._palette import HEAT_MAX, LIGHT, fractions
from patchkit.results.scoreboard import Ranking, Scoreboard

# Inches of a cell, of the names beside and above them, and of the title over a family.
_WIDE, _TALL, _LEFT, _TOP, _FOOT, _TITLE = 0.37, 0.19, 2.3, 1.45, 0.5, 0.34
# The page cuts a little off the left of a wide picture.
_EDGE = 0.2
_NAME, _METHOD = 30, 24


def mapped(board: Scoreboard, what: Literal["nodes", "edges"]) -> list[str]:
    """Methods that have an AUROC in some case."""
    return [method for method in board.methods if any(v is not None for v in _column(board, method, what))]


@style()
def heat_figure(board: Scoreboard, what: Literal["nodes", "edges"]) -> Figure:
    """Case by method; the number is 100 times the AUROC, the tint its distance from chance. Blank: not measured."""
    methods = mapped(board, what)
    families = board.families
    height = _TOP + _FOOT + _TALL * len(board.cases) + _TITLE * len(families)
    width = _LEFT + _WIDE * max(1, len(methods)) + 0.75
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.set_axis_off()
    for place, method in enumerate(methods):
        x = _LEFT + _WIDE * (place + 0.5)
        axes.text(
            x,
            _TOP - 0.06,
            label(method, _METHOD),
            rotation=50,
            ha="left",
            va="bottom",
            size=8.5,
            rotation_mode="anchor",
        )
    cells: list[Rectangle] = []
    tints: list[tuple[float, float, float, float]] = []
    y = _TOP
    for family in families:
        axes.text(_EDGE, y + _TITLE - 0.07, family, ha="left", va="bottom", size=9.5, weight="bold")
        axes.plot([_EDGE, width - 0.7], [y + _TITLE - 0.03] * 2, color=LIGHT["line"], lw=0.8)
        y += _TITLE
        for case in board.cases:
            if case.family != family:
                continue
            axes.text(_LEFT - 0.08, y + _TALL / 2, label(case.name, _NAME), ha="right", va="center", size=8)
            for place, method in enumerate(methods):
                row = case.of(method)
                value = None if row is None else _auroc(getattr(row, what))
                if value is None:
                    continue
                x = _LEFT + _WIDE * place
                cells.append(Rectangle((x, y), _WIDE, _TALL))
                tints.append(_tint(value))
                axes.text(
                    x + _WIDE / 2,
                    y + _TALL / 2 + 0.005,
                    f"{100 * value:.0f}",
                    ha="center",
                    va="center",
                    size=7,
                )
            y += _TALL
    axes.add_collection(PatchCollection(cells, facecolors=tints, edgecolors=LIGHT["panel"], linewidths=0.8))
    _key(figure, height, width)
    return figure


def _column(board: Scoreboard, method: str, what: str) -> list[float | None]:
    rows = [case.of(method) for case in board.cases]
    return [None if row is None else _auroc(getattr(row, what)) for row in rows]


def _auroc(ranking: Ranking | None) -> float | None:
    return None if ranking is None else ranking.auroc


def _tint(value: float) -> tuple[float, float, float, float]:
    """From nothing at chance to the full hue at 1, and to the other at 0."""
    strength = min(1.0, abs(2 * value - 1))
    return (*fractions(LIGHT["heat" if value >= 0.5 else "against"]), HEAT_MAX * strength)


def _key(figure: Figure, height: float, width: float) -> None:
    """The scale of tints, along the bottom."""
    steps, start, length = 41, 1.0, 1.6
    for step in range(steps):
        place = ((start + length * step / steps) / width, 0.13 / height)
        size = (length / steps / width, 0.14 / height)
        figure.add_artist(Rectangle(place, *size, fc=_tint(step / (steps - 1)), ec="none", lw=0))
    for x, said, side in (
        (start - 0.06, "all wrong, 0", "right"),
        (start + length + 0.06, "100, all found", "left"),
    ):
        figure.text(x / width, 0.2 / height, said, ha=side, va="center", size=8, color=LIGHT["soft"])
    figure.text(
        (start + length / 2) / width,
        0.33 / height,
        "50, chance",
        ha="center",
        va="center",
        size=8,
        color=LIGHT["soft"],
    )
