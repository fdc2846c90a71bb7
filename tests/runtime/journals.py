"""Programs whose numbers are known without running them, and processes that die while they run."""

from __future__ import annotations

import os
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from patchkit.model import Dims, PatchModel
from patchkit.runtime import Cost, Journal, run_program
from tests.comparisons import pair

ITEMS = [5, 3, 9, 4, 8]
#: At 9 tokens a batch; the longest is run first.
BATCHES = [[9], [8], [5], [3, 4]]


@dataclass(frozen=True)
class Squares:
    """Squares of numbers, one tensor of each dtype.

    `runs` notes the batches, and one too many is an interruption; each is told to the pipe `tell` as it begins.
    """

    power: int = 2
    last_run: int = field(default=99, compare=False)
    tell: int | None = field(default=None, compare=False)
    runs: list[list[int]] = field(default_factory=list, compare=False)

    def tokens(self, item: int) -> int:
        return item

    def run(self, model: PatchModel, items: Sequence[int]) -> dict[str, Tensor]:
        if len(self.runs) == self.last_run:
            raise KeyboardInterrupt
        self.runs.append(list(items))
        if self.tell is not None:
            os.write(self.tell, b".")
        square = torch.tensor(items, dtype=torch.float64) ** self.power / 3
        return {
            "square": square,
            "item": torch.tensor(items),
            "half": square.bfloat16()[:, None].expand(-1, 2),
        }

    def cost(self, dims: Dims, items: Sequence[int]) -> Cost:
        return Cost()


@dataclass(frozen=True)
class Totals(Squares):
    """Besides, the sum of the items, of their halves, and how many they are: exact, whatever the batches."""

    @property
    def summed(self) -> frozenset[str]:
        return frozenset({"total", "halves"})

    def run(self, model: PatchModel, items: Sequence[int]) -> dict[str, Tensor]:
        found = super().run(model, items)
        numbers = torch.tensor(items)
        return found | {
            "total": torch.stack([numbers.sum(), torch.tensor(len(items))]),
            "halves": (numbers.float() / 2).sum(),
        }


def run(
    program: Squares, directory: Path | None, items: Sequence[int] = ITEMS, tokens: int = 9
) -> dict[str, Tensor]:
    journal = None if directory is None else Journal(directory)
    return run_program(program, pair("gpt2")[0], list(items), max_batch_tokens=tokens, journal=journal)


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Bit for bit."""
    return one.keys() == other.keys() and all(
        torch.equal(one[name], other[name]) and one[name].dtype == other[name].dtype for name in one
    )


def shards(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.parquet"))


def fork(work: Callable[[], object]) -> int:
    """A copy of this process that does some work and ends, 0 or 1; its number."""
    with warnings.catch_warnings():
        # Python warns of other threads, which the copy does not have; none of them is waited for.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child:
        return child
    status = 1
    try:
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def ended(child: int) -> int:
    """Waits for a copy: its exit status, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
