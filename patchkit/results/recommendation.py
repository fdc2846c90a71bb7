"""What `patchkit recommend` returns: which method to trust for a model, a question and a budget, with the evidence."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from patchkit.results.scoreboard import Interval

Question = Literal["rank", "top", "circuit", "sizes"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class KindMissed(_Frozen):
    """True items of one kind that a method does not find, over all cases of the scoreboard."""

    kind: str = Field(description="why they may be missed; '' for those that nothing was planted at")
    missed: int
    total: int


class Choice(_Frozen):
    """A method that answers the question within the budget."""

    method: str
    told: str = Field(description="what it is")
    command: str = Field(description="to copy; DIR and pairs.jsonl are the user's")
    cost: float = Field(description="of its scores on this model, in forwards a pair")
    cost_with_proof: float | None = Field(
        default=None, description="with the exact check that is in the command, if one is"
    )
    score: float = Field(description="mean of the measure, every family weighed alike")
    interval: Interval | None = Field(description="95 % bootstrap over programs and tasks")
    cases: int
    like_best: bool = Field(description="the cases do not tell it from the one with the best mean")
    missed: list[KindMissed]


class LeftOut(_Frozen):
    """A method that is not among the choices, and why."""

    method: str
    reason: str
    cost: float | None = Field(
        default=None, description="on this model, in forwards a pair, where it is known"
    )
    score: float | None = None
    gain: float | None = Field(
        default=None,
        description="by how much its mean is better than the best of the choices; below 0: worse",
    )


class Unseen(_Frozen):
    """A kind of failure that every method within the budget misses more often than not."""

    kind: str
    why: str
    by: str = Field(description="the method that misses least of it")
    missed: int
    total: int
    advice: str


class Recommendation(_Frozen):
    """The row of the scoreboard for a model, a question and a budget."""

    model: str
    shape: str = Field(description="of the model, in words")
    of: Literal["nodes", "edges"]
    kinds: list[str] = Field(description="of nodes; empty for edges")
    question: Question
    measure: str = Field(description="in words; of several the mean")
    higher: bool = Field(description="whether more of it is better")
    pairs: int
    tokens: int
    budget: float | None = Field(description="forwards a pair; None: whatever it takes")
    chosen: str = Field(description="the cheapest of those that the cases do not tell from the best")
    best: str = Field(description="the best mean within the budget")
    choices: list[Choice] = Field(description="within the budget, the best first")
    over_budget: list[LeftOut]
    not_compared: list[LeftOut]
    unseen: list[Unseen]
    notes: list[str]
    date: str = Field(description="of the scoreboard")
    versions: dict[str, str]

    @property
    def choice(self) -> Choice:
        """What is recommended."""
        return self.of_method(self.chosen)

    @property
    def runner_up(self) -> Choice | None:
        """The best of the others."""
        return next((each for each in self.choices if each.method != self.chosen), None)

    def of_method(self, method: str) -> Choice:
        """A choice by its method."""
        return next(each for each in self.choices if each.method == method)
