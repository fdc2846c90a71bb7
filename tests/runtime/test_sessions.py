"""Steps of a session: batches opened once, sums over all items, and what a journal holds of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

from patchkit.model import Dims, PatchModel
from patchkit.runtime import (
    Cost,
    Journal,
    Session,
)
from patchkit.runtime.queue import Part
from patchkit.runtime.sessions import Gathered
from tests.comparisons import pair


@dataclass(frozen=True)
class Opened:
    """Numbers, opened to themselves; notes what was opened."""

    seen: list[list[int]] = field(default_factory=list, compare=False)

    def tokens(self, item: int) -> int:
        return item

    def open(self, model: PatchModel, items: Sequence[int]) -> list[int]:
        self.seen.append(list(items))
        return list(items)

    def cost(self, dims: Dims, items: Sequence[int]) -> Cost:
        return Cost(passes=0)


@dataclass(frozen=True)
class Times:
    """Opened numbers times a factor; notes its batches, and may be interrupted in one."""

    factor: int
    batches: list[list[int]] = field(default_factory=list, compare=False)
    stop: int | None = field(default=None, compare=False)

    def run(self, model: PatchModel, opened: list[int]) -> dict[str, Tensor]:
        if len(self.batches) == self.stop:
            raise KeyboardInterrupt
        self.batches.append(opened)
        return {"times": torch.tensor(opened) * self.factor}


@dataclass(frozen=True)
class Total(Times):
    """The sum besides, and that in float32."""

    summed = frozenset({"total"})

    def run(self, model: PatchModel, opened: list[int]) -> dict[str, Tensor]:
        return super().run(model, opened) | {"total": torch.tensor(opened).float().sum() * self.factor}


NUMBERS = [5, 3, 9, 3, 4, 8, 3]
#: With a budget of 10.
BATCHES = [[3, 3, 3], [4, 5], [8], [9]]


def test_batches_are_opened_once_and_every_step_finds_them() -> None:
    opener, model = Opened(), pair("gpt2")[0]
    with Session(opener, model, NUMBERS, max_batch_tokens=10) as session:
        for factor in range(1, 4):
            step = Times(factor)
            assert session.run(step)["times"].tolist() == [number * factor for number in NUMBERS]
            assert step.batches == BATCHES[::-1]
    assert opener.seen == BATCHES[::-1]


def test_sums_are_over_all_items_equal_ones_included(tmp_path: Path) -> None:
    """Whole and interrupted: what the journal holds of equal items is counted as often as they are there."""
    model, journal = pair("gpt2")[0], Journal(tmp_path)
    for stop in (0, 1, 2, None):
        step = Total(2, stop=stop)
        with Session(Opened(), model, NUMBERS, max_batch_tokens=10) as session:
            if stop is not None:
                with pytest.raises(KeyboardInterrupt):
                    session.run(step, journal=journal)
                continue
            found = session.run(step, journal=journal)
    assert found["times"].tolist() == [number * 2 for number in NUMBERS]
    assert found["total"].dtype == torch.float64 and found["total"].item() == 2 * sum(NUMBERS)
    assert step.batches == [[3, 3, 3]], "the others had been finished"
    # One equal item fewer is another sum, of which some is there: the batch of the equal ones is run again.
    with Session(Opened(), model, NUMBERS[:-1], max_batch_tokens=10) as session:
        found = session.run(fewer := Total(2), journal=journal)
    assert found["total"].item() == 2 * sum(NUMBERS[:-1]) and fewer.batches == [[3, 3]]


def test_another_step_is_not_taken_for_one_in_the_journal(tmp_path: Path) -> None:
    with Session(Opened(), pair("gpt2")[0], NUMBERS) as session:
        first = session.run(Times(2), journal=Journal(tmp_path))
        second = session.run(Times(3), journal=Journal(tmp_path))
    assert (second["times"] * 2).tolist() == (first["times"] * 3).tolist()


def test_an_opened_batch_that_is_half_done_stays_whole(tmp_path: Path) -> None:
    """So that what was opened is used again; the numbers are taken once."""
    model, journal = pair("gpt2")[0], Journal(tmp_path)
    with Session(Opened(), model, [4, 9], max_batch_tokens=10) as session:
        session.run(Times(2), journal=journal)
    with Session(opener := Opened(), model, NUMBERS, max_batch_tokens=10) as session:
        step = Times(2)
        assert session.run(step, journal=journal)["times"].tolist() == [2 * n for n in NUMBERS]
    assert step.batches == opener.seen == [[8], [4, 5], [3, 3, 3]]


def test_a_part_that_comes_twice_counts_once() -> None:
    gathered = Gathered(frozenset({"total"}))

    def part(*numbers: int) -> Part:
        values = torch.tensor(numbers)
        return Part(0, list(numbers), {"value": values * 10, "total": values.sum()})

    assert gathered.take(part(3, 1)) == [3, 1]
    assert gathered.take(part(3, 1)) == []
    assert gathered.take(part(0, 2)) == [0, 2]
    assert gathered.take(Part(1, [], {}, [(4, "too large")])) == []
    found = gathered.result()
    assert found["value"].tolist() == [0, 10, 20, 30] and found["total"].item() == 6
    assert gathered.failures == {4: "too large"}


def test_of_a_part_of_which_some_was_there_the_rest_is_taken() -> None:
    gathered = Gathered(frozenset())
    gathered.take_found({1: {"value": torch.tensor(10)}}, [])
    assert gathered.take(Part(0, [0, 1, 2], {"value": torch.tensor([0, 99, 20])})) == [0, 2]
    assert gathered.result()["value"].tolist() == [0, 10, 20]
