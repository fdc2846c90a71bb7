"""Triples made for a random model by brute force: their targets are what patching a known set of components gives."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable, Iterable, Sequence

import torch

from patchkit.data import Triple
from tests import oracles
from tests.comparisons import pair
from tests.families import VOCAB

FAMILY, KINDS = "llama-gqa", ("attn_out", "mlp_out")
#: Flat order: kind by kind, layer by layer.
PLACES = [(kind, layer) for kind in KINDS for layer in range(3)]
EVERY_SET = [set(c) for n in range(7) for c in itertools.combinations(range(6), n)]


@functools.cache
def prompts() -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    rng = random.Random(3)
    return [
        tuple(tuple(rng.randrange(3, VOCAB) for _ in range(rng.choice((3, 5)))) for _ in range(2))  # type: ignore[misc]
        for _ in range(20)
    ]


@functools.cache
def answers(components: frozenset[int]) -> list[int]:
    """By the oracle: the answer to every original when exactly these are replaced at the last token."""
    _, twin = pair(FAMILY)
    found = []
    for (original, _), (values, _) in zip(prompts(), alternates(), strict=True):
        edits = {PLACES[c]: _replace_last(values[PLACES[c]][-1]) for c in components}
        found.append(int(oracles.patched_logits(twin, original, edits).argmax()))
    return found


@functools.cache
def alternates() -> list[tuple[dict[oracles.Place, torch.Tensor], torch.Tensor]]:
    _, twin = pair(FAMILY)
    return [oracles.read(twin, alternate) for _, alternate in prompts()]


def _replace_last(value: torch.Tensor) -> oracles.Edit:
    return lambda activation: torch.cat([activation[:-1], value[None]])


def planted(components: Iterable[int]) -> list[Triple]:
    """Triples whose targets are reached, by construction, when these components are patched; never when none is."""
    reached, own, other = (
        answers(frozenset(components)),
        answers(frozenset()),
        [int(v.argmax()) for _, v in alternates()],
    )
    return [
        Triple("planted", o, a, target, original_answer_id=mine, alternate_answer_id=theirs)
        for (o, a), target, mine, theirs in zip(prompts(), reached, own, other, strict=True)
        if target != mine
    ]


def score_table(triples: Sequence[Triple]) -> Callable[[Iterable[int]], float]:
    """Accuracy of any set, from the oracle's answers."""
    places = [prompts().index((t.original_ids, t.alternate_ids)) for t in triples]

    def score(components: Iterable[int]) -> float:
        given = answers(frozenset(components))
        return sum(given[i] == t.target_id for i, t in zip(places, triples, strict=True)) / len(triples)

    return score
