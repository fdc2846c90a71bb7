"""Searches on made-up effects: orders and costs by hand, against slow loops, and what each must never do."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from patchkit.errors import InputError
from patchkit.methods import search
from patchkit.methods.search import Effects, Search, SetEffect


def additive(values: Tensor) -> Effects:
    """Effects of sets that are sums of node effects, `values` [pairs, nodes]."""

    def effects(sets: Sequence[Tensor], numbers: Sequence[int]) -> Tensor:
        pairs = zip(sets, numbers, strict=True)
        return torch.stack([values[number, nodes].sum() for nodes, number in pairs])

    return effects


def one_pair(*values: float) -> SetEffect:
    return search.mean_magnitude(additive(torch.tensor([values])), 1)


def costs(found: Search) -> list[float]:
    """Cost when each node of the order is verified."""
    return found.cost_at[found.order].tolist()


def test_uninformed_searches_pay_one_a_node() -> None:
    assert search.iterative(5).order.tolist() == [0, 1, 2, 3, 4]
    assert costs(search.iterative(5)) == [1, 2, 3, 4, 5]
    drawn = search.random(50, seed=3)
    assert sorted(drawn.order.tolist()) == list(range(50)) != drawn.order.tolist()
    assert costs(drawn) == list(range(1, 51))
    assert search.random(50, seed=3).order.tolist() == drawn.order.tolist()
    assert search.random(50, seed=4).order.tolist() != drawn.order.tolist()


def test_scores_are_verified_from_the_largest_on() -> None:
    found = search.from_scores("atp", torch.tensor([0.5, 2.0, 0.0, 2.0, 1.0]), 3.0)
    # Nodes 1 and 3 tie: by number.
    assert found.order.tolist() == [1, 3, 4, 0, 2]
    assert found.cost_at.tolist() == [7, 4, 8, 5, 6]
    assert (found.name, found.preparation) == ("atp", 3.0)
    with pytest.raises(InputError, match=r"atp: node 1 has no score \(NaN\)"):
        search.from_scores("atp", torch.tensor([0.5, math.nan]), 3.0)


def test_blocks_by_hand() -> None:
    # Blocks [0 1], [2 3], [4] have effects 3 - 1 = 2, 5, 4.
    found = search.blocks(one_pair(3.0, -1.0, 0.0, 5.0, -4.0), torch.arange(5), size=2)
    assert found.order.tolist() == [2, 3, 4, 0, 1]
    assert costs(found) == [4, 5, 6, 7, 8]
    assert found.preparation == 3
    # Cut out of another order: [4 3], [2 1], [0].
    found = search.blocks(one_pair(3.0, -1.0, 0.0, 5.0, -4.0), torch.tensor([4, 3, 2, 1, 0]), size=2)
    assert found.order.tolist() == [0, 4, 3, 2, 1]


@pytest.mark.parametrize("size", [1, 3, 7, 30, 100, None])
def test_blocks_against_a_loop(size: int | None) -> None:
    torch.manual_seed(0)
    values = torch.randn(3, 50)
    found = search.blocks(search.mean_magnitude(additive(values), 3), torch.arange(50), size)
    width = 7 if size is None else size
    parts = [list(range(start, min(start + width, 50))) for start in range(0, 50, width)]

    def effect(part: list[int]) -> float:
        return sum(abs(sum(float(values[pair, node]) for node in part)) for pair in range(3)) / 3

    expected = [node for part in sorted(parts, key=effect, reverse=True) for node in part]
    assert found.order.tolist() == expected
    assert costs(found) == [len(parts) + place for place in range(1, 51)]


def test_hierarchical_by_hand() -> None:
    # 5 nodes in two: [0 1] and [2 3 4]; then [2] and [3 4].
    found = search.hierarchical(one_pair(0.0, 1.0, 0.0, 0.0, 9.0), 5, branching=2)
    # Paid: [0 1] 1, [2 3 4] 2; opens [2 3 4]: 2 at 3, [3 4] 4; opens it: 3 at 5, 4 at 6; opens [0 1]: 0 at 7, 1 at 8.
    assert found.order.tolist() == [2, 3, 4, 0, 1]
    assert found.cost_at.tolist() == [7, 8, 3, 5, 6]
    assert found.preparation == 0


def slow_hierarchical(effect: Callable[[list[int]], float], nodes: int, branching: int) -> dict[int, int]:
    """Cost of every node, one range at a time and without a queue."""
    waiting = [(math.inf, list(range(nodes)))]
    paid, cost_at = 0, {}
    while waiting:
        best = max(waiting, key=lambda entry: (entry[0], -entry[1][0]))
        waiting.remove(best)
        members = best[1]
        parts = min(branching, len(members))
        edges = [len(members) * i // parts for i in range(parts + 1)]
        for begin, end in zip(edges, edges[1:], strict=False):
            part = members[begin:end]
            paid += 1
            if len(part) == 1:
                cost_at[part[0]] = paid
            else:
                waiting.append((effect(part), part))
    return cost_at


@pytest.mark.parametrize("branching", [2, 3, 4, 10])
@pytest.mark.parametrize("nodes", [1, 2, 9, 64, 101])
def test_hierarchical_against_a_loop(nodes: int, branching: int) -> None:
    torch.manual_seed(nodes)
    values = torch.randn(2, nodes).double()
    found = search.hierarchical(search.mean_magnitude(additive(values), 2), nodes, branching)

    def effect(part: list[int]) -> float:
        return float(values[:, part].sum(1).abs().mean())

    expected = slow_hierarchical(effect, nodes, branching)
    assert {node: int(cost) for node, cost in enumerate(found.cost_at)} == expected
    assert sorted(found.order.tolist()) == list(range(nodes))
    assert costs(found) == sorted(costs(found))


@pytest.mark.parametrize("branching", [2, 3, 4])
def test_hierarchical_finds_one_planted_node_in_logarithmic_time(branching: int) -> None:
    for planted in (0, 777, 1023):
        values = torch.zeros(1, 1024)
        values[0, planted] = -5.0
        found = search.hierarchical(search.mean_magnitude(additive(values), 1), 1024, branching)
        assert float(found.cost_at[planted]) <= branching * math.ceil(math.log(1024, branching))


def test_ranges_without_effect_are_opened_in_their_order() -> None:
    found = search.hierarchical(one_pair(*[0.0] * 9), 9, branching=3)
    assert found.order.tolist() == list(range(9))
    assert found.cost_at.tolist() == list(range(4, 13))


def slow_subsampling(values: Tensor, inside: Tensor) -> list[float]:
    """|mean in - mean out| of every node; draw r is of pair r modulo pairs."""
    scores = []
    for node in range(values.shape[1]):
        pools: dict[bool, list[float]] = {True: [], False: []}
        for draw, members in enumerate(inside):
            y = float(values[draw % len(values)][members].double().sum())
            pools[bool(members[node])].append(y)
        with_, without = pools[True], pools[False]
        both = with_ and without
        scores.append(abs(sum(with_) / len(with_) - sum(without) / len(without)) if both else -1.0)
    return scores


@pytest.mark.parametrize(("p", "draws"), [(0.2, 150), (0.02, 90), (0.03, None)])
def test_subsampling_against_a_loop(p: float, draws: int | None) -> None:
    torch.manual_seed(0)
    values = torch.randn(3, 40).double()
    found = search.subsampling(additive(values), 40, 3, p=p, draws=draws, seed=5)
    count = draws or 333
    inside = torch.rand(count, 40, generator=torch.Generator().manual_seed(5)) < p
    scores = slow_subsampling(values, inside)
    assert found.order.tolist() == sorted(range(40), key=lambda node: -scores[node])
    assert found.preparation == count / 3
    assert costs(found) == pytest.approx([count / 3 + place for place in range(1, 41)])


def test_a_node_that_was_never_drawn_comes_last() -> None:
    inside = torch.tensor([[True, False, True], [False, False, True]])
    means = search.difference_of_means(inside, torch.tensor([3.0, 1.0]))
    assert means[0] == 2.0 and bool(means[1:].isnan().all())
    # One draw: every node is in it or not, so nothing is known.
    found = search.subsampling(additive(torch.ones(1, 4)), 4, 1, p=0.5, draws=1)
    assert found.order.tolist() == [0, 1, 2, 3]


def test_subsampling_finds_what_is_planted() -> None:
    values = torch.zeros(2, 200)
    values[:, 150], values[:, 20] = 4.0, -2.0
    found = search.subsampling(additive(values), 200, 2, p=0.1, draws=200)
    assert found.order[:2].tolist() == [150, 20]


def test_the_effect_on_a_distribution_is_the_mean_of_absolute_values() -> None:
    effect = search.mean_magnitude(additive(torch.tensor([[2.0, 1.0], [-4.0, 1.0]])), 2)
    sets = [torch.tensor([0]), torch.tensor([0, 1]), torch.tensor([], dtype=torch.long)]
    assert effect(sets).tolist() == [3.0, 3.0, 0.0]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda e: search.subsampling(e, 3, 1, p=0.0), "p must lie between 0 and 1, found 0"),
        (lambda e: search.subsampling(e, 3, 1, p=1.0), "p must lie between 0 and 1, found 1"),
        (lambda e: search.subsampling(e, 3, 1, draws=0), "at least one draw, found 0"),
        (lambda e: search.blocks(search.mean_magnitude(e, 1), torch.arange(3), 0), "size of at least 1"),
        (lambda e: search.hierarchical(search.mean_magnitude(e, 1), 3, 1), "at least 2, found 1"),
    ],
)
def test_parameters_that_make_no_search_are_refused(call: Callable[[Effects], Search], words: str) -> None:
    with pytest.raises(InputError, match=words):
        call(additive(torch.ones(1, 3)))
