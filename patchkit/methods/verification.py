"""Verification of an attribution: its top nodes and a stratified random sample of the rest, patched exactly.

An estimate that ranks nodes is believed for two reasons only: the nodes it puts on top have the effects that it says,
and random nodes that it puts lower do not have larger ones. Both are measured here, on the pairs of the attribution.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from patchkit.data import Pair
from patchkit.errors import InputError
from patchkit.methods._node_options import Asked, NodeOptions, ask
from patchkit.methods._replacements import replacement
from patchkit.methods.activation_patching import exact_scores
from patchkit.model import NodeGrid, PatchModel
from patchkit.results.rank import rank_correlation
from patchkit.results.scores import Scores
from patchkit.results.verification import Verification, VerifiedNode
from patchkit.runtime import Progress


def strata_of(grid: NodeGrid, ids: Int[Tensor, " n"]) -> list[str]:
    """The stratum of each node: its kind and layer, as `q.3`."""
    where = grid.locate(ids)
    return [
        f"{grid.kinds[kind]}.{layer}"
        for kind, layer in zip(where.kind.tolist(), where.layer.tolist(), strict=True)
    ]


def stratified_sample(strata: Sequence[str], n: int, generator: torch.Generator) -> Int[Tensor, " chosen"]:
    """Places of `n` members drawn at random, spread over the strata as evenly as their sizes allow."""
    members: dict[str, list[int]] = {}
    for place in torch.randperm(len(strata), generator=generator).tolist():
        name = str(strata[place])
        members.setdefault(name, []).append(place)
    # Round after round one of each stratum, in an order of the strata that is drawn too.
    names = sorted(members)
    names = [names[i] for i in torch.randperm(len(names), generator=generator).tolist()]
    depth = max((len(each) for each in members.values()), default=0)
    rounds = [members[name][turn] for turn in range(depth) for name in names if turn < len(members[name])]
    return torch.tensor(rounds[:n], dtype=torch.long)


def check_same_run(scores: Scores, asked: Asked) -> None:
    """Raises InputError unless the scores are of these pairs, in this order, and of this grid and convention."""
    same = scores.pair_ids == tuple(pair.id for pair in asked.pairs) and scores.grid == asked.grid
    if not same or scores.convention != asked.options.convention:
        raise InputError(
            "the scores to check are of other pairs or nodes, or of another convention than the options given; pass the "
            "pairs and options that `attribute` was called with"
        )


def verify(
    model: PatchModel,
    pairs: Sequence[Pair],
    scores: Scores,
    options: NodeOptions,
    k: int,
    sample: int | None = None,
    *,
    reference: Sequence[Pair] | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Patches the top `k` nodes of an attribution exactly, and a random sample of the others.

    Args:
        scores: what `attribute` returned for the same pairs and options.
        sample: how many of the others (default: as many as `k`), drawn from every kind and layer.
        reference: as it was given to `attribute`.

    Raises:
        InputError: `k` below 1 or `sample` below 0, or scores of other pairs or options.
    """
    if k < 1:
        raise InputError(f"verify: expected at least 1 node to patch, found {k}")
    if sample is not None and sample < 0:
        raise InputError(f"sample: expected at least 0 nodes, found {sample}")
    asked = ask(model, pairs, options)
    check_same_run(scores, asked)
    order = scores.order()
    top, rest = order[:k], order[k:]
    generator = torch.Generator().manual_seed(options.seed)
    drawn = stratified_sample(strata_of(asked.grid, rest), len(top) if sample is None else sample, generator)
    checked = torch.cat([top, rest[drawn]])
    made = replacement(model, pairs, options, asked.grid.sites(checked), reference)
    exact = exact_scores(model, asked, made, checked, progress=progress)
    return _compare(scores, exact, top, rest[drawn], len(order))


def _compare(scores: Scores, exact: Scores, top: Tensor, drawn: Tensor, computed: int) -> Verification:
    checked = torch.cat([top, drawn])
    columns = [
        each[checked].tolist() for each in (scores.mean_abs(), scores.mean(), exact.mean_abs(), exact.mean())
    ]
    names, strata = scores.grid.names(checked.tolist()), strata_of(scores.grid, checked)
    nodes = [
        VerifiedNode(
            node=names[i],
            number=int(checked[i]),
            estimate=columns[0][i],
            signed=columns[1][i],
            exact=columns[2][i],
            exact_signed=columns[3][i],
            group="top" if i < len(top) else "sample",
            stratum=strata[i],
        )
        for i in range(len(checked))
    ]
    groups = {
        "top": nodes[: len(top)],
        "sample": nodes[len(top) :],
        "all": nodes,
    }
    least = min(node.exact for node in groups["top"])
    return Verification(
        k=len(top),
        sampled=len(drawn),
        unverified=computed - len(checked),
        rank_correlation={name: _rank_correlation(group) for name, group in groups.items()},
        sign_agreement={name: _sign_agreement(group) for name, group in groups.items()},
        nodes=nodes,
        cost=exact.cost,
        missed=[node.node for node in groups["sample"] if node.exact > least],
    )


def _rank_correlation(nodes: Sequence[VerifiedNode]) -> float | None:
    estimates, exact = ([getattr(node, name) for node in nodes] for name in ("estimate", "exact"))
    return rank_correlation(*(torch.tensor(each, dtype=torch.float64) for each in (estimates, exact)))


def _sign_agreement(nodes: Sequence[VerifiedNode]) -> float | None:
    signed = [node for node in nodes if node.exact_signed != 0]
    if not signed:
        return None
    return sum(node.signed * node.exact_signed > 0 for node in signed) / len(signed)
