"""The bound on what was missed: against scipy's Welch interval, on constant effects, and how often it holds."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from scipy import stats
from torch import Tensor

from patchkit.errors import InputError
from patchkit.methods.diagnostics import (
    BoundOptions,
    NodeBounds,
    bound_effects,
    bound_from_draws,
    draw_subsets,
)

REPEATS = 1000


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def by_scipy(inside: Tensor, y: Tensor, level: float) -> list[float]:
    """max(|low|, |high|) of the two-sided Welch interval whose tails are `level` each: |Delta| + t SE."""
    found = []
    for members in inside.T:
        test = stats.ttest_ind(y[members].numpy(), y[~members].numpy(), equal_var=False)
        interval = test.confidence_interval(1 - 2 * level)
        found.append(max(abs(interval.low), abs(interval.high)))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shift", [0.0, 50.0])
def test_the_bound_is_welchs_interval(shift: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    inside = draw_subsets(9, 0.2, 4, generator(1))
    # Draws with node 3 vary more, so that the variances of its two sides differ.
    y = torch.randn(len(inside)) * (1 + 5 * inside[:, 3]) + inside.float() @ torch.randn(9) + shift
    y = y.to(dtype)
    found = bound_from_draws(inside, y, alpha=0.05, family=40)
    assert found.bound.tolist() == pytest.approx(by_scipy(inside, y.double(), 0.05), rel=1e-9)
    assert found.familywise.tolist() == pytest.approx(by_scipy(inside, y.double(), 0.05 / 40), rel=1e-9)
    means = [float(y.double()[m].mean() - y.double()[~m].mean()) for m in inside.T]
    assert found.delta.tolist() == pytest.approx(means, rel=1e-9, abs=1e-12)
    assert bool((found.familywise > found.bound).all()) and bool((found.bound > found.delta.abs()).all())


@pytest.mark.parametrize("value", [0.0, 0.1, -3.7])
def test_effects_that_never_vary_are_bounded_by_nothing(value: float) -> None:
    inside = draw_subsets(6, 0.3, 3, generator(0))
    y = torch.full((len(inside),), value, dtype=torch.float64)
    found = bound_from_draws(inside, y, 0.05, 6)
    for part in (found.delta, found.bound, found.familywise):
        assert part.tolist() == [0.0] * 6


def test_effects_that_vary_by_one_node_alone_are_exact() -> None:
    inside = draw_subsets(6, 0.5, 3, generator(0))
    found = bound_from_draws(inside, 2.5 * inside[:, 4].double(), 0.05, 6)
    assert float(found.delta[4]) == 2.5
    assert float(found.bound[4]) == float(found.familywise[4]) == 2.5
    assert bool(found.bound.isfinite().all())


@pytest.mark.parametrize(("p", "count"), [(0.1, 5), (0.5, 20), (0.9, 3)])
def test_draws_stop_as_soon_as_every_node_was_in_and_out(p: float, count: int) -> None:
    inside = draw_subsets(30, p, count, generator(2))
    fewest = torch.minimum(inside.sum(0), (~inside).sum(0)).min()
    before = torch.minimum(inside[:-1].sum(0), (~inside[:-1]).sum(0)).min()
    assert (int(fewest), int(before)) == (count, count - 1)
    assert abs(float(inside.float().mean()) - p) < 0.05
    assert torch.equal(inside, draw_subsets(30, p, count, generator(2)))
    assert not torch.equal(inside[:4], draw_subsets(30, p, count, generator(3))[:4])


def test_a_node_without_two_draws_on_a_side_is_refused() -> None:
    inside = torch.tensor([[True, True], [True, False], [False, False], [False, False]])
    with pytest.raises(InputError, match="node 1 of the draws was in 1 of 4 and out of 3"):
        bound_from_draws(inside, torch.randn(4), 0.05, 2)


def simulate(seed: int, planted: int) -> tuple[Tensor, NodeBounds]:
    """(mean effects, bounds) of 12 nodes that add up, in a random one of 5 pairs, with noise."""
    source = generator(seed)
    effects = 0.2 * torch.randn(5, 12, generator=source)
    # Some nodes stand out, with signs and places of their own in each repeat.
    chosen = torch.randperm(12, generator=source)[:planted]
    effects[:, chosen] += 1.5 * (-1.0) ** torch.randint(2, (planted,), generator=source)
    inside = draw_subsets(12, 0.3, 15, source)
    pair = torch.randint(5, (len(inside),), generator=source)
    noise = 0.5 * torch.randn(len(inside), generator=source)
    y = (inside * effects[pair]).sum(1) + noise
    return effects.mean(0), bound_from_draws(inside, y, 0.05, 12)


class Repeats:
    """1,000 repeats, as arrays `[repeats, nodes]`, and shares of them."""

    def __init__(self, planted: int) -> None:
        effects, bounds = zip(*(simulate(seed, planted) for seed in range(REPEATS)), strict=True)
        self.truth = torch.stack(effects).abs()
        self.delta = torch.stack([each.delta for each in bounds]).abs()
        self.bound = torch.stack([each.bound for each in bounds])
        self.familywise = torch.stack([each.familywise for each in bounds])

    def covered(self, bound: Tensor) -> float:
        """The share in which the largest bound is at least the largest effect: the statement about U."""
        return float((bound.amax(1) >= self.truth.amax(1)).double().mean())


@pytest.fixture(scope="module")
def several() -> Repeats:
    return Repeats(planted=4)


@pytest.fixture(scope="module")
def single() -> Repeats:
    return Repeats(planted=1)


def test_the_reported_bound_holds_in_95_percent(several: Repeats) -> None:
    assert several.covered(several.bound) >= 0.95
    assert several.covered(several.familywise) >= 0.95
    # Familywise every node is under its own bound, in all nodes at once.
    assert float((several.familywise >= several.truth).all(1).double().mean()) >= 0.95
    # The bounds at level alpha do not hold in all nodes at once: that is what Bonferroni is for.
    assert float((several.bound >= several.truth).all(1).double().mean()) < 0.9


@pytest.mark.slow
def test_the_hardest_case_has_the_level_that_is_said(single: Repeats) -> None:
    """One node stands out, so U is its own bound: it holds in 95 %, neither less nor in all (3 deviations: 2.1 %)."""
    assert 0.929 <= single.covered(single.bound) <= 0.971
    assert single.covered(single.familywise) >= 0.98
    assert float((single.familywise >= single.truth).all(1).double().mean()) >= 0.95
    excess = (single.bound.amax(1) - single.truth.amax(1)).mean()
    assert 0.1 < float(excess) < 0.6


@pytest.mark.parametrize("planted", ["several", "single"])
def test_without_its_standard_error_the_bound_would_fail(
    planted: str, request: pytest.FixtureRequest
) -> None:
    """What the coverage tests can see: without SE, or with t of 0, |Delta| is left; half of t SE is too little too."""
    repeats: Repeats = request.getfixturevalue(planted)
    assert repeats.covered(repeats.delta) < 0.95
    assert single_share(repeats, repeats.delta) < 0.6
    assert single_share(repeats, (repeats.delta + repeats.bound) / 2) < 0.9


def single_share(repeats: Repeats, bound: Tensor) -> float:
    """The share in which the node with the largest effect is under its own bound."""
    largest = repeats.truth.argmax(1, keepdim=True)
    return float((bound.gather(1, largest) >= repeats.truth.gather(1, largest)).double().mean())


def additive(values: Tensor, asked: list[tuple[list[int], int]]):
    def effects(sets: Sequence[Tensor], numbers: Sequence[int]) -> Tensor:
        asked.extend((nodes.tolist(), number) for nodes, number in zip(sets, numbers, strict=True))
        return torch.stack([values[n, nodes].sum() for nodes, n in zip(sets, numbers, strict=True)])

    return effects


def test_strata_are_drawn_apart_and_the_largest_bound_is_reported() -> None:
    torch.manual_seed(0)
    values = 0.01 * torch.randn(4, 40)
    values[:, 17] = -3.0
    ids = torch.tensor([*range(2, 12), *range(15, 30)])
    # The strata are mixed, so that places and numbers differ.
    strata = [f"q.{int(node) % 3}" for node in ids]
    asked: list[tuple[list[int], int]] = []
    options = BoundOptions(p=0.2, min_count=8, seed=3)
    found = bound_effects(additive(values, asked), ids, strata, [f"n{int(node)}" for node in ids], 4, options)
    assert {stratum.name: stratum.nodes for stratum in found.strata} == {"q.2": 9, "q.0": 8, "q.1": 8}
    assert sum(stratum.draws for stratum in found.strata) == len(asked)
    assert found.cost == len(asked) / 4
    assert {number for _, number in asked} == {0, 1, 2, 3}
    for nodes, _ in asked:
        assert len({node % 3 for node in nodes}) <= 1 and set(nodes) <= set(ids.tolist())
    name, delta, bound = found.largest[0]
    assert name == "n17" and delta == pytest.approx(-3.0, abs=0.1)
    assert bound == found.bound == {s.name: s.bound for s in found.strata}["q.2"]
    assert 3.0 <= found.bound < found.familywise < 3.5
    assert (found.alpha, found.unverified, len(found.largest)) == (0.05, 25, 10)
    again = bound_effects(additive(values, []), ids, strata, [f"n{int(n)}" for n in ids], 4, options)
    assert again == found


def test_the_bound_equals_that_of_each_stratums_draws() -> None:
    """The whole path against the pure functions: each stratum's draws, y and family."""
    torch.manual_seed(1)
    values = torch.randn(1, 8)
    strata = ["a", "a", "a", "a", "b", "b", "b", "b"]
    asked: list[tuple[list[int], int]] = []
    found = bound_effects(
        additive(values, asked), torch.arange(8), strata, list("abcdefgh"), 1, BoundOptions(min_count=5)
    )
    first = found.strata[0].draws
    for stratum, part, offset in zip(found.strata, (asked[:first], asked[first:]), (0, 4), strict=True):
        inside = torch.tensor([[node + offset in nodes for node in range(4)] for nodes, _ in part])
        y = torch.tensor([float(values[0, nodes].sum()) for nodes, _ in part])
        assert stratum.bound == pytest.approx(max(by_scipy(inside, y.double(), 0.05)), rel=1e-5)
        assert stratum.familywise == pytest.approx(max(by_scipy(inside, y.double(), 0.05 / 8)), rel=1e-5)


def test_nothing_left_to_bound() -> None:
    found = bound_effects(additive(torch.ones(1, 1), []), torch.tensor([], dtype=torch.long), [], [], 1)
    assert (found.unverified, found.bound, found.familywise, found.cost) == (0, 0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"alpha": 0.0}, "alpha must lie between 0 and 1, found 0"),
        ({"p": 1.0}, "p must lie between 0 and 1, found 1"),
        ({"min_count": 1}, "min_count must be at least 2"),
    ],
)
def test_options_that_make_no_bound_are_refused(options: dict[str, float], words: str) -> None:
    with pytest.raises(InputError, match=words):
        BoundOptions(**options)  # type: ignore[arg-type]


def test_names_must_fit() -> None:
    with pytest.raises(InputError, match="2 unverified nodes with 1 strata and 2 names"):
        bound_effects(additive(torch.ones(1, 2), []), torch.arange(2), ["q.0"], ["a", "b"], 1)
