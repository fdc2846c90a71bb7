"""What senders write to the residual stream, and what the stream gains when one of them is replaced.

A head writes z_h W_O[h], an MLP its output, the input its token embedding. Where a norm stands between the heads' sum Y
and the stream (Gemma, OLMo 2), heads do not add up: replacing head h by z'_h changes the stream by

    norm(Y + (z'_h - z_h) W_O[h]) - norm(Y)

which is what is called its contribution here; without such a norm it is the difference itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter

import nnsight
import torch
from jaxtyping import Float
from torch import Tensor

from patchkit.data.batch import Batch
from patchkit.model import PatchModel, Site
from patchkit.model.access import read_site
from patchkit.tracing._inputs import forward_inputs


@dataclass(frozen=True, eq=False)
class Senders:
    """What every sender of a run holds.

    Attributes:
        input: token embeddings as they enter the stream, without any embedding of positions.
        heads: z of each layer.
        mlps: the MLP's contribution to the stream, of each layer.
    """

    input: Float[Tensor, "batch position d_model"]
    heads: tuple[Float[Tensor, "batch position head d_head"], ...]
    mlps: tuple[Float[Tensor, "batch position d_model"], ...]

    def rows(self, index: Tensor | slice) -> Senders:
        """The senders of some rows."""

        def take(value: Tensor) -> Tensor:
            return value[index.to(value.device) if isinstance(index, Tensor) else index]

        return Senders(take(self.input), tuple(map(take, self.heads)), tuple(map(take, self.mlps)))


def capture_senders(model: PatchModel, batch: Batch) -> tuple[Senders, Float[Tensor, "batch vocab"]]:
    """Every sender of a run, and its last-position logits: one forward, without gradients."""
    layers = range(model.dims.n_layers)
    inputs = forward_inputs(model, batch)
    with torch.no_grad():
        with model.lm.trace(**inputs):
            given = token_embeddings(model)
            heads, mlps = [], []
            for layer in layers:
                heads.append(read_site(model, Site("z", layer)))
                mlps.append(read_site(model, Site("mlp_out", layer)))
            kept = nnsight.save((given, heads, mlps, model.lm.output.logits[:, -1]))
    given, heads, mlps, logits = kept
    return Senders(given, tuple(heads), tuple(mlps)), logits


def position_embedding(model: PatchModel) -> Tensor | None:
    """What is added to the stream beside the token embedding, or None; call it inside a trace, before the first block."""
    path = model.arch.position_embed
    return None if path is None else attrgetter(path)(model.lm).output


def token_embeddings(model: PatchModel) -> Float[Tensor, "batch position d_model"]:
    """What the input writes: the stream that the first block reads, without the embedding of positions.

    A copy, which nothing behind it changes; call it inside a trace, before anything of the first block is read.
    """
    placed = position_embedding(model)
    stream = model.block(0).input
    return stream.clone() if placed is None else stream - placed


def head_outputs(
    model: PatchModel, layer: int, z: Float[Tensor, "*at head d_head"]
) -> Float[Tensor, "*at head d_model"]:
    """z_h W_O[h] of each head: without bias, before any norm behind it."""
    return torch.einsum("...hd,hdm->...hm", z, model.w_o(layer).to(z))


def heads_sum(
    model: PatchModel, layer: int, z: Float[Tensor, "*at head d_head"]
) -> Float[Tensor, "*at d_model"]:
    """Y: the output projection of all heads with its bias, before any norm behind it."""
    weight, bias = model.w_o(layer), model.b_o(layer)
    total = z.flatten(-2) @ weight.flatten(0, 1).to(z)
    return total if bias is None else total + bias.to(z)


def contributions(
    model: PatchModel,
    layer: int,
    own: Float[Tensor, "*at head d_head"],
    other: Float[Tensor, "*at head d_head"],
) -> Float[Tensor, "*at head d_model"]:
    """What the stream gains when each head alone is replaced: `other` by `own` in place of `own`'s run.

    Args:
        own: z of the run that is patched, all heads.
        other: what is put in.
    """
    change = head_outputs(model, layer, other - own)
    norm = model.attention_post_norm(layer)
    if norm is None:
        return change
    total = heads_sum(model, layer, own)
    return (norm((total.unsqueeze(-2) + change).to(own.dtype)) - norm(total).unsqueeze(-2)).to(own.dtype)
