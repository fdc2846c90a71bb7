"""Processes that share the work, as contexts: started from the main one, or joined where a launcher has started all.

    with started_processes(8):
        scores = patch_nodes(model, pairs)

    with joined_processes() as group:
        if group.is_main:
            scores = patch_nodes(model, pairs)
        else:
            serve(model, group=group)

Of those that are started here the main process is the one that the user has started, so that its terminal, its exit
status and Ctrl-C are the run's. The others are new interpreters.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace

import torch
import torch.distributed as dist

from patchkit.errors import InputError, RunError
from patchkit.runtime.execution import current_execution, use_execution
from patchkit.runtime.processes import Group, join, launched
from patchkit.runtime.queue import say_end

_SERVE = "from patchkit.runtime.serving import main; main()"
_SECONDS_TO_END = 20.0
#: Within which a process of this machine has joined; a launcher's processes may have to wait for other machines.
_SECONDS_TO_START = 180.0
_SECONDS_TO_JOIN = 1800.0


@contextmanager
def joined_processes(gpus_per_replica: int = 1) -> Iterator[Group]:
    """The group that `accelerate launch`, torchrun or a batch system has started this process in.

    In the main process, Programs that are run inside are shared with the others; these must `serve`. They end when the
    main process leaves the context.

    Raises:
        InputError: this process was not started in a group, or the group cannot be formed.
    """
    group = join(_SECONDS_TO_JOIN, gpus_per_replica)
    try:
        with use_execution(replace(current_execution(), group=group)):
            yield group
    finally:
        if group.is_main:
            # When the store is gone there is nobody left to tell.
            with suppress(RunError):
                say_end(group, _SECONDS_TO_END)
        group.close()


@contextmanager
def started_processes(count: int, gpus_per_replica: int = 1) -> Iterator[Group]:
    """A group of `count` processes on this machine, this one the first, which share the Programs that are run inside.

    On CPUs each gets its share of the threads, unless OMP_NUM_THREADS says how many.

    Raises:
        InputError: this process is one of several already, or there are not enough GPUs.
    """
    if count < 1:
        raise InputError(f"--num-processes {count}: expected at least 1")
    if launched():
        raise InputError(
            "--num-processes is for a run that starts its processes itself; this one was started as one of several "
            f"already ({os.environ['WORLD_SIZE']}), by torchrun or accelerate launch: leave it out"
        )
    if torch.cuda.is_available() and count * gpus_per_replica > torch.cuda.device_count():
        raise InputError(
            f"--num-processes {count} with {gpus_per_replica} GPU each needs {count * gpus_per_replica} GPUs, and there "
            f"are {torch.cuda.device_count()}"
        )
    before = dict(os.environ)
    all_threads = torch.get_num_threads()
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, all_threads // count))
    shared = {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "OMP_NUM_THREADS": threads,
    }
    children: dict[int, subprocess.Popen[bytes]] = {}
    group = None
    try:
        for rank in range(1, count):
            environment = {**before, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            # Its own session: Ctrl-C is the main process's, which tells the others when it ends.
            children[rank] = subprocess.Popen(
                [sys.executable, "-c", _SERVE, str(_SECONDS_TO_START), str(gpus_per_replica)],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,
            )
        os.environ.update(shared, RANK="0", LOCAL_RANK="0")
        torch.set_num_threads(int(threads))
        group = join(_SECONDS_TO_START, gpus_per_replica)
        group.children = {rank: _runs(child) for rank, child in children.items()}
        with use_execution(replace(current_execution(), group=group)):
            yield group
    finally:
        _end(group, children)
        torch.set_num_threads(all_threads)
        os.environ.clear()
        os.environ.update(before)


def _runs(child: subprocess.Popen[bytes]) -> Callable[[], bool]:
    return lambda: child.poll() is None


def _end(group: Group | None, children: dict[int, subprocess.Popen[bytes]]) -> None:
    if group is not None:
        with suppress(RunError):
            say_end(group)
        group.close()
    for child in children.values():
        try:
            child.wait(timeout=_SECONDS_TO_END if group is not None else 0)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
    if dist.is_initialized():
        dist.destroy_process_group()
        from accelerate.state import PartialState

        PartialState._reset_state()


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
