"""The numbers that a scoreboard compares methods by, and their means over cases, with all families weighed alike.

Cases that share a title are one program in several shapes of model. They are alike, so the bootstrap draws titles, within
their family. Of all cases the mean is that of the families' means: sixteen programs in three shapes do not outweigh four
models that were trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float

from patchkit.results.scoreboard import Case, Family, Interval, Mean, MethodOnCase, Ranking, Scoreboard

_DRAWS, _SEED = 2000, 0
#: Below this a difference is rounding.
_EPSILON = 1e-9


@dataclass(frozen=True)
class Measure:
    """One number of a method on a case.

    Attributes:
        title: for the head of a table.
        said: in a sentence, `AUROC of nodes`.
        higher: whether more is better.
        of: the number; None where it was not measured.
    """

    title: str
    said: str
    higher: bool
    of: Callable[[MethodOnCase], float | None]


def _ranking(what: str, number: str) -> Callable[[MethodOnCase], float | None]:
    def read(row: MethodOnCase) -> float | None:
        ranking: Ranking | None = getattr(row, what)
        return None if ranking is None else getattr(ranking, number)

    return read


def _gap(row: MethodOnCase) -> float | None:
    return None if row.faithfulness is None else abs(1 - row.faithfulness)


#: By name, as `Mean.measure` has it.
MEASURES: Mapping[str, Measure] = {
    "node auroc": Measure("nodes", "AUROC of nodes", True, _ranking("nodes", "auroc")),
    "input auroc": Measure("inputs", "AUROC of queries, keys and values", True, _ranking("inputs", "auroc")),
    "edge auroc": Measure("edges", "AUROC of edges", True, _ranking("edges", "auroc")),
    "single node auroc": Measure("nodes", "AUROC of nodes from one pair", True, _ranking("nodes", "single")),
    "single input auroc": Measure(
        "inputs", "AUROC of queries, keys and values from one pair", True, _ranking("inputs", "single")
    ),
    "single edge auroc": Measure("edges", "AUROC of edges from one pair", True, _ranking("edges", "single")),
    "node precision": Measure("nodes", "precision of the top nodes", True, _ranking("nodes", "precision")),
    "input precision": Measure(
        "inputs", "precision of the top queries, keys and values", True, _ranking("inputs", "precision")
    ),
    "edge precision": Measure("edges", "precision of the top edges", True, _ranking("edges", "precision")),
    "faithfulness": Measure("faithful", "faithfulness", True, lambda row: row.faithfulness),
    "faithfulness gap": Measure("gap", "distance of faithfulness from 1, at the true size", False, _gap),
    "overlap": Measure("overlap", "Jaccard index with the true circuit", True, lambda row: row.overlap),
    "cpr": Measure("CPR", "area under faithfulness against size (CPR)", True, lambda row: row.cpr),
    "cmd": Measure("CMD", "distance from the model over all sizes (CMD)", False, lambda row: row.cmd),
    "cost": Measure("cost", "forwards a pair", False, lambda row: row.cost),
}


@dataclass(frozen=True)
class Versus:
    """A method against the best one, on the cases that both have a number of."""

    mean: float
    interval: Interval | None
    cases: int

    @property
    def distinguishable(self) -> bool:
        """Whether the bootstrap tells the two apart; one program or task alone tells nothing."""
        return self.interval is not None and not self.interval[0] <= 0 <= self.interval[1]


def measured(cases: Iterable[Case], method: str, measures: Sequence[str]) -> dict[str, float]:
    """Name of a case -> the mean of some measures, of the cases that have them all."""
    found: dict[str, float] = {}
    for case in cases:
        row = case.of(method)
        numbers = [] if row is None else [MEASURES[measure].of(row) for measure in measures]
        known = [number for number in numbers if number is not None]
        if known and len(known) == len(measures):
            found[case.name] = sum(known) / len(known)
    return found


def mean_of_cases(cases: Sequence[Case], values: Mapping[str, float]) -> tuple[float, Interval | None]:
    """The mean of numbers of some cases, every family weighed alike, and its 95 % interval.

    Args:
        values: by name of a case; at least one.

    Returns:
        The mean; and the bootstrap over titles, None where every family has numbers of one title alone.
    """
    means, draws, varied = [], np.zeros(_DRAWS), False
    families = list(dict.fromkeys(case.family for case in cases if case.name in values))
    generator = np.random.default_rng(_SEED)
    for family in families:
        clusters: dict[str, list[float]] = {}
        for case in cases:
            if case.family == family and case.name in values:
                clusters.setdefault(case.title, []).append(values[case.name])
        means.append(float(np.mean([value for cluster in clusters.values() for value in cluster])))
        draws += _drawn_means(list(clusters.values()), generator) / len(families)
        varied |= len(clusters) > 1
    low, high = np.quantile(draws, [0.025, 0.975]).tolist()
    return float(np.mean(means)), (low, high) if varied else None


def _drawn_means(
    clusters: Sequence[Sequence[float]], generator: np.random.Generator
) -> Float[np.ndarray, " draws"]:
    sums = np.array([sum(cluster) for cluster in clusters])
    counts = np.array([len(cluster) for cluster in clusters])
    drawn = generator.integers(len(clusters), size=(_DRAWS, len(clusters)))
    return sums[drawn].sum(1) / counts[drawn].sum(1)


def versus(cases: Sequence[Case], mine: Mapping[str, float], best: Mapping[str, float]) -> Versus | None:
    """Mean of mine - best over the cases that both have; None without any."""
    both = {name: value - best[name] for name, value in mine.items() if name in best}
    if not both:
        return None
    mean, interval = mean_of_cases(cases, both)
    if interval is not None:
        interval = (_plain(interval[0]), _plain(interval[1]))
    return Versus(_plain(mean), interval, len(both))


def _plain(value: float) -> float:
    return 0.0 if abs(value) < _EPSILON else value


def all_means(cases: Sequence[Case], methods: Iterable[str]) -> list[Mean]:
    """`Scoreboard.means`: every method by every measure, of all cases and of each family."""
    families: tuple[Family | Literal["all"], ...] = ("all", *dict.fromkeys(case.family for case in cases))
    return [
        mean
        for method in methods
        for measure in MEASURES
        for family in families
        if (mean := _mean(cases, method, measure, family)) is not None
    ]


def _mean(cases: Sequence[Case], method: str, measure: str, family: Family | Literal["all"]) -> Mean | None:
    values = measured((case for case in cases if family in ("all", case.family)), method, [measure])
    if not values:
        return None
    mean, interval = mean_of_cases(cases, values)
    return Mean(
        method=method, family=family, measure=measure, mean=mean, interval=interval, cases=len(values)
    )


@dataclass(frozen=True)
class Leaders:
    """Who is best by a measure.

    Attributes:
        best: the method with the best mean.
        mean: its mean, over `cases` cases.
        like: those that the cases do not tell from it, itself included, the cheapest first.
    """

    best: str
    mean: float
    interval: Interval | None
    cases: int
    like: tuple[str, ...]

    @property
    def cheapest(self) -> str:
        return self.like[0]


def leaders(board: Scoreboard, measures: Sequence[str], costs: Mapping[str, float]) -> Leaders | None:
    """Who is best by the mean of some measures that are better in one direction; None where nobody has them.

    Methods that lack cases of a family which others have are not compared: what they were spared would count for them.

    Args:
        costs: of the methods that compete.
    """
    values = {method: measured(board.cases, method, measures) for method in costs}
    families = {
        method: {case.family for case in board.cases if case.name in found}
        for method, found in values.items()
    }
    every = set().union(*families.values()) if families else set()
    competing = [method for method in costs if families[method] == every and values[method]]
    if not competing:
        return None
    sign = -1 if MEASURES[measures[0]].higher else 1
    means = {method: mean_of_cases(board.cases, values[method]) for method in competing}
    best = min(competing, key=lambda method: (round(sign * means[method][0], 9), costs[method]))
    like = [method for method in competing if not _told_apart(board.cases, values[method], values[best])]
    mean, interval = means[best]
    ordered = tuple(sorted(like, key=lambda method: (costs[method], method != best)))
    return Leaders(best, mean, interval, len(values[best]), ordered)


def _told_apart(cases: Sequence[Case], mine: Mapping[str, float], best: Mapping[str, float]) -> bool:
    found = versus(cases, mine, best)
    return found is None or found.distinguishable
