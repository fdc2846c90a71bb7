"""Running batches on a host: every batch is one job, several under way at a time, its numbers all that comes back.

What a batch is opened to stays on the host and is gone with the job, so that every step opens its batches anew there.
Where the host's memory or its time limit is too small for a batch, the batch is halved, as memory asks for here.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from patchkit.errors import InputError, RunError
from patchkit.model import PatchModel
from patchkit.runtime.execution import Execution, current_execution
from patchkit.runtime.failures import ItemFailure
from patchkit.runtime.host import Answer, Host, Watch, logger
from patchkit.runtime.job_notes import JobNotes
from patchkit.runtime.memory import says_out_of_memory
from patchkit.runtime.queue import Part
from patchkit.runtime.work import Pieces, halves, summed_of, with_budget
from patchkit.tracing.jobs import pack_job, run_step, unpack_result

#: Seconds between two looks at the jobs, from the first to the longest.
FIRST_LOOK, LONGEST_LOOK = 0.05, 2.0
#: Times that a job is sent which was lost or cancelled through no fault of its own.
ATTEMPTS = 3

_TIME_LIMIT = "exceeded the execution timeout"
_CANCELLED = "cancelled or preempted by the server"


@dataclass(eq=False)
class Flight:
    """A job under way."""

    job: str
    batch: int
    piece: list[int]
    attempt: int
    watch: Watch


@dataclass(eq=False)
class _Waiting:
    batch: int
    piece: list[int]
    attempt: int = 1


class HostedRunner(Pieces):
    """Sends the batches of some items to the model's host."""

    def __init__(self, model: PatchModel, opener: Any, items: Sequence[Any]) -> None:
        assert model.hosted is not None
        Pieces.__init__(self, opener, items)
        self.model, self.hosted = model, model.hosted

    def parts(
        self,
        step: Any,
        batches: Sequence[Sequence[int]],
        budget: int,
        keys: Sequence[str] | None,
        notes: JobNotes | None,
    ) -> Iterator[Part]:
        """What the batches gave, as they come back.

        Args:
            keys: of every item, by which jobs that were sent before are found in `notes`.

        Raises:
            InputError: the step takes gradients, and the host gives none.
            RunError: the host is lost, or a job failed; the message names its items.
        """
        check_gradients(self.model, self.opener, step)
        host = host_of(self.model)
        # The longest first, as everywhere.
        waiting = deque(_Waiting(number, list(batches[number])) for number in reversed(range(len(batches))))
        execution = current_execution()
        flying: list[Flight] = []
        pause = FIRST_LOOK
        while waiting or flying:
            while waiting and len(flying) < execution.remote_concurrency:
                next_one = waiting.popleft()
                if self.is_over_limit(next_one.piece):
                    _put_back(waiting, next_one.batch, halves(next_one.piece))
                    continue
                flying.append(self._launch(host, step, next_one, budget, keys, notes))
            done = False
            for flight in list(flying):
                answer = host.look(flight.job)
                if answer is None or not answer.over:
                    if not self._lost(flight, answer, host, execution):
                        continue
                    answer = None
                done = True
                flying.remove(flight)
                kept = answer is not None and answer.result is not None
                if notes is not None and not kept:
                    # Nothing will come of it: it must not be taken up again.
                    notes.drop(flight.job)
                part = self._landed(flight, answer, step, waiting)
                if part is not None:
                    yield part
                if notes is not None and kept:
                    notes.drop(flight.job)
            pause = FIRST_LOOK if done else min(1.3 * pause, LONGEST_LOOK)
            if flying and not done:
                host.wait(pause)

    def _launch(
        self,
        host: Host,
        step: Any,
        asked: _Waiting,
        budget: int,
        keys: Sequence[str] | None,
        notes: JobNotes | None,
    ) -> Flight:
        mine = None if keys is None else [keys[number] for number in asked.piece]
        job = None if notes is None or mine is None or asked.attempt > 1 else notes.take(mine)
        if (watcher := current_execution().watcher) is not None:
            watcher.batch(len(asked.piece), self.padded(asked.piece) // len(asked.piece))
        if job is None:
            given = [self.items[number] for number in asked.piece]
            opener = None if self.opener is step else self.opener
            blob = pack_job(self.model, run_step, opener, with_budget(step, budget), given)
            job = host.send(self.hosted.key, self.hosted.env, blob)
            if notes is not None and mine is not None:
                notes.add(job, mine)
        else:
            logger.info("job %s: taken up again", job)
        return Flight(job, asked.batch, asked.piece, asked.attempt, Watch())

    def _lost(self, flight: Flight, answer: Answer | None, host: Host, execution: Execution) -> bool:
        """Whether a job that is not over is lost; RunError where it takes too long."""
        if flight.watch.lost(answer, host):
            return True
        waited = time.monotonic() - flight.watch.began
        if answer is not None and waited > execution.job_timeout:
            raise RunError(
                f"job {flight.job} ({self._names(flight.piece)}) is {answer.status} for {waited:.0f} s, longer than "
                "--job-timeout allows. What is finished is kept, and this job is taken up again with --resume; a smaller "
                "--max-batch-tokens makes shorter jobs"
            )
        return False

    def _landed(
        self, flight: Flight, answer: Answer | None, step: Any, waiting: deque[_Waiting]
    ) -> Part | None:
        """The part of a job that has ended; None where it, or its halves, are to be sent again."""
        again = _Waiting(flight.batch, flight.piece, flight.attempt + 1)
        if answer is None or is_cancelled(answer):
            if flight.attempt >= ATTEMPTS:
                what = "is not known to the host any more" if answer is None else "was cancelled by the host"
                raise RunError(
                    f"job {flight.job} ({self._names(flight.piece)}) {what}, {ATTEMPTS} times now. What is finished is "
                    "kept; go on with --resume"
                )
            waiting.appendleft(again)
            return None
        if answer.error is not None:
            return self._failed(flight, answer.error, waiting)
        assert answer.result is not None
        found: dict[str, Tensor] = unpack_result(answer.result)
        summed = summed_of(step)
        return Part(
            flight.batch,
            list(flight.piece),
            {name: value.double() if name in summed else value for name, value in found.items()},
        )

    def _failed(self, flight: Flight, said: str, waiting: deque[_Waiting]) -> Part | None:
        reason = None
        if says_out_of_memory(said):
            reason = (
                "the host ran out of memory with this item alone. A shorter prompt or a smaller --max-batch-tokens takes "
                "less"
            )
        elif is_over_time(said):
            reason = f"this item alone takes longer than the host allows: {in_short(said)}"
        if reason is None:
            raise RunError(
                f"job {flight.job} failed on {self.hosted.url}, with {self._names(flight.piece)}: {in_short(said)} (the "
                "whole message is in the log)"
            )
        if len(flight.piece) > 1:
            _put_back(waiting, flight.batch, self.halve(flight.piece))
            return None
        return Part(flight.batch, failures=[(flight.piece[0], reason)])

    def _names(self, piece: Sequence[int]) -> str:
        names = list(dict.fromkeys(ItemFailure(self.items[number], "").name for number in piece))
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        return f"{', '.join(names[:3])}{more}"


def host_of(model: PatchModel, execution: Execution | None = None) -> Host:
    """The host of a hosted model, as this execution speaks with it."""
    assert model.hosted is not None
    execution = execution or current_execution()
    found = execution.hosts.get(model.hosted.url)
    if found is None:
        found = execution.hosts[model.hosted.url] = Host(model.hosted.url, execution.patience)
    return found


def check_gradients(model: PatchModel, opener: Any, step: Any) -> None:
    """Raises InputError where a step differentiates and the host cannot."""
    takes = getattr(step, "backward", False) or getattr(step, "differentiates", False)
    if not takes or model.hosted is None or model.hosted.gradients:
        return
    why = model.hosted.facts.get("no_gradients", "")
    forward = "exact activation patching (patch)"
    if model.hosted.facts.get("weights"):
        forward += ", path patching (paths), exact edges (edges --method exact), ACDC (--method acdc), evaluate, scrub"
    raise InputError(
        f"{type(step).__name__} takes gradients, and {model.hosted.url} gives none for {model.name}"
        f"{f' ({why})' if why else ''}. Methods of forward passes alone still work there: {forward}"
    )


def is_over_time(said: str) -> bool:
    """Whether a host's message says that it gave a job up because it took too long."""
    return _TIME_LIMIT in said


def is_cancelled(answer: Answer) -> bool:
    """Whether a job was ended by its host through no fault of its own."""
    return answer.error is not None and _CANCELLED in answer.error


def in_short(text: str) -> str:
    """What a host says went wrong, in a line: what stands before a traceback, or what it says in the end."""
    head = " ".join(text.partition("Traceback (most recent call last)")[0].split())
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return (head or (lines[-1] if lines else "no reason was given"))[:500]


def _put_back(waiting: deque[_Waiting], batch: int, pieces: list[list[int]]) -> None:
    """Pieces that are sent next, the last of them first."""
    waiting.extendleft(_Waiting(batch, piece) for piece in pieces)
