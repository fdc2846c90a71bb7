"""Many steps on the same items: each process opens its batches once and keeps what it has opened.

    with Session(opener, model, items) as session:
        found = session.run(step)

`opener.open(model, items)` gives what a batch is opened to (activations of its runs, say), and `step.run(model, opened)`
tensors whose first axis is the items. Training a mask is such a session: every step is the mask as it stands, and its
gradient a sum over the items, whichever process had them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from hashlib import sha256
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from patchkit.errors import InputError
from patchkit.model import PatchModel
from patchkit.runtime.batching import MAX_BATCH_TOKENS, fitting_budget, length_buckets, split_for
from patchkit.runtime.content import content_digest
from patchkit.runtime.execution import current_execution
from patchkit.runtime.failures import ItemFailure, ItemsFailed, check_failures
from patchkit.runtime.hosted import HostedRunner
from patchkit.runtime.interrupts import Interrupts
from patchkit.runtime.job_notes import JobNotes
from patchkit.runtime.journal import Journal
from patchkit.runtime.program import Progress
from patchkit.runtime.queue import CloseWork, ModelSource, OpenWork, Part, speaker
from patchkit.runtime.sharing import shared_parts
from patchkit.runtime.work import BatchRunner, summed_of


class Session:
    """Items of any lengths, batched once.

    Args:
        opener: has `tokens(item)`, `open(model, items)` and `cost(dims, items)`; see the module's docstring.
        max_batch_tokens: the most padded tokens of a batch.
        label: what is being done, for messages.

    Raises:
        InputError: there are no items, the model has no weights, or the group's other processes cannot open it.
    """

    def __init__(
        self,
        opener: Any,
        model: PatchModel,
        items: Sequence[Any],
        *,
        max_batch_tokens: int = MAX_BATCH_TOKENS,
        label: str = "",
    ) -> None:
        self.label = label or type(opener).__name__
        if not items:
            raise InputError(f"{self.label}: nothing to run, the list of items is empty")
        if model.hosted is None:
            model.require_weights()
        self.opener, self.model, self.items = opener, model, items
        execution = current_execution()
        self.group = execution.group
        budget = max_batch_tokens
        lengths = [opener.tokens(item) for item in items]
        # Refuses a budget of nothing before anything is estimated.
        self.batches = length_buckets(lengths, budget)
        if model.hosted is not None and self.group is not None and self.group.size > 1:
            raise InputError(
                f"{model.name} is hosted at {model.hosted.url}: jobs are sent by one process, found {self.group.size}; "
                "give --remote-concurrency instead of several processes"
            )
        # How much memory a host has is found out there: what does not fit comes back, and is halved.
        if execution.fit_memory and model.hosted is None:
            here = 1 if self.group is None else self.group.local_size
            budget = fitting_budget(opener, model, items, max_batch_tokens, here)
            if budget < max_batch_tokens:
                self.batches = length_buckets(lengths, budget)
        self.budget = budget
        self._runner = _runner(model, opener, items)
        self._item_keys: list[str] | None = None
        self._made_by: tuple[str, str] | None = None
        self._journals: list[Journal] = []
        if self.group is not None and self.group.size > 1:
            self.batches = split_for(self.batches, self.group.size)
            self.group.runs += 1
            self._number = self.group.runs
            source = ModelSource(model.opening, model.name, model.content_key())
            speaker(self.group).say(OpenWork(self._number, source, opener, list(items)))

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Lets go of what was opened, in every process, and writes what waits in journals."""
        self._runner = _runner(self.model, self.opener, self.items)
        if self.group is not None and self.group.size > 1:
            speaker(self.group).say(CloseWork(self._number))
        for journal in self._journals:
            journal.flush()

    def run(
        self,
        step: Any,
        *,
        progress: Progress | None = None,
        label: str = "",
        journal: Journal | None = None,
    ) -> dict[str, Tensor]:
        """Runs a step on every item: its tensors in the order of the items, its sums added up in float64.

        Args:
            journal: where finished batches are noted, and taken from when the run was interrupted before. What
                waits there to be written is written when the session is closed.

        Raises:
            ItemsFailed: some items did not fit into memory even alone; all others were run and are in the journal.
            RunError: more items failed than the execution allows, or another process met an error.
            KeyboardInterrupt: asked by Ctrl-C or SIGTERM, after the batch in hand; at once where batches run on a host.
        """
        label = label or self.label
        summed = summed_of(step)
        gathered = Gathered(summed)
        keys = None if journal is None else self.keys(step)
        if journal is not None and keys is not None:
            if journal not in self._journals:
                self._journals.append(journal)
            found = journal.find(keys)
            gathered.take_found(found.items, found.sums)
        todo = self._todo(step, gathered.have)
        if progress is not None and gathered.have:
            progress(label, len(gathered.have), len(self.items))
        execution = current_execution()
        watcher = execution.watcher
        with Interrupts(None if watcher is None else watcher.message) as interrupts:
            for part in self._parts(step, todo, keys, journal, interrupts):
                numbers = gathered.take(part)
                if part.failures:
                    self._check_failures(gathered)
                    if watcher is not None:
                        watcher.failed(len(gathered.failures))
                if journal is not None and keys is not None and numbers:
                    journal.add([keys[n] for n in numbers], part.tensors, summed)
                if progress is not None:
                    progress(label, len(gathered.have), len(self.items))
                interrupts.check()
        if gathered.failures:
            raise ItemsFailed(self._failures(gathered), len(self.items))
        return gathered.result()

    def keys(self, step: Any) -> list[str]:
        """What each item's numbers depend on, as content: the step, the model, the item."""
        if self._item_keys is None:
            seen: dict[str, int] = {}
            self._item_keys = []
            for item in self.items:
                digest = content_digest(item)
                # The same item a second time is another one: sums count both.
                seen[digest] = seen.get(digest, 0) + 1
                self._item_keys.append(f"{digest} {seen[digest]}")
        if self._made_by is None:
            # Once: an opener may hold large tensors, and a step be one of thousands.
            self._made_by = content_digest(self.opener), self.model.content_key()
        made_by = content_digest(*self._made_by, None if step is self.opener else step)
        # Texts of their own lengths: there are many, and content_digest takes its time.
        return [sha256(f"{made_by} {key}".encode()).hexdigest()[:32] for key in self._item_keys]

    def _todo(self, step: Any, have: set[int]) -> list[list[int]]:
        """Batches with something left to do."""
        if not have:
            return self.batches
        left = [[n for n in batch if n not in have] for batch in self.batches]
        if step is self.opener or summed_of(step):
            return [batch for batch in left if batch]
        # Opened batches stay as they are, so that what was opened is found again.
        return [batch for batch, missing in zip(self.batches, left, strict=True) if missing]

    def _parts(
        self,
        step: Any,
        batches: Sequence[Sequence[int]],
        keys: Sequence[str] | None,
        journal: Journal | None,
        interrupts: Interrupts,
    ) -> Iterator[Part]:
        if isinstance(self._runner, HostedRunner):
            notes = None if journal is None else JobNotes(journal.directory, self._runner.hosted.url)
            parts = self._runner.parts(step, batches, self.budget, keys, notes)
            yield from interrupts.at_once(parts)
            return
        if self.group is not None and self.group.size > 1:
            yield from shared_parts(self.group, self._number, step, self._runner, batches, self.budget)
            return
        # The longest first: what does not fit shows at once, and the end comes in small steps.
        for number in reversed(range(len(batches))):
            yield self._runner.run(step, number, batches[number], self.budget)

    def _check_failures(self, gathered: Gathered) -> None:
        failures = self._failures(gathered)
        subjects = {id(failure.subject) for failure in failures}
        total = len({id(ItemFailure(item, "").subject) for item in self.items})
        check_failures(len(subjects), total, failures[0])

    def _failures(self, gathered: Gathered) -> list[ItemFailure]:
        return [
            ItemFailure(self.items[number], reason) for number, reason in sorted(gathered.failures.items())
        ]


def _runner(model: PatchModel, opener: Any, items: Sequence[Any]) -> BatchRunner | HostedRunner:
    return BatchRunner(model, opener, items) if model.hosted is None else HostedRunner(model, opener, items)


class Gathered:
    """What has come of a run so far.

    Attributes:
        have: items whose numbers are here.
    """

    def __init__(self, summed: frozenset[str]) -> None:
        self.summed = summed
        self.have: set[int] = set()
        self.failures: dict[int, str] = {}
        self._order: list[int] = []
        self._rows: dict[str, list[Tensor]] = {}
        self._sums: dict[str, Tensor] = {}

    def take_found(self, items: Any, sums: Any) -> None:
        """What a journal holds."""
        for number in sorted(items):
            self.have.add(number)
            self._order.append(number)
            for name, value in items[number].items():
                self._rows.setdefault(name, []).append(value[None])
        for each in sums:
            self._add(each)

    def take(self, part: Part) -> list[int]:
        """A finished batch; the items of it that are new here: all, unless it comes for the second time."""
        self.failures.update(part.failures)
        if not part.numbers or not self.have.isdisjoint(part.numbers):
            fresh = [number for number in part.numbers if number not in self.have]
            if not fresh:
                return []
            assert not self.summed & part.tensors.keys(), "sums over items of which some were here"
            rows = torch.tensor([part.numbers.index(number) for number in fresh])
            part.tensors = {name: value[rows] for name, value in part.tensors.items()}
            part.numbers = fresh
        self.have.update(part.numbers)
        self._order += part.numbers
        for name, value in part.tensors.items():
            if name not in self.summed:
                self._rows.setdefault(name, []).append(value)
        self._add({name: value for name, value in part.tensors.items() if name in self.summed})
        return part.numbers

    def result(self) -> dict[str, Tensor]:
        if not self._rows:
            return self._sums
        back = torch.argsort(torch.tensor(self._order))
        return self._sums | {name: torch.cat(rows)[back] for name, rows in self._rows.items()}

    def _add(self, sums: Any) -> None:
        for name, value in sums.items():
            added = value.double()
            self._sums[name] = self._sums[name] + added if name in self._sums else added
