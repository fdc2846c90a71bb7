"""Information-flow routes (Ferrando and Voita 2024, arXiv:2403.00824): how much of what a receiver reads is whose.

    importance(u -> v) = max(0, |x|_1 - |x - y_u|_1), over the sum of those of all senders upstream; mean over tokens

for x the stream that v reads and y_u what sender u wrote to it. One forward, no gradient, no other prompt, no metric; all
queries, keys and values of a layer read one stream and get one importance. Where a norm stands behind the heads' sum,
y_u is the head's share of its output at the norm's own scale.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from patchkit.methods._edge_batch import EdgeBatch
from patchkit.methods._edge_receivers import clean
from patchkit.model import EdgeGraph, PatchModel, Site
from patchkit.tracing import capture
from patchkit.tracing.senders import Senders, capture_senders, head_outputs, heads_sum


def flow_scores(
    batch: EdgeBatch,
) -> tuple[Float[Tensor, "pairs places senders receivers"], Tensor, Tensor]:
    """(importances of every edge, the metric of the base and source runs); positions average over their tokens."""
    model, graph, pairs = batch.model, batch.graph, batch.pairs
    own, logits = capture_senders(model, pairs.base)
    middle = "resid_pre" if graph.parallel else "resid_mid"
    layers = range(graph.n_layers)
    last = Site("resid_post", graph.n_layers - 1)
    sites = {Site(kind, layer) for kind in ("resid_pre", middle) for layer in layers} | {last}
    streams = capture(model, pairs.base, sites).values
    shape = (len(pairs.pairs), pairs.cover.shape[1], graph.n_senders, graph.n_receivers)
    scores = torch.zeros(shape, device=own.input.device, dtype=clean(own.input[:1], batch.real[:1]).dtype)
    for layer in layers:
        attention = _shares(batch, own, streams[Site("resid_pre", layer)], graph.heads(layer).start)
        scores[..., : attention.shape[2], graph.attention_receivers(layer)] = attention[..., None]
        receiver = graph.mlp_receiver(layer)
        mlp = _shares(batch, own, streams[Site(middle, layer)], int(graph.upstream[receiver]))
        scores[..., : mlp.shape[2], receiver] = mlp
    scores[..., graph.logits] = _shares(batch, own, streams[last], graph.n_senders)
    source = capture(model, pairs.source, ()).logits
    score = batch.scorer(logits)
    return scores, score(logits), score(source)


def _shares(
    batch: EdgeBatch, own: Senders, stream: Tensor, count: int
) -> Float[Tensor, "pairs places senders"]:
    """Importances of the first `count` senders in a stream, a layer of them at a time."""
    stream = clean(stream, batch.real)
    size = stream.abs().sum(-1)
    near = [
        (size - (stream - part).abs().sum(-1)).clamp(min=0) for part in _written(batch, own, count, stream)
    ]
    proximity = torch.stack(near)
    total = proximity.sum(0)
    # A stream that nobody is near to has no routes.
    importance = torch.where(
        total > 0, proximity / total.masked_fill(total == 0, 1.0), torch.zeros_like(total)
    )
    cover = batch.pairs.cover.to(importance)
    tokens = cover.sum(-1)[..., None]
    return torch.einsum("sbt,bpt->bps", importance, cover) / tokens


def _written(batch: EdgeBatch, own: Senders, count: int, like: Tensor) -> Iterator[Tensor]:
    """What the first `count` senders write: the heads of one layer are there at a time."""
    graph: EdgeGraph = batch.graph
    yield clean(own.input.to(like.device), batch.real)
    given = 1
    for layer in range(graph.n_layers):
        if given >= count:
            return
        parts = [*_head_shares(batch.model, layer, own.heads[layer]).unbind(-2), own.mlps[layer]]
        for part in parts[: count - given]:
            yield clean(part.to(like.device), batch.real)
        given += len(parts)


def _head_shares(model: PatchModel, layer: int, z: Tensor) -> Tensor:
    outputs, norm = head_outputs(model, layer, z), model.attention_post_norm(layer)
    if norm is None:
        return outputs
    scale = norm.scale(heads_sum(model, layer, z))
    return outputs * norm.weight.to(outputs) / scale.unsqueeze(-2).to(outputs)
