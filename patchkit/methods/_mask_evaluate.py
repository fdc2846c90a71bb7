"""Scoring sets of components: does patching exactly these give every desideratum its target?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from patchkit.methods._mask_layout import Layout
from patchkit.methods._mask_prepared import Prepared


def rounded(values: Float[Tensor, " n"]) -> list[int]:
    """The components a mask patches once discretised: those with w < 0.5."""
    return torch.nonzero(values < 0.5).flatten().tolist()


def joint_score(scores: Mapping[str, float], over: Iterable[str] | None = None) -> float:
    """The minimum over desiderata: a set that fails one of them does not carry what is asked for."""
    names = list(over) if over is not None else list(scores)
    return min(scores[name] for name in names)


def evaluate_mask(prepared: Prepared, keep: Float[Tensor, " n"]) -> dict[str, float]:
    """Accuracy by desideratum: the fraction of triples whose answer under the mask is the target."""
    return share_by_name(prepared, prepared.answers(keep) == prepared.target)


def evaluate_masks(prepared: Prepared, keeps: Float[Tensor, "mask n"]) -> list[dict[str, float]]:
    """The same for each of a few masks."""
    return [
        share_by_name(prepared, answers == prepared.target)
        for answers in prepared.answers_under(keeps).unbind(1)
    ]


def evaluate_sets(
    layout: Layout, prepared: Prepared, sets: Iterable[Sequence[int]]
) -> Iterator[dict[str, float]]:
    """The same for each of many sets of components that are patched, several in one step."""
    for answers in answers_to_sets(layout, prepared, sets):
        yield share_by_name(prepared, answers == prepared.target)


def answers_to_sets(
    layout: Layout, prepared: Prepared, sets: Iterable[Sequence[int]]
) -> Iterator[Int[Tensor, " triple"]]:
    """The answers where exactly these sets of components are patched, in turn."""
    waiting = iter(sets)
    # So many that the masks of all of them at once would not fit into memory.
    while some := list(islice(waiting, prepared.together(layout.size))):
        keeps = torch.stack([layout.keep_all_but(patched) for patched in some])
        yield from prepared.answers_under(keeps).unbind(1)


def share_by_name(prepared: Prepared, hits: Bool[Tensor, " triple"]) -> dict[str, float]:
    """Mean of a boolean per triple, by desideratum."""
    group = prepared.group
    counts = [(int(hits[group == g].sum()), int((group == g).sum())) for g in range(len(prepared.names))]
    return {name: hit / size for name, (hit, size) in zip(prepared.names, counts, strict=True)}


def random_sets(n: int, size: int, count: int, seed: int) -> list[list[int]]:
    """Random sets of components of one size, each drawn without replacement."""
    generator = torch.Generator().manual_seed(seed)
    return [sorted(torch.randperm(n, generator=generator)[:size].tolist()) for _ in range(count)]


def jaccard(a: Sequence[str], b: Sequence[str]) -> float:
    """Size of the intersection over size of the union; 1 for two empty sets."""
    union = set(a) | set(b)
    return len(set(a) & set(b)) / len(union) if union else 1.0
