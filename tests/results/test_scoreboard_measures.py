"""Means of a scoreboard: families weigh alike, programs are drawn together, and who cannot be told from the best."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from patchkit.results.scoreboard import Case, Family, MethodOnCase, Ranking, Scoreboard
from patchkit.results.scoreboard_measures import (
    MEASURES,
    all_means,
    leaders,
    mean_of_cases,
    measured,
    versus,
)
from patchkit.results.scoreboard_short import shortened, write_short
from tests.report import scoreboard_example as made

Numbers = Mapping[str, float | None]


def row(method: str, auroc: float | None, cost: float = 3.0) -> MethodOnCase:
    ranking = None if auroc is None else Ranking(auroc=auroc, single=auroc / 2, precision=auroc, missed=[])
    return MethodOnCase(method=method, cost=cost, nodes=ranking, edges=None, faithfulness=auroc)


def case(name: str, title: str, family: Family, numbers: Numbers) -> Case:
    rows = [row(method, auroc) for method, auroc in numbers.items()]
    return made.case(name, title, family, methods=()).model_copy(update={"methods": rows})


def cases(numbers: Mapping[tuple[str, str, Family], Numbers]) -> list[Case]:
    return [case(*place, held) for place, held in numbers.items()]


def board(held: list[Case]) -> Scoreboard:
    methods = dict.fromkeys(row.method for case in held for row in case.methods)
    return made.board(held, {method: method for method in methods})


MIXED = cases(
    {
        ("a-1", "a", "handmade"): {"x": 1.0, "y": 0.9, "z": 0.5},
        ("a-2", "a", "handmade"): {"x": 0.9, "y": 0.8, "z": 0.4},
        ("b", "b", "handmade"): {"x": 0.8, "y": 0.9, "z": 0.3},
        ("n", "n", "natural"): {"x": 0.6, "y": 0.5, "z": None},
    }
)


def test_families_weigh_alike() -> None:
    mean, interval = mean_of_cases(MIXED, measured(MIXED, "x", ["node auroc"]))
    assert mean == pytest.approx((0.9 + 0.6) / 2)
    # Two titles of the first family, one of the second: drawn are (0.95, 0.95, 0.8)-like means and always 0.6.
    assert interval == pytest.approx(((0.8 + 0.6) / 2, (0.95 + 0.6) / 2))


def test_one_title_alone_has_no_interval() -> None:
    twice = MIXED[:2]
    assert mean_of_cases(twice, measured(twice, "x", ["node auroc"])) == (pytest.approx(0.95), None)


def test_of_several_measures_the_mean_counts_where_all_are_known() -> None:
    found = measured(MIXED, "x", ["node auroc", "single node auroc"])
    assert found["n"] == pytest.approx(0.45) and len(found) == 4
    assert measured(MIXED, "x", ["node auroc", "edge auroc"]) == {}
    assert measured(MIXED, "nobody", ["node auroc"]) == {}


def test_a_difference_is_taken_case_by_case() -> None:
    x, y = (measured(MIXED, method, ["node auroc"]) for method in "xy")
    found = versus(MIXED, y, x)
    assert found is not None and found.cases == 4 and not found.distinguishable
    # +0.1 in b, -0.1 in the rest.
    assert found.mean == pytest.approx(((-0.1 - 0.1 + 0.1) / 3 - 0.1) / 2)
    assert versus(MIXED, {}, x) is None
    same = versus(MIXED, x, x)
    assert same is not None and same.interval == (0.0, 0.0) and not same.distinguishable


def test_leaders_are_told_apart_and_the_cheapest_of_the_rest_comes_first() -> None:
    clear = cases(
        {
            (f"c{i}", f"c{i}", "handmade"): {"x": 0.9, "y": 0.9 + 0.01 * (-1) ** i - 0.001, "z": 0.5}
            for i in range(8)
        }
    )
    found = leaders(board(clear), ["node auroc"], {"x": 10.0, "y": 3.0, "z": 1.0})
    assert found is not None
    assert (found.best, found.like, found.cheapest, found.cases) == ("x", ("y", "x"), "y", 8)
    lower = leaders(board(clear), ["faithfulness gap"], {"x": 10.0, "y": 3.0, "z": 1.0})
    assert lower is not None and "z" not in lower.like


def test_who_was_spared_a_family_is_not_compared() -> None:
    found = leaders(board(MIXED), ["node auroc"], {"x": 1.0, "y": 2.0, "z": 3.0})
    assert found is not None and found.best == "x" and "z" not in found.like
    assert leaders(board(MIXED), ["edge auroc"], {"x": 1.0}) is None


def test_all_means_are_those_of_a_family_and_of_all() -> None:
    means = {(each.method, each.measure, each.family): each for each in all_means(MIXED, "xyz")}
    assert means["x", "node auroc", "natural"].mean == 0.6 and means["x", "node auroc", "handmade"].cases == 3
    assert means["x", "faithfulness gap", "natural"].mean == pytest.approx(0.4)
    assert ("z", "node auroc", "natural") not in means and ("x", "cmd", "all") not in means
    assert {measure for _, measure, _ in means} <= set(MEASURES)


def test_a_shortened_board_leads_to_the_same_means(tmp_path: Path) -> None:
    whole = made.board([made.case("a", "a", "handmade"), made.case("b", "b", "natural")])
    write_short(tmp_path / "scoreboard.json", whole)
    short = Scoreboard.load(tmp_path)
    assert short == shortened(whole) == shortened(short)
    whole.save(tmp_path / "whole")
    sizes = [(path / "scoreboard.json").stat().st_size for path in (tmp_path, tmp_path / "whole")]
    assert sizes[0] < 0.4 * sizes[1]
    for mine, theirs in zip(short.means, all_means(whole.cases, whole.methods), strict=True):
        assert (mine.method, mine.measure, mine.family) == (theirs.method, theirs.measure, theirs.family)
        assert mine.mean == pytest.approx(theirs.mean, abs=1e-3)
    assert short.missed("atp", "nodes") == whole.missed("atp", "nodes")
