"""Attention of heads from one token of each prompt, as a Program."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from patchkit.data import Batch, positions
from patchkit.model import Dims, PatchModel
from patchkit.runtime import Cost, run_program
from patchkit.tracing import attention_from


@dataclass(frozen=True)
class Looking:
    """A prompt, and the token of it that attends; negative numbers count from the end."""

    ids: tuple[int, ...]
    query: int


@dataclass(frozen=True)
class AttentionRows:
    """The Program: `weights`, `[prompts, layers, heads, width]`, of which a prompt's own are the last ones.

    Attributes:
        layers: ascending.
        width: of the longest prompt of all, so that every batch gives tensors of one shape.
    """

    layers: tuple[int, ...]
    width: int

    def tokens(self, item: Looking) -> int:
        return len(item.ids)

    def run(self, model: PatchModel, items: Sequence[Looking]) -> dict[str, Tensor]:
        batch = Batch.from_ids([item.ids for item in items], model.pad_id).to(model.embed_device)
        columns = positions(batch, [item.query for item in items])
        found = attention_from(model, batch, self.layers, columns)
        weights = torch.stack([found[layer].cpu() for layer in self.layers], dim=1)
        return {"weights": pad(weights, (self.width - batch.width, 0))}

    def cost(self, dims: Dims, items: Sequence[Looking]) -> Cost:
        """A forward over every prompt, and the weights that are kept of it."""
        kept = len(items) * len(self.layers) * dims.n_heads * self.width
        return Cost(float(sum(len(item.ids) for item in items)), dims.itemsize * kept)


def attention_rows(
    model: PatchModel, layers: Sequence[int], items: Sequence[Looking]
) -> list[dict[int, Float[Tensor, "head token"]]]:
    """Of each prompt: layer -> what each head gives to its tokens."""
    chosen = tuple(sorted(set(layers)))
    program = AttentionRows(chosen, max(len(item.ids) for item in items))
    weights = run_program(program, model, items, label="attention")["weights"]
    return [
        {layer: row[place, :, -len(item.ids) :] for place, layer in enumerate(chosen)}
        for row, item in zip(weights, items, strict=True)
    ]
