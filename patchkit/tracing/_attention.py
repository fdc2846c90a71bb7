"""A layer's attention as it is called: scaling, soft-cap, and which keys each query sees."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from patchkit.model import PatchModel
from patchkit.model.access import attention_arguments


@dataclass(frozen=True, eq=False)
class Attention:
    """How a layer turns queries and keys into probabilities: what its attention function is given.

    Attributes:
        scaling: of the dot products.
        softcap: limit of the scores (Gemma-2), or None.
        allowed: which keys each query sees, `[batch, query, key]`; its own always, so that padding has a softmax. The
            queries are those of the last columns, where the first were run before.
    """

    scaling: float
    softcap: float | None
    allowed: Bool[Tensor, "batch query key"]


def attention_of(model: PatchModel, layer: int, mask: Tensor) -> Attention:
    """The layer's attention over a batch whose columns have this padding mask; call it inside a trace, at the layer's
    queries."""
    queries, _, keywords = attention_arguments(model, layer)
    place = torch.arange(mask.shape[1], device=mask.device)
    distance = place[len(place) - queries.shape[1] :, None] - place
    seen = distance >= 0
    window = keywords.get("sliding_window")
    if window is not None:
        seen = seen & (distance < window)
    allowed = (seen & (mask > 0)[:, None]) | (distance == 0)
    return Attention(keywords["scaling"], keywords.get("softcap"), allowed.to(queries.device))


def attention_scores(
    queries: Float[Tensor, "batch query head d"],
    keys: Float[Tensor, "batch key kv_head d"],
    attention: Attention,
) -> Float[Tensor, "batch head query key"]:
    """Scaled and, where the model does so, capped scores; not masked."""
    scores = torch.einsum("bihd,bthd->bhit", queries, per_head(keys, queries)) * attention.scaling
    return scores if attention.softcap is None else torch.tanh(scores / attention.softcap) * attention.softcap


def per_head(of_kv_heads: Tensor, of_heads: Tensor) -> Tensor:
    """Keys or values `[batch, key, kv_head, d]` with one copy for each query head of a group."""
    return of_kv_heads.repeat_interleave(of_heads.shape[2] // of_kv_heads.shape[2], dim=2)
