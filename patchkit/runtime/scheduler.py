"""Batches of similar length under a token budget, and the loop that runs a Program over them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from patchkit.errors import InputError
from patchkit.model import PatchModel
from patchkit.runtime.journal import Journal
from patchkit.runtime.program import Program, Summing

Item = TypeVar("Item")
#: Called with (what is being done, done, total).
Progress = Callable[[str, int, int], None]

#: Padded tokens in one batch unless the caller says otherwise.
MAX_BATCH_TOKENS = 16384


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


def run_program(
    program: Program[Item],
    model: PatchModel,
    items: Sequence[Item],
    *,
    max_batch_tokens: int = MAX_BATCH_TOKENS,
    progress: Progress | None = None,
    label: str = "",
    journal: Journal | None = None,
) -> dict[str, Tensor]:
    """Runs a Program over items of any lengths and returns its tensors in the order of the items; sums are added up.

    Args:
        journal: where finished batches are noted, and taken from when the run was interrupted before.

    Raises:
        InputError: there is nothing to run.
    """
    if not items:
        raise InputError(f"{label or type(program).__name__}: nothing to run, the list of items is empty")
    order: list[int] = []
    parts: list[dict[str, Tensor]] = []
    summed = program.summed if isinstance(program, Summing) else frozenset()
    sums: dict[str, Tensor] = {}
    for batch in length_buckets([program.tokens(item) for item in items], max_batch_tokens):
        part = None if journal is None else journal.read(batch)
        if part is None:
            part = {
                name: value.cpu() for name, value in program.run(model, [items[i] for i in batch]).items()
            }
            if journal is not None:
                journal.write(batch, part)
        for name in summed & part.keys():
            added = part[name].double()
            sums[name] = sums[name] + added if name in sums else added
        parts.append({name: value for name, value in part.items() if name not in summed})
        order.extend(batch)
        if progress is not None:
            progress(label, len(order), len(items))
    back = torch.argsort(torch.tensor(order))
    return sums | {name: torch.cat([part[name] for part in parts])[back] for name in parts[0]}
