"""Reusing what a patch cannot change: nothing before the first patched position depends on it.

The tokens before that position are run once and their keys and values kept; every later trace runs the rest only. For
masks at the last token that is one token a prompt. Exact: the same arithmetic on the same cached numbers.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache

from patchkit.data.batch import Batch
from patchkit.errors import InputError
from patchkit.model import PatchModel
from patchkit.tracing._inputs import forward_inputs
from patchkit.tracing.suffix import kept_cache, whole_mask


@dataclass(frozen=True)
class Prefix:
    """A batch split at column `start`: the keys and values before it, and the tokens from it on.

    Attributes:
        start: the first column that is run again; a column c of the batch is column c - start of a run.
        batch: the whole batch.
        cache: keys and values of the columns before `start`.
    """

    start: int
    batch: Batch
    cache: Cache

    def inputs(self) -> dict[str, Any]:
        """Keyword arguments of a forward over the rest; each call brings its own view of the cache."""
        return {
            "input_ids": self.batch.input_ids[:, self.start :],
            "attention_mask": whole_mask(self.batch),
            "position_ids": self.batch.position_ids[:, self.start :],
            "past_key_values": _fork(self.cache),
            "use_cache": True,
            "logits_to_keep": 1,
        }


def compute_prefix(model: PatchModel, batch: Batch, start: int | None = None) -> Prefix:
    """Runs the columns before `start` (default: all but the last) once and keeps their keys and values.

    Raises:
        InputError: `start` is not a column of the batch.
    """
    start = batch.width - 1 if start is None else start
    if not 0 <= start < batch.width:
        raise InputError(
            f"prefix of {start} columns: expected 0 to {batch.width - 1}, the batch is {batch.width} wide"
        )
    batch = batch.to(model.embed_device)
    cache = kept_cache(batch)
    if start:
        head = batch.until(start)
        inputs = forward_inputs(model, head, use_cache=True)
        inputs["past_key_values"] = kept_cache(head)
        with torch.no_grad():
            with model.lm.trace(**inputs):
                cache = model.lm.output.past_key_values.save()
    return Prefix(start, batch, cache)


def _fork(cache: Cache) -> Cache:
    """A cache that a run may extend, sharing this one's tensors: extending concatenates, it never writes in place."""
    fork = copy.copy(cache)
    fork.layers = [copy.copy(layer) for layer in cache.layers]
    return fork
