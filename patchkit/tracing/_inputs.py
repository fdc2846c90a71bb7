"""What every trace is given: ids, mask and positions, explicit, so that padding can never shift a result."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from patchkit.data.batch import Batch
from patchkit.model import PatchModel


def forward_inputs(model: PatchModel, batch: Batch, *, use_cache: bool = False) -> dict[str, Any]:
    """Keyword arguments of a forward over a left-padded batch; logits are computed at the last position only."""
    model.require_weights()
    batch = batch.to(model.embed_device)
    return {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "position_ids": batch.position_ids,
        "use_cache": use_cache,
        "logits_to_keep": 1,
    }


def pick_columns(activation: Tensor, columns: Int[Tensor, " batch"] | None) -> Tensor:
    """`[batch, position, ...]` at one column a row: `[batch, ...]`; with None, all positions."""
    if columns is None:
        return activation
    columns = columns.to(activation.device)
    return activation[torch.arange(len(columns), device=activation.device), columns]
