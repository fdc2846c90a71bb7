"""Scoreboards for `recommend` in which it is said beforehand how good each method is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from patchkit.results.scoreboard import Case, MethodOnCase, Missed, Ranking, Scoreboard
from patchkit.zoo.programs.failures import BACKUP, MLP, REDUNDANCY
from tests.report import scoreboard_example as made

EDGES = frozenset(made.EDGE_METHODS)
KINDS = {MLP: "no gradient", REDUNDANCY: "others do the same", BACKUP: "it waits"}


def ranked(quality: float, single: float | None, misses: Sequence[str]) -> Ranking:
    missed = [Missed(kind=kind, missed=2 * (kind in misses), total=2) for kind in ("", *KINDS)]
    return Ranking(auroc=quality, single=single, precision=quality, missed=missed)


def row(method: str, quality: float, single: float | None, misses: Sequence[str]) -> MethodOnCase:
    each = ranked(quality, single, misses)
    return MethodOnCase(
        method=method,
        cost=1.0,
        nodes=each,
        inputs=None if method == "mask" else each,
        edges=each,
        faithfulness=quality,
        n_edges=9 if method in EDGES else None,
        cmd=1 - quality if method in EDGES else None,
    )


def board(
    qualities: Mapping[str, float],
    *,
    singles: Mapping[str, float | None] | None = None,
    misses: Mapping[str, Sequence[str]] | None = None,
    wobble: Mapping[str, float] | None = None,
) -> Scoreboard:
    """Six programs and two natural cases.

    Args:
        qualities: AUROC, precision and faithfulness of each method.
        singles: AUROC of one pair; by default 0.1 less.
        misses: kinds that a method misses always; others it never misses.
        wobble: what is added to a method's quality on every second case and taken away on the others.
    """
    cases: list[Case] = []
    for number in range(8):
        name, family = f"c{number}", "natural" if number > 5 else "handmade"
        rows = []
        for method, quality in qualities.items():
            here = quality + (wobble or {}).get(method, 0.0) * (-1) ** number
            single = (singles or {}).get(method, here - 0.1)
            rows.append(row(method, here, single, (misses or {}).get(method, (BACKUP,))))
        cases.append(made.case(name, name, family, methods=()).model_copy(update={"methods": rows}))
    return made.board(cases, {method: f"what {method} is" for method in qualities}, kinds=KINDS)
