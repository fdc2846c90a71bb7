"""A run shared by the processes of a group, as the main process sees it.

Every process pulls the next batch when it is done with one, so that uneven lengths keep nobody waiting. Each begins with
batches of its own, which are the same ones in every run over the same items (what it has opened is used again), and then
takes whichever nobody has begun. Batches that a process had begun when it died are run here.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

from patchkit.runtime.execution import current_execution
from patchkit.runtime.processes import Group
from patchkit.runtime.queue import Inbox, Part, Prepare, RunStep, claim, claimed_by, close, closed, speaker
from patchkit.runtime.work import BatchRunner, raise_error

#: Seconds between two looks at who is alive.
_LOOK_SECONDS = 1.0


def announce_model(source: str, **options: Any) -> None:
    """Tells the other processes, if there are any, which model will be needed: they open it while this one opens its own.

    Args:
        options: of `patchkit.load`.
    """
    group = current_execution().group
    if group is not None and group.size > 1:
        given = {"device_map": None, **options}
        speaker(group).say(Prepare({"source": source, **given}))


def own_order(batches: int, rank: int, size: int) -> list[int]:
    """The order in which a process looks for batches: its own first, longest first."""
    longest_first = list(reversed(range(batches)))
    return [b for b in longest_first if b % size == rank] + [b for b in longest_first if b % size != rank]


def unclaimed(group: Group, run: int, batches: int) -> Iterator[int]:
    """Batches that this process gets to run, until none is left or the run is over."""
    for batch in own_order(batches, group.rank, group.size):
        if closed(group, run):
            return
        if claim(group, run, batch):
            yield batch


def shared_parts(
    group: Group, work: int, step: Any, runner: BatchRunner, batches: Sequence[Sequence[int]], budget: int
) -> Iterator[Part]:
    """Runs a step on all batches, here and in the other processes; every batch's part, once, as it comes.

    Raises:
        InputError, RunError: what another process met.
    """
    if not batches:
        return
    group.runs += 1
    run = group.runs
    sent = None if step is runner.opener else step
    speaker(group).say(RunStep(run, work, sent, [list(batch) for batch in batches], budget))
    main = _Main(group, run, step, runner, batches, budget)
    try:
        for batch in unclaimed(group, run, len(batches)):
            yield from main.new([runner.run(step, batch, batches[batch], budget)])
            yield from main.new(main.inbox.collect())
        while main.pending:
            group.wait(main.something_came, _LOOK_SECONDS)
            yield from main.new(main.inbox.collect())
            yield from main.rescue()
    finally:
        # Also when this run is left by an exception: the others stop after the batch in hand.
        close(group, run)


class _Main:
    """The main process's view of one run."""

    def __init__(
        self,
        group: Group,
        run: int,
        step: Any,
        runner: BatchRunner,
        batches: Sequence[Sequence[int]],
        budget: int,
    ) -> None:
        self.group, self.run, self.step, self.runner = group, run, step, runner
        self.batches, self.budget = batches, budget
        self.inbox = Inbox(group, run)
        self.pending = set(range(len(batches)))
        self._looked = time.monotonic()

    def new(self, parts: Sequence[Part]) -> Iterator[Part]:
        """The parts of batches that were not here yet."""
        for part in parts:
            if part.batch in self.pending:
                raise_error(part, claimed_by(self.group, self.run, part.batch))
                self.pending.discard(part.batch)
                yield part

    def something_came(self) -> bool:
        return self.inbox.waiting()

    def rescue(self) -> Iterator[Part]:
        """Runs the batches that processes had begun when they died."""
        if time.monotonic() - self._looked < _LOOK_SECONDS:
            return
        self._looked = time.monotonic()
        found = self.group.find_dead()
        if found:
            shown = " and ".join(str(rank) for rank in found)
            if (watcher := current_execution().watcher) is not None:
                watcher.message(f"Process {shown} has died; its work is done by the others.")
        if not self.group.dead:
            return
        # What the dead had handed in is there by now.
        yield from self.new(self.inbox.collect())
        alive = {self.group.rank, *self.group.others}
        for batch in sorted(self.pending):
            by = claimed_by(self.group, self.run, batch)
            if by not in alive:
                yield from self.new([self.runner.run(self.step, batch, self.batches[batch], self.budget)])
