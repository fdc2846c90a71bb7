"""Time of a plan: from batches that were really run, or from what a device's operations take at the best.

A batch takes a fixed time and a time for each token-forward. Both come from two batches of different size.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from patchkit.model import PatchModel
from patchkit.runtime.batching import length_buckets
from patchkit.runtime.plan import Plan, Stage, StagePlan
from patchkit.runtime.program import Program

#: Peak rates in 10^12 floating-point operations a second, dense, as the makers give them: (16 bits, 32 bits, and
#: 10^12 bytes a second from memory).
PEAK_RATES: dict[str, tuple[float, float, float]] = {
    "B200": (2250, 80, 8.0),
    "H200": (989, 67, 4.8),
    "H100": (989, 67, 3.35),
    "A100": (312, 19.5, 2.0),
    "L40S": (362, 91.6, 0.86),
    "A10": (125, 31.2, 0.6),
    "V100": (125, 15.7, 0.9),
    "T4": (65, 8.1, 0.32),
    "4090": (165, 82.6, 1.0),
}
#: Share of the peak that large batches reach in forwards and backwards of such models.
UTILISATION = 0.3
#: Longer than this no measured batch should take, in seconds.
_LONG = 15.0

Clock = Callable[[], float]


@dataclass(frozen=True)
class Pace:
    """What batches take, in seconds.

    Attributes:
        fixed: of a batch.
        each: of a token-forward.
        measured: items and seconds of each batch that was run.
    """

    fixed: float
    each: float
    measured: tuple[tuple[int, float], ...] = ()

    def seconds(self, batches: float, forwards: float) -> float:
        return batches * self.fixed + forwards * self.each


def fit(first: tuple[float, float], second: tuple[float, float]) -> tuple[float, float]:
    """(fixed, each) of two batches of (token-forwards, seconds), the smaller first.

    Where the larger one was no slower, or so much slower that nothing would be left for the fixed part, all time is the
    tokens'.
    """
    (few, short), (many, long) = first, second
    each = (long - short) / (many - few) if many > few else 0.0
    fixed = short - each * few
    if each <= 0 or fixed < 0:
        return 0.0, long / many
    return fixed, each


def measure(
    model: PatchModel, stage: Stage, max_batch_tokens: int, clock: Clock = time.perf_counter
) -> tuple[Pace, Pace | None]:
    """Runs two batches of a stage: (the pace of its Program, the pace of its steps)."""
    tokens = [stage.program.tokens(item) for item in stage.items]
    buckets = length_buckets(tokens, max_batch_tokens)
    batch = [stage.items[i] for i in buckets[len(buckets) // 2]]
    small = batch[: max(1, len(batch) // 4)]
    # Not counted: the first trace of a kind is compiled.
    _run(model, stage, small[:1], clock)
    seconds, steps = _run(model, stage, small, clock)
    few = _forwards(model, stage, small)
    # As much more as is measured in good time.
    more = min(len(batch), max(len(small) + 1, int(len(small) * _LONG / max(seconds + steps, 1e-9))))
    large = batch[:more]
    if len(large) == len(small):
        step = Pace(0.0, steps / few[1], ((len(small), steps),)) if few[1] else None
        return Pace(0.0, seconds / few[0], ((len(small), seconds),)), step
    longer, later = _run(model, stage, large, clock)
    many = _forwards(model, stage, large)
    sizes = (len(small), len(large))
    pace = Pace(*fit((few[0], seconds), (many[0], longer)), tuple(zip(sizes, (seconds, longer), strict=True)))
    if not few[1]:
        return pace, None
    step = Pace(*fit((few[1], steps), (many[1], later)), tuple(zip(sizes, (steps, later), strict=True)))
    return pace, step


def _forwards(model: PatchModel, stage: Stage, items: Sequence[Any]) -> tuple[float, float]:
    """Token-forwards of a batch of the Program, and of one step on it."""
    example = None if stage.steps is None else stage.steps.example
    step = 0.0 if example is None else example[1] * len(items)
    return max(stage.program.cost(model.dims, items).forwards, 1.0), step


def _run(model: PatchModel, stage: Stage, items: Sequence[Any], clock: Clock) -> tuple[float, float]:
    """Seconds of the Program, or of opening, and of one step."""
    began = clock()
    if isinstance(stage.program, Program):
        stage.program.run(model, items)
        _wait()
        return clock() - began, 0.0
    opener: Any = stage.program
    opened = opener.open(model, items)
    _wait()
    opening = clock() - began
    if stage.steps is None or stage.steps.example is None:
        return opening, 0.0
    began = clock()
    stage.steps.example[0].run(model, opened)
    _wait()
    return opening, clock() - began


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def stage_seconds(stage: Stage, plan: StagePlan, pace: Pace, step: Pace | None) -> float:
    """Of a whole stage on one process."""
    if stage.steps is None:
        return pace.seconds(plan.batches, plan.forwards)
    inside = len(stage.items) * stage.steps.forwards * stage.repeats
    opening = pace.seconds(plan.batches, plan.forwards - inside)
    if step is None:
        return opening + inside * pace.each
    return opening + step.seconds(stage.steps.count * plan.batches, inside)


@dataclass(frozen=True)
class Rate:
    """What a device does in a second.

    Attributes:
        flops: floating-point operations.
        bytes: that it reads from its memory; infinite where that is not known.
    """

    flops: float
    bytes: float = math.inf

    def seconds(self, plan: Plan, weights: int) -> float:
        """Each stage's operations, or reading all weights for every pass, whichever takes longer: small batches wait for
        the weights."""
        return sum(
            max(stage.forwards * plan.token_flops / self.flops, stage.passes * weights / self.bytes)
            for stage in plan.stages
        )


def peak_rate(name: str, itemsize: int) -> Rate | None:
    """Of a GPU by its name; None if it is not in the table."""
    for known, (half, single, memory) in PEAK_RATES.items():
        if known in name:
            return Rate(1e12 * (half if itemsize <= 2 else single), 1e12 * memory)
    return None
