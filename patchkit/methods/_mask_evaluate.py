"""Scoring sets of components: does patching exactly these give every desideratum its target?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from jaxtyping import Bool, Float
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


def moved_by(prepared: Prepared, keep: Float[Tensor, " n"]) -> dict[str, float]:
    """The fraction of triples whose answer under the mask is no longer the unpatched one, by desideratum."""
    return share_by_name(prepared, prepared.answers(keep) != prepared.original_answer)


def share_by_name(prepared: Prepared, hits: Bool[Tensor, " triple"]) -> dict[str, float]:
    """Mean of a boolean per triple, by desideratum."""
    group = prepared.group
    counts = [(int(hits[group == g].sum()), int((group == g).sum())) for g in range(len(prepared.names))]
    return {name: hit / size for name, (hit, size) in zip(prepared.names, counts, strict=True)}


def random_sets(n: int, size: int, count: int, seed: int) -> list[list[int]]:
    """Random sets of components of one size, each drawn without replacement."""
    generator = torch.Generator().manual_seed(seed)
    return [sorted(torch.randperm(n, generator=generator)[:size].tolist()) for _ in range(count)]


#: Accuracies that differ by less are the same: 0.7 less a slack of 0.1 is 0.6, not a little more.
ROUNDING = 1e-9
#: Up to so many components are pruned one at a time.
ONE_BY_ONE = 48


def prune(
    layout: Layout, prepared: Prepared, chosen: Sequence[int], slack: float
) -> tuple[list[int], list[int]]:
    """Drops components that are not needed: (kept, dropped).

    One at a time, always the one whose absence costs least, as long as the joint score stays within `slack` of the
    whole set's. While there are more than `ONE_BY_ONE`, as many of the cheapest go together as the score allows: one at
    a time would take as many evaluations as the square of their number.
    """

    def joint(components: Sequence[int]) -> float:
        return joint_score(evaluate_mask(prepared, layout.keep_all_but(components)))

    kept, dropped = list(chosen), []
    floor = joint(kept) - slack - ROUNDING
    while kept:
        without = {component: joint([c for c in kept if c != component]) for component in kept}
        cheapest = sorted(
            (component for component in kept if without[component] >= floor),
            key=lambda component: (-without[component], component),
        )
        count = min(len(cheapest), 1) if len(kept) <= ONE_BY_ONE else len(cheapest)
        while count > 1 and joint([c for c in kept if c not in cheapest[:count]]) < floor:
            count //= 2
        if not count:
            break
        dropped += cheapest[:count]
        kept = [c for c in kept if c not in cheapest[:count]]
    return kept, dropped


def jaccard(a: Sequence[str], b: Sequence[str]) -> float:
    """Size of the intersection over size of the union; 1 for two empty sets."""
    union = set(a) | set(b)
    return len(set(a) & set(b)) / len(union) if union else 1.0
