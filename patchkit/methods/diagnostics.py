"""A bound on what was missed: random subsets of the unverified nodes are patched, and Welch's t bounds every node.

AtP* paper (arXiv 2403.00745), diagnostics. Within a stratum (nodes of one kind and layer) each draw patches a Bernoulli
subset of the unverified nodes in a random pair. For a node, with the r1 draws it was in and the r0 others,

    Delta = mean of y with it - mean of y without it,      SE = sqrt(s1^2 / r1 + s0^2 / r0),
    bound = |Delta| + t_{1-a, nu} SE,                      nu = Welch's degrees of freedom,

and U is the largest bound. With a = alpha this holds for a node fixed in advance. The node with the largest effect is
such a node, though we do not know which it is, so "no unverified node has |effect| above U" has confidence 1 - alpha
as it stands. With a = alpha / nodes (Bonferroni) the bounds of all nodes hold at once, each for its own node.

What is bounded is Delta: the effect of a node on top of random background patches of its stratum, averaged over them,
signed and averaged over pairs. It is the node's effect alone where effects add up (to first order they do), and effects
of opposite sign in different pairs cancel in it. Nodes of other strata are not patched with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy import special
from torch import Tensor

from patchkit.errors import InputError
from patchkit.methods.search import Effects
from patchkit.results.verification import Bound, BoundStratum

#: In the bound's list of nodes.
LARGEST = 10
# Nodes whose membership is multiplied at once, and draws that are made at once: they bound the memory.
_NODES_AT_ONCE = 1 << 14
_DRAWS_AT_ONCE = 64


@dataclass(frozen=True)
class BoundOptions:
    """How subsets are drawn.

    Attributes:
        alpha: 1 - confidence.
        p: probability of a node to be in a subset. SE does not depend on it where effects add up; a small p keeps the
            run near the prompts' own, a large one needs fewer draws.
        min_count: draws go on until every node was in so many and out of so many. SE shrinks as 1 / sqrt(draws).
        seed: of subsets and pairs.
    """

    alpha: float = 0.05
    p: float = 0.1
    min_count: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("alpha", "p"):
            if not 0 < getattr(self, name) < 1:
                raise InputError(f"bound: {name} must lie between 0 and 1, found {getattr(self, name)}")
        if self.min_count < 2:
            raise InputError(f"bound: min_count must be at least 2, for a variance; found {self.min_count}")


@dataclass(frozen=True, eq=False)
class NodeBounds:
    """Per node: the difference of means, its upper bound at level alpha, and at the familywise level."""

    delta: Float[Tensor, " nodes"]
    bound: Float[Tensor, " nodes"]
    familywise: Float[Tensor, " nodes"]


def draw_subsets(
    nodes: int, p: float, min_count: int, generator: torch.Generator
) -> Bool[Tensor, "draws nodes"]:
    """Bernoulli(p) subsets until every node was in `min_count` of them and out of `min_count`.

    When to stop depends on who is in which subset, never on effects, so what is measured afterwards is not biased.
    """
    inside = torch.zeros(0, nodes, dtype=torch.bool)
    count = torch.zeros(nodes, dtype=torch.long)
    while True:
        more = torch.rand(_DRAWS_AT_ONCE, nodes, generator=generator) < p
        seen = torch.arange(1, _DRAWS_AT_ONCE + 1)[:, None] + len(inside)
        within = more.cumsum(0) + count
        enough = (torch.minimum(within, seen - within) >= min_count).all(1)
        if bool(enough.any()):
            return torch.cat([inside, more[: int(enough.int().argmax()) + 1]])
        inside, count = torch.cat([inside, more]), within[-1]


def bound_from_draws(
    inside: Bool[Tensor, "draws nodes"], y: Float[Tensor, " draws"], alpha: float, family: int
) -> NodeBounds:
    """Welch's upper bound of |Delta| of every node, in float64 (handbook section 1.9).

    Args:
        inside: which nodes each draw patched; every node at least twice in and twice out.
        y: the draws' effects, signed.
        alpha: 1 - confidence of one bound.
        family: the number of bounds that hold at once at the familywise level, alpha / family each.

    Raises:
        InputError: a node that was in or out less than twice, and has no variance there.
    """
    parts = [_bound(part, y, alpha, family) for part in inside.split(_NODES_AT_ONCE, dim=1)]
    fields = ("delta", "bound", "familywise")
    return NodeBounds(*(torch.cat([getattr(part, name) for part in parts]) for name in fields))


def _bound(inside: Tensor, y: Tensor, alpha: float, family: int) -> NodeBounds:
    # From one of the values: sums of squares lose less, and effects that are all equal give variances of exactly 0.
    y = y.double() - y[0].double()
    members = inside.double()
    with_ = members.sum(0)
    without = len(y) - with_
    if float(torch.minimum(with_, without).min()) < 2:
        node = int(torch.minimum(with_, without).argmin())
        raise InputError(
            f"node {node} of the draws was in {int(with_[node])} of {len(y)} and out of {int(without[node])}; "
            "expected at least 2 each, draw more subsets"
        )
    total, squares = members.T @ y, members.T @ y.square()
    mean1, mean0 = total / with_, (y.sum() - total) / without
    # s^2 / r, the squared standard error of each mean.
    error1 = (squares - with_ * mean1**2).clamp(min=0) / (with_ - 1) / with_
    error0 = (y.square().sum() - squares - without * mean0**2).clamp(min=0) / (without - 1) / without
    error = error1 + error0
    # Where nothing varies SE is 0, and any number of degrees of freedom gives the bound |Delta|.
    freedom = error**2 / (error1**2 / (with_ - 1) + error0**2 / (without - 1))
    freedom = torch.where(error > 0, freedom, len(y) - 2.0).numpy()
    delta, spread = mean1 - mean0, error.sqrt()

    def upper(level: float) -> Tensor:
        # By symmetry the quantile of 1 - level, without the rounding of 1 - level.
        return delta.abs() + torch.from_numpy(np.asarray(-special.stdtrit(freedom, level))) * spread

    return NodeBounds(delta, upper(alpha), upper(alpha / family))


def bound_effects(
    effects: Effects,
    ids: Int[Tensor, " nodes"],
    strata: Sequence[str],
    names: Sequence[str],
    pairs: int,
    options: BoundOptions | None = None,
) -> Bound:
    """Bounds the effects of unverified nodes from random subsets, stratum by stratum.

    Args:
        effects: signed effects of sets of node numbers, each in the pair whose number stands beside it.
        ids: numbers of the unverified nodes.
        strata: for each of them, its kind and layer, e.g. `q.3`.
        names: of the nodes.
        pairs: how many there are; each draw is of one of them, at random, and costs 1 / pairs.

    Returns:
        The bound; its sentences say what it means and what it does not.

    Raises:
        InputError: names or strata that do not fit the nodes.
    """
    options = options or BoundOptions()
    if not len(ids) == len(strata) == len(names):
        raise InputError(f"{len(ids)} unverified nodes with {len(strata)} strata and {len(names)} names")
    if not len(ids):
        return _summary(options, ids, [], [], names, 0.0)
    generator = torch.Generator().manual_seed(options.seed)
    members: dict[str, list[int]] = {}
    for place, name in enumerate(strata):
        members.setdefault(name, []).append(place)
    drawn = {
        name: draw_subsets(len(places), options.p, options.min_count, generator)
        for name, places in members.items()
    }
    sets = [ids[torch.tensor(members[name])[row]] for name, inside in drawn.items() for row in inside]
    values = effects(sets, torch.randint(pairs, (len(sets),), generator=generator).tolist())
    parts = values.split([len(inside) for inside in drawn.values()])
    found = [
        bound_from_draws(inside, y, options.alpha, len(ids))
        for inside, y in zip(drawn.values(), parts, strict=True)
    ]
    each = [
        BoundStratum(
            name=name,
            nodes=inside.shape[1],
            draws=len(inside),
            p=options.p,
            bound=float(bounds.bound.max()),
            familywise=float(bounds.familywise.max()),
        )
        for (name, inside), bounds in zip(drawn.items(), found, strict=True)
    ]
    order = [place for places in members.values() for place in places]
    return _summary(options, ids, each, found, [names[place] for place in order], len(sets) / pairs)


def _summary(
    options: BoundOptions,
    ids: Int[Tensor, " nodes"],
    strata: list[BoundStratum],
    found: list[NodeBounds],
    names: Sequence[str],
    cost: float,
) -> Bound:
    """The largest bounds over strata; `names` are in the order of the strata."""
    rows = [
        (delta, bound)
        for part in found
        for delta, bound in zip(part.delta.tolist(), part.bound.tolist(), strict=True)
    ]
    largest = sorted(zip(names, rows, strict=True), key=lambda item: -item[1][1])[:LARGEST]
    return Bound(
        alpha=options.alpha,
        unverified=len(ids),
        bound=max((stratum.bound for stratum in strata), default=0.0),
        familywise=max((stratum.familywise for stratum in strata), default=0.0),
        strata=strata,
        largest=[(name, delta, bound) for name, (delta, bound) in largest],
        cost=cost,
    )
