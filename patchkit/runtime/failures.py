"""Pairs that cannot be run: what is said of them, and how the rest goes on without them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from patchkit.errors import RunError
from patchkit.runtime.execution import current_execution

Result = TypeVar("Result")


@dataclass(frozen=True, eq=False)
class ItemFailure:
    """An item of a run that gave no numbers, and why."""

    item: Any
    reason: str

    @property
    def subject(self) -> Any:
        """The pair that the item is about, or the item itself."""
        return getattr(self.item, "pair", self.item)

    @property
    def name(self) -> str:
        """The pair's id, or the item in words."""
        return str(getattr(self.subject, "id", self.subject))[:80]


class ItemsFailed(RunError):
    """Some items of a run failed; all others were run, and are in its journal."""

    def __init__(self, failures: Sequence[ItemFailure], total: int) -> None:
        self.failures = tuple(failures)
        first = self.failures[0]
        super().__init__(
            f"{len(failures)} of {total} items could not be run; the first is {first.name!r}: {first.reason}"
        )


@dataclass(frozen=True)
class LeftOut:
    """A pair that a run was done without."""

    id: str
    reason: str


def without_failures(
    call: Callable[[Sequence[Any]], Result], pairs: Sequence[Any]
) -> tuple[Result, list[LeftOut]]:
    """Calls `call(pairs)`; where pairs could not be run, it is called again without them.

    What was finished before comes from the journal, if `call` keeps one, so that only what depends on the pairs as a
    whole (a mean over them) is computed again.

    Returns:
        What the last call gave, and the pairs left out.

    Raises:
        RunError: more than `Execution.max_failures` pairs failed, or all of them.
    """
    left_out: list[LeftOut] = []
    kept = list(pairs)
    while True:
        try:
            return call(kept), left_out
        except ItemsFailed as error:
            failed = {id(failure.subject): failure for failure in error.failures}
            found = [failed[id(pair)] for pair in kept if id(pair) in failed]
            if not found:
                # Not items about one of these pairs each.
                raise
            left_out += [LeftOut(failure.name, failure.reason) for failure in found]
            kept = [pair for pair in kept if id(pair) not in failed]
            check_failures(len(left_out), len(pairs), found[0])


def check_failures(failed: int, total: int, first: ItemFailure) -> None:
    """Raises RunError where so many failures are more than the execution allows."""
    allowed = current_execution().max_failures
    if failed >= total or (allowed is not None and failed > allowed):
        limit = "all" if failed >= total else f"more than --max-failures {allowed}"
        raise RunError(
            f"{failed} of {total} could not be run, {limit}; the first is {first.name!r}: {first.reason}. "
            "What is finished was kept; go on with --resume"
        )
