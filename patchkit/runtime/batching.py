"""Batches of similar length under a token budget, and the budget that memory allows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

from patchkit.errors import InputError
from patchkit.model import PatchModel
from patchkit.runtime.batch_memory import batch_bytes
from patchkit.runtime.memory import model_free_bytes

#: Padded tokens in one batch unless the caller says otherwise; on no device do larger ones gain anything.
MAX_BATCH_TOKENS = 16384
#: Of the free memory, what batches are sized for: estimates are within a quarter of the truth, and fragments are lost.
SHARE_OF_FREE = 0.7
#: Batches of fewer bytes are not learnt from: what they take is mostly overhead, and says nothing of large ones.
LEARN_FROM = 1 << 26
#: For each model, by kind of Program: measured bytes of a batch over estimated ones.
_LEARNT: WeakKeyDictionary[PatchModel, dict[str, float]] = WeakKeyDictionary()


def length_buckets(lengths: Sequence[int], max_batch_tokens: int = MAX_BATCH_TOKENS) -> list[list[int]]:
    """Indices of items grouped so that no batch, padded to its longest item, exceeds the budget.

    Items of similar length stand together, so that little is spent on padding. A single item longer than the budget
    is a batch of its own.

    Raises:
        InputError: the budget is not positive.
    """
    if max_batch_tokens < 1:
        raise InputError(f"max_batch_tokens must be at least 1, found {max_batch_tokens}")
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        # Lengths ascend, so this item is the batch's width.
        if batches and (len(batches[-1]) + 1) * lengths[index] <= max_batch_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def split_for(batches: Sequence[Sequence[int]], processes: int) -> list[list[int]]:
    """Batches, the largest halved until every process has several: the last ones to end then wait for little."""
    wanted = 1 if processes == 1 else 4 * processes
    found = [list(batch) for batch in batches]
    while len(found) < wanted:
        largest = max(range(len(found)), key=lambda place: len(found[place]))
        batch = found[largest]
        if len(batch) < 2:
            break
        found[largest : largest + 1] = [batch[: len(batch) // 2], batch[len(batch) // 2 :]]
    return found


def fitting_budget(
    program: Any, model: PatchModel, items: Sequence[Any], ceiling: int, processes: int = 1
) -> int:
    """The largest budget of which a batch fits into what memory is free, by the Program's own estimate: the ceiling,
    half of it, a quarter of it, ...

    The estimate is of the fullest batch and that of the longest items, and is corrected by what was measured of batches
    before.

    Args:
        processes: how many share the machine's memory.
    """
    free = model_free_bytes(model, processes=processes)
    if free is None:
        return ceiling
    allowed = SHARE_OF_FREE * free / _LEARNT.get(model, {}).get(_kind(program), 1.0)
    lengths = [program.tokens(item) for item in items]
    budget = ceiling
    while budget > max(lengths):
        batches = length_buckets(lengths, budget)
        fullest = max(reversed(batches), key=lambda batch: len(batch) * lengths[batch[-1]])
        if all(
            estimated_bytes(program, model, [items[i] for i in batch]) <= allowed
            for batch in (batches[-1], fullest)
        ):
            break
        budget //= 2
    return max(1, budget)


def estimated_bytes(program: Any, model: PatchModel, items: Sequence[Any]) -> int:
    """What a batch takes beside the weights."""
    return batch_bytes(program, model.dims, model.dtype.itemsize, items)


def learn(program: Any, model: PatchModel, items: Sequence[Any], measured: int) -> None:
    """Notes what a batch really took; the largest ratio to the estimate counts from then on."""
    estimate = estimated_bytes(program, model, items)
    if estimate >= LEARN_FROM and measured > 0:
        learnt = _LEARNT.setdefault(model, {})
        kind = _kind(program)
        learnt[kind] = max(measured / estimate, learnt.get(kind, 0.0))


def _kind(program: Any) -> str:
    return type(program).__qualname__
