"""Starting the other processes from the main one: `--num-processes N` on this machine.

The main process is the one that the user has started, so that its terminal, its exit status and Ctrl-C are the run's. The
others are new interpreters that serve it.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from patchkit.errors import InputError
from patchkit.runtime.processes import Group, join, launched
from patchkit.runtime.queue import say_end

_SECONDS_TO_END = 20.0


@contextmanager
def started_processes(count: int, gpus_per_replica: int = 1) -> Iterator[Group]:
    """A group of `count` processes on this machine, this one the first; they end with the context.

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
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, torch.get_num_threads() // count))
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
                [sys.executable, "-m", "patchkit.runtime.serve", str(gpus_per_replica)],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,
            )
        os.environ.update(shared, RANK="0", LOCAL_RANK="0")
        torch.set_num_threads(int(threads))
        group = join(gpus_per_replica)
        group.children = {rank: _runs(child) for rank, child in children.items()}
        yield group
    finally:
        _end(group, children)
        os.environ.clear()
        os.environ.update(before)


def _runs(child: subprocess.Popen[bytes]):  # noqa: ANN202
    return lambda: child.poll() is None


def _end(group: Group | None, children: dict[int, subprocess.Popen[bytes]]) -> None:
    if group is not None:
        try:
            say_end(group)
        finally:
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
