"""CPR and CMD: the weight of every size in them, and the numbers that follow for curves known in advance."""

from __future__ import annotations

import math

import pytest

from patchkit.errors import InputError
from patchkit.results.curves import FRACTIONS, area, curve
from patchkit.results.evaluation import Curve


def of(f: list[float | None]) -> Curve:
    count = len(f)
    return curve(
        FRACTIONS[:count], list(range(count)), list(range(count)), f, False, "top", "resample", "edge"
    )


def test_fractions_are_those_of_mib() -> None:
    assert [100 * fraction for fraction in FRACTIONS] == pytest.approx(
        [0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100]
    )


def weight(number: int, log: bool = False) -> float:
    """What f = 1 at one size alone adds to the area."""
    found = of([1.0 if index == number else 0.0 for index in range(10)])
    weight = found.cpr_log if log else found.cpr
    assert weight is not None
    return weight


def test_the_weights_of_the_linear_axis() -> None:
    """Half of the two gaps beside a size: circuits of up to 2 % of the edges count for 3.4 % together."""
    weights = [weight(number) for number in range(10)]
    assert sum(weights[:5]) == pytest.approx(0.034)
    assert weights[5:] == pytest.approx([0.04, 0.075, 0.2, 0.4, 0.25])
    assert sum(weights) == pytest.approx(0.999)


def test_the_weights_of_the_logarithmic_axis() -> None:
    weights = [weight(number, log=True) for number in range(10)]
    gaps = [math.log(high / low) for low, high in zip(FRACTIONS, FRACTIONS[1:], strict=False)]
    expected = [
        (left + right) / 2 / math.log(1000) for left, right in zip([0, *gaps], [*gaps, 0], strict=True)
    ]
    assert weights == pytest.approx(expected)
    assert sum(weights) == pytest.approx(1.0)


def test_a_perfect_curve() -> None:
    found = of([1.0] * 10)
    assert (found.cpr, found.cmd) == pytest.approx((0.999, 0.0))
    assert (found.cpr_log, found.cmd_log) == pytest.approx((1.0, 0.0))


def test_nothing_until_everything_is_the_random_baseline() -> None:
    found = of([0.0] * 9 + [1.0])
    assert (found.cpr, found.cmd) == pytest.approx((0.25, 0.749))
    # On the logarithmic axis the last gap, from a half to all, is a tenth.
    last = math.log(2) / math.log(1000) / 2
    assert (found.cpr_log, found.cmd_log) == pytest.approx((last, 1 - last))


def test_more_than_everything_counts_for_cpr_and_against_cmd() -> None:
    found = of([2.0] * 10)
    assert (found.cpr, found.cmd) == pytest.approx((1.998, 0.999))
    assert (found.cpr_log, found.cmd_log) == pytest.approx((2.0, 1.0))


def test_the_distance_is_taken_at_the_points() -> None:
    """|1 - f| at each size and then the area, as in MIB: a curve that crosses 1 between two sizes is not at 0 there."""
    assert area((0.0, 1.0), [abs(1 - value) for value in (0.5, 1.5)]) == pytest.approx(0.5)
    found = of([0.5, 1.5] * 5)
    assert found.cmd == pytest.approx(0.4995)


def test_areas_are_by_trapezoid() -> None:
    assert area((0.0, 1.0, 3.0), [0.0, 2.0, 4.0]) == pytest.approx(1.0 + 6.0)
    assert area((0.0, 2.0), [1.0, 1.0], unit=2.0) == 1.0


def test_a_point_that_is_not_defined_leaves_no_area() -> None:
    for number in (0, 4, 9):
        found = of([None if index == number else 1.0 for index in range(10)])
        assert (found.cpr, found.cmd, found.cpr_log, found.cmd_log) == (None, None, None, None)
        assert found.f[number] is None


def test_a_curve_keeps_what_it_was_made_of() -> None:
    found = curve([0.1, 1.0], [10, 100], [7, 100], [0.5, 1.0], True, "greedy", "mean", "node")
    assert found.model_dump(exclude={"cpr", "cmd", "cpr_log", "cmd_log"}) == {
        "absolute": True,
        "selection": "greedy",
        "ablation": "mean",
        "patching": "node",
        "fractions": [0.1, 1.0],
        "requested": [10, 100],
        "n_edges": [7, 100],
        "f": [0.5, 1.0],
    }


@pytest.mark.parametrize(
    ("fractions", "f", "words"),
    [
        ([0.1, 1.0], [1.0], "found 2 fractions, 2 requested, 2 n_edges, 1 f"),
        ([1.0], [1.0], "two at least, found 1 fractions"),
        ([0.5, 0.1], [1.0, 1.0], "expected fractions that ascend within"),
        ([0.1, 0.1], [1.0, 1.0], "expected fractions that ascend within"),
        ([0.0, 1.0], [1.0, 1.0], "expected fractions that ascend within"),
        ([0.1, 1.5], [1.0, 1.0], "found 0.1, 1.5"),
        ([0.1, 1.0], [1.0, math.nan], "expected finite numbers or None, found 1.0, nan"),
    ],
)
def test_other_curves_are_refused(fractions: list[float], f: list[float | None], words: str) -> None:
    sizes = list(range(len(fractions)))
    with pytest.raises(InputError, match=words):
        curve(fractions, sizes, sizes, f, False, "top", "resample", "edge")
