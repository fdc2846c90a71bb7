"""Which nodes of which rows are replaced in a training step, drawn at random."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from siit_interchange import NodeHooks, Swap

from patchkit.zoo.siit import SiitCase

T = TypeVar("T")


@dataclass(frozen=True)
class Shares:
    """Of the rows of a batch, how many get what.

    Attributes:
        variables: `none` is set, `one`, or `some` (each with even odds).
        outside: of the nodes outside the circuit `none` is replaced, `one`, `some`, or `all`.
        put_in: what is put in at those: another row's activation (`donor`), the `mean` over rows, or `zero`.
    """

    variables: Mapping[str, float]
    outside: Mapping[str, float]
    put_in: Mapping[str, float]


PUT_IN = {"donor": 0.7, "mean": 0.15, "zero": 0.15}
#: Nothing interchanged, and the circuit alone in a part of the rows: a lookup is learned sooner where there are many
#: heads for it, and then it is to be found in those that are always there.
LESSON = Shares({"none": 1.0}, {"none": 0.4, "some": 0.3, "all": 0.3}, PUT_IN)
#: Interchanges of variables, with the nodes outside the circuit replaced in most rows.
STRICT = Shares(
    {"none": 0.2, "one": 0.4, "some": 0.4}, {"none": 0.15, "one": 0.15, "some": 0.2, "all": 0.5}, PUT_IN
)


def drawn_swap(
    rng: random.Random, case: SiitCase, hooks: NodeHooks, rows: int, shares: Shares
) -> tuple[Swap, list[dict[str, int]]]:
    """A swap, and for each row the row that each of its variables is taken from."""
    aligned = hooks.numbers(case.nodes)
    outside = [number for number in range(len(hooks.names)) if number not in aligned]
    changed = torch.zeros(rows, len(hooks.names), dtype=torch.bool)
    donor = torch.zeros(rows, len(hooks.names), dtype=torch.long)
    blank, scale = changed.clone(), torch.zeros(rows, 1)
    taken: list[dict[str, int]] = []
    for row in range(rows):
        mine = {name: rng.randrange(rows) for name in _some(rng, shares.variables, list(case.variables))}
        taken.append(mine)
        for number, name in zip(aligned, case.variables, strict=True):
            if name in mine:
                changed[row, number], donor[row, number] = True, mine[name]
        kind = _one(rng, shares.put_in)
        # One other prompt for all of them, or one for each.
        together = rng.randrange(rows) if rng.random() < 0.5 else None
        for number in _some(rng, shares.outside, outside):
            changed[row, number] = True
            donor[row, number] = rng.randrange(rows) if together is None else together
            blank[row, number] = kind != "donor"
        scale[row] = float(kind == "mean")
    return Swap(changed, donor, blank, scale), taken


def _one(rng: random.Random, shares: Mapping[str, float]) -> str:
    return rng.choices(list(shares), list(shares.values()))[0]


def _some(rng: random.Random, shares: Mapping[str, float], of: Sequence[T]) -> list[T]:
    how = _one(rng, shares)
    if how == "none":
        return []
    if how == "one":
        return [rng.choice(of)]
    return [each for each in of if how == "all" or rng.random() < 0.5]
