"""Batches when memory runs out: halved, with the same numbers; one item that cannot fit is left out, and said.

Memory is faked by Programs that raise what an allocator raises, above so many tokens, as accelerate's own tests do; in
`test_real_memory.py` a process is held to a real limit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from patchkit.data import Batch
from patchkit.errors import RunError
from patchkit.model import Dims, PatchModel
from patchkit.runtime import (
    Cost,
    Execution,
    ItemsFailed,
    Journal,
    Session,
    run_program,
    use_execution,
    without_failures,
    work,
)
from patchkit.tracing import capture
from tests.comparisons import agree, pair

#: What is raised, by where it comes from.
SAID: dict[str, Callable[[], BaseException]] = {
    "cuda": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "cpu": lambda: RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
        "allocate 8589934592 bytes. Error code 12 (Cannot allocate memory)"
    ),
    "mps": lambda: RuntimeError("MPS backend out of memory (MPS allocated: 8.9 GB, max allowed: 9.1 GB)"),
    "cublas": lambda: RuntimeError(
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
    ),
    "python": MemoryError,
}


@dataclass(frozen=True)
class Hungry:
    """Logits of prompts, in a memory that holds so many padded tokens; notes the batches that it was asked for."""

    fits: int
    said: str = "cuda"
    asked: list[tuple[int, int]] = field(default_factory=list, compare=False)

    def tokens(self, item: tuple[int, ...]) -> int:
        return len(item)

    def run(self, model: PatchModel, items: Sequence[tuple[int, ...]]) -> dict[str, Tensor]:
        width = max(map(len, items))
        self.asked.append((len(items), width))
        if len(items) * width > self.fits:
            raise SAID[self.said]()
        return {"logits": capture(model, Batch.from_ids(items, pad_id=model.pad_id), []).logits}

    def cost(self, dims: Dims, items: Sequence[tuple[int, ...]]) -> Cost:
        return Cost(float(sum(map(len, items))), bytes=1000 * sum(map(len, items)))

    @property
    def failed(self) -> list[tuple[int, int]]:
        """The batches that did not fit."""
        return [batch for batch in self.asked if batch[0] * batch[1] > self.fits]


@dataclass(frozen=True)
class Counting:
    """Without a model: the length of each prompt, and sums over all of them."""

    fits: int
    asked: list[tuple[int, int]] = field(default_factory=list, compare=False)
    summed = frozenset({"total", "tokens"})

    def tokens(self, item: tuple[int, ...]) -> int:
        return len(item)

    def run(self, model: PatchModel, items: Sequence[tuple[int, ...]]) -> dict[str, Tensor]:
        width = max(map(len, items))
        self.asked.append((len(items), width))
        if len(items) * width > self.fits:
            raise SAID["cpu"]()
        lengths = torch.tensor([len(item) for item in items])
        return {
            "length": lengths,
            "total": torch.tensor([sum(map(sum, items))], dtype=torch.float32),
            "tokens": lengths.sum(),
        }

    def cost(self, dims: Dims, items: Sequence[tuple[int, ...]]) -> Cost:
        return Cost(float(sum(map(len, items))))


@pytest.fixture(autouse=True)
def released(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Collecting garbage takes long in a process of tests; here it is noted. What it does is in `test_memory.py`."""
    calls: list[int] = []
    monkeypatch.setattr(work, "release_memory", lambda: calls.append(1))
    return calls


@contextmanager
def large_batches(max_failures: int | None = None) -> Iterator[None]:
    """Batches as large as the token budget says, whatever memory is free here."""
    with use_execution(Execution(fit_memory=False, max_failures=max_failures)):
        yield


def prompts(*lengths: int) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(sum(lengths))
    return [tuple(torch.randint(3, 37, (n,), generator=generator).tolist()) for n in lengths]


@pytest.mark.parametrize("said", SAID)
def test_a_batch_that_does_not_fit_is_halved_and_the_numbers_stay(said: str, released: list[int]) -> None:
    model, twin = pair("llama-gqa")
    items = prompts(7, 2, 9, 2, 5, 1, 8, 8, 3, 9, 6, 4)
    program = Hungry(fits=20, said=said)
    with large_batches():
        found = run_program(program, model, items, max_batch_tokens=1000)["logits"]
    assert program.asked[0] == (12, 9) and len(program.failed) >= 2
    assert len(released) == len(program.failed)
    with torch.no_grad():
        alone = torch.stack([twin(input_ids=torch.tensor([item])).logits[0, -1] for item in items])
    agree(found, alone, said)


def test_later_batches_begin_with_the_size_that_was_learnt() -> None:
    model, _ = pair("gpt2")
    program = Hungry(fits=40)
    with large_batches():
        run_program(program, model, prompts(*[5] * 64), max_batch_tokens=80)
    assert program.asked == [(16, 5)] + [(8, 5)] * 8
    program = Hungry(fits=40)
    with large_batches():
        run_program(program, model, prompts(*[5] * 32, *[2] * 40), max_batch_tokens=320)
    # The longest 8 fit; then 40 of 2 tokens and 24 of 5 together do not, and neither does their first half.
    assert program.failed == [(64, 5), (32, 2)]


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=30),
    st.integers(1, 45),
    st.integers(1, 500),
)
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_everything_that_fits_is_run_once_and_the_rest_is_named(
    lengths: list[int], fits: int, budget: int
) -> None:
    """Sums too are over exactly the items that were run."""
    model, _ = pair("gpt2")
    items = [tuple(range(n)) for n in lengths]
    program = Counting(fits)
    too_long = [n for n, length in enumerate(lengths) if length > fits]
    with large_batches():
        if len(too_long) == len(items):
            with pytest.raises(RunError, match="all; the first"):
                run_program(program, model, items, max_batch_tokens=budget)
            return
        if too_long:
            with pytest.raises(ItemsFailed) as caught:
                run_program(program, model, items, max_batch_tokens=budget)
            failures = caught.value.failures
            assert [failure.item for failure in failures] == [items[n] for n in too_long]
            items = [item for item in items if len(item) <= fits]
            program = replace(program, asked=[])
        found = run_program(program, model, items, max_batch_tokens=budget)
    assert found["length"].tolist() == [len(item) for item in items]
    assert float(found["total"]) == sum(map(sum, items)) and int(found["tokens"]) == sum(map(len, items))
    ran = [rows * width for rows, width in program.asked]
    assert sum(rows for rows, width in program.asked if rows * width <= fits) == len(items)
    # Each failure halves what is asked for from then on.
    failures = [size for size in ran if size > fits]
    assert all(later <= earlier // 2 for earlier, later in zip(failures, failures[1:], strict=False))


@pytest.mark.parametrize(
    "error",
    [ValueError("shapes do not match"), RuntimeError("index 40 is out of bounds"), KeyError("out of memory")],
)
def test_another_error_is_raised_at_once(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SAID, "other", lambda: error)
    model, _ = pair("gpt2")
    program = Hungry(fits=3, said="other")
    with large_batches(), pytest.raises(type(error)) as caught:
        run_program(program, model, prompts(4, 4, 2), max_batch_tokens=100)
    assert caught.value is error and len(program.asked) == 1


def test_an_item_that_cannot_fit_is_said_with_what_would_help() -> None:
    model, _ = pair("gpt2")
    items = prompts(3, 30, 4)
    with large_batches(), pytest.raises(ItemsFailed) as caught:
        run_program(Hungry(fits=12), model, items, max_batch_tokens=1000)
    (failure,) = caught.value.failures
    assert failure.item == items[1]
    for part in ("30 tokens", "estimated at", "kB", "free", "--max-batch-tokens", "--dtype", "--device-map"):
        assert part in failure.reason, part
    assert "1 of 3 items" in str(caught.value) and failure.reason in str(caught.value)


def test_the_rest_is_in_the_journal_and_is_not_run_again(tmp_path: Path) -> None:
    model, twin = pair("gpt2")
    items = prompts(3, 30, 4, 4, 28, 2)
    with large_batches():
        for again in (False, True):
            program = Hungry(fits=12)
            with pytest.raises(ItemsFailed) as caught:
                run_program(program, model, items, max_batch_tokens=1000, journal=Journal(tmp_path))
            assert [failure.item for failure in caught.value.failures] == [items[1], items[4]]
            if again:
                assert program.asked == program.failed, "what had been finished was run again"
        program = Hungry(fits=12)
        rest, left_out = without_failures(
            lambda kept: run_program(program, model, kept, max_batch_tokens=1000, journal=Journal(tmp_path)),
            items,
        )
    assert len(left_out) == 2 and program.asked == program.failed
    with torch.no_grad():
        alone = [twin(input_ids=torch.tensor([item])).logits[0, -1] for item in items if len(item) < 12]
    agree(rest["logits"], torch.stack(alone), "those that are left")


def test_too_many_failures_end_the_run() -> None:
    model, _ = pair("gpt2")
    items = prompts(3, 30, 4, 4, 28, 2)
    with large_batches(max_failures=2), pytest.raises(ItemsFailed):
        run_program(Hungry(fits=12), model, items, max_batch_tokens=30)
    program = Hungry(fits=12)
    with (
        large_batches(max_failures=1),
        pytest.raises(RunError, match="2 of 6 .* --max-failures 1; .* 30 tokens"),
    ):
        run_program(program, model, items, max_batch_tokens=30)
    assert max(width for _, width in program.asked) == 30 and len(program.asked) == 2, "the run went on"
    with large_batches(), pytest.raises(RunError, match="3 of 3 could not be run, all"):
        run_program(Hungry(fits=1), model, prompts(2, 2, 2))


@dataclass(frozen=True)
class Inner(Hungry):
    """Runs rows of its own, of an item's length each, as many at once as it is told."""

    max_batch_tokens: int = field(default=64, compare=False)
    rows: list[int] = field(default_factory=list, compare=False)

    def run(self, model: PatchModel, items: Sequence[tuple[int, ...]]) -> dict[str, Tensor]:
        width = max(map(len, items))
        at_once = max(1, self.max_batch_tokens // width)
        self.rows.append(at_once)
        if at_once * width > self.fits:
            raise SAID[self.said]()
        return {"length": torch.tensor([len(item) for item in items])}


def test_what_a_program_runs_inside_of_an_item_is_made_smaller_too() -> None:
    """An item whose own rows did not fit at once fits with fewer; the next ones begin with so many."""
    model, _ = pair("gpt2")
    items = prompts(8, 8, 8, 4)
    program = Inner(fits=16)
    with large_batches():
        found = run_program(program, model, items, max_batch_tokens=64)
    assert found["length"].tolist() == [8, 8, 8, 4]
    assert max(program.rows[3:]) <= 2, program.rows
    with large_batches(), pytest.raises(ItemsFailed) as caught:
        run_program(Inner(fits=7), model, items, max_batch_tokens=64)
    assert [len(failure.item) for failure in caught.value.failures] == [8, 8, 8]


class Opened:
    """What a batch was opened to, which fills memory as long as it is held."""

    held: list[int] = []

    def __init__(self, items: Sequence[tuple[int, ...]]) -> None:
        self.items, self.size = list(items), sum(map(len, items))
        self.held.append(self.size)

    def __del__(self) -> None:
        self.held.remove(self.size)


@dataclass(frozen=True)
class Opener:
    """Opens prompts in a memory that holds so many tokens of opened ones; a step's own work takes `working` more."""

    fits: int
    working: int = 0
    opened: list[int] = field(default_factory=list, compare=False)

    def tokens(self, item: tuple[int, ...]) -> int:
        return len(item)

    def open(self, model: PatchModel, items: Sequence[tuple[int, ...]]) -> Opened:
        made = Opened(items)
        if sum(Opened.held) > self.fits:
            raise SAID["cuda"]()
        self.opened.append(len(items))
        return made

    def cost(self, dims: Dims, items: Sequence[tuple[int, ...]]) -> Cost:
        return Cost(float(sum(map(len, items))))


@dataclass(frozen=True)
class Step:
    """Lengths of opened prompts, times a factor."""

    factor: int
    opener: Opener = field(compare=False)

    def run(self, model: PatchModel, opened: Opened) -> dict[str, Tensor]:
        if sum(Opened.held) + self.opener.working > self.opener.fits:
            raise SAID["cuda"]()
        return {"length": self.factor * torch.tensor([len(item) for item in opened.items])}


@pytest.mark.parametrize(("fits", "working"), [(1000, 0), (30, 0), (13, 0), (40, 25), (16, 8)])
def test_a_session_lets_go_of_what_is_opened_where_memory_runs_out(fits: int, working: int) -> None:
    """Of batches that do not fit side by side, and of one that fits only alone; every step gives the same."""
    model, _ = pair("gpt2")
    items = prompts(3, 4, 2, 4, 1, 4, 4, 3)
    opener = Opener(fits, working)
    with large_batches(), Session(opener, model, items, max_batch_tokens=8) as session:
        for factor in (1, 2, 3):
            found = session.run(Step(factor, opener))["length"]
            assert found.tolist() == [factor * len(item) for item in items]
    assert Opened.held == []
    if fits == 1000:
        assert len(opener.opened) == 4, "opened more than once without need"
    if fits == 30:
        # All at once fit: 25 tokens.
        assert len(opener.opened) == 4


def test_an_item_that_cannot_be_opened_is_left_out_of_a_session() -> None:
    model, _ = pair("gpt2")
    items = prompts(3, 40, 4, 4)
    opener = Opener(fits=20)
    with large_batches(), Session(opener, model, items, max_batch_tokens=200) as session:
        with pytest.raises(ItemsFailed) as caught:
            session.run(Step(1, opener))
    assert [failure.item for failure in caught.value.failures] == [items[1]]
