"""What every trace is given: ids, mask and positions, explicit, so that padding can never shift a result."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from patchkit.data.batch import Batch
from patchkit.errors import InputError
from patchkit.model import PatchModel
from patchkit.tracing.suffix import SuffixBatch


def forward_inputs(model: PatchModel, batch: Batch, *, use_cache: bool = False) -> dict[str, Any]:
    """Keyword arguments of a forward over a left-padded batch; logits are computed at the last position only.

    Of a batch whose first columns were run before, the mask is that of all columns.
    """
    model.require_weights()
    batch = batch.to(model.embed_device)
    inputs: dict[str, Any] = {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "position_ids": batch.position_ids,
        "use_cache": use_cache,
        "logits_to_keep": 1,
    }
    if isinstance(batch, SuffixBatch):
        inputs |= {"attention_mask": batch.whole_mask, "past_key_values": batch.past(), "use_cache": True}
    return inputs


def pick_columns(activation: Tensor, columns: Int[Tensor, " batch"] | None) -> Tensor:
    """`[batch, position, ...]` at one column a row: `[batch, ...]`; with None, all positions."""
    if columns is None:
        return activation
    columns = columns.to(activation.device)
    return activation[torch.arange(len(columns), device=activation.device), columns]


def check_columns(columns: Int[Tensor, " batch"], batch: Batch) -> None:
    """Raises InputError unless there is one column a row, each on a real token.

    A column on padding would be read or written without a trace in the logits, and a negative one would count from the
    end of the padded row.
    """
    if tuple(columns.shape) != (batch.rows,):
        raise InputError(
            f"columns: expected one padded column a row, ({batch.rows},), found {tuple(columns.shape)}"
        )
    columns = columns.to(batch.input_ids.device)
    bad = (columns < batch.offset) | (columns >= batch.width)
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise InputError(
            f"columns: row {row} has its tokens at columns {int(batch.offset[row])} to {batch.width - 1}, found "
            f"{int(columns[row])}; patchkit.data.positions gives columns from positions"
        )
