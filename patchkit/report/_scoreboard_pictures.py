"""The pictures of a scoreboard and what is said of them, for its page and for the repository's: those with data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from matplotlib.figure import Figure

from patchkit.report._html import signed
from patchkit.report._scoreboard_maps import heat_figure, mapped
from patchkit.report._scoreboard_plots import (
    circuits_figure,
    costs_figure,
    curves_figure,
    has_circuits,
    has_costs,
    has_curves,
)
from patchkit.report._scoreboard_words import listed
from patchkit.results.scoreboard import Scoreboard


@dataclass(frozen=True)
class Picture:
    """One picture.

    Attributes:
        name: of its file, without the suffix.
        title: of its section.
        short: of its section, in the list of links.
        alt: what it shows, for who does not see it.
        caption: how to read it.
        draw: makes the figure.
    """

    name: str
    title: str
    short: str
    alt: str
    caption: str
    draw: Callable[[], Figure]


def pictures(board: Scoreboard) -> list[Picture]:
    """All that there is data for, in the order of the page."""
    made = [_heat(board, "nodes"), _heat(board, "edges")]
    if has_circuits(board):
        said = _means_said(board, "faithfulness")
        made.append(
            Picture(
                "overlap",
                "Does a circuit that looks right also do right?",
                "Overlap and faithfulness",
                f"Scatter plots of faithfulness against overlap, a panel a family. Mean faithfulness: {said}.",
                "Means over the cases of a family, each method at the true size. Dotted: as faithful as the model. What "
                "stands high on the left does the work with other parts; what stands low on the right looks right.",
                lambda: circuits_figure(board),
            )  # fmt: skip
        )
    if has_curves(board):
        made.append(
            Picture(
                "curves",
                "Faithfulness at every size",
                "Curves",
                f"Line charts of faithfulness by fraction of edges, a panel a family. CMD: {_means_said(board, 'cmd')}.",
                "Means over the cases of a family, of those that have a circuit at a size. CPR is the area under a line, "
                "CMD that between it and 1. Dotted: the model.",
                lambda: curves_figure(board),
            )  # fmt: skip
        )
    if has_costs(board):
        said = ", ".join(
            f"{m} {found.mean:,.1f}" for m in board.methods if (found := board.mean_of(m, "cost"))
        )
        made.append(
            Picture(
                "costs",
                "What does it cost?",
                "Costs",
                f"Scatter plots of AUROC against cost, on a logarithmic axis. Forwards a pair: {said}.",
                "All families, each weighed alike. Dotted: chance. Costs below half a forward stand at half a forward.",
                lambda: costs_figure(board),
            )  # fmt: skip
        )
    return [each for each in made if each is not None]


def _heat(board: Scoreboard, what: str) -> Picture | None:
    side = "nodes" if what == "nodes" else "edges"
    methods = mapped(board, side)
    if not methods:
        return None
    return Picture(
        f"heat-{side}", f"Every method on every case: {side}", f"Map of {side}",
        f"Table of AUROC of {side}, methods across ({listed(methods)}) and cases down. Means over all families: "
        f"{_means_said(board, f'{side[:-1]} auroc')}.",
        f"100 times the AUROC of {side}: 50 is chance, 100 is every true one before all others. Blank: not measured.",
        lambda: heat_figure(board, side),
    )  # fmt: skip


def _means_said(board: Scoreboard, measure: str) -> str:
    return (
        ", ".join(
            f"{method} {signed(found.mean, 2)}"
            for method in board.methods
            if (found := board.mean_of(method, measure))
        )
        or "none"
    )
