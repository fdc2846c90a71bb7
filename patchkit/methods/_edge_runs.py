"""The runs whose gradients are averaged: one for EAP, both ends for clean-corrupted, a path of embeddings for EAP-IG.

    eap              gradient at the base run (Syed et al. 2023, arXiv:2310.10348)
    clean-corrupted  mean of the gradients at the base and at the source run
    eap-ig-inputs    mean of the gradients at source + a (base - source), of the token embeddings (Hanna et al. 2024,
                     arXiv:2403.17806): a = k/m for k = 0..m-1 (rule `repo`) or (k + 1/2)/m (rule `midpoint`)

Each gives the senders of both runs, what the receivers' gradients add up to, and the metric of the base and source runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from patchkit.methods._edge_batch import EdgeBatch
from patchkit.methods._edge_receivers import ReceiverVectors
from patchkit.tracing.edge_gradients import edge_run
from patchkit.tracing.senders import Senders, capture_senders


@dataclass(frozen=True, eq=False)
class Integrated:
    """Senders of the base run, what is put in, gradients at receivers, metric of the base and source runs."""

    own: Senders
    other: Senders
    vectors: ReceiverVectors
    base: Tensor
    source: Tensor


def at_base(batch: EdgeBatch) -> Integrated:
    """EAP: two forwards and one backward."""
    run = edge_run(batch.model, batch.pairs.base, batch.scorer(), by_query=batch.by_query)
    other, logits = batch.replacement.senders(batch.model, batch.pairs, run.senders)
    vectors = _vectors(batch)
    vectors.add(run)
    return Integrated(run.senders, other, vectors, run.metric, batch.scorer(run.logits)(logits))


def at_both_ends(batch: EdgeBatch) -> Integrated:
    """Clean-corrupted: two forwards and two backwards."""
    base = edge_run(batch.model, batch.pairs.base, batch.scorer(), by_query=batch.by_query)
    vectors = _vectors(batch)
    vectors.add(base, 0.5)
    own, metric, score = base.senders, base.metric, batch.scorer(base.logits)
    del base
    other, source = _add_source(batch, vectors, score, 0.5)
    return Integrated(own, other, vectors, metric, source)


def along_inputs(batch: EdgeBatch, steps: int, rule: str) -> Integrated:
    """EAP-IG-inputs: a forward, and a forward and a backward for every step (one forward more for `midpoint`)."""
    model, pairs = batch.model, batch.pairs
    own, base_logits = capture_senders(model, pairs.base)
    score = batch.scorer(base_logits)
    vectors = _vectors(batch)
    if rule == "repo":
        # The first step is the source run itself.
        other, source = _add_source(batch, vectors, score, 1 / steps)
        points = [step / steps for step in range(1, steps)]
    else:
        other, logits = capture_senders(model, pairs.source)
        source = score(logits)
        points = [(step + 0.5) / steps for step in range(steps)]
    for point in points:
        start = other.input + point * (own.input - other.input)
        # Not kept under a name: the next run would have to find room beside it.
        vectors.add(edge_run(model, pairs.base, score, start=start, by_query=batch.by_query), 1 / steps)
    return Integrated(own, other, vectors, score(base_logits), source)


def _add_source(
    batch: EdgeBatch, vectors: ReceiverVectors, score: Callable[[Tensor], Tensor], weight: float
) -> tuple[Senders, Tensor]:
    """Adds the gradients of the source run; its senders and metric."""
    run = edge_run(batch.model, batch.pairs.source, score, by_query=batch.by_query)
    vectors.add(run, weight)
    return run.senders, run.metric


def _vectors(batch: EdgeBatch) -> ReceiverVectors:
    return ReceiverVectors(batch.model, batch.graph, batch.real)
