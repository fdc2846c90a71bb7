"""The Program protocol: the one currency between methods and the places where they run.

A Program is a small frozen, picklable object. A method builds one, the scheduler batches its items and hands them to
`run`, whose body calls `patchkit.tracing` functions and reduces to numbers per item; the merged result goes back to the
method. A Program knows nothing of batching or machines; the scheduler knows nothing of methods.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar, runtime_checkable

from torch import Tensor

from patchkit.model import Dims, PatchModel

#: Called with (what is being done, done, total).
Progress = Callable[[str, int, int], None]
Item_contra = TypeVar("Item_contra", contravariant=True)


@dataclass(frozen=True)
class Cost:
    """What running something takes.

    Attributes:
        forwards: token-forwards: one token through the whole model once is 1, a backward of activations counts 1 more.
        bytes: what is kept beyond the weights and the largest pass, at the most.
        passes: bytes of that pass, where it is not simply one over the whole batch; see `batch_memory.py`.
    """

    forwards: float = 0.0
    bytes: int = 0
    passes: int | None = None

    def __add__(self, other: Cost) -> Cost:
        """One after the other: work adds up, memory is the larger of the two."""
        given = [each.passes for each in (self, other) if each.passes is not None]
        return Cost(
            self.forwards + other.forwards, max(self.bytes, other.bytes), max(given) if given else None
        )


@runtime_checkable
class Batched(Protocol[Item_contra]):
    """What batches are made by: of a Program, or of what a `Session` opens."""

    def tokens(self, item: Item_contra) -> int:
        """Tokens of an item: what batches are bucketed and budgeted by."""
        ...

    def cost(self, dims: Dims, items: Sequence[Item_contra]) -> Cost:
        """What a batch of these items takes, without running it."""
        ...


@runtime_checkable
class Program(Batched[Item_contra], Protocol[Item_contra]):
    """What the scheduler runs; see the module's docstring."""

    def run(self, model: PatchModel, items: Sequence[Item_contra]) -> dict[str, Tensor]:
        """Tensors whose first axis is the items, in their order. An item's values do not depend on its neighbours.

        A program that is `Summing` gives sums over the items besides.
        """
        ...


@runtime_checkable
class Differentiating(Protocol):
    """A Program that says whether it takes gradients, so that a forward's activations are kept; others take none."""

    @property
    def backward(self) -> bool: ...


@runtime_checkable
class Summing(Protocol):
    """A Program some of whose tensors are sums over the items of a batch, without an axis of items: they are added up,
    in float64, so that a result of many numbers an item need not be kept for every item."""

    @property
    def summed(self) -> frozenset[str]:
        """Names of those tensors."""
        ...
