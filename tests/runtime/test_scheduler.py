"""Batches under a token budget, results in the order of the items; the algebra of costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from patchkit.data import Batch
from patchkit.errors import InputError
from patchkit.model import Dims, PatchModel
from patchkit.runtime import (
    MAX_BATCH_TOKENS,
    Cost,
    Program,
    Session,
    length_buckets,
    run_program,
)
from patchkit.tracing import capture
from tests.comparisons import pair

lengths = st.lists(st.integers(min_value=1, max_value=60), max_size=40)
budgets = st.integers(min_value=1, max_value=200)


@given(lengths, budgets)
def test_every_item_is_in_one_batch_and_no_batch_is_over_budget(items: list[int], budget: int) -> None:
    batches = length_buckets(items, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(len(items)))
    for batch in batches:
        width = max(items[i] for i in batch)
        assert len(batch) == 1 or len(batch) * width <= budget


@given(lengths, budgets)
def test_batches_ascend_in_length_and_none_could_take_one_more(items: list[int], budget: int) -> None:
    batches = length_buckets(items, budget)
    flat = [i for batch in batches for i in batch]
    assert [items[i] for i in flat] == sorted(items)
    for one, other in zip(flat, flat[1:], strict=False):
        assert items[one] < items[other] or one < other, "equal lengths stay in the order given"
    for batch, following in zip(batches, batches[1:], strict=False):
        assert (len(batch) + 1) * items[following[0]] > budget


def test_batches_by_hand() -> None:
    assert length_buckets([5, 2, 9, 2, 4], 10) == [[1, 3], [4, 0], [2]]
    assert length_buckets([5, 2, 9, 2, 4], 1) == [[1], [3], [4], [0], [2]]
    assert length_buckets([5, 2, 9, 2, 4], 45) == [[1, 3, 4, 0, 2]]
    assert length_buckets([]) == []
    assert length_buckets([MAX_BATCH_TOKENS // 2] * 3) == [[0, 1], [2]]


@pytest.mark.parametrize("budget", [0, -5])
def test_a_budget_of_nothing_is_refused(budget: int) -> None:
    with pytest.raises(InputError, match=f"at least 1, found {budget}"):
        length_buckets([1], budget)


@dataclass(frozen=True)
class Tail:
    """The last token and the length of each prompt; notes the batches that it was given."""

    batches: list[list[tuple[int, ...]]] = field(default_factory=list, compare=False)

    def tokens(self, item: Sequence[int]) -> int:
        return len(item)

    def run(self, model: PatchModel, items: Sequence[tuple[int, ...]]) -> dict[str, Tensor]:
        self.batches.append(list(items))
        return {
            "tail": torch.tensor([item[-1] for item in items]),
            "wide": torch.tensor([[len(item), 0.5] for item in items]),
        }

    def cost(self, dims: Dims, items: Sequence[Sequence[int]]) -> Cost:
        return Cost(float(sum(map(len, items))))


@dataclass(frozen=True)
class Logits:
    """Last-token logits of each prompt."""

    def tokens(self, item: Sequence[int]) -> int:
        return len(item)

    def run(self, model: PatchModel, items: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        return {"logits": capture(model, Batch.from_ids(items, pad_id=model.pad_id), []).logits}

    def cost(self, dims: Dims, items: Sequence[Sequence[int]]) -> Cost:
        return Cost(float(sum(map(len, items))))


prompts = st.lists(st.lists(st.integers(3, 36), min_size=1, max_size=9).map(tuple), min_size=1, max_size=15)


@given(prompts, budgets)
@settings(deadline=None, max_examples=50)
def test_results_come_in_the_order_of_the_items(items: list[tuple[int, ...]], budget: int) -> None:
    program = Tail()
    found = run_program(program, pair("gpt2")[0], items, max_batch_tokens=budget)
    assert found["tail"].tolist() == [item[-1] for item in items]
    assert found["wide"].tolist() == [[len(item), 0.5] for item in items]
    assert sorted(item for batch in program.batches for item in batch) == sorted(items)
    widths = [max(map(len, batch)) for batch in program.batches]
    assert widths == sorted(widths, reverse=True), "what does not fit shows in the first batch"


@pytest.mark.parametrize("budget", [1, 17, 8192])
def test_a_result_does_not_depend_on_the_budget(budget: int) -> None:
    model, twin = pair("llama-gqa")
    generator = torch.Generator().manual_seed(0)
    items = [tuple(torch.randint(3, 37, (n,), generator=generator).tolist()) for n in (7, 2, 9, 2, 5, 1)]
    found = run_program(Logits(), model, items, max_batch_tokens=budget)["logits"]
    with torch.no_grad():
        alone = torch.stack([twin(input_ids=torch.tensor([item])).logits[0, -1] for item in items])
    torch.testing.assert_close(found, alone, atol=1e-4, rtol=1e-5)


def test_progress_counts_items_up_to_all_of_them() -> None:
    seen: list[tuple[str, int, int]] = []
    items = [(5,) * n for n in (3, 1, 2, 3)]
    run_program(
        Tail(),
        pair("gpt2")[0],
        items,
        max_batch_tokens=3,
        progress=lambda label, done, total: seen.append((label, done, total)),
        label="tails",
    )
    assert seen == [("tails", n, 4) for n in (1, 2, 3, 4)]


def test_nothing_to_run_is_an_error_that_names_the_program() -> None:
    with pytest.raises(InputError, match="Tail: nothing to run"):
        run_program(Tail(), pair("gpt2")[0], [])
    with pytest.raises(InputError, match="own answers: nothing to run"):
        run_program(Tail(), pair("gpt2")[0], [], label="own answers")
    with pytest.raises(InputError, match="steps: nothing to run"):
        Session(Tail(), pair("gpt2")[0], [], label="steps")
    with pytest.raises(InputError, match="at least 1, found 0"):
        run_program(Tail(), pair("gpt2")[0], [(1,)], max_batch_tokens=0)


def test_a_program_is_what_has_its_three_functions() -> None:
    assert isinstance(Tail(), Program) and isinstance(Logits(), Program)
    assert not isinstance(Cost(), Program)


costs = st.builds(Cost, st.floats(0, 1e6), st.integers(0, 10**12))


@given(costs, costs, costs)
def test_costs_add_up_one_after_the_other(a: Cost, b: Cost, c: Cost) -> None:
    """Work adds, memory is the most of any part; a cost of nothing changes nothing."""
    assert a + b == b + a and a + Cost() == a
    assert ((a + b) + c).forwards == pytest.approx((a + (b + c)).forwards)
    assert ((a + b) + c).bytes == max(a.bytes, b.bytes, c.bytes)
    assert (a + b).forwards == a.forwards + b.forwards
