"""Ways of running items: in which order, in how large batches, how often interrupted, in how little memory.

A result must be the same in all of them. `ways` draws one with hypothesis, `run_in_a_way` runs so, and `check_equal`
compares with what each item gave alone.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from patchkit.model import PatchModel
from patchkit.tracing.prefixes import Prefixes, use_prefixes

#: (model, items, max_batch_tokens, directory of the journal) to tensors by name: of items, or sums over them.
Call = Callable[[PatchModel, Sequence[Any], int, Path | None], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Attempt:
    """A run until it ends, or until Ctrl-C comes in the batch of this number."""

    budget: int
    stop: int | None = None


@dataclass(frozen=True)
class Way:
    """How some items of a pool are run.

    Attributes:
        order: items by number; one may come several times.
        attempts: the last one is not interrupted.
        room: padded tokens of a batch that fit into memory; None: any number.
    """

    order: tuple[int, ...]
    attempts: tuple[Attempt, ...]
    room: int | None


def ways(pool: int, most_budget: int = 400) -> st.SearchStrategy[Way]:
    """Ways of running some of a pool of items."""
    budgets = st.integers(1, most_budget)
    stopped = st.builds(Attempt, budgets, st.integers(0, 3))
    attempts = st.tuples(st.lists(stopped, max_size=2), st.builds(Attempt, budgets))
    return st.builds(
        Way,
        order=st.lists(st.integers(0, pool - 1), min_size=2, max_size=pool + 1).map(tuple),
        attempts=attempts.map(lambda made: (*made[0], made[1])),
        room=st.none() | st.integers(1, most_budget // 2),
    )


def run_in_a_way(
    call: Call, program: type, model: PatchModel, pool: Sequence[Any], way: Way, function: str = "run"
) -> Mapping[str, Tensor]:
    """Runs `call` as `way` says; `program` is the class whose batches are interrupted and do not fit, in `function`."""
    # Prefixes of its own, and cheap ones: they are shared wherever two items of a batch begin alike.
    with tempfile.TemporaryDirectory() as directory, use_prefixes(Prefixes(least=2, worth=1)):
        found: Mapping[str, Tensor] | None = None
        for number, attempt in enumerate(way.attempts):
            # What was finished is known by its content, not by its place.
            turned = number + 1 - len(way.attempts)
            order = way.order[turned:] + way.order[:turned] if turned else way.order
            with _disturbed(program, function, attempt.stop, way.room) as stopped:
                try:
                    found = call(model, [pool[n] for n in order], attempt.budget, Path(directory))
                except KeyboardInterrupt:
                    assert stopped(), "an interruption that nobody asked for"
        assert found is not None
        return found


@contextmanager
def _disturbed(
    program: Any, function: str, stop: int | None, room: int | None
) -> Iterator[Callable[[], bool]]:
    """Inside, a function of a program is interrupted at a batch, and runs out of memory where a batch is too large."""
    run, batches = getattr(program, function), 0

    def disturbed(self: Any, model: PatchModel, items: Sequence[Any]) -> Any:
        nonlocal batches
        padded = len(items) * max(self.tokens(item) for item in items)
        inside = getattr(self, "max_batch_tokens", 0)
        if room is not None and padded > room and (len(items) > 1 or inside > padded):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate nothing, for a test")
        if batches == stop:
            raise KeyboardInterrupt
        batches += 1
        return run(self, model, items)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, function, disturbed)
        yield lambda: stop is not None and batches == stop


def run_alone(call: Call, model: PatchModel, pool: Sequence[Any]) -> list[Mapping[str, Tensor]]:
    """What each item gives in a run of its own, without shared prefixes."""
    with use_prefixes(None):
        return [call(model, [item], 1 << 14, None) for item in pool]


def check_equal(
    found: Mapping[str, Tensor],
    alone: Sequence[Mapping[str, Tensor]],
    order: Sequence[int],
    tolerance: float,
    summed: frozenset[str] = frozenset(),
    scale: float = 0.0,
) -> None:
    """Every item's tensors equal those that it gave alone, and sums the sum of these.

    Args:
        tolerance: of the largest number of a tensor in the whole pool, or of `scale` where that is larger.
    """
    assert found.keys() == alone[0].keys()
    for name, value in found.items():
        parts = [each[name] for each in alone]
        expected = [parts[number] for number in order]
        together = sum(expected) if name in summed else torch.cat(expected)
        assert isinstance(together, Tensor) and value.shape == together.shape, f"{name}: shape"
        assert torch.equal(value.isnan(), together.isnan()), f"{name}: other numbers are missing"
        size = max(scale, float(torch.cat([part.flatten() for part in parts]).nan_to_num().abs().max()))
        gap = float((value.double() - together.double()).nan_to_num().abs().max())
        allowed = tolerance * size * (len(order) if name in summed else 1)
        assert gap <= allowed, f"{name}: off by {gap:.2g}, allowed {allowed:.2g}"
