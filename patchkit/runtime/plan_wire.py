"""What a run on a hosted model will send and get back: its jobs are packed as they would be sent, and are not sent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from patchkit.model import PatchModel
from patchkit.runtime.batching import length_buckets
from patchkit.runtime.plan import Stage, StagePlan
from patchkit.runtime.work import with_budget
from patchkit.tracing.jobs import pack_job, run_step

#: Jobs that ask a host what it has, when a model is opened: what they are is sent and comes back, in bytes.
PROBES, PROBES_SENT, PROBES_BACK = 3, 93_000, 1_700
#: Bytes of an answer beside its numbers, and what of the numbers is left when they are compressed.
ANSWER, COMPRESSED = 650, 0.93


@dataclass(frozen=True)
class Wire:
    """What goes over the wire, in bytes."""

    jobs: float
    sent: float
    back: float

    def __add__(self, other: Wire) -> Wire:
        return Wire(self.jobs + other.jobs, self.sent + other.sent, self.back + other.back)


def opening() -> Wire:
    """Opening a model."""
    return Wire(PROBES, PROBES_SENT, PROBES_BACK)


def stage_wire(model: PatchModel, stage: Stage, plan: StagePlan, max_batch_tokens: int) -> Wire:
    """A stage of which `plan` is the price: each of its batches is a job, and in each step of a session again.

    The smallest and the largest batch are packed; what lies between is taken to lie between in bytes too.
    """
    opener, items = stage.program, stage.items
    lengths = stage.tokens
    batches = length_buckets(lengths, max_batch_tokens)
    padded = [len(batch) * max(lengths[number] for number in batch) for batch in batches]
    step: Any = opener
    if stage.steps is not None and stage.steps.example is not None:
        step = stage.steps.example[0]
    ends = sorted(range(len(batches)), key=padded.__getitem__)
    few, many = (
        _packed(model, opener, step, [items[number] for number in batches[end]], max_batch_tokens)
        for end in (ends[0], ends[-1])
    )
    width = padded[ends[-1]] - padded[ends[0]]
    slope = (many - few) / width if width else 0.0
    once = sum(few + slope * (each - padded[ends[0]]) for each in padded)
    numbers, steps = plan.back, stage.steps
    if steps is not None and steps.jobs is not None:
        # Of many steps in one job only what the last one leaves comes back.
        numbers -= (steps.count * len(batches) - steps.jobs) * steps.back * stage.repeats
    # Every step opens its batches anew.
    return Wire(
        plan.requests,
        once * plan.requests / len(batches),
        plan.requests * ANSWER + COMPRESSED * stage.filled * numbers,
    )


def _packed(model: PatchModel, opener: Any, step: Any, items: Sequence[Any], budget: int) -> int:
    """Bytes of a job."""
    given = None if opener is step else opener
    return len(pack_job(model, run_step, given, with_budget(step, budget), list(items)))
