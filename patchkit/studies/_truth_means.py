"""Means over cases, their bootstrap, and which methods cannot be told from the best.

Families weigh alike: a mean over all is the mean of the families' means, and a bootstrap draws cases within each family.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from patchkit.results.scoreboard import Case, Family, Mean, MethodOnCase, Ranking

FAMILIES: tuple[Family, ...] = ("handmade", "siit", "natural")
#: What is measured on one case; None where a method or a case has no such number.
MEASURES: dict[str, Callable[[MethodOnCase], float | None]] = {
    "node auroc": lambda row: _auroc(row.nodes),
    "input auroc": lambda row: _auroc(row.inputs),
    "edge auroc": lambda row: _auroc(row.edges),
    "single node auroc": lambda row: _single(row.nodes),
    "single input auroc": lambda row: _single(row.inputs),
    "single edge auroc": lambda row: _single(row.edges),
    "node precision": lambda row: None if row.nodes is None else row.nodes.precision,
    "input precision": lambda row: None if row.inputs is None else row.inputs.precision,
    "edge precision": lambda row: None if row.edges is None else row.edges.precision,
    "faithfulness": lambda row: row.faithfulness,
    "faithfulness gap": lambda row: None if row.faithfulness is None else abs(1 - row.faithfulness),
    "overlap": lambda row: row.overlap,
    "cpr": lambda row: row.cpr,
    "cmd": lambda row: row.cmd,
    "cost": lambda row: row.cost,
}
#: Of these less is better.
LESS = ("faithfulness gap", "cmd", "cost")
#: What a method says of a natural case is the truth there, if the truth is made of it.
_OWN_TRUTH = {
    "exact": (
        "node auroc",
        "input auroc",
        "single node auroc",
        "single input auroc",
        "node precision",
        "input precision",
    ),
    "exact edges": ("edge auroc", "single edge auroc", "edge precision"),
}

Values = Mapping[Family, Tensor]


def _auroc(ranking: Ranking | None) -> float | None:
    return None if ranking is None else ranking.auroc


def _single(ranking: Ranking | None) -> float | None:
    return None if ranking is None else ranking.single


def values_of(cases: Sequence[Case], method: str, measure: str) -> dict[Family, Tensor]:
    """A method's numbers, case by case; NaN where it has none. Families without any are left out."""
    found: dict[Family, Tensor] = {}
    for family in FAMILIES:
        if family == "natural" and measure in _OWN_TRUTH.get(method, ()):
            continue
        rows = [case.of(method) for case in cases if case.family == family]
        numbers = [None if row is None else MEASURES[measure](row) for row in rows]
        if any(number is not None for number in numbers):
            found[family] = torch.tensor(
                [torch.nan if number is None else number for number in numbers], dtype=torch.float64
            )
    return found


def means(cases: Sequence[Case], methods: Sequence[str], draws: int, seed: int) -> list[Mean]:
    """Of every method and measure, for each family and for all."""
    found: list[Mean] = []
    for method in methods:
        for measure in MEASURES:
            values = values_of(cases, method, measure)
            if not values:
                continue
            drawn = _drawn(values, draws, seed)
            for family in values:
                found.append(_mean(method, measure, family, values[family], drawn[family]))
            together = torch.stack([value.nanmean() for value in values.values()])
            spread = torch.stack(list(drawn.values())).mean(0)
            count = sum(int((~value.isnan()).sum()) for value in values.values())
            interval = _quantiles(spread) if count > 1 else None
            found.append(
                Mean(
                    method=method,
                    family="all",
                    measure=measure,
                    mean=round(float(together.mean()), 4),
                    interval=interval,
                    cases=count,
                )
            )
    return found


def _mean(method: str, measure: str, family: Family, values: Tensor, drawn: Tensor) -> Mean:
    count = int((~values.isnan()).sum())
    return Mean(
        method=method,
        family=family,
        measure=measure,
        mean=round(float(values.nanmean()), 4),
        interval=_quantiles(drawn) if count > 1 else None,
        cases=count,
    )


def _drawn(values: Values, draws: int, seed: int) -> dict[Family, Tensor]:
    """Means of bootstraps of the cases: the same draws for every method, so that methods can be compared."""
    found: dict[Family, Tensor] = {}
    for family, numbers in values.items():
        generator = torch.Generator().manual_seed(seed + FAMILIES.index(family))
        picked = numbers[torch.randint(len(numbers), (draws, len(numbers)), generator=generator)]
        # A bootstrap without a single number says nothing new.
        found[family] = picked.nanmean(1).nan_to_num(float(numbers.nanmean()))
    return found


def _quantiles(drawn: Tensor) -> tuple[float, float]:
    low, high = drawn.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return round(low, 4), round(high, 4)


def leaders(
    cases: Sequence[Case], methods: Sequence[str], measure: str, draws: int, seed: int
) -> list[tuple[str, float]]:
    """The methods that cannot be told from the best by one measure: (method, mean), the best first.

    A method is told from the best if the 95 % interval of its paired difference, over bootstraps of the cases, leaves out
    0. Only cases on which both have a number are compared, and only methods with a number in as many families as any.
    """
    values = {method: values_of(cases, method, measure) for method in methods}
    families = max((len(value) for value in values.values()), default=0)
    full = {method: value for method, value in values.items() if value and len(value) == families}
    if not full:
        return []
    sign = -1.0 if measure in LESS else 1.0
    mean = {
        method: float(torch.stack([v.nanmean() for v in value.values()]).mean())
        for method, value in full.items()
    }
    ranked = sorted(full, key=lambda method: -sign * mean[method])
    best = full[ranked[0]]
    near = [ranked[0]]
    for method in ranked[1:]:
        gap: dict[Family, Tensor] = {family: sign * (best[family] - full[method][family]) for family in best}
        drawn = torch.stack(list(_drawn(gap, draws, seed).values())).mean(0)
        if _quantiles(drawn)[0] <= 0:
            near.append(method)
    return [(method, mean[method]) for method in near]
