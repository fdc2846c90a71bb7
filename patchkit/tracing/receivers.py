"""What receivers make of a residual stream that is given to them, and what an MLP writes back.

A head's query, key and value inputs and an MLP read the stream through the block's own norm. Here a stream of any rows
is handed to the modules of one block themselves, outside a forward, so that what comes out has their own numerics in
every precision; nothing else of the model is run.
"""

from __future__ import annotations

from operator import attrgetter

import torch
from jaxtyping import Float
from torch import Tensor

from patchkit.model import PatchModel, Site
from patchkit.model.access import canonical

#: Sites of what the queries', keys' and values' receivers hand on.
PROJECTIONS = {"q": "q_proj", "k": "k_proj", "v": "v_proj"}


def read_by_attention(
    model: PatchModel, layer: int, stream: Float[Tensor, "rows position d_model"]
) -> dict[str, Float[Tensor, "rows position head d_head"]]:
    """What the projections of a layer give when its attention reads this stream; by letter, `k` and `v` a KV head."""
    with torch.no_grad():
        block, arch = model.block_module(layer), model.arch
        read = stream if arch.attn_norm is None else attrgetter(arch.attn_norm)(block)(stream)
        made = [attrgetter(path)(block)(read) for path in arch.qkv]
        return {
            letter: canonical(model, Site(kind, layer), made[place if arch.packing == "separate" else 0])
            for place, (letter, kind) in enumerate(PROJECTIONS.items())
        }


def read_by_mlp(
    model: PatchModel, layer: int, stream: Float[Tensor, "rows position d_model"]
) -> Float[Tensor, "rows position d_model"]:
    """What a layer's MLP is handed when it reads this stream: behind its norm, where it has one."""
    with torch.no_grad():
        path = model.arch.mlp_norm
        return stream if path is None else attrgetter(path)(model.block_module(layer))(stream)


def written_by_mlp(
    model: PatchModel, layer: int, stream: Float[Tensor, "rows position d_model"]
) -> Float[Tensor, "rows position d_model"]:
    """What a layer's MLP adds to the residual stream when it reads this one."""
    with torch.no_grad():
        block, arch = model.block_module(layer), model.arch
        written = attrgetter(arch.mlp)(block)(read_by_mlp(model, layer, stream))
        return written if arch.mlp_out is None else attrgetter(arch.mlp_out)(block)(written)
