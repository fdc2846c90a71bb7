"""Training along a path of sparsity weights, which can be left after any step and gone on with elsewhere.

All that a step depends on is in one object, whose state is tensors, numbers, texts, lists and dicts: a job on a model's
host takes it along and brings it back, and so the path does not depend on how many jobs it was cut into.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from patchkit.methods._mask_evaluate import evaluate_mask, evaluate_masks, joint_score, rounded
from patchkit.methods._mask_layout import Layout
from patchkit.methods._mask_objective import DirectMask, HardConcreteMask, Objective
from patchkit.methods._mask_prepared import Prepared
from patchkit.methods._mask_schedule import Schedule

#: With every component above this, a mask has settled on patching nothing, or was never moved.
_ALL_KEPT = 0.95


@dataclass(frozen=True)
class PathPoint:
    """The mask at one lambda."""

    lam: float
    values: Float[Tensor, " n"]
    validation: dict[str, float]
    steps: int

    @property
    def chosen(self) -> list[int]:
        return rounded(self.values)

    @property
    def joint(self) -> float:
        return joint_score(self.validation)


@dataclass
class PathResult:
    """All points of one path, its training curve, and why it ended."""

    points: list[PathPoint] = field(default_factory=list)
    history: list[dict[str, float]] = field(default_factory=list)
    stopped: str = ""
    diverged: bool = False


@dataclass(frozen=True)
class Recipe:
    """What decides a path, besides the triples."""

    layout: Layout
    objective: Objective
    schedule: Schedule
    seed: int


class PathTraining:
    """A path as far as it is trained.

    Args:
        weights: of the triples of each group that is stepped on together.
        start: the mask that the next lambda starts from.
        result: the lambdas that are done.

    Attributes:
        result: the path so far; it is over when `stopped` says why.
    """

    def __init__(
        self, recipe: Recipe, weights: Sequence[Tensor], start: Tensor, result: PathResult | None = None
    ) -> None:
        self.recipe, self.weights, self.start = recipe, list(weights), start
        self.result = result or PathResult()
        self._begin_lambda()

    @classmethod
    def begin(
        cls, recipe: Recipe, training: Sequence[Prepared], begun: PathResult | None = None
    ) -> PathTraining:
        """A path at its start, or behind the lambdas of it that were trained before.

        The seed re-weights the training triples (Bayesian bootstrap: exponential weights of mean 1) and jitters the
        start, so that seeds differ as fresh samples of triples would; seed 0 starts at all ones with equal weights, as
        published.
        """
        generator = torch.Generator().manual_seed(recipe.seed)
        weights = [triple_weights(prepared, generator if recipe.seed else None) for prepared in training]
        start = torch.ones(recipe.layout.size)
        if recipe.seed:
            start = start - 0.1 * torch.rand(recipe.layout.size, generator=generator)
        path = cls(recipe, weights, start)
        if begun is not None and begun.points:
            path.result = begun
            path._next_lambda()
        return path

    @classmethod
    def restored(cls, recipe: Recipe, state: dict[str, Any]) -> PathTraining:
        """The path that gave this state."""
        points = [PathPoint(**point) for point in state["points"]]
        history = [dict(row) for row in state["history"]]
        result = PathResult(points, history, state["stopped"], state["diverged"])
        path = cls(recipe, state["weights"], state["start"], result)
        path._mask.restore(state["mask"])
        for parameter, moments in zip(path._mask.parameters, state["adam"], strict=True):
            path._adam.state[parameter] = {name: value.clone() for name, value in moments.items()}
        path._step, path._good = state["step"], state["good"]
        path._before, path._unchanged = state["before"], state["unchanged"]
        return path

    def state(self) -> dict[str, Any]:
        """What `restored` makes the same path of."""
        return {
            "weights": self.weights,
            "start": self.start,
            "mask": self._mask.state(),
            "adam": [
                {name: value.clone() for name, value in self._adam.state[parameter].items()}
                for parameter in self._mask.parameters
            ],
            "step": self._step,
            "good": self._good,
            "before": self._before,
            "unchanged": self._unchanged,
            "points": [
                {"lam": p.lam, "values": p.values, "validation": p.validation, "steps": p.steps}
                for p in self.result.points
            ],
            "history": [dict(row) for row in self.result.history],
            "stopped": self.result.stopped,
            "diverged": self.result.diverged,
        }

    @property
    def done(self) -> int:
        """Steps of the schedule that lie behind: those that a lambda did not need are done as well."""
        return sum(self._steps_at(place) for place in range(len(self.result.points))) + self._step

    def advance(self, training: Sequence[Prepared], validation: Prepared, go_on: Callable[[], bool]) -> None:
        """Trains until the path is over, or as long as it may.

        A loss that is not finite ends the path: `diverged` is set, `stopped` says where, and the points reached before it
        stand, the last of them the last good mask.

        Args:
            go_on: asked after every step.
        """
        while not self.result.stopped:
            loss, bad = self._take_step(training)
            if bad is not None:
                if self._step:
                    self._add_point(validation)
                self.result.diverged, self.result.stopped = True, bad
                return
            if self._lambda_is_over(loss, validation):
                self._add_point(validation)
                self._next_lambda()
            if not go_on():
                return

    def _steps_at(self, place: int) -> int:
        schedule = self.recipe.schedule
        return schedule.steps if place == 0 or not schedule.warm else schedule.steps_after

    def _begin_lambda(self) -> None:
        recipe, place = self.recipe, len(self.result.points)
        # A path that is over needs no mask, but has one all the same, so that its state has no gaps.
        self._lam = recipe.schedule.lambdas[min(place, len(recipe.schedule.lambdas) - 1)]
        self._mask: DirectMask | HardConcreteMask = recipe.objective.make(self.start, self._lam, recipe.seed)
        self._adam = torch.optim.Adam(self._mask.parameters, lr=recipe.schedule.lr)
        # Of a finished or diverged lambda the point has them.
        self._step, self._good = 0, self._mask.final()
        self._before: list[int] | None = None
        self._unchanged = 0

    def _take_step(self, training: Sequence[Prepared]) -> tuple[float, str | None]:
        """(loss, what went wrong or None): then the step does not count, and `_good` is the mask before it."""
        mask, loss = self._mask, math.nan
        for prepared, weight in zip(training, self.weights, strict=True):
            mask.before_step()
            # The published code charges for components on the dependence step only.
            charged = not self.recipe.objective.alternates_steps or prepared.kinds != ("invariance",) * len(
                prepared.kinds
            )
            loss = backward(prepared, weight, mask, self.recipe.objective, charged)
            finite = all(p.grad is None or bool(torch.isfinite(p.grad).all()) for p in mask.parameters)
            if not finite or not math.isfinite(loss):
                names = ", ".join(prepared.names)
                where = f"loss is not finite at lambda {self._lam:g}, step {self._step + 1}, on {names}"
                return loss, f"{where}; the mask of step {self._step} is kept"
            mask.after_backward()
            self._adam.step()
            self._adam.zero_grad()
        self._good = mask.final()
        self._step += 1
        return loss, None

    def _lambda_is_over(self, loss: float, validation: Prepared) -> bool:
        schedule, last = self.recipe.schedule, self._step == self._steps_at(len(self.result.points))
        if self._step % schedule.check_every and not last:
            return False
        now = rounded(self._good)
        self.result.history.append(
            {
                "lambda": self._lam,
                "step": float(self._step),
                "loss": loss,
                "size": float(len(now)),
                "soft": float((1 - self._good).sum()),
            }
        )
        self._unchanged = self._unchanged + 1 if now == self._before else 0
        self._before = now
        if last or not schedule.patience or self._unchanged < schedule.patience:
            return last
        both = torch.stack([self.recipe.layout.keep_all_but(now), self._good])
        hard, soft = evaluate_masks(validation, both)
        # Settled: rounding no longer matters and the set has stopped changing.
        return joint_score(hard) >= joint_score(soft)

    def _add_point(self, validation: Prepared) -> None:
        scores = evaluate_mask(validation, self.recipe.layout.keep_all_but(rounded(self._good)))
        self.result.points.append(PathPoint(self._lam, self._good, scores, self._step))
        self._step = 0

    def _next_lambda(self) -> None:
        """What follows from the last point: the next lambda's start, or the end of the path."""
        schedule, place = self.recipe.schedule, len(self.result.points) - 1
        values, lam = self.result.points[-1].values, schedule.lambdas[place]
        if schedule.warm:
            self.start = values
        heavier = schedule.lambdas[place + 1 :] if schedule.warm and self.recipe.objective.is_direct else ()
        if heavier and min(heavier) >= lam and bool((values > _ALL_KEPT).all()):
            # Where the price has pushed every component back to "keep", a heavier one cannot bring any back.
            self.result.stopped = (
                f"nothing is patched any more at lambda {lam:g}; heavier ones were not tried"
            )
        elif place == len(schedule.lambdas) - 1:
            self.result.stopped = f"every lambda of the path was tried ({len(schedule.lambdas)})"
        self._begin_lambda()


def triple_weights(prepared: Prepared, generator: torch.Generator | None) -> Float[Tensor, " triple"]:
    """A weight for each triple: the mean over a desideratum's triples is 1 / its size."""
    raw = torch.ones(len(prepared.group))
    if generator is not None:
        raw = torch.empty(len(prepared.group)).exponential_(generator=generator)
    sums = torch.zeros(len(prepared.sizes)).index_add_(0, prepared.group, raw)
    return raw / sums[prepared.group]


def backward(
    prepared: Prepared,
    weights: Float[Tensor, " triple"],
    mask: DirectMask | HardConcreteMask,
    objective: Objective,
    charged: bool,
) -> float:
    """Adds one step's gradient into the mask's parameters and returns the loss."""
    sample = mask.sample()
    total, gradient = prepared.gradient(objective.loss, sample.detach(), weights)
    through = (sample * gradient).sum()
    if charged:
        penalty = mask.penalty()
        through = through + penalty
        total += float(penalty.detach())
    through.backward()
    return total
