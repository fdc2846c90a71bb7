"""Cost of verified recall: curves by hand and by the handbook's loop; the oracle is 1, and nobody beats it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from patchkit.errors import InputError
from patchkit.methods import search
from patchkit.methods.recall import Recall, cost_curve, mean_recall


def by_loop(true_order: list[int], method_order: list[int], prep: float) -> tuple[list[float], float]:
    """Relative cost and aggregate of an order, as section 1.8 of the handbook writes them."""
    place = {node: index + 1 for index, node in enumerate(method_order)}
    worst, relative = 0, []
    for x, node in enumerate(true_order, start=1):
        worst = max(worst, place[node])
        relative.append((prep + worst) / x)
    weights = [1 / x for x in range(1, len(true_order) + 1)]
    logs = sum(weight * math.log(value) for weight, value in zip(weights, relative, strict=True))
    return relative, math.exp(logs / sum(weights))


def test_five_nodes_by_hand() -> None:
    truth = torch.tensor([3.0, 5.0, 1.0, 4.0, 2.0])  # true order 1, 3, 0, 4, 2
    found = cost_curve(truth, search.from_scores("atp", torch.tensor([2.0, 9.0, 8.0, 1.0, 3.0]), 3.0))
    # Verified as 1, 2, 4, 0, 3: places of the true order are 1, 5, 4, 3, 2.
    assert found.cost.tolist() == [4, 8, 8, 8, 8]
    assert found.relative.tolist() == [4, 4, 8 / 3, 2, 8 / 5]
    weights = [1, 1 / 2, 1 / 3, 1 / 4, 1 / 5]
    logs = [w * math.log(v) for w, v in zip(weights, [4, 4, 8 / 3, 2, 8 / 5], strict=True)]
    assert found.aggregate == pytest.approx(math.exp(sum(logs) / sum(weights)), rel=1e-12)
    assert (found.name, found.preparation) == ("atp", 3.0)
    assert found.unprepared().cost.tolist() == [1, 5, 5, 5, 5]
    assert found.unprepared().preparation == 0


@pytest.mark.parametrize("prep", [0.0, 3.0, 17.25])
def test_curves_are_those_of_the_loop(prep: float) -> None:
    torch.manual_seed(0)
    for nodes in (1, 2, 30):
        truth = torch.rand(nodes) + 0.1
        made = search.from_scores("x", torch.rand(nodes), prep)
        found = cost_curve(truth, made)
        relative, aggregate = by_loop(truth.argsort(descending=True).tolist(), made.order.tolist(), prep)
        assert found.relative.tolist() == pytest.approx(relative, rel=1e-6)
        assert found.aggregate == pytest.approx(aggregate, rel=1e-6)


def test_the_oracle_is_exactly_one() -> None:
    torch.manual_seed(0)
    truth = torch.rand(1000)
    found = cost_curve(truth, search.from_scores("oracle", truth, 0.0))
    assert bool((found.relative == 1).all())
    assert found.aggregate == 1.0


def additive(values: Tensor) -> search.Effects:
    return lambda sets, numbers: torch.stack([values[n, s].sum() for s, n in zip(sets, numbers, strict=True)])


@settings(max_examples=60, deadline=None)
@given(
    # Few different values, so that ties and zeros are common.
    values=st.lists(st.sampled_from([0.0, 0.5, -0.5, 1.0, 7.0]), min_size=2, max_size=40).filter(any),
    seed=st.integers(0, 5),
)
def test_no_search_beats_the_oracle(values: list[float], seed: int) -> None:
    row = torch.tensor([values])
    effects, nodes = additive(row), len(values)
    magnitude = search.mean_magnitude(effects, 1)
    searches = [
        search.iterative(nodes),
        search.random(nodes, seed),
        search.subsampling(effects, nodes, 1, p=0.3, draws=5, seed=seed),
        search.blocks(magnitude, torch.arange(nodes), 3),
        search.hierarchical(magnitude, nodes, 3),
        search.from_scores("oracle", row[0].abs(), 0.0),
    ]
    for each in searches:
        found = cost_curve(row[0].abs(), each)
        assert len(found.cost) == sum(value != 0 for value in values)
        assert float(found.relative.min()) >= 1 and found.aggregate >= 1
        assert bool((found.cost.diff() >= 0).all())
    assert found.aggregate == 1


def test_nodes_without_effect_are_not_asked_for_but_paid_for() -> None:
    truth = torch.tensor([0.0, 1e-6, 2.0, 0.0, 1.0])
    found = cost_curve(truth, search.iterative(5), floor=1e-5)
    assert found.cost.tolist() == [3, 5]
    assert len(cost_curve(truth, search.iterative(5)).cost) == 3
    with pytest.raises(InputError, match="no node has an effect above 2, so there is nothing to recall"):
        cost_curve(truth, search.iterative(5), floor=2.0)


def test_ties_are_nobodys_advantage() -> None:
    truth = torch.tensor([1.0, 1.0, 1.0, 2.0])
    # Three orders of the tied nodes, one curve.
    for scores in ([3.0, 2.0, 1.0, 4.0], [1.0, 2.0, 3.0, 4.0], [2.0, 3.0, 1.0, 4.0]):
        assert cost_curve(truth, search.from_scores("x", torch.tensor(scores), 0.0)).aggregate == 1.0


def test_truth_and_search_must_speak_of_the_same_nodes() -> None:
    with pytest.raises(InputError, match="iterative orders 4 nodes, but 3 nodes have a true effect"):
        cost_curve(torch.ones(3), search.iterative(4))
    with pytest.raises(InputError, match=r"node 1 has no true effect \(NaN\)"):
        cost_curve(torch.tensor([1.0, math.nan]), search.iterative(2))


def test_pairs_are_averaged_on_the_logarithmic_axis() -> None:
    first = Recall("x", 1.0, torch.tensor([2.0, 8.0, 9.0]).double())
    second = Recall("x", 3.0, torch.tensor([8.0, 8.0]).double())
    both = mean_recall([first, second])
    assert both.cost.tolist() == pytest.approx([4.0, 8.0])
    assert (both.name, both.preparation) == ("x", 2.0)
