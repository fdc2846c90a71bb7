"""Which maps show the scores of each node kind, as numbers: `_scores_plots` draws them.

A kind with heads and positions has two maps: over positions the head, and over heads the position, where the effect is
largest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from patchkit.model.nodes import NodeGrid
from patchkit.model.sites import KINDS
from patchkit.results.scores import Scores

# Nodes outlined in the maps.
OUTLINED = 10
# Spans and the like: one map each instead of the largest over them.
FEW_PLACES = 3


@dataclass(frozen=True)
class Panel:
    """One map: cells `[layer, column]`, NaN where nothing was computed, and the cells to outline."""

    title: str
    cells: Float[Tensor, "layer column"]
    columns: Sequence[str]
    across: str
    outlined: frozenset[tuple[int, int]]

    @property
    def width(self) -> int:
        return self.cells.shape[1]

    @property
    def named(self) -> bool:
        """Whether columns have names, and not numbers."""
        return not all(name.lstrip("+-").isdigit() for name in self.columns)


@dataclass(frozen=True)
class Block:
    """Maps that share a scale: `name` is fit for an id, `alt` says in words what they show."""

    name: str
    title: str
    kinds: tuple[str, ...]
    panels: tuple[Panel, ...]
    alt: str


def blocks(scores: Scores, size: bool = False) -> list[Block]:
    """The blocks of maps that show every kind: kinds of whole vectors without positions share one.

    With `size`, of mean |effect| instead of the signed mean.
    """
    flat = scores.mean_abs() if size else scores.mean()
    tops = scores.order()[:OUTLINED]
    lone = tuple(k for k in scores.grid.kinds if KINDS[k].unit == "vector" and not scores.grid.placed)
    groups = dict.fromkeys(lone if kind in lone else (kind,) for kind in scores.grid.kinds)
    made = []
    for kinds in groups:
        panels = () if kinds == ("neuron",) else _panels(scores.grid, flat, kinds, tops)
        name = "-".join(kinds)
        said = ", ".join(scores.grid.names(tops.tolist()))
        what = "mean |effect|" if size else "mean effect, signed"
        made.append(
            Block(
                name,
                ", ".join(kinds),
                kinds,
                panels,
                f"Heat map of the {what} of {name} by layer. Top nodes: {said}.",
            )
        )
    return made


def _panels(
    grid: NodeGrid, flat: Float[Tensor, " nodes"], kinds: tuple[str, ...], tops: Tensor
) -> tuple[Panel, ...]:
    where = grid.locate(tops)
    index = torch.tensor([grid.kinds.index(kind) for kind in kinds])
    top = [
        (layer, place, unit)
        for kind, layer, place, unit in zip(*(part.tolist() for part in where), strict=True)
        if kind in index
    ]
    start, size = grid.start(kinds[0]), grid.size(kinds[0])
    values = flat[start : start + size].reshape(grid.full_shape(kinds[0]))
    layers, places, units = values.shape
    heads = [str(unit) for unit in range(units)]
    across = "KV head" if KINDS[kinds[0]].unit == "kv_head" else "head"
    if KINDS[kinds[0]].unit == "vector":
        if grid.placed:
            marks = frozenset((layer, place) for layer, place, _ in top)
            return (Panel("", values[:, :, 0], grid.places, "position", marks),)
        columns = torch.stack([grid.split(flat)[kind] for kind in kinds], dim=1)
        marked = frozenset(
            (layer, kinds.index(grid.kinds[kind]))
            for kind, layer in zip(where.kind.tolist(), where.layer.tolist(), strict=True)
            if grid.kinds[kind] in kinds
        )
        return (Panel("", columns, kinds, "", marked),)
    if places <= FEW_PLACES:
        return tuple(
            Panel(
                f"at {grid.places[place]}" if grid.placed else "",
                values[:, place],
                heads,
                across,
                frozenset((layer, unit) for layer, at, unit in top if at == place),
            )
            for place in range(places)
        )
    return (
        Panel(
            f"largest over {across}s",
            _largest(values, 2),
            grid.places,
            "position",
            frozenset((layer, place) for layer, place, _ in top),
        ),
        Panel(
            "largest over positions",
            _largest(values, 1),
            heads,
            across,
            frozenset((layer, unit) for layer, _, unit in top),
        ),
    )


def _largest(values: Float[Tensor, "layer place unit"], axis: int) -> Float[Tensor, "layer column"]:
    """The signed value of largest size along an axis; NaN where there is none."""
    place = values.abs().nan_to_num(nan=-1.0).argmax(axis, keepdim=True)
    return values.gather(axis, place).squeeze(axis)
