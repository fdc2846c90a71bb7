"""The queries and keys that a layer's attention would use if it read another stream."""

from __future__ import annotations

from typing import NamedTuple

import nnsight
import torch
from jaxtyping import Float
from torch import Tensor

from patchkit.data.batch import Batch
from patchkit.model import PatchModel, Site
from patchkit.model.access import attention_arguments, prepare
from patchkit.tracing._attention import Attention as Attention
from patchkit.tracing._attention import attention_of
from patchkit.tracing._inputs import forward_inputs


class Attended(NamedTuple):
    """Queries and keys as used by attention, behind rotary and norms, and how the layer attends.

    Keys are of all columns, those that were run before too.
    """

    queries: Float[Tensor, "rows position head d_head"]
    keys: Float[Tensor, "rows column kv_head d_head"]
    attention: Attention


def attended(
    model: PatchModel, batch: Batch, layer: int, stream: Float[Tensor, "rows position d_model"]
) -> Attended:
    """Runs one layer's attention on a stream, and no more.

    Args:
        batch: prompts of the rows, for their masks and positions.
        stream: what the block gets.
    """
    prepare(model, [Site("q", layer)])
    inputs = forward_inputs(model, batch)
    with torch.no_grad():
        with model.lm.trace(**inputs) as tracer:
            for below in range(layer):
                # Only the last skipped block's output is read, but each must give something of that shape.
                model.block(below).skip(stream)
            if layer == 0:
                model.block(0).input = stream
            attention = attention_of(model, layer, inputs["attention_mask"])
            queries, keys, _ = attention_arguments(model, layer)
            kept = nnsight.save((queries, keys, attention.scaling, attention.softcap, attention.allowed))
            tracer.stop()
    queries, keys, scaling, softcap, allowed = kept
    return Attended(queries, keys, Attention(scaling, softcap, allowed))
