"""What is asked for in one pair, how items of one pair share its base run, and how rows' numbers go back to items."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from patchkit.data import Pair
from patchkit.methods._pair_batch import PairBatch
from patchkit.model import PatchModel


@runtime_checkable
class ItemOfRows(Protocol):
    """Patched rows of one pair.

    Attributes:
        number: which pair this is, so that items of one pair share its base run.
        covered: the tokens of each place.
    """

    @property
    def number(self) -> int: ...
    @property
    def pair(self) -> Pair: ...
    @property
    def covered(self) -> tuple[tuple[int, ...], ...]: ...
    @property
    def rows(self) -> int: ...


@dataclass(frozen=True, eq=False)
class EdgeItem:
    """Edges to patch in one pair, each on its own and at each place: a row for every edge and place.

    Attributes:
        edges: (sender, receiver) of each.
    """

    number: int = field(compare=False)
    pair: Pair
    covered: tuple[tuple[int, ...], ...]
    edges: Int[Tensor, "n 2"]

    @property
    def rows(self) -> int:
        return len(self.edges) * len(self.covered)


@dataclass(frozen=True, eq=False)
class PathItem:
    """Senders to patch along paths in one pair, at its one place."""

    number: int = field(compare=False)
    pair: Pair
    covered: tuple[tuple[int, ...], ...]
    senders: Int[Tensor, " n"]

    @property
    def rows(self) -> int:
        return len(self.senders)


def batch_of(model: PatchModel, items: Sequence[ItemOfRows], direction: str) -> tuple[PairBatch, list[int]]:
    """The items' pairs, each once, and for each item where its pair is."""
    first: dict[int, ItemOfRows] = {}
    for item in items:
        first.setdefault(item.number, item)
    place = {number: index for index, number in enumerate(first)}
    unique = list(first.values())
    batch = PairBatch.of(model, [i.pair for i in unique], [i.covered for i in unique], direction)
    return batch, [place[item.number] for item in items]


@dataclass(frozen=True, eq=False)
class RowEffects:
    """What some rows gave.

    Attributes:
        slots: their numbers among all rows that the items ask for.
        work: token-forwards of each.
    """

    slots: Int[Tensor, " rows"]
    effects: Float[Tensor, " rows"]
    work: float


def by_item(
    items: Sequence[ItemOfRows],
    batch: PairBatch,
    pair_of: Sequence[int],
    most: int,
    found: Sequence[RowEffects],
    base: Float[Tensor, " pairs"],
    source: Float[Tensor, " pairs"],
) -> dict[str, Tensor]:
    """Effects `[items, most]`, 0 in rows that were not run and NaN beyond an item's own; metrics; work, with the base and
    the source run."""
    sizes = [item.rows for item in items]
    effects, work = torch.zeros(sum(sizes), dtype=base.dtype), torch.zeros(sum(sizes))
    for part in found:
        effects[part.slots] = part.effects
        work[part.slots] = part.work
    by_row = torch.full((len(items), most), torch.nan, dtype=base.dtype)
    paid = torch.zeros(len(items))
    of = torch.tensor(list(pair_of))
    ends = (batch.ends() / torch.bincount(of))[of]
    for place, (each, cost) in enumerate(zip(effects.split(sizes), work.split(sizes), strict=True)):
        by_row[place, : len(each)] = each
        paid[place] = cost.sum() + ends[place]
    return {"effect": by_row, "base": base[of], "source": source[of], "work": paid}
