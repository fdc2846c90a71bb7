"""From the metrics of scrubbed runs to a result: shares recovered, intervals, spread, and what a reader must know."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from patchkit.methods._scrub_draws import Buckets, Draws
from patchkit.methods._scrub_hypothesis import Interpretation
from patchkit.methods._scrub_reading import Reading
from patchkit.results.convention import Convention
from patchkit.results.scrubbing import ScrubbedInput, ScrubNode, ScrubResult

BOOTSTRAPS = 1000
_TAILS = (0.025, 0.975)
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def summarise(
    model: str,
    reading: Reading,
    draws: Draws,
    found: Mapping[str, Tensor],
    metric: str,
    samples: int,
    seed: int,
) -> ScrubResult:
    """The result of a run.

    Args:
        found: `model`, `random` and `scrubbed` metric and `forwards` of every tree, in order.
    """
    runs = {name: found[name].double().reshape(-1, samples) for name in ("model", "random", "scrubbed")}
    means = torch.stack([runs[name].mean(1) for name in ("model", "random", "scrubbed")])
    # Its own generator: an interval is the same whatever else was drawn.
    generator = torch.Generator().manual_seed(seed)
    again = torch.randint(means.shape[1], (BOOTSTRAPS, means.shape[1]), generator=generator)
    resampled = means[:, again].mean(-1)
    of_model, random, scrubbed = (float(value) for value in means.mean(1))
    share = _recovered(means.mean(1)[:, None])
    shares = _recovered(resampled)
    scale, halfway = abs(of_model - random), (of_model + random) / 2
    occurrences = Counter(reading.hypothesis.occurrences())
    nodes = [
        _node(node, draws.buckets[node.name], occurrences[node.name]) for node in reading.hypothesis.nodes
    ]
    spread = runs["scrubbed"].std(1).tolist() if samples > 1 else [None] * means.shape[1]
    defined = len(share) == 1
    return ScrubResult(
        hypothesis=reading.hypothesis.name,
        claim=reading.hypothesis.claim,
        model=model,
        convention=Convention(
            metric=metric,
            direction="noise",
            ablation="resample by equal keys",
            positions="of each node",
            patching="edge",
        ),
        samples=samples,
        seed=seed,
        children=list(reading.hypothesis.children),
        nodes=nodes,
        pool=draws.pool,
        inputs=[
            ScrubbedInput(
                id=draws.inputs[number].id,
                model=float(means[0, row]),
                random=float(means[1, row]),
                scrubbed=float(means[2, row]),
                spread=spread[row],
            )
            for row, number in enumerate(draws.references)
        ],
        model_metric=of_model,
        random_metric=random,
        scrubbed_metric=scrubbed,
        scrubbed_interval=_interval(resampled[2]),
        recovered=float(share[0]) if defined else None,
        recovered_interval=_interval(shares) if defined and len(shares) else None,
        gap=float((means[0] - means[2]).abs().mean()) / scale if defined else None,
        kept=float(((means[2] > halfway) == (of_model > random)).double().mean()) if defined else None,
        quantiles=tuple(np.quantile(means[2].numpy(), _QUANTILES).tolist()),
        forwards=float(found["forwards"].double().sum()),
        notes=_notes(nodes, defined),
    )


def _recovered(metrics: Float[Tensor, "3 draws"]) -> Float[Tensor, " defined"]:
    """(scrubbed - random) / (model - random) of each draw in which it is defined."""
    model, random, scrubbed = metrics
    known = (model - random).abs() > 1e-9 * (1 + model.abs())
    return (scrubbed - random)[known] / (model - random)[known]


def _interval(values: Float[Tensor, " draws"]) -> tuple[float, float]:
    low, high = np.quantile(values.numpy(), _TAILS)
    return float(low), float(high)


def _node(node: Interpretation, buckets: Buckets, occurrences: int) -> ScrubNode:
    named = [said if "@" in said else f"{said}@{node.positions}" for said in node.nodes]
    return ScrubNode(
        name=node.name,
        key=node.key_words,
        nodes=named
        or list(dict.fromkeys(f"{edge.partition('->')[0]}@{node.positions}" for edge in node.edges)),
        edges=list(node.edges),
        positions=node.positions,
        children=list(node.children),
        occurrences=occurrences,
        buckets=buckets.count,
        bucket_sizes=(buckets.smallest, buckets.middle, buckets.largest),
        singletons=buckets.singletons,
        empty=buckets.empty,
        draws=buckets.draws,
        vacuous=buckets.vacuous,
    )


def _notes(nodes: list[ScrubNode], defined: bool) -> list[str]:
    notes = []
    for node in nodes:
        if node.vacuous:
            notes.append(
                f"'{node.name}': {node.vacuous} of {node.draws} draws were vacuous: no other prompt has that key "
                f"({node.singletons} of {node.buckets} buckets hold one input, {node.empty} keys have none). There the "
                "hypothesis was not tested: give more inputs, or a coarser key."
            )
    if not nodes:
        notes.append("Nothing is claimed: every activation is that of an unrelated input.")
    if not defined:
        notes.append(
            "The model and the random baseline have one metric, so that no share is defined: nothing here depends on the "
            "input."
        )
    return notes
