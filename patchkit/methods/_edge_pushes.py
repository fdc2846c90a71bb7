"""One change of the stream against every receiver's gradient: the change is carried forward, not the gradients back.

Where every row has its own change there is one product a receiver, and a change d goes through norm and projection once:

    J d = w (d - mean(d) - u mean(u d)) / s,        score = sum over tokens of (J d W_h) . (gradient at the projection)

without the first mean for RMSNorm. The same numbers as `_edge_receivers` gives, the other way round.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from patchkit.methods._edge_batch import EdgeBatch
from patchkit.methods._edge_receivers import clean
from patchkit.model import Norm
from patchkit.tracing.edge_gradients import EdgeRun, Reads


def pushed(
    batch: EdgeBatch,
    run: EdgeRun,
    change: Float[Tensor, "rows position d_model"],
    real: Bool[Tensor, "rows position"],
) -> Float[Tensor, "rows receivers"]:
    """Sum over tokens of each row's change times the gradient at each receiver of the run's layers.

    Receivers of layers that were not run get 0. Whether a receiver is downstream is the caller's to know.
    """
    graph = batch.graph
    change = clean(change, real)
    scores = torch.zeros(len(change), graph.n_receivers, dtype=change.dtype, device=change.device)
    for layer, reads in run.reads.items():
        scores[:, graph.attention_receivers(layer)] = _attention(batch, layer, reads, change, real)
        through = _through(batch.model.mlp_norm(layer), clean(reads.mid, real), change)
        product = through * clean(reads.mlp_gradient, real).to(through.device)
        scores[:, graph.mlp_receiver(layer)] = product.sum((1, 2)).to(scores.device)
    scores[:, graph.logits] = (change * clean(run.final, real).to(change.device)).sum((1, 2))
    return scores


def _attention(
    batch: EdgeBatch, layer: int, reads: Reads, change: Tensor, real: Tensor
) -> Float[Tensor, "rows receivers"]:
    through = _through(batch.model.attention_norm(layer), clean(reads.stream, real), change)
    found = []
    for (weight, _), gradient in zip(batch.model.projections(layer), reads.gradients, strict=True):
        moved = torch.einsum("btd,hdk->bthk", through, weight.to(through))
        gradient = clean(gradient, real).to(moved.device)
        # Query heads of one group share their projection.
        moved = moved.repeat_interleave(gradient.shape[2] // moved.shape[2], dim=2)
        found.append((moved * gradient).sum((1, 3)))
    return torch.cat(found, dim=-1).to(change.device)


def _through(norm: Norm | None, stream: Tensor, change: Tensor) -> Tensor:
    """The change behind a norm, to first order."""
    change = change.to(stream.device)
    if norm is None:
        return change
    unit = norm.unit(stream)
    moved = change - unit * (unit * change).mean(-1, keepdim=True)
    if norm.centred:
        moved = moved - change.mean(-1, keepdim=True)
    return moved / norm.scale(stream) * norm.weight.to(moved)
