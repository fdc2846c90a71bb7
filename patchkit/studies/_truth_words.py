"""What the scoreboard shows, in words that its numbers choose."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from patchkit.results.rank import rank_correlation
from patchkit.results.scoreboard import Case, MethodOnCase, Recovery, Scoreboard
from patchkit.results.scoreboard_measures import MEASURES, Leaders, leaders
from patchkit.studies._truth_methods import METHODS
from patchkit.zoo.programs import failures

#: Kinds that AtP* is made for, and those that look like them to a gradient.
GRADIENT_FAILURES = (failures.ATTENTION, failures.BEHIND, failures.MLP, failures.CANCELLATION)
#: Question -> the measure that answers it, and whether it is about methods of nodes (or of edges, or both).
QUESTIONS: dict[str, tuple[str, bool | None]] = {
    "which heads and MLPs matter, over many pairs": ("node auroc", None),
    "which heads and MLPs matter, in one pair": ("single node auroc", None),
    "which queries, keys and values matter, over many pairs": ("input auroc", None),
    "which queries, keys and values matter, in one pair": ("single input auroc", None),
    "which edges matter, over many pairs": ("edge auroc", None),
    "which edges matter, in one pair": ("single edge auroc", None),
    "a circuit of nodes, of the true size, that behaves as the model does": ("faithfulness gap", True),
    "a circuit of edges, of the true size, that behaves as the model does": ("faithfulness gap", False),
    "circuits of edges of every size that behave as the model does": ("cmd", None),
}
#: What costs more than this many forwards a pair is no cheap method.
CHEAP = 15.0
_EXACT = ("exact", "exact edges")


class Words:
    """Sentences about one scoreboard."""

    def __init__(self, board: Scoreboard) -> None:
        self.board, self.cases = board, board.cases
        self._means = {(each.method, each.measure): each for each in board.means if each.family == "all"}

    def best(self) -> dict[str, str]:
        """Question -> which method is best for it, and which is the cheapest that cannot be told from it."""
        costs = {
            method: self._paid(method) for method in METHODS if method not in _EXACT and self._ran(method)
        }
        found: dict[str, str] = {}
        for question, (measure, of_nodes) in QUESTIONS.items():
            asked = {
                method: cost
                for method, cost in costs.items()
                if of_nodes is None or of_nodes != self.board.of_edges(method)
            }
            leading = leaders(self.board, [measure], asked)
            if leading is not None:
                found[question] = self._best(measure, of_nodes, leading)
        return found

    def _ran(self, method: str) -> bool:
        return (method, "cost") in self._means

    def _best(self, measure: str, of_nodes: bool | None, leading: Leaders) -> str:
        first, cheapest = leading.best, leading.cheapest
        said = f"{first} ({self._said(first, measure)}, {self._cost(first)})"
        others = [method for method in leading.like if method != first]
        if others:
            said += f"; on these cases {', '.join(others)} cannot be told from it"
        if cheapest != first:
            said += (
                f", of which {cheapest} is cheapest ({self._said(cheapest, measure)}, {self._cost(cheapest)})"
            )
        rivals = _EXACT if of_nodes is None else _EXACT[:1] if of_nodes else _EXACT[1:]
        exact = [each for method in rivals if (each := self._means.get((method, measure))) is not None]
        if exact:
            top = (max if MEASURES[measure].higher else min)(exact, key=lambda each: each.mean)
            cases = "" if top.cases == len(self.cases) else ", where it is not itself the truth"
            said += f". {_named(top.method)} has {top.mean:.3f} at {self._cost(top.method)}{cases}"
        return f"{said}."

    def _said(self, method: str, measure: str) -> str:
        found = self._means[method, measure]
        spread = "" if found.interval is None else f" [{found.interval[0]:.3f}, {found.interval[1]:.3f}]"
        return f"{MEASURES[measure].said} {found.mean:.3f}{spread}"

    def _paid(self, method: str) -> float:
        return self._means[method, "cost"].mean

    def _cost(self, method: str) -> str:
        return f"{self._paid(method):,.1f} forwards a pair"

    def findings(self) -> list[str]:
        """What the table shows."""
        return [
            *self._estimates("node auroc", "heads and MLPs"),
            *self._estimates("edge auroc", "edges"),
            *_recovered(self.board.recovery),
            *_lost(self.cases),
            *self._blind(),
            *self._overlap_and_faithfulness(),
        ]

    def _estimates(self, measure: str, what: str) -> list[str]:
        """The best cheap method, and what one gradient alone gives."""
        cheap = {
            method: self._means[method, measure].mean
            for method in METHODS
            if (method, measure) in self._means and 0 < self._paid(method) <= CHEAP
        }
        if not cheap:
            return []
        first = max(cheap, key=lambda method: cheap[method])
        plain = "atp" if measure == "node auroc" else "eap"
        told = (
            f"Of the methods for at most {CHEAP:g} forwards a pair, {first} tells the true {what} best from the others: "
            f"mean AUROC {cheap[first]:.3f} (families of models weigh alike)"
        )
        if plain in cheap and first != plain:
            told += f", against {cheap[plain]:.3f} of {plain}"
        return [f"{told}."]

    def _blind(self) -> list[str]:
        """Kinds of failure that no method, or only some, can see, among edges."""
        told: list[str] = []
        for kind, why in failures.KINDS.items():
            able = [method for method in METHODS if not method.startswith("random")]
            counted = {method: self.board.missed(method, "edges").get(kind) for method in able}
            found = {method: count for method, count in counted.items() if count is not None}
            if not found:
                continue
            seen = [method for method in able if method in found and 2 * found[method][0] < found[method][1]]
            if not seen:
                told.append(f"No method finds half of the edges of the kind '{kind}': {why}.")
            elif len(seen) <= len(able) / 2:
                told.append(
                    f"More than half of the edges of the kind '{kind}' are found by {_listed(seen)} only."
                )
            elif len(seen) < len(able):
                others = _listed([method for method in able if method not in seen])
                told.append(f"Half or more of the edges of the kind '{kind}' are missed by {others}.")
        return told

    def _overlap_and_faithfulness(self) -> list[str]:
        cells = [
            (case, row)
            for case in self.cases
            for row in case.methods
            if row.overlap is not None and row.faithfulness is not None
        ]
        if len(cells) < 3:
            return []
        overlaps = torch.tensor([row.overlap for _, row in cells], dtype=torch.float64)
        gaps = torch.tensor([_gap(row) for _, row in cells], dtype=torch.float64)
        together = rank_correlation(overlaps, -gaps)
        low = [(case, row) for case, row in cells if (row.overlap or 0) < 0.5 and _gap(row) <= 0.1]
        high = [(case, row) for case, row in cells if (row.overlap or 0) >= 0.5 and _gap(row) > 0.5]
        shown = "undefined" if together is None else f"{together:.2f}"
        return [
            f"Overlap with the true circuit and faithfulness go together (rank correlation {shown} over {len(cells)} "
            f"circuits), but not always: {len(low)} circuits that share less than half with the truth behave within 10 % "
            f"of the model, and {len(high)} that share at least half are off by more than half of the behaviour."
        ]


def _lost(cases: Sequence[Case]) -> list[str]:
    """What GradDrop costs: nodes and inputs that AtP finds and AtP* does not."""
    lost: list[tuple[Case, int]] = []
    for case in cases:
        atp, star = (_missed_names(case.of(method)) for method in ("atp", "atp-star"))
        fresh = set[str]().union(*star.values()) - set[str]().union(*atp.values())
        lost += [(case, len(fresh))] if fresh else []
    if not lost:
        return []
    count = sum(number for _, number in lost)
    depths = sorted({case.layers for case, _ in lost})
    shallow = sum(number for case, number in lost if case.layers <= 3)
    return [
        f"AtP* misses {count} nodes and inputs that AtP finds, in {len(lost)} cases of {depths[0]} to {depths[-1]} "
        f"layers, {shallow} of them in models of at most three: GradDrop is a mean over drops of one layer each, and "
        "where all that a node does goes through few layers, most drops leave nothing of it. In two layers a node whose "
        "whole effect goes through the other layer gets 0."
    ]


def _gap(row: MethodOnCase) -> float:
    return abs(1 - (row.faithfulness or 0.0))


def _named(method: str) -> str:
    return "Patching every edge alone" if method == "exact edges" else "Patching every node alone"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def recoveries(cases: Sequence[Case]) -> list[Recovery]:
    """Every planted saturation and cancellation that AtP misses, and what AtP* makes of it: nodes and heads' inputs."""
    found: list[Recovery] = []
    for case in cases:
        atp, star = (_missed_names(case.of(method)) for method in ("atp", "atp-star"))
        for kind in GRADIENT_FAILURES:
            missed = sorted(atp.get(kind, set()))
            if missed:
                left = sorted(set(missed) & star.get(kind, set()))
                found.append(
                    Recovery(
                        case=case.name,
                        kind=kind,
                        missed=missed,
                        recovered=[name for name in missed if name not in left],
                        left=left,
                        why=failures.KINDS[kind] if left else "",
                    )
                )
    return found


def _missed_names(row: MethodOnCase | None) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for ranking in () if row is None else (row.nodes, row.inputs):
        for each in () if ranking is None else ranking.missed:
            found.setdefault(each.kind, set()).update(each.names)
    return found


def _recovered(recovery: Sequence[Recovery]) -> list[str]:
    """One sentence a kind."""
    told: list[str] = []
    for kind in GRADIENT_FAILURES:
        rows = [row for row in recovery if row.kind == kind]
        missed, again = (sum(len(getattr(row, name)) for row in rows) for name in ("missed", "recovered"))
        if rows:
            why = "" if again == missed else f". Why not the others: {failures.KINDS[kind]}"
            told.append(
                f"Of {missed} planted nodes and inputs of the kind '{kind}' that AtP misses in {len(rows)} cases, AtP* "
                f"finds {again}{why}."
            )
    return told
