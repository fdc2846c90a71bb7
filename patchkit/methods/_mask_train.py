"""Learning one mask: Adam over blended runs, along a path of sparsity weights with warm starts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from patchkit.errors import InputError
from patchkit.methods._mask_evaluate import evaluate_mask, joint_score, rounded
from patchkit.methods._mask_layout import Layout
from patchkit.methods._mask_objective import DirectMask, HardConcreteMask, Objective
from patchkit.methods._mask_prepared import Prepared


@dataclass(frozen=True)
class Schedule:
    """How long and how fast.

    Attributes:
        lambdas: the path, in the order in which they are tried; each starts from the mask before it.
        steps: Adam steps at the first lambda.
        steps_after: at each later one.
        lr: Adam's.
        check_every: steps between looks at the validation score.
        patience: looks without a change of the rounded set after which a lambda is done; 0: take every step.
        warm: start each lambda from the mask before it; False starts each one afresh, as published.
    """

    lambdas: tuple[float, ...] = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32)
    steps: int = 160
    steps_after: int = 60
    lr: float = 0.02
    check_every: int = 10
    patience: int = 4
    warm: bool = True

    @property
    def total_steps(self) -> int:
        """Steps of the whole path, if no lambda is done early."""
        return self.steps + (self.steps_after if self.warm else self.steps) * (len(self.lambdas) - 1)

    def __post_init__(self) -> None:
        if not self.lambdas or not all(math.isfinite(lam) and lam >= 0 for lam in self.lambdas):
            raise InputError(
                f"lambdas is {list(self.lambdas)}; expected at least one number, none of them negative"
            )
        for name, least in (("steps", 1), ("steps_after", 1), ("check_every", 1), ("patience", 0)):
            if getattr(self, name) < least:
                raise InputError(f"{name} is {getattr(self, name)}; expected at least {least}")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise InputError(f"lr is {self.lr}; expected a positive learning rate")


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


Report = Callable[[int, int], None]
#: With every component above this, a mask has settled on patching nothing, or was never moved.
_ALL_KEPT = 0.95


def train_path(
    layout: Layout,
    training: Sequence[Prepared],
    validation: Prepared,
    objective: Objective,
    schedule: Schedule,
    seed: int,
    report: Report | None = None,
    begun: PathResult | None = None,
    keep: Callable[[PathResult], None] | None = None,
) -> PathResult:
    """Learns a mask at every lambda of the path.

    The seed re-weights the training triples (Bayesian bootstrap: exponential weights of mean 1) and jitters the start,
    so that seeds differ as fresh samples of triples would; seed 0 starts at all ones with equal weights, as published.

    Args:
        training: one entry a group of desiderata that is stepped on together.
        validation: triples not trained on; early stopping looks at them.
        begun: the first lambdas of this very path, which are not trained again.
        keep: called with the path after every lambda.

    Returns:
        The path. A loss that is not finite ends it: `diverged` is set, `stopped` says where, and the points reached
        before it stand, the last of them the last good mask.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = [_weights(prepared, generator if seed else None) for prepared in training]
    start = torch.ones(layout.size)
    if seed:
        start = start - 0.1 * torch.rand(layout.size, generator=generator)
    result = begun or PathResult()
    total = schedule.total_steps
    done = 0
    for place, lam in enumerate(schedule.lambdas):
        steps = schedule.steps if place == 0 or not schedule.warm else schedule.steps_after
        if place >= len(result.points):
            mask = objective.make(start, lam, seed)
            values, taken, bad = _train_one(
                layout, training, weights, validation, mask, objective, schedule, steps, result, lam
            )
            if bad is None or taken > 0:
                scores = evaluate_mask(validation, layout.keep_all_but(rounded(values)))
                result.points.append(PathPoint(lam, values, scores, taken))
            if bad is not None:
                result.diverged, result.stopped = True, bad
                return result
        values = result.points[place].values
        if schedule.warm:
            start = values
        done += steps
        heavier = schedule.lambdas[place + 1 :] if schedule.warm and objective.is_direct else ()
        if heavier and min(heavier) >= lam and bool((values > _ALL_KEPT).all()):
            # Where the price has pushed every component back to "keep", a heavier one cannot bring any back.
            result.stopped = f"nothing is patched any more at lambda {lam:g}; heavier ones were not tried"
        elif place == len(schedule.lambdas) - 1:
            result.stopped = f"every lambda of the path was tried ({len(schedule.lambdas)})"
        if keep is not None:
            keep(result)
        if report is not None:
            report(done, total)
        if result.stopped:
            break
    return result


def _weights(prepared: Prepared, generator: torch.Generator | None) -> Float[Tensor, " triple"]:
    """A weight for each triple: the mean over a desideratum's triples is 1 / its size."""
    raw = torch.ones(len(prepared.group))
    if generator is not None:
        raw = torch.empty(len(prepared.group)).exponential_(generator=generator)
    sums = torch.zeros(len(prepared.sizes)).index_add_(0, prepared.group, raw)
    return raw / sums[prepared.group]


def _train_one(
    layout: Layout,
    training: Sequence[Prepared],
    weights: Sequence[Tensor],
    validation: Prepared,
    mask: DirectMask | HardConcreteMask,
    objective: Objective,
    schedule: Schedule,
    steps: int,
    result: PathResult,
    lam: float,
) -> tuple[Tensor, int, str | None]:
    """Steps at one lambda: (values, steps taken, what went wrong or None). Values are always the last good ones."""
    optimiser = torch.optim.Adam(mask.parameters, lr=schedule.lr)
    good = mask.final()
    before: list[int] | None = None
    unchanged = 0
    for step in range(1, steps + 1):
        for prepared, weight in zip(training, weights, strict=True):
            mask.before_step()
            # The published code charges for components on the dependence step only.
            charged = not objective.alternates_steps or prepared.kinds != ("invariance",) * len(
                prepared.kinds
            )
            loss = _backward(prepared, weight, mask, objective, charged)
            finite = all(p.grad is None or bool(torch.isfinite(p.grad).all()) for p in mask.parameters)
            if not finite or not math.isfinite(loss):
                where = f"loss is not finite at lambda {lam:g}, step {step}, on {', '.join(prepared.names)}"
                return good, step - 1, f"{where}; the mask of step {step - 1} is kept"
            mask.after_backward()
            optimiser.step()
            optimiser.zero_grad()
        good = mask.final()
        if step % schedule.check_every == 0 or step == steps:
            now = rounded(good)
            result.history.append(
                {
                    "lambda": lam,
                    "step": float(step),
                    "loss": loss,
                    "size": float(len(now)),
                    "soft": float((1 - good).sum()),
                }
            )
            unchanged = unchanged + 1 if now == before else 0
            before = now
            if schedule.patience and unchanged >= schedule.patience and step < steps:
                scores = evaluate_mask(validation, layout.keep_all_but(now))
                soft = evaluate_mask(validation, good)
                # Settled: rounding no longer matters and the set has stopped changing.
                if joint_score(scores) >= joint_score(soft):
                    return good, step, None
    return good, steps, None


def _backward(
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
