"""Token budgets: halved until a batch fits what is free, learnt from what batches took, shared by processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from patchkit.model import Dims, PatchModel
from patchkit.runtime import (
    Cost,
    Execution,
    Session,
    batching,
    length_buckets,
    run_program,
    use_execution,
)
from patchkit.runtime.batching import fitting_budget, split_for
from patchkit.runtime.work import with_budget
from tests.comparisons import pair

lengths = st.lists(st.integers(min_value=1, max_value=60), min_size=1, max_size=40)
budgets = st.integers(min_value=1, max_value=200)


@dataclass(frozen=True)
class Inside:
    """A Program that runs something in batches of its own."""

    max_batch_tokens: int = field(compare=False)


@dataclass(frozen=True)
class Weighing:
    """A Program of which an item takes 1000 bytes for each of its tokens, padding included."""

    def tokens(self, item: int) -> int:
        return item

    def run(self, model: PatchModel, items: Sequence[int]) -> dict[str, Tensor]:
        return {"item": torch.tensor(items)}

    def cost(self, dims: Dims, items: Sequence[int]) -> Cost:
        return Cost(bytes=1000 * len(items) * max(items), passes=0)


def test_a_program_with_batches_of_its_own_gets_the_budget_of_now() -> None:
    assert with_budget(Inside(500), 90) == Inside(90)
    assert with_budget(Inside(500), 900) == Inside(500), "never more than was asked for"
    step = Weighing()
    assert with_budget(step, 7) is step


@pytest.mark.parametrize(
    ("free", "budget"), [(None, 400), (10**9, 400), (400_000, 200), (200_000, 100), (100_000, 50), (1, 12)]
)
def test_the_budget_is_halved_until_a_batch_fits(
    free: int | None, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """0.7 of what is free; a batch that cannot be smaller is tried as it is."""
    monkeypatch.setattr(batching, "model_free_bytes", lambda model, processes=1: free)
    model, items = pair("gpt2")[0], [12, 20, 5] * 30
    assert fitting_budget(Weighing(), model, items, 400) == budget
    assert run_program(Weighing(), model, items, max_batch_tokens=400)["item"].tolist() == items


def test_budgets_of_processes_are_of_their_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "model_free_bytes", lambda model, processes=1: 400_000 // processes)
    model = pair("gpt2")[0]
    assert [fitting_budget(Weighing(), model, [5] * 99, 400, n) for n in (1, 2, 4)] == [200, 100, 50]


def test_batches_are_as_small_as_memory_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "model_free_bytes", lambda model, processes=1: 50_000)
    model, items = pair("gpt2")[0], [7] * 20
    with Session(Weighing(), model, items, max_batch_tokens=100) as session:
        assert session.budget == 25 and {len(batch) for batch in session.batches} == {3, 2}
    with use_execution(Execution(fit_memory=False)):
        with Session(Weighing(), model, items, max_batch_tokens=100) as session:
            assert session.budget == 100 and len(session.batches) == 2


def test_what_large_batches_took_is_learnt(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pair("olmo2")[0]
    program, items = Weighing(), [100] * 1000
    monkeypatch.setattr(batching, "model_free_bytes", lambda model, processes=1: 150_000_000)
    assert fitting_budget(program, model, items, 100_000) == 100_000
    # A small one says nothing, however wrong the estimate is.
    batching.learn(program, model, items[:10], 100_000_000)
    assert fitting_budget(program, model, items, 100_000) == 100_000
    batching.learn(program, model, items, 170_000_000)
    assert fitting_budget(program, model, items, 100_000) == 50_000
    # The largest counts, since the next one must fit as well; other kinds of Program are others.
    batching.learn(program, model, items, 90_000_000)
    assert fitting_budget(program, model, items, 100_000) == 50_000
    assert fitting_budget(Heavier(), model, items, 100_000) == 100_000


@dataclass(frozen=True)
class Heavier(Weighing):
    """Another kind."""


@given(lengths, budgets, st.integers(1, 5))
def test_every_process_has_several_batches_where_there_are_items(
    items: list[int], budget: int, processes: int
) -> None:
    batches = length_buckets(items, budget)
    found = split_for(batches, processes)
    assert [i for batch in found for i in batch] == [i for batch in batches for i in batch]
    assert all(found) and len(found) >= len(batches)
    if processes == 1:
        assert found == batches
    else:
        assert len(found) >= min(len(items), 4 * processes)
