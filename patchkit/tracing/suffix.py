"""Prompts whose first tokens were run before: the columns that are left to run, and keys and values of those before.

A left-padded batch is cut at one column, the same in every row. Before the cut a row has its padding and then the first
tokens of its prompt, whose keys and values are known; behind it is the rest. So every row stays in one piece: positions,
masks and sliding windows count as they do in the whole batch. Where a shorter row would have padding to run, it runs the
last tokens of the prefix again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from patchkit.data.batch import Batch


@dataclass(frozen=True, eq=False)
class KnownTokens:
    """The first tokens of prompts, and each layer's keys and values of them as attention uses them.

    Attributes:
        keys, values: of each layer, `[kv_head, token, d_head]`, on the layer's device.
    """

    tokens: tuple[int, ...]
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    @property
    def bytes(self) -> int:
        return sum(each.numel() * each.element_size() for each in (*self.keys, *self.values))


@dataclass(frozen=True, eq=False)
class SuffixBatch(Batch):
    """The last columns of a left-padded batch: `input_ids` and `attention_mask` are of these, and so are activations.

    Attributes:
        start: the columns before them.
        known: prefixes.
        which: the prefix that each row begins with.
        before: how many tokens of it stand before these columns; the rest of `start` is padding.
    """

    start: int
    known: tuple[KnownTokens, ...]
    which: Int[Tensor, " rows"]
    before: Int[Tensor, " rows"]

    @classmethod
    def of(
        cls,
        batch: Batch,
        start: int,
        known: Sequence[KnownTokens],
        which: Int[Tensor, " rows"],
    ) -> SuffixBatch:
        """A whole batch cut before column `start`; every row's prefix reaches there."""
        return cls(
            batch.input_ids[:, start:],
            batch.attention_mask[:, start:],
            start,
            tuple(known),
            which.cpu(),
            (start - batch.offset.cpu()).clamp(min=0),
        )

    @property
    def position_ids(self) -> Int[Tensor, "rows width"]:
        before = self.before.to(self.attention_mask.device)
        return (before[:, None] + self.attention_mask.cumsum(dim=1) - 1).clamp(min=0)

    @property
    def whole_mask(self) -> Int[Tensor, "rows all"]:
        """The attention mask of all columns, those before these too."""
        mask = self.attention_mask
        missing = (self.start - self.before).to(mask.device)
        behind = torch.arange(self.start, device=mask.device) >= missing[:, None]
        return torch.cat([behind.to(mask.dtype), mask], dim=1)

    def past(self, *, keep: bool = False) -> Cache:
        """A cache for one forward over these columns.

        Args:
            keep: whether it holds keys and values of all columns afterwards.
        """
        places = _Places(self)
        return Cache(layers=[_KnownLayer(places, layer, keep) for layer in range(len(self.known[0].keys))])

    def to(self, device: torch.device | str) -> SuffixBatch:
        """The same batch on another device; keys and values stay with their layers."""
        return replace(
            self, input_ids=self.input_ids.to(device), attention_mask=self.attention_mask.to(device)
        )

    def take(self, rows: Int[Tensor, " chosen"]) -> SuffixBatch:
        here, held = rows.to(self.input_ids.device), rows.cpu()
        return replace(
            self,
            input_ids=self.input_ids[here],
            attention_mask=self.attention_mask[here],
            which=self.which[held],
            before=self.before[held],
        )

    def until(self, column: int) -> SuffixBatch:
        return replace(
            self, input_ids=self.input_ids[:, :column], attention_mask=self.attention_mask[:, :column]
        )

    def followed_by(self, other: Batch) -> SuffixBatch:
        """The rows of both, which have one cut and the same prefixes."""
        assert isinstance(other, SuffixBatch) and (self.start, self.known) == (other.start, other.known)
        device = self.input_ids.device
        return replace(
            self,
            input_ids=torch.cat([self.input_ids, other.input_ids.to(device)]),
            attention_mask=torch.cat([self.attention_mask, other.attention_mask.to(device)]),
            which=torch.cat([self.which, other.which]),
            before=torch.cat([self.before, other.before]),
        )


def kept_cache(batch: Batch) -> Cache:
    """A cache that holds keys and values of every column after one forward over the batch.

    Not the model's own kind of cache: that of a layer with a sliding window forgets what is out of sight at the end.
    """
    return batch.past(keep=True) if isinstance(batch, SuffixBatch) else DynamicCache()


def whole_mask(batch: Batch) -> Int[Tensor, "rows all"]:
    """The attention mask of all columns, those that were run before too."""
    return batch.whole_mask if isinstance(batch, SuffixBatch) else batch.attention_mask


class _Places:
    """Which known token stands in each column before a cut, by device: worked out once for all layers."""

    def __init__(self, batch: SuffixBatch) -> None:
        self.known, self.start, self.rows = batch.known, batch.start, batch.rows
        #: One prefix that fills all columns before the cut in every row needs no copy.
        self.alike = len(batch.known) == 1 and bool((batch.before == batch.start).all())
        columns = torch.arange(batch.start) - (batch.start - batch.before)[:, None]
        self.rows_of = [(batch.which == number).nonzero()[:, 0] for number in range(len(batch.known))]
        # Padding has the first token's, which no query sees.
        self.tokens_of = [columns.clamp(min=0)[rows] for rows in self.rows_of]

    def gather(self, parts: Sequence[Tensor]) -> Tensor:
        """`[row, kv_head, column, d_head]` from each prefix's `[kv_head, token, d_head]`."""
        heads, _, width = parts[0].shape
        if self.alike:
            return parts[0][None, :, : self.start].expand(self.rows, -1, -1, -1)
        found = parts[0].new_empty(self.rows, heads, self.start, width)
        for part, rows, tokens in zip(parts, self.rows_of, self.tokens_of, strict=True):
            found[rows.to(part.device)] = part[:, tokens.to(part.device)].transpose(0, 1)
        return found


class _KnownLayer(DynamicLayer):
    """One layer of a batch's known keys and values, laid out in rows when the layer runs."""

    def __init__(self, places: _Places, layer: int, keep: bool) -> None:
        DynamicLayer.__init__(self)
        self.places, self.layer, self.keep, self.filled = places, layer, keep, False
        first = places.known[0].keys[layer]
        self.dtype, self.device = first.dtype, first.device
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of all columns: the known ones, then those that are computed now."""
        if self.filled:
            assert self.keys is not None and self.values is not None
            before = (self.keys, self.values)
        else:
            known = self.places.known
            before = (
                self.places.gather([each.keys[self.layer] for each in known]),
                self.places.gather([each.values[self.layer] for each in known]),
            )
        keys = torch.cat([before[0], key_states], dim=-2)
        values = torch.cat([before[1], value_states], dim=-2)
        if self.keep:
            self.keys, self.values, self.filled = keys, values, True
        return keys, values

    def get_seq_length(self) -> int:
        """Columns before those that are computed next."""
        return self.keys.shape[-2] if self.filled and self.keys is not None else self.places.start
