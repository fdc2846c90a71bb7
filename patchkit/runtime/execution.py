"""Where and how Programs run here: which processes take part, what is done about items that fail, and who is told.

It is ambient, so that no method passes it on: `use_execution(...)` sets it for what is called inside.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from patchkit.runtime.host import Host
from patchkit.runtime.processes import Group


@runtime_checkable
class Watcher(Protocol):
    """Who is shown how a run goes, besides the Progress of its items."""

    def batch(self, rows: int, width: int) -> None:
        """The batch that is run now: prompts, and tokens of the longest."""
        ...

    def failed(self, count: int) -> None:
        """So many items of this run could not be run."""
        ...

    def message(self, text: str) -> None:
        """Something to read at once, in one line."""
        ...


@dataclass(frozen=True)
class Execution:
    """How Programs run.

    Attributes:
        group: the processes that share the work; None: this one alone.
        max_failures: items that may fail before a run is given up; None: any number but all.
        fit_memory: begin with batches that by the Program's own estimate fit into what memory is free. Without it they
            are as large as the token budget says, until memory runs out.
        watcher: who is told.
        remote_concurrency: jobs that are under way at a time on a model's host.
        job_timeout: seconds after which a job that is still not done ends the run.
        job_seconds: for which a job with many steps goes on before it brings back what it has; less where the host's
            own limit turns out to be less.
        patience: seconds for which a host that cannot be reached is asked again.
        hosts: those that are spoken with, by URL.
    """

    group: Group | None = None
    max_failures: int | None = None
    fit_memory: bool = True
    watcher: Watcher | None = None
    remote_concurrency: int = 2
    job_timeout: float = 3600.0
    job_seconds: float = 300.0
    patience: float = 600.0
    hosts: dict[str, Host] = field(default_factory=dict, compare=False)


_EXECUTION: ContextVar[Execution | None] = ContextVar("execution", default=None)
_ALONE = Execution()


def current_execution() -> Execution:
    """The execution that was set last; by default this process alone."""
    return _EXECUTION.get() or _ALONE


@contextmanager
def use_execution(execution: Execution) -> Iterator[Execution]:
    """Programs that are run inside run so."""
    token = _EXECUTION.set(execution)
    try:
        yield execution
    finally:
        _EXECUTION.reset(token)
