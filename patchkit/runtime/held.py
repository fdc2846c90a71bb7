"""Steps on items in a job on a model's host: the batches of a `Session`, opened once and held until the job ends.

It travels by value. Where memory runs out, batches are let go of and halved as in `BatchRunner`, without the measuring,
for which a host may lack the packages.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from patchkit.model import PatchModel
from patchkit.runtime.memory import is_out_of_memory
from patchkit.runtime.queue import Part
from patchkit.runtime.sessions import Gathered
from patchkit.runtime.work import Pieces, add_piece, halves, summed_of
from patchkit.tracing.prefixes import forget_prefixes


class TooLarge(Exception):
    """An item for which memory is too small, even alone."""

    def __init__(self, held: Held, number: int) -> None:
        Exception.__init__(self, f"item {number} does not fit into memory")
        self.held, self.number = held, number


class Held(Pieces):
    """Items of which a job holds the batches open.

    Args:
        batches: of the session that the job was sent for, so that sums are added up in its order.
    """

    def __init__(
        self, opener: Any, model: PatchModel, items: Sequence[Any], batches: Sequence[Sequence[int]]
    ) -> None:
        # Spelled out: `super()` without arguments does not travel.
        Pieces.__init__(self, opener, items)
        self.model, self.batches = model, batches
        self._opened: dict[tuple[int, ...], Any] = {}

    def run(self, step: Any) -> dict[str, Tensor]:
        """What `Session.run` gives.

        Raises:
            TooLarge: an item does not fit, even alone.
        """
        gathered = Gathered(summed_of(step))
        for number in reversed(range(len(self.batches))):
            gathered.take(self._batch(step, number))
        return gathered.result()

    def close(self) -> None:
        """Lets go of what was opened."""
        self._opened.clear()

    def _batch(self, step: Any, number: int) -> Part:
        part, summed = Part(number), summed_of(step)
        waiting = [list(self.batches[number])]
        while waiting:
            piece = waiting.pop()
            if self.is_over_limit(piece):
                waiting += halves(piece)
                continue
            found = self._try(step, piece)
            if found is not None:
                add_piece(part, piece, found, summed)
            elif len(piece) > 1:
                waiting += self.halve(piece)
            else:
                raise TooLarge(self, piece[0])
        return part

    def _try(self, step: Any, piece: list[int]) -> dict[str, Tensor] | None:
        """What a step gives on some items, or None where memory ran out."""
        key = tuple(piece)
        try:
            if key not in self._opened:
                self._opened[key] = self.opener.open(self.model, [self.items[number] for number in piece])
            found = step.run(self.model, self._opened[key])
            return {name: value.detach().cpu() for name, value in found.items()}
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        # Out of the handler: the error's traceback holds what filled the memory.
        others = bool(self._opened.keys() - {key})
        self._opened.clear()
        forget_prefixes()
        gc.collect()
        torch.cuda.empty_cache()
        # What other batches were opened to may be what fills it; they are opened again when their turn comes.
        return self._try(step, piece) if others else None
