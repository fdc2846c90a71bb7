"""`recommend`: which method to trust for a model, a question and a budget, by what the ground-truth study has measured.

The scoreboard says how well each method does where the circuit is known; the library's own plans say what it takes on a
user's model, of which only the config is needed. Of what the budget allows, the method with the best mean is found (every
family of cases weighed alike), then those that the cases do not tell from it; the cheapest of them is recommended.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from patchkit.errors import InputError
from patchkit.model import EdgeGraph, PatchModel
from patchkit.model.nodes import kinds_of
from patchkit.reading import exists
from patchkit.results.recommendation import Choice, LeftOut, Question, Recommendation
from patchkit.results.scoreboard import SCOREBOARD, Scoreboard
from patchkit.results.scoreboard_measures import Leaders, leaders, mean_of_cases, measured
from patchkit.runtime.plan_words import model_words
from patchkit.studies._recommend_evidence import Asked, asked_of, check_measured, missed_by, unseen_by
from patchkit.studies._recommend_ways import CONTROLS, WAYS, Setting
from patchkit.studies._recommend_words import evidence_lines as evidence_lines
from patchkit.studies._recommend_words import lead_lines as lead_lines
from patchkit.zoo.load import load_sizes

QUESTIONS: tuple[Question, ...] = get_args(Question)
# What a budget may be under a cost by, and still be met.
_SLACK = 1e-6


@dataclass(frozen=True)
class RecommendOptions:
    """What is asked.

    Attributes:
        nodes: kinds and names of nodes; None asks about edges.
        budget: forwards a pair at the most; a backward counts 1. None: whatever it takes.
        pairs: how many there will be; 1 is a single pair, which methods are worse at.
        question: `rank`: which matter more than others; `top`: which are the ones; `circuit`: what of the size that the
            true one has behaves as the model; `sizes`: the same at every size.
        tokens: of a prompt.
    """

    nodes: tuple[str, ...] | None = ("z", "mlp_out")
    budget: float | None = None
    pairs: int = 100
    question: Question = "rank"
    tokens: int = 32

    def __post_init__(self) -> None:
        if self.question not in QUESTIONS:
            raise InputError(f"question {self.question}: expected one of: {', '.join(QUESTIONS)}")
        if self.budget is not None and not self.budget > 0:
            raise InputError(f"budget {self.budget:g}: expected forwards a pair, above 0")
        for name, least in (("pairs", 1), ("tokens", 2)):
            if getattr(self, name) < least:
                raise InputError(f"{name} {getattr(self, name)}: expected at least {least}")
        if self.nodes is not None and not self.nodes:
            raise InputError("no nodes are given; expected kinds such as z and mlp_out, or None for edges")


def shipped_scoreboard() -> Scoreboard:
    """The scoreboard that this version of patchkit was released with.

    Raises:
        InputError: this copy has none.
    """
    home = Path(__file__).parent
    if not exists(home / SCOREBOARD):
        raise InputError(
            f"this copy of patchkit has no {SCOREBOARD}; make one with `patchkit study ground-truth --out DIR` and give "
            "--scoreboard DIR"
        )
    return Scoreboard.load(home)


def recommend(
    model: PatchModel | str | Path,
    options: RecommendOptions | None = None,
    *,
    scoreboard: Scoreboard | None = None,
) -> Recommendation:
    """The method to trust, with its command, its cost on this model and the evidence.

    Args:
        model: opened (weights are not looked at), or an embedded name, a directory with a config, a hub name.
        scoreboard: default: the one that the package ships.

    Raises:
        InputError: a node kind that the model does not have, a budget below the cheapest method, or a question that the
            scoreboard has no numbers for.
    """
    options, board = options or RecommendOptions(), scoreboard or shipped_scoreboard()
    opened = model if isinstance(model, PatchModel) else load_sizes(model)
    name = opened.name if isinstance(model, PatchModel) else os.fspath(model)
    kinds = None if options.nodes is None else kinds_of(options.nodes, opened.dims)
    asked = asked_of(options.question, kinds, options.pairs == 1)
    setting = Setting(opened, name, options.nodes or (), options.pairs, options.tokens)
    compared = _Comparison(board, asked, setting, options)
    return compared.recommendation(kinds)


class _Comparison:
    """Costs and scores of every method that could answer, and what follows from them."""

    def __init__(self, board: Scoreboard, asked: Asked, setting: Setting, options: RecommendOptions) -> None:
        self.board, self.asked, self.setting, self.options = board, asked, setting, options
        self.edges = options.nodes is None
        self.not_compared: list[LeftOut] = []
        self.scores: dict[str, dict[str, float]] = {}
        self.costs: dict[str, float] = {}
        for method in board.methods:
            self._enter(method)
        check_measured(board, asked, self.costs)

    def _enter(self, method: str) -> None:
        """Takes a method in, or notes why not. Methods of the other kind are no answer, and are not mentioned."""
        way = WAYS.get(method)
        of_edges = self.board.of_edges(method) if way is None else way.edges
        if of_edges != self.edges:
            return
        values = measured(self.board.cases, method, self.asked.measures)
        reason = ""
        if method in CONTROLS:
            reason = "a control, which knows nothing"
        elif not values:
            reason = f"the scoreboard has no {self.asked.said} of it"
        elif way is None:
            reason = "no command of this version runs it"
        else:
            try:
                self.costs[method] = way.cost(self.setting)
            except InputError as error:
                reason = f"it cannot be run so: {error}"
        if reason:
            score = mean_of_cases(self.board.cases, values)[0] if values else None
            self.not_compared.append(LeftOut(method=method, reason=reason, score=score))
        else:
            self.scores[method] = values

    def recommendation(self, kinds: tuple[str, ...] | None) -> Recommendation:
        options, board = self.options, self.board
        within = {method: cost for method, cost in self.costs.items() if self._affordable(cost)}
        if not within:
            cheapest = min(self.costs, key=lambda method: self.costs[method])
            least = self.costs[cheapest]
            raise InputError(
                f"a budget of {options.budget:g} forwards a pair is below the cheapest method, {cheapest}, which takes "
                f"{least:,.1f} on this model; give at least --budget {_ceiled(least)}"
            )
        first = leaders(board, self.asked.measures, within)
        assert first is not None, "every method that was taken in has numbers"
        choices = self._choices(within, first)
        return Recommendation(
            model=self.setting.name,
            shape=self._shape(),
            of="edges" if self.edges else "nodes",
            kinds=list(kinds or ()),
            question=options.question,
            measure=self.asked.said,
            higher=self.asked.higher,
            pairs=options.pairs,
            tokens=options.tokens,
            budget=options.budget,
            chosen=first.cheapest,
            best=first.best,
            choices=choices,
            over_budget=self._over(within, first),
            not_compared=self.not_compared,
            unseen=unseen_by(board, choices),
            notes=[*self.asked.notes, *self._notes(within, first)],
            date=board.date,
            versions=board.versions,
        )

    def _affordable(self, cost: float) -> bool:
        return self.options.budget is None or cost <= self.options.budget * (1 + _SLACK)

    def _choices(self, within: Mapping[str, float], first: Leaders) -> list[Choice]:
        made = [self._choice(method, cost, first) for method, cost in within.items()]
        sign = -1 if self.asked.higher else 1
        return sorted(
            made, key=lambda choice: (choice.method != first.best, sign * choice.score, choice.cost)
        )

    def _choice(self, method: str, cost: float, first: Leaders) -> Choice:
        way = WAYS[method]
        command, proved = way.command(self.setting), None
        if way.proof is not None:
            words, price = way.proof
            proved = price(self.setting)
            if self._affordable(proved):
                command = command.replace(" --out ", f" {words} --out ")
            else:
                proved = None
        score, interval = mean_of_cases(self.board.cases, self.scores[method])
        return Choice(
            method=method,
            told=self.board.methods[method],
            command=command,
            cost=cost,
            cost_with_proof=proved,
            score=score,
            interval=interval,
            cases=len(self.scores[method]),
            like_best=method in first.like,
            missed=missed_by(self.board, method, self.asked.whats),
        )

    def _over(self, within: Mapping[str, float], first: Leaders) -> list[LeftOut]:
        """Methods that cost too much, the best of them first."""
        sign = 1 if self.asked.higher else -1
        found = []
        for method, cost in self.costs.items():
            if method not in within:
                score = mean_of_cases(self.board.cases, self.scores[method])[0]
                gain = sign * (score - first.mean)
                found.append(
                    LeftOut(method=method, reason="over the budget", cost=cost, score=score, gain=gain)
                )
        return sorted(found, key=lambda each: -(each.gain or 0.0))

    def _notes(self, within: Mapping[str, float], first: Leaders) -> list[str]:
        families = {case.family for case in self.board.cases if case.name in self.scores[first.best]}
        partial = [
            method
            for method in within
            if {case.family for case in self.board.cases if case.name in self.scores[method]} != families
        ]
        notes = []
        if partial:
            notes.append(f"Not on cases of every family, and so not recommended: {', '.join(partial)}.")
        most = [method for method in self.costs if WAYS[method].most]
        if most:
            notes.append(f"The most that it may come to is the cost of {', '.join(most)}.")
        return notes

    def _shape(self) -> str:
        graph = EdgeGraph.of(self.setting.model.dims)
        words = model_words(self.setting.model).removeprefix(f"{self.setting.model.name}: ")
        return f"{words}; {graph.n_senders - 1:,} heads and MLPs, {graph.n_edges:,} edges"


def _ceiled(cost: float) -> str:
    """A cost rounded up to a tenth: a budget that is enough."""
    tenths = int(cost * 10 * (1 - _SLACK)) + 1
    return f"{tenths / 10:g}"
