"""Searches for the nodes that matter, and the order in which each verifies them: what AtP and AtP* compete with.

A node is verified when it has been patched on its own, exactly. A search is an order of verification and what has
been paid by then; the unit of cost is one forward per pair (AtP* paper, arXiv 2403.00745, its baselines). Nodes are
numbered 0 to n-1 here. The effect of a set on P pairs is the mean over pairs of |effect| and costs P forwards, 1 in
this unit; a draw that patches one pair only costs 1/P.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from patchkit.errors import InputError

#: Signed effects: each set of nodes patched at once, in the pair of the number beside it.
Effects = Callable[[Sequence[Tensor], Sequence[int]], Tensor]
#: Effects of sets without sign, over all pairs: see `mean_magnitude`.
SetEffect = Callable[[Sequence[Tensor]], Tensor]

# Subsets whose membership is multiplied at once: bounds the memory of a product in float64.
_DRAWS_AT_ONCE = 64


@dataclass(frozen=True, eq=False)
class Search:
    """An order of verification and its cost, in forwards per pair.

    Attributes:
        order: all node numbers, the first verified first.
        cost_at: for each node number, everything paid when that node has been verified.
        preparation: paid before the first verification; 0 where looking and verifying are one.
    """

    name: str
    order: Int[Tensor, " nodes"]
    cost_at: Float[Tensor, " nodes"]
    preparation: float = 0.0


def iterative(nodes: int) -> Search:
    """Brute force: every node in its natural order, which knows nothing. Costs 1 a node."""
    return _verified_in("iterative", torch.arange(nodes), 0.0)


def random(nodes: int, seed: int = 0) -> Search:
    """Every node in a random order, which knows nothing either and has no luck with where nodes stand."""
    generator = torch.Generator().manual_seed(seed)
    return _verified_in("random", torch.randperm(nodes, generator=generator), 0.0)


def from_scores(name: str, scores: Float[Tensor, " nodes"], preparation: float) -> Search:
    """Nodes by descending score, ties by number: AtP, AtP*, or anything that estimates magnitudes.

    Args:
        preparation: what the scores cost, in forwards per pair (a backward over activations counts 1).

    Raises:
        InputError: a score is NaN: that node was not estimated, and has no place in an order.
    """
    if bool(scores.isnan().any()):
        missing = int(scores.isnan().nonzero()[0])
        raise InputError(f"{name}: node {missing} has no score (NaN), and a search must order every node")
    return _verified_in(name, torch.sort(scores, descending=True, stable=True).indices, preparation)


def subsampling(
    effects: Effects, nodes: int, pairs: int, *, p: float = 0.03, draws: int | None = None, seed: int = 0
) -> Search:
    """Subsampling: patch random subsets; rank nodes by |mean effect with the node - mean effect without it|.

    Each draw patches a Bernoulli subset in one pair, and the pairs take turns. Effects keep their sign, since means of
    absolute values would mix the node's own effect with that of the rest; what has opposite signs in different pairs
    therefore cancels. A node that was in no draw, or in all, comes last.

    Args:
        p: probability of a node to be in a subset.
        draws: None for 10 / p, so that a node is in ten of them.

    Raises:
        InputError: p outside (0, 1), or no draws.
    """
    if not 0 < p < 1:
        raise InputError(f"subsampling: p must lie between 0 and 1, found {p}")
    draws = round(10 / p) if draws is None else draws
    if draws < 1:
        raise InputError(f"subsampling: expected at least one draw, found {draws}")
    generator = torch.Generator().manual_seed(seed)
    inside = torch.rand(draws, nodes, generator=generator) < p
    numbers = [draw % pairs for draw in range(draws)]
    values = effects([members.nonzero()[:, 0] for members in inside], numbers)
    scores = difference_of_means(inside, values).abs().nan_to_num(-1.0)
    return from_scores("subsampling", scores, draws / pairs)


def difference_of_means(
    inside: Bool[Tensor, "draws nodes"], values: Float[Tensor, " draws"]
) -> Float[Tensor, " nodes"]:
    """mean(values where the node is in) - mean(values where it is not), in float64; NaN where one side is empty."""
    values = values.double()
    total = sum(
        members.double().T @ part
        for members, part in zip(inside.split(_DRAWS_AT_ONCE), values.split(_DRAWS_AT_ONCE), strict=True)
    )
    count = inside.sum(0)
    return total / count - (values.sum() - total) / (len(values) - count)


def blocks(effect: SetEffect, order: Int[Tensor, " nodes"], size: int | None = None) -> Search:
    """Blocks: patch each block of `size` neighbours in `order`, then verify block by block, the largest effect first.

    Args:
        effect: of sets, without sign.
        order: of the nodes before blocks are cut; inside a block they are verified in this order.
        size: None for the square root of the number of nodes, at which blocks are as many as their nodes.

    Raises:
        InputError: the size is below 1.
    """
    size = max(1, round(len(order) ** 0.5)) if size is None else size
    if size < 1:
        raise InputError(f"blocks: expected a size of at least 1, found {size}")
    parts = order.split(size)
    ranked = torch.sort(effect(parts), descending=True, stable=True).indices
    return _verified_in("blocks", torch.cat([parts[i] for i in ranked.tolist()]), float(len(parts)))


def hierarchical(effect: SetEffect, nodes: int, branching: int = 4) -> Search:
    """Hierarchical: best-first search down a tree over the natural order of the nodes.

    The tree cuts a range of nodes into `branching` ranges as equal as can be. The open range with the largest effect is
    opened next: each of its parts is patched, for 1 each. A part of one node is verified by that, at once.

    Effects of ranges do not depend on the search, so they are asked for together; the costs are counted as if one by one.

    Raises:
        InputError: branching below 2.
    """
    if branching < 2:
        raise InputError(f"hierarchical: expected a branching factor of at least 2, found {branching}")
    if nodes == 1:
        return _verified_in("hierarchical", torch.arange(1), 0.0)
    ranges = _inner_ranges(nodes, branching)
    asked = [torch.arange(start, stop) for start, stop in ranges]
    size = dict(zip(ranges, effect(asked).tolist(), strict=True)) if asked else {}
    open_ranges: list[tuple[float, int, int]] = [(-torch.inf, 0, nodes)]
    paid, order, cost_at = 0, [], torch.zeros(nodes, dtype=torch.float64)
    while open_ranges:
        _, start, stop = heapq.heappop(open_ranges)
        for part in _cut(start, stop, branching):
            paid += 1
            if part[1] - part[0] == 1:
                order.append(part[0])
                cost_at[part[0]] = paid
            else:
                heapq.heappush(open_ranges, (-size[part], *part))
    return Search("hierarchical", torch.tensor(order), cost_at)


def mean_magnitude(effects: Effects, pairs: int) -> SetEffect:
    """The effect of a set on a distribution: the mean over pairs of |effect|, as the true c(n) of a node has it."""

    def magnitude(sets: Sequence[Tensor]) -> Tensor:
        rows = [nodes for nodes in sets for _ in range(pairs)]
        return effects(rows, list(range(pairs)) * len(sets)).abs().reshape(len(sets), pairs).mean(1)

    return magnitude


def _verified_in(name: str, order: Int[Tensor, " nodes"], preparation: float) -> Search:
    cost_at = torch.empty(len(order), dtype=torch.float64)
    cost_at[order] = preparation + torch.arange(1.0, len(order) + 1, dtype=torch.float64)
    return Search(name, order, cost_at, preparation)


def _cut(start: int, stop: int, branching: int) -> list[tuple[int, int]]:
    """At most `branching` ranges, as equal as can be, none of them empty."""
    parts = min(branching, stop - start)
    edges = [start + (stop - start) * i // parts for i in range(parts + 1)]
    return list(zip(edges[:-1], edges[1:], strict=True))


def _inner_ranges(nodes: int, branching: int) -> list[tuple[int, int]]:
    """The ranges of more than one node that the tree has below its root."""
    found: list[tuple[int, int]] = []
    todo = [(0, nodes)]
    while todo:
        inner = [part for part in _cut(*todo.pop(), branching) if part[1] - part[0] > 1]
        found += inner
        todo += inner
    return found
