"""Token batches: rows of different lengths, padded on the left, so that the last token of every row is in one
column.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from patchkit.errors import InputError


@dataclass(frozen=True, eq=False)
class Batch:
    """`input_ids` and `attention_mask`, both [rows, width]; in every row zeros of the mask come before its
    ones.

    Positions that users speak of are counted on unpadded tokens; `offset` and `positions` lead to padded
    columns. Raises InputError where the mask is not a left padding.
    """

    input_ids: Int[Tensor, "rows width"]
    attention_mask: Int[Tensor, "rows width"]

    def __post_init__(self) -> None:
        ids, mask = self.input_ids, self.attention_mask
        if ids.ndim != 2 or ids.shape != mask.shape:
            raise InputError(
                f"a batch needs ids and mask of one shape [rows, width], found {list(ids.shape)} and "
                f"{list(mask.shape)}"
            )
        if mask.is_meta:
            return
        if bool(((mask != 0) & (mask != 1)).any()) or bool((mask[:, 1:] < mask[:, :-1]).any()):
            raise InputError(
                "the attention mask is not a left padding (zeros, then ones, in every row); pad on the left"
            )

    @classmethod
    def from_ids(cls, rows: Sequence[Sequence[int]], pad_id: int = 0) -> Batch:
        """Pads lists of token ids on the left to the longest; every row needs at least one token."""
        if not rows:
            raise InputError("a batch needs at least one row, found none")
        lengths = [len(row) for row in rows]
        if min(lengths) == 0:
            raise InputError(
                f"row {lengths.index(0)} of the batch has no tokens; every row needs at least one"
            )
        width = max(lengths)
        ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
        mask = torch.zeros((len(rows), width), dtype=torch.long)
        for index, row in enumerate(rows):
            ids[index, width - len(row) :] = torch.tensor(list(row), dtype=torch.long)
            mask[index, width - len(row) :] = 1
        return cls(ids, mask)

    @property
    def rows(self) -> int:
        return self.input_ids.shape[0]

    @property
    def width(self) -> int:
        return self.input_ids.shape[1]

    @property
    def lengths(self) -> Int[Tensor, " rows"]:
        """Real tokens per row."""
        return self.attention_mask.sum(dim=1)

    @property
    def offset(self) -> Int[Tensor, " rows"]:
        """The column of each row's first real token: width - length."""
        return self.width - self.lengths

    @property
    def position_ids(self) -> Int[Tensor, "rows width"]:
        """What the model counts: 0 at each row's first real token; 0 on padding."""
        return (self.attention_mask.cumsum(dim=1) - 1).clamp(min=0)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return Batch(self.input_ids.to(device), self.attention_mask.to(device))

    def take(self, rows: Int[Tensor, " chosen"]) -> Batch:
        """Some rows, in any order and as often as they are named."""
        rows = rows.to(self.input_ids.device)
        return Batch(self.input_ids[rows], self.attention_mask[rows])

    def repeat(self, times: int) -> Batch:
        """The whole batch so many times, one after the other."""
        return self.take(torch.arange(self.rows).repeat(times))

    def until(self, column: int) -> Batch:
        """The columns before this one."""
        return Batch(self.input_ids[:, :column], self.attention_mask[:, :column])

    def followed_by(self, other: Batch) -> Batch:
        """The rows of both, of one width, as one batch on this one's device."""
        other = other.to(self.input_ids.device)
        return Batch(
            torch.cat([self.input_ids, other.input_ids]),
            torch.cat([self.attention_mask, other.attention_mask]),
        )

    def split_last(self) -> tuple[Batch, Int[Tensor, "rows 1"]]:
        """Everything before the last token, and the last tokens [rows, 1].

        InputError where a row has one token only: its prefix would be padding alone.
        """
        lengths = self.lengths
        if bool((lengths < 2).any()):
            row = int((lengths < 2).nonzero()[0])
            raise InputError(
                f"row {row} of the batch has one token; splitting off the last needs at least two"
            )
        return self.until(self.width - 1), self.input_ids[:, -1:]


def positions(batch: Batch, index: int | Sequence[int]) -> Int[Tensor, " rows"]:
    """The padded column of a position counted on unpadded tokens, for every row; on the batch's device.

    `index` is one number for all rows or one per row; negative numbers count from the end (-1 is the last
    token). Raises InputError that names the row where it is out of range.
    """
    if isinstance(index, int):
        index = [index] * batch.rows
    elif len(index) != batch.rows:
        raise InputError(f"expected one position, or one for each of {batch.rows} rows; found {len(index)}")
    columns = []
    for row, (position, length) in enumerate(zip(index, batch.lengths.tolist(), strict=True)):
        if not -length <= position < length:
            raise InputError(
                f"position {position} is outside row {row}, which has {length} tokens (0 to {length - 1})"
            )
        columns.append(batch.width - length + position % length)
    return torch.tensor(columns, dtype=torch.long, device=batch.input_ids.device)
