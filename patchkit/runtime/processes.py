"""The processes that share the work: a process group that accelerate has formed, and its store.

One process, the main one, works as if it were alone: it reads the input, calls the methods, writes the results. The
others serve it (`patchkit.runtime.serve`). They speak through the group's key-value store and through nothing else: no
collective operation is used, which a process that has died would leave hanging.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from patchkit.errors import InputError, RunError

#: Seconds between two signs of life, and without any after which a process counts as dead.
BEAT_SECONDS = 1.0
DEAD_SECONDS = 30.0
_PREFIX = "patchkit"
#: Pauses between two looks at the store, in seconds: short at first, since most answers come at once.
_PAUSES = (0.0003, 0.02)
#: What torchrun, `accelerate launch` and srun scripts set.
_LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Group:
    """This process's place among those that share the work.

    Attributes:
        rank, size: 0 is the main process.
        local_rank: its number on this machine, which chooses its GPUs.
        gpus_per_replica: GPUs that each process spreads its model over.
    """

    def __init__(self, store: Any, rank: int, size: int, local_rank: int, gpus_per_replica: int = 1) -> None:
        self._store = dist.distributed_c10d.PrefixStore(_PREFIX, store)
        self.rank, self.size, self.local_rank = rank, size, local_rank
        self.gpus_per_replica = gpus_per_replica
        #: Processes that the main one has started itself: rank -> (whether it still runs).
        self.children: dict[int, Callable[[], bool]] = {}
        self.runs = 0
        self._beats: dict[int, tuple[int, float]] = {}
        self._dead: set[int] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True, name="patchkit-alive")
        self._thread.start()

    @property
    def local_size(self) -> int:
        """How many of the processes are on this machine."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", self.size))

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def dead(self) -> frozenset[int]:
        """Ranks that were found dead."""
        return frozenset(self._dead)

    @property
    def others(self) -> list[int]:
        """Ranks of the other processes that are alive."""
        return [rank for rank in range(self.size) if rank != self.rank and rank not in self._dead]

    # The store. Values are bytes.

    def put(self, key: str, value: bytes) -> None:
        self._call(self._store.set, key, value)

    def take(self, key: str) -> bytes:
        """The value of a key that is there, which is then removed."""
        value = self._call(self._store.get, key)
        self._call(self._store.delete_key, key)
        return value

    def read(self, key: str) -> bytes:
        return self._call(self._store.get, key)

    def drop(self, key: str) -> None:
        self._call(self._store.delete_key, key)

    def has(self, *keys: str) -> bool:
        """Whether all these keys are there."""
        return self._call(self._store.check, list(keys))

    def count(self, key: str, amount: int = 1) -> int:
        """Adds to a counter, and gives its value after that."""
        return self._call(self._store.add, key, amount)

    def claim(self, key: str) -> int:
        """The rank that has claimed a key: this one, unless another was first."""
        return int(self._call(self._store.compare_set, key, "", str(self.rank)))

    def wait(self, ready: Callable[[], bool], seconds: float | None = None) -> bool:
        """Looks until `ready()`, ever less often; False when the time is over."""
        begun = time.monotonic()
        while not ready():
            passed = time.monotonic() - begun
            if seconds is not None and passed >= seconds:
                return False
            shortest, longest = _PAUSES
            time.sleep(min(longest, max(shortest, passed / 20)))
        return True

    # Who is alive.

    def find_dead(self) -> list[int]:
        """Ranks that have died since the last call; for the main process, between its own batches."""
        found = []
        for rank in self.others:
            runs = self.children.get(rank)
            if (runs is not None and not runs()) or self._silent(rank):
                self._dead.add(rank)
                found.append(rank)
        return found

    def close(self) -> None:
        """Ends the signs of life; the process group itself is left to whoever formed it."""
        self._stop.set()
        self._thread.join(timeout=5 * BEAT_SECONDS)

    def _silent(self, rank: int) -> bool:
        beats, now = self.count(f"beat/{rank}", 0), time.monotonic()
        if rank not in self._beats or self._beats[rank][0] != beats:
            self._beats[rank] = (beats, now)
        return now - self._beats[rank][1] > DEAD_SECONDS

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_SECONDS):
            try:
                self._store.add(f"beat/{self.rank}", 1)
            except Exception:
                # The store is gone: the main thread meets the same error where it can be told.
                return

    def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except RuntimeError as error:
            raise RunError(
                f"process {self.rank}: the store of the process group does not answer any more, so the process that "
                f"holds it has ended ({str(error).splitlines()[0]}). What is finished was kept; go on with --resume"
            ) from error


def launched() -> bool:
    """Whether this process was started as one of several by torchrun, `accelerate launch` or a batch system."""
    return all(name in os.environ for name in _LAUNCHED) and int(os.environ["WORLD_SIZE"]) > 1


def join(seconds: float, gpus_per_replica: int = 1) -> Group:
    """Joins the process group that the environment describes, through accelerate.

    Args:
        seconds: how long the others may keep it waiting.

    Raises:
        InputError: the environment describes none, or the group cannot be formed.
    """
    missing = [name for name in _LAUNCHED if name not in os.environ]
    if missing:
        raise InputError(
            f"there is no process group to join: {', '.join(missing)} not set. Start with `accelerate launch -m patchkit "
            "...` or torchrun, or give --num-processes N to start N processes on this machine"
        )
    from accelerate import PartialState

    try:
        PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(seconds=seconds))
        store = dist.distributed_c10d._get_default_store()
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"the process group at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} could not be joined: "
            f"{str(error).strip().splitlines()[0]}"
        ) from error
    local = int(os.environ.get("LOCAL_RANK", 0))
    return Group(store, dist.get_rank(), dist.get_world_size(), local, gpus_per_replica)


def placement(group: Group | None, device_map: Any = None) -> dict[str, Any]:
    """Where this process puts its model: arguments of `patchkit.load`, from what was asked for.

    Alone, a process uses all GPUs; one of several uses its own, `gpus_per_replica` of them.

    Raises:
        InputError: there are fewer GPUs than the processes of this machine need.
    """
    if not torch.cuda.is_available() or device_map in ("cpu", {"": "cpu"}):
        return {"device_map": device_map}
    if group is None or group.size == 1:
        return {"device_map": device_map or "auto"}
    first, each, count = (
        group.local_rank * group.gpus_per_replica,
        group.gpus_per_replica,
        torch.cuda.device_count(),
    )
    if first + each > count:
        raise InputError(
            f"process {group.local_rank} of this machine needs GPU {first} to {first + each - 1}, and there are {count}; "
            "start fewer processes or give a smaller --gpus-per-replica"
        )
    if each == 1:
        return {"device_map": {"": first}}
    own = {number: torch.cuda.mem_get_info(number)[0] for number in range(first, first + each)}
    # Named for every device: what is left out may be filled up.
    return {"device_map": device_map or "auto", "max_memory": dict.fromkeys(range(count), 0) | own}
