"""`@runs`: the options that every command has that runs a model, and what they set up around it.

    @runs
    def patch(ctx: typer.Context, shared: RunOptions, model: Model, out: Out) -> None: ...

The command declares its own options, and gets the shared ones as one object; on the command line they stand behind its
own. In a process group the body runs in the main process alone; the others serve it.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from patchkit.cli.app import INTERRUPTED
from patchkit.cli.console import say
from patchkit.cli.hosted import check_hosted, on_host
from patchkit.cli.options import (
    BACKENDS,
    AttnImplementation,
    Backend,
    DeviceMap,
    Dtype,
    GpusPerReplica,
    Host,
    JobSeconds,
    JobTimeout,
    MaxBatchTokens,
    MaxFailures,
    NumProcesses,
    Patience,
    Quiet,
    RemoteConcurrency,
    Resume,
    Seed,
    batch_tokens,
    one_of,
)
from patchkit.errors import InputError, PatchkitError

if TYPE_CHECKING:
    from patchkit.runtime import Execution

#: Name, annotation and default of each, in the order of the help.
_SHARED: tuple[tuple[str, Any, Any], ...] = (
    ("dtype", Dtype, None),
    ("device_map", DeviceMap, None),
    ("attn_implementation", AttnImplementation, None),
    ("backend", Backend, None),
    ("num_processes", NumProcesses, None),
    ("gpus_per_replica", GpusPerReplica, None),
    ("host", Host, None),
    ("remote_concurrency", RemoteConcurrency, None),
    ("job_timeout", JobTimeout, None),
    ("job_seconds", JobSeconds, None),
    ("patience", Patience, None),
    ("max_batch_tokens", MaxBatchTokens, "auto"),
    ("max_failures", MaxFailures, None),
    ("seed", Seed, 0),
    ("resume", Resume, False),
    ("quiet", Quiet, False),
)


@dataclass
class RunOptions:
    """The shared options as they were given; see their help texts."""

    dtype: str | None = None
    device_map: str | None = None
    attn_implementation: str | None = None
    backend: str | None = None
    num_processes: int | None = None
    gpus_per_replica: int | None = None
    host: str | None = None
    remote_concurrency: int | None = None
    job_timeout: float | None = None
    job_seconds: float | None = None
    patience: float | None = None
    max_batch_tokens: str = "auto"
    max_failures: int | None = None
    seed: int = 0
    resume: bool = False
    quiet: bool = False
    #: What ends with the command.
    until_end: ExitStack = field(default_factory=ExitStack, repr=False)

    @property
    def batch_tokens(self) -> int:
        """The most tokens of a batch; `auto` goes from the default down to what memory allows."""
        from patchkit.runtime import MAX_BATCH_TOKENS

        return batch_tokens(self.max_batch_tokens) or MAX_BATCH_TOKENS

    def check(self, in_group: bool, gpus: int) -> None:
        """Raises InputError for options that do not go together here.

        Args:
            in_group: whether this process was started as one of several.
            gpus: how many this machine has.
        """
        batch_tokens(self.max_batch_tokens)
        accelerate = in_group
        if self.backend is not None:
            accelerate = one_of(BACKENDS, self.backend, "--backend") == "accelerate"
        if in_group and not accelerate:
            raise InputError(
                f"--backend {self.backend}: this process is one of several that were started together; leave --backend "
                "out, or start it without torchrun or accelerate launch"
            )
        check_hosted(self)
        if in_group and self.num_processes is not None:
            raise InputError(
                f"--num-processes {self.num_processes}: this process is one of several that were started together; leave "
                "it out, or start it without torchrun or accelerate launch"
            )
        for option, value in (
            ("--num-processes", self.num_processes),
            ("--gpus-per-replica", self.gpus_per_replica),
        ):
            if value is not None and value < 1:
                raise InputError(f"{option} {value}: expected at least 1")
            if value is not None and not accelerate:
                there = f", found --backend {self.backend}" if self.backend else "; give both"
                raise InputError(f"{option} {value} belongs to --backend accelerate{there}")
        if self.max_failures is not None and self.max_failures < 0:
            raise InputError(f"--max-failures {self.max_failures}: expected at least 0")
        self._check_gpus(gpus)

    def _check_gpus(self, gpus: int) -> None:
        each, processes = self.gpus_per_replica or 1, self.num_processes or 1
        if each > 1 and (not gpus or gpus % each):
            raise InputError(
                f"--gpus-per-replica {each}: expected a number that divides the GPUs of this machine, and it has {gpus}"
            )
        if gpus and processes * each > gpus:
            raise InputError(
                f"--num-processes {processes}, with {each} GPU{'s' if each > 1 else ''} each, needs {processes * each} "
                f"GPUs; found {gpus}. Give at most --num-processes {gpus // each}"
            )

    @property
    def hosted(self) -> bool:
        """Whether the model stays on a host."""
        return self.backend == "ndif"

    def execution(self) -> Execution:
        """How Programs run that the command runs."""
        from patchkit.runtime import Execution

        names = ("remote_concurrency", "job_timeout", "job_seconds", "patience")
        given = {name: getattr(self, name) for name in names}
        return Execution(
            max_failures=self.max_failures,
            fit_memory=self.max_batch_tokens == "auto",
            **{name: value for name, value in given.items() if value is not None},
        )

    def start(self) -> None:
        """Starts the processes that `--num-processes` asks for, once: when the input is known to be good."""
        from patchkit.runtime import current_execution, started_processes

        if self.num_processes is not None and current_execution().group is None:
            self.until_end.enter_context(started_processes(self.num_processes, self.gpus_per_replica or 1))


def runs(command: Callable[..., None] | None = None, *, without: Collection[str] = ()) -> Callable[..., Any]:
    """Adds the shared options to a command, and sets up what they ask for around it.

    The command's parameter `shared` receives them.

    Args:
        without: those that mean nothing to this command; they keep their defaults.
    """
    if command is None:
        return functools.partial(runs, without=without)
    taken = [each for each in _SHARED if each[0] not in without]
    own = inspect.signature(command, eval_str=True).parameters
    parameters = [parameter for name, parameter in own.items() if name != "shared"]
    keyword = inspect.Parameter.KEYWORD_ONLY
    added = [
        inspect.Parameter(name, keyword, annotation=annotation, default=default)
        for name, annotation, default in taken
    ]

    @functools.wraps(command)
    def run(*args: Any, **given: Any) -> None:
        shared = RunOptions(**{name: given.pop(name) for name, _, _ in taken})
        with _set_up(shared, given.get("out")):
            command(*args, shared=shared, **given)

    signature = inspect.Signature([*parameters, *added])
    run.__signature__ = signature  # pyright: ignore[reportAttributeAccessIssue]
    run.__annotations__ = {
        parameter.name: parameter.annotation for parameter in signature.parameters.values()
    }
    # Typer follows it to the function without the shared options.
    del run.__wrapped__
    return run


@contextmanager
def _set_up(shared: RunOptions, out: Path | None) -> Iterator[None]:
    """The execution that the options ask for. In all processes of a group but the main one it does not come back."""
    import torch

    from patchkit.runtime import joined_processes, launched, use_execution
    from patchkit.runtime.interrupts import terminable

    in_group = launched()
    is_main = not in_group or os.environ["RANK"] == "0"
    try:
        shared.check(in_group, torch.cuda.device_count())
    except InputError as error:
        if is_main:
            raise
        # The main process says it, once.
        raise typer.Exit(error.exit_code) from None
    if not is_main:
        raise typer.Exit(_serve(shared))
    with terminable(), shared.until_end as until_end:
        until_end.enter_context(use_execution(shared.execution()))
        if shared.hosted:
            until_end.enter_context(on_host(out, shared.quiet))
        if in_group or (shared.backend == "accelerate" and shared.num_processes is None):
            until_end.enter_context(joined_processes(shared.gpus_per_replica or 1))
        yield


def _serve(shared: RunOptions) -> int:
    """Serves the main process until its end; the exit status."""
    from patchkit.runtime import joined_processes, serve

    try:
        with joined_processes(shared.gpus_per_replica or 1) as group:
            serve(group=group)
    except PatchkitError as error:
        say(f"patchkit, process {os.environ['RANK']}: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        # Whoever interrupted it has interrupted the main process too, which says how to go on.
        return INTERRUPTED
    return 0
