"""Loops over steps (training a mask, pruning it) where the model is hosted: as many steps in one job as its time allows.

A job opens the triples once, takes the loop's state along and brings it back, so that the outcome is the same however it
was cut into jobs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

from torch import Tensor

from patchkit.errors import RunError
from patchkit.methods._mask_prepare import Masked, Preparation
from patchkit.methods._mask_prepared import Prepared, Tally
from patchkit.model import PatchModel
from patchkit.runtime import ItemsFailed, current_execution
from patchkit.runtime.failures import ItemFailure
from patchkit.runtime.held import Held, TooLarge
from patchkit.runtime.hosted import host_of
from patchkit.runtime.job_notes import JobNotes
from patchkit.runtime.lone_job import OverTime, run_job

#: Seconds of a job below which the next try is one step.
_LEAST_SECONDS = 1.0


@runtime_checkable
class Loop(Protocol):
    """Steps that can be left after any one and gone on with from their `state`: tensors, numbers, texts, lists, dicts."""

    @property
    def recipe(self) -> Any: ...

    @classmethod
    def restored(cls, recipe: Any, state: dict[str, Any]) -> Loop: ...

    def state(self) -> dict[str, Any]: ...

    def advance(
        self, training: Sequence[Prepared], validation: Prepared, go_on: Callable[[], bool]
    ) -> None: ...


SomeLoop = TypeVar("SomeLoop", bound=Loop)


class StepOverTime(OverTime):
    """A single step takes longer than the host allows for a job."""


def advance_hosted(
    loop: SomeLoop,
    training: Sequence[Prepared],
    validation: Prepared,
    about: str,
    notes: JobNotes | None = None,
    key: str = "",
) -> SomeLoop:
    """The loop as one job has brought it on.

    Args:
        notes: where the job is noted under its `key` until it is over.

    Raises:
        StepOverTime: a single step takes longer than the host allows.
        RunError: the job failed, or the host is lost.
        ItemsFailed: the host has too little memory for a triple.
    """
    model, execution = validation.sessions[0].model, current_execution()
    host = host_of(model, execution)
    parts = [Travelling.of(prepared) for prepared in (*training, validation)]
    if execution.watcher is not None:
        items = [item for part in parts for sent in part.sent for item in sent.items]
        execution.watcher.batch(len(items), max(map(parts[0].sent[0].opener.tokens, items)))
    state, known = loop.state(), host.job_seconds
    while True:
        seconds = min(execution.job_seconds, host.job_seconds)
        work = (advance_there, type(loop), loop.recipe, state, parts, seconds)
        try:
            found = run_job(model, *work, about=about, notes=notes, key=key)
        except OverTime as error:
            if seconds <= 0:
                # That says nothing of other loops' steps.
                host.job_seconds = known
                raise StepOverTime(
                    f"{error} (it was a single step: fewer triples make it shorter)"
                ) from error
            host.job_seconds = seconds / 2 if seconds > _LEAST_SECONDS else 0.0
            continue
        if "too_large" in found:
            raise _failure(parts, *found["too_large"])
        try:
            validation.tally.token_forwards += found["paid"]
            restored: Any = type(loop).restored(loop.recipe, found["state"])
        except (KeyError, TypeError, ValueError) as error:
            raise RunError(
                f"{about}: a job on {host.url} gave back something else than was asked for"
            ) from error
        return restored


def _failure(parts: Sequence[Travelling], place: int, number: int) -> ItemsFailed:
    reason = "the host has too little memory for it here, even alone. A shorter prompt takes less"
    sent = [each for part in parts for each in part.sent]
    total = sum(len(each.items) for each in sent)
    return ItemsFailed([ItemFailure(sent[place].items[number], reason)], total)


# What runs there.


@dataclass(frozen=True, eq=False)
class Sent:
    """A session as it is sent: what is open stays where it is, and is opened anew there."""

    opener: Preparation
    items: Sequence[Masked]
    batches: Sequence[Sequence[int]]


@dataclass(frozen=True, eq=False)
class Travelling:
    """Prepared triples as they are sent."""

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    kinds: tuple[str, ...]
    sent: tuple[Sent, ...]
    group: Tensor
    target: Tensor
    original_answer: Tensor

    @classmethod
    def of(cls, prepared: Prepared) -> Travelling:
        return cls(
            prepared.names,
            prepared.sizes,
            prepared.kinds,
            tuple(Sent(each.opener, each.items, each.batches) for each in prepared.sessions),
            prepared.group,
            prepared.target,
            prepared.original_answer,
        )

    def held(self, model: PatchModel, tally: Tally) -> Prepared:
        """The same triples in a job, which opens them when they are first needed."""
        return Prepared(
            self.names,
            self.sizes,
            self.kinds,
            tuple(Held(each.opener, model, each.items, each.batches) for each in self.sent),
            self.group,
            self.target,
            self.original_answer,
            tally,
        )


class UntilLate:
    """Whether there is time for one more step that takes as long as the last one."""

    def __init__(self, seconds: float) -> None:
        self._last = time.monotonic()
        self._end = self._last + seconds

    def __call__(self) -> bool:
        before, self._last = self._last, time.monotonic()
        return 2 * self._last - before < self._end


def advance_there(
    model: PatchModel,
    kind: type[Loop],
    recipe: Any,
    state: dict[str, Any],
    parts: Sequence[Travelling],
    seconds: float,
) -> dict[str, Any]:
    """Job: the loop's state after as many steps as there is time for, and the token-forwards that were `paid`."""
    go_on, tally = UntilLate(seconds), Tally()
    prepared = [part.held(model, tally) for part in parts]
    loop = kind.restored(recipe, state)
    try:
        loop.advance(prepared[:-1], prepared[-1], go_on)
    except TooLarge as error:
        held = [session for part in prepared for session in part.sessions]
        return {"too_large": [held.index(error.held), error.number]}
    return {"state": loop.state(), "paid": tally.token_forwards}
