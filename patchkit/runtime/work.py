"""Running batches in one process: items opened once, steps run on them, and batches halved when memory runs out."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from patchkit.errors import InputError, RunError
from patchkit.model import PatchModel
from patchkit.runtime.batching import estimated_bytes, learn
from patchkit.runtime.execution import current_execution
from patchkit.runtime.memory import (
    bytes_text,
    is_out_of_memory,
    model_devices,
    model_free_bytes,
    peak_measure,
    release_memory,
)
from patchkit.runtime.queue import Part
from patchkit.tracing.prefixes import forget_prefixes


class Pieces:
    """Items whose batches are run in pieces, and how large a piece may be where that is.

    Attributes:
        limit: padded tokens of a piece, from the last time that one was too large.
    """

    def __init__(self, opener: Any, items: Sequence[Any]) -> None:
        self.opener, self.items = opener, items
        self.limit: int | None = None

    def padded(self, piece: Sequence[int]) -> int:
        return len(piece) * max(self.opener.tokens(self.items[number]) for number in piece)

    def is_over_limit(self, piece: Sequence[int]) -> bool:
        """Whether a piece is known to be too large, and can be halved."""
        return self.limit is not None and len(piece) > 1 and self.padded(piece) > self.limit

    def halve(self, piece: list[int]) -> list[list[int]]:
        """Both halves of a piece that was too large: none of its size will be tried again."""
        self.limit = max(1, self.padded(piece) // 2)
        return halves(piece)


class BatchRunner(Pieces):
    """Runs steps on batches of some items, and remembers how large a batch may be here.

    Attributes:
        inner_limit: of what a step runs inside of a batch, from the last time an item did not fit alone with more.
    """

    def __init__(self, model: PatchModel, opener: Any, items: Sequence[Any]) -> None:
        Pieces.__init__(self, opener, items)
        self.model = model
        self.inner_limit: int | None = None
        self._opened: dict[tuple[int, ...], Any] = {}
        # On a CPU measuring costs more than a small batch.
        self._measured = [device for device in model_devices(model) if device.type == "cuda"]

    def run(self, step: Any, batch: int, numbers: Sequence[int], budget: int) -> Part:
        """Runs a batch, in as many pieces as memory asks for. An exception other than out-of-memory is in the part."""
        part = Part(batch)
        summed = summed_of(step)
        waiting = [list(numbers)]
        while waiting:
            piece = waiting.pop()
            if self.is_over_limit(piece):
                waiting += halves(piece)
                continue
            found = self._try(step, piece, self._inner(budget))
            if found is not None:
                add_piece(part, piece, found, summed)
                continue
            if len(piece) > 1:
                waiting += self.halve(piece)
            else:
                self._run_alone(step, part, piece, budget, summed)
        return part

    def _run_alone(
        self, step: Any, part: Part, piece: list[int], budget: int, summed: frozenset[str]
    ) -> None:
        """One item that does not fit as it is: with ever smaller pieces inside of it, where the step has any."""
        inner = self._inner(budget)
        while _has_budget(step) and inner > 1:
            inner = max(1, min(inner, step.max_batch_tokens) // 8)
            found = self._try(step, piece, inner)
            if found is not None:
                self.inner_limit = inner
                add_piece(part, piece, found, summed)
                return
        part.failures.append((piece[0], self._too_large(piece[0])))

    def _inner(self, budget: int) -> int:
        """The budget of what a step runs inside of a batch, as far as memory is known to allow it."""
        return budget if self.inner_limit is None else min(budget, self.inner_limit)

    def _try(self, step: Any, piece: list[int], budget: int) -> dict[str, Tensor] | None:
        """What a step gives on some items, or None where memory ran out."""
        try:
            return self._run(step, piece, budget)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        # Out of the handler: the error's traceback holds what filled the memory.
        others = bool(self._opened.keys() - {tuple(piece)})
        self._opened.clear()
        forget_prefixes()
        release_memory()
        # What other batches were opened to may be what fills it; they are opened again when their turn comes.
        return self._try(step, piece, budget) if others else None

    def _run(self, step: Any, piece: list[int], budget: int) -> dict[str, Tensor]:
        if (watcher := current_execution().watcher) is not None:
            watcher.batch(len(piece), self.padded(piece) // len(piece))
        with peak_measure(self._measured) as peak:
            opened = self._items(piece) if self.opener is step else self._open(piece)
            found = with_budget(step, budget).run(self.model, opened)
            found = {name: value.detach().cpu() for name, value in found.items()}
        if peak.rise is not None and self.opener is step:
            learn(step, self.model, self._items(piece), peak.rise)
        return found

    def _items(self, piece: Sequence[int]) -> list[Any]:
        return [self.items[number] for number in piece]

    def _open(self, piece: Sequence[int]) -> Any:
        key = tuple(piece)
        if key not in self._opened:
            self._opened[key] = self.opener.open(self.model, self._items(piece))
        return self._opened[key]

    def _too_large(self, number: int) -> str:
        item = self.items[number]
        free = model_free_bytes(self.model)
        estimate = estimated_bytes(self.opener, self.model, [item])
        there = "" if free is None else f", and {bytes_text(free)} are free"
        return (
            f"out of memory with this item alone: {self.opener.tokens(item):,} tokens, estimated at "
            f"{bytes_text(estimate)} beside the weights{there}. A shorter prompt, a smaller --max-batch-tokens, --dtype "
            "bfloat16, or --device-map / --gpus-per-replica over more GPUs takes less"
        )


def summed_of(step: Any) -> frozenset[str]:
    """Names of a step's tensors that are sums over the items."""
    # `isinstance(step, Summing)` is slow where a step takes little itself.
    return getattr(step, "summed", frozenset())


def with_budget(step: Any, budget: int) -> Any:
    """The step with this budget for what it runs inside of a batch, if it has one."""
    return replace(step, max_batch_tokens=min(budget, step.max_batch_tokens)) if _has_budget(step) else step


def failed_part(batch: int, error: Exception) -> Part:
    """A part that says what went wrong, for the main process to raise."""
    said = "".join(traceback.format_exception(error))
    return Part(batch, error=(type(error).__name__, str(error), said))


def raise_error(part: Part, rank: int | None) -> None:
    """Raises what another process met."""
    if part.error is None:
        return
    kind, message, said = part.error
    if kind == InputError.__name__:
        raise InputError(message)
    if kind == RunError.__name__:
        raise RunError(message)
    raise RunError(f"process {rank} failed: {kind}: {message}\n{said}")


def _has_budget(step: Any) -> bool:
    return is_dataclass(step) and any(field.name == "max_batch_tokens" for field in fields(step))


def halves(piece: list[int]) -> list[list[int]]:
    """Both halves, the first one last: it is taken next."""
    middle = len(piece) // 2
    return [piece[middle:], piece[:middle]]


def add_piece(part: Part, piece: list[int], found: dict[str, Tensor], summed: frozenset[str]) -> None:
    """Adds what some items gave to their batch's part."""
    if not part.numbers:
        part.numbers, part.tensors = list(piece), dict(found)
        for name in summed & found.keys():
            part.tensors[name] = found[name].double()
        return
    for name, value in found.items():
        before = part.tensors[name]
        part.tensors[name] = before + value.double() if name in summed else torch.cat([before, value])
    part.numbers += piece
