"""One job that is waited for: what is no step on batches, but a whole loop that runs where the model is hosted."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from patchkit.errors import RunError
from patchkit.model import PatchModel
from patchkit.runtime.execution import Execution, current_execution
from patchkit.runtime.host import Answer, Host, Watch, logger
from patchkit.runtime.hosted import (
    ATTEMPTS,
    FIRST_LOOK,
    LONGEST_LOOK,
    host_of,
    in_short,
    is_cancelled,
    is_over_time,
)
from patchkit.runtime.interrupts import Interrupts
from patchkit.runtime.job_notes import JobNotes
from patchkit.tracing.jobs import pack_job, unpack_result


class OverTime(RunError):
    """A job took longer than its host allows."""


def run_job(
    model: PatchModel,
    work: Callable[..., dict[str, Any]],
    *given: Any,
    about: str,
    notes: JobNotes | None = None,
    key: str = "",
) -> dict[str, Any]:
    """Runs `work(model, *given)` on the model's host, again where the job was lost or cancelled: it has no effects.

    Args:
        about: what the job does, for messages.
        notes: where it is noted under its `key` until it is over, and taken up again.

    Raises:
        OverTime: it took longer than the host allows.
        RunError: it failed, or the host is lost.
        KeyboardInterrupt: asked by Ctrl-C or SIGTERM; the job runs on.
    """
    execution = current_execution()
    host = host_of(model, execution)
    watcher = execution.watcher
    with Interrupts(None if watcher is None else watcher.message) as interrupts:
        answer = next(interrupts.at_once(_answers(host, execution, model, work, given, about, notes, key)))
    if answer.result is not None:
        return unpack_result(answer.result)
    assert answer.error is not None
    said = in_short(answer.error)
    if is_over_time(answer.error):
        raise OverTime(f"{about}: a job took longer than {host.url} allows: {said}")
    raise RunError(f"{about}: a job failed on {host.url}: {said} (the whole message is in the log)")


def _answers(
    host: Host,
    execution: Execution,
    model: PatchModel,
    work: Callable[..., dict[str, Any]],
    given: tuple[Any, ...],
    about: str,
    notes: JobNotes | None,
    key: str,
) -> Iterator[Answer]:
    """The one answer, once it is there."""
    assert model.hosted is not None
    job = None if notes is None else notes.take([key])
    if job is not None:
        logger.info("job %s: taken up again", job)
    for _ in range(ATTEMPTS):
        if job is None:
            job = host.send(model.hosted.key, model.hosted.env, pack_job(model, work, *given))
            if notes is not None:
                notes.add(job, [key])
        answer = _wait(host, job, execution, about)
        if notes is not None:
            notes.drop(job)
        if answer is not None and not is_cancelled(answer):
            yield answer
            return
        job = None
    raise RunError(
        f"{about}: a job was lost or cancelled on {host.url}, {ATTEMPTS} times now. What is finished is kept; go on with "
        "--resume"
    )


def _wait(host: Host, job: str, execution: Execution, about: str) -> Answer | None:
    """How a job ended; None where the host knows nothing of it any more."""
    watch, pause = Watch(), FIRST_LOOK
    while True:
        answer = host.look(job)
        if answer is not None and answer.over:
            return answer
        if watch.lost(answer, host):
            return None
        waited = time.monotonic() - watch.began
        if answer is not None and waited > execution.job_timeout:
            raise RunError(
                f"{about}: job {job} is {answer.status} for {waited:.0f} s, longer than --job-timeout allows. What is "
                "finished is kept, and this job is taken up again with --resume"
            )
        host.wait(pause)
        pause = min(1.3 * pause, LONGEST_LOOK)
