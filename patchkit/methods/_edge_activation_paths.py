"""EAP-IG-activations: the gradient at receivers, averaged while a sender's activation goes from one run's to the other's.

Two rules:

- `midpoint` (the default): each sender has its own path. With d_u what the stream gains when u is replaced, the base
  run is run with a d_u added, a = (k + 1/2)/m, and

      score(u -> v) = mean over a of d_u . (gradient of v's stream in that run)

  so that the scores of u's edges add up to the effect of replacing u, as m grows. Runs begin at u's layer.
- `repo`: as the EAP-IG repository has it. One after the other the input, all heads of a layer and each MLP are set to
  (k/m) base + (1 - k/m) source, k = 1..m; gradients at all receivers are averaged over all (2L + 1) m runs, and
  multiplied with every sender's difference. Scores rank edges, but they are no effects.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from patchkit.methods._edge_batch import EdgeBatch
from patchkit.methods._edge_products import SenderChanges, edge_products
from patchkit.methods._edge_pushes import pushed
from patchkit.methods._edge_receivers import ReceiverVectors
from patchkit.model import PatchModel, Site
from patchkit.tracing import capture
from patchkit.tracing.edge_gradients import edge_run
from patchkit.tracing.senders import Senders, capture_senders, heads_sum

#: (scores `[pairs, places, senders, receivers]`, metric of the base runs, of the source runs).
Scored = tuple[Tensor, Tensor, Tensor]


def along_senders(batch: EdgeBatch, steps: int, max_rows: int) -> Scored:
    """The rule `midpoint`: every sender on its own path."""
    model, graph, pairs = batch.model, batch.graph, batch.pairs
    own, base_logits = capture_senders(model, pairs.base)
    other, source_logits = batch.replacement.senders(model, pairs, own)
    streams = capture(model, pairs.base, [Site("resid_pre", layer) for layer in range(graph.n_layers)]).values
    changes = SenderChanges(model, graph, own, other, batch.real)
    shape = (len(pairs.pairs), pairs.cover.shape[1], graph.n_senders, graph.n_receivers)
    scores: Tensor | None = None
    points = (torch.arange(steps) + 0.5) / steps
    for layer in range(graph.n_layers):
        vectors = changes.block(layer, layer, slice(None))
        start = 0 if layer == 0 else graph.heads(layer).start
        for numbers in torch.arange(start, start + len(vectors)).split(
            max(1, max_rows // (shape[0] * steps))
        ):
            for place in range(shape[1]):
                # A sender is replaced at the tokens of one place, and each place has a path of its own.
                inside = pairs.cover[None, :, place, :, None].to(vectors.device)
                change = vectors[numbers - start] * inside
                found = _sender_paths(batch, layer, numbers, change, points, own, streams, base_logits)
                if scores is None:
                    scores = torch.zeros(shape, dtype=found.dtype, device=found.device)
                scores[:, place, numbers] = found
    assert scores is not None
    score = batch.scorer(base_logits)
    return scores, score(base_logits), score(source_logits)


def _sender_paths(
    batch: EdgeBatch,
    layer: int,
    numbers: Tensor,
    change: Float[Tensor, "sender pairs position d_model"],
    points: Tensor,
    own: Senders,
    streams: Mapping[Site, Tensor],
    reference: Tensor,
) -> Float[Tensor, "pairs sender receivers"]:
    """Scores of the edges of some senders of one layer; a row is a sender at a point of its path in a pair."""
    model, graph, base = batch.model, batch.graph, batch.pairs.base
    copies, pairs = len(numbers) * len(points), base.rows
    rows = base.repeat(copies)

    def spread(value: Tensor) -> Tensor:
        return value.repeat(copies, *[1] * (value.ndim - 1))

    # Rows: sender by sender, point by point, pair by pair.
    moved = change[:, None] * points.to(change)[None, :, None, None, None]
    moved = moved.flatten(0, 2)
    delta = change[:, None].expand(-1, len(points), -1, -1, -1).flatten(0, 2)
    kinds = [graph.sender_name(number)[0] for number in numbers.tolist()]
    of_row = torch.arange(len(numbers)).repeat_interleave(len(points) * pairs)

    def only(letter: str) -> Tensor:
        mine = torch.tensor([kind == letter for kind in kinds])[of_row].to(moved.device)
        return moved * mine[:, None, None]

    start = spread(own.input if layer == 0 else streams[Site("resid_pre", layer)])
    if layer == 0:
        start = start + only("i").to(start)
    run = edge_run(
        model,
        rows,
        batch.scorer(reference, copies),
        start=start,
        first=layer,
        added={Site("attn_out", layer): only("a"), Site("mlp_out", layer): only("m")},
        by_query=batch.by_query,
    )
    found = pushed(batch, run, delta, batch.real.repeat(copies, 1))
    found = found.unflatten(0, (len(numbers), len(points), pairs)).mean(1).transpose(0, 1)
    downstream = numbers[:, None] < graph.upstream
    return found.masked_fill(~downstream.to(found.device), 0.0)


def along_sites(batch: EdgeBatch, steps: int) -> Scored:
    """The rule `repo`."""
    model, graph, pairs = batch.model, batch.graph, batch.pairs
    own, base_logits = capture_senders(model, pairs.base)
    other, source_logits = batch.replacement.senders(model, pairs, own)
    score = batch.scorer(base_logits)
    weight = 1 / (steps * (2 * graph.n_layers + 1))
    changes = SenderChanges(model, graph, own, other, batch.real)
    parts: list[Tensor] = []
    total: Tensor | None = None
    for options in _interpolated(model, own, other, steps):
        # The runs of one site together: of each run more than sums must be kept.
        vectors = ReceiverVectors(model, graph, batch.real)
        for each in options:
            # Not kept under a name: the next run would have to find room beside it.
            vectors.add(
                edge_run(
                    model, pairs.base, score, start=each.start, pinned=each.pinned, by_query=batch.by_query
                ),
                weight,
            )
        parts = [part for _, part in edge_products(changes, vectors, pairs.cover)]
        found = torch.cat(parts)
        total = found if total is None else total + found
    assert total is not None
    return total, score(base_logits), score(source_logits)


class _Set(NamedTuple):
    """What one run of the rule `repo` is set to."""

    start: Tensor | None = None
    pinned: dict[Site, Tensor] | None = None


def _interpolated(model: PatchModel, own: Senders, other: Senders, steps: int) -> Iterator[list[_Set]]:
    """For each site what is set in its runs."""
    points = [step / steps for step in range(1, steps + 1)]

    def between(point: float, ours: Tensor, theirs: Tensor) -> Tensor:
        return point * ours + (1 - point) * theirs

    yield [_Set(start=between(point, own.input, other.input)) for point in points]
    for layer in range(model.dims.n_layers):
        norm = model.attention_post_norm(layer)
        runs = []
        for point in points:
            # Of sums that are linear in the heads, the average of two is that of the average heads.
            added = heads_sum(model, layer, between(point, own.heads[layer], other.heads[layer]))
            runs.append(_Set(pinned={Site("attn_out", layer): added if norm is None else norm(added)}))
        yield runs
        yield [
            _Set(pinned={Site("mlp_out", layer): between(point, own.mlps[layer], other.mlps[layer])})
            for point in points
        ]
