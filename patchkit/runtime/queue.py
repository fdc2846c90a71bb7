"""What the processes of a group say to each other: work, claims on its batches, and what the batches gave.

    message/M     the M-th thing the main process says: work to open, a step to run on it, the end
    run/R/claim/B who adds the first to this counter runs batch B of run R
    run/R/part/K  the K-th batch that came back

Programs and items travel pickled, within the group alone: they are this program's own objects, and no file. Numbers come
back as safetensors.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from patchkit.runtime.processes import Group


@dataclass(frozen=True, eq=False)
class ModelSource:
    """How another process opens the model, and how it knows that it is the same."""

    opening: dict[str, Any] | None
    name: str
    content: str


@dataclass(frozen=True, eq=False)
class OpenWork:
    """Items that steps will be run on."""

    number: int
    model: ModelSource
    opener: Any
    items: Sequence[Any]


@dataclass(frozen=True, eq=False)
class RunStep:
    """A step to run on these batches of a work's items."""

    number: int
    work: int
    step: Any
    batches: Sequence[Sequence[int]]
    budget: int


@dataclass(frozen=True)
class CloseWork:
    """A work's items are not needed any more."""

    number: int


@dataclass(frozen=True)
class End:
    """There will be no more work."""


@dataclass(frozen=True, eq=False)
class Prepare:
    """A model that will be needed, so that it can be opened while the main process opens its own."""

    opening: dict[str, Any]


@dataclass(eq=False)
class Part:
    """What a batch gave.

    Attributes:
        numbers: items whose numbers these are, in the order of the tensors' first axis.
        tensors: of the step; those that are sums are sums over `numbers`.
        failures: items that could not be run, and why.
        error: (kind, message, traceback) of an exception that ended the batch.
    """

    batch: int
    numbers: list[int] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    failures: list[tuple[int, str]] = field(default_factory=list)
    error: tuple[str, str, str] | None = None


def say(group: Group, number: int, message: Any) -> None:
    """The main process's next message to all others."""
    group.put(f"message/{number}", pickle.dumps(message))


def hear(group: Group, number: int) -> Any:
    """Waits for the message of this number and says that it was heard."""
    group.wait(lambda: group.has(f"message/{number}"))
    message = pickle.loads(group.read(f"message/{number}"))
    group.count(f"heard/{number}")
    return message


class Speaker:
    """The main process's messages, in order; those that all have heard are taken off the store."""

    def __init__(self, group: Group) -> None:
        self._group, self._next, self._kept = group, 0, list[int]()

    def say(self, message: Any) -> None:
        say(self._group, self._next, message)
        self._kept.append(self._next)
        self._next += 1
        self._forget()

    def _forget(self) -> None:
        while len(self._kept) > 1 and self._group.count(f"heard/{self._kept[0]}", 0) >= len(
            self._group.others
        ):
            heard = self._kept.pop(0)
            self._group.drop(f"message/{heard}")
            self._group.drop(f"heard/{heard}")


_SPEAKERS: dict[int, Speaker] = {}


def speaker(group: Group) -> Speaker:
    """The one speaker of a group."""
    return _SPEAKERS.setdefault(id(group), Speaker(group))


def say_end(group: Group) -> None:
    """Sends the other processes home."""
    speaker(group).say(End())
    _SPEAKERS.pop(id(group), None)


def claim(group: Group, run: int, batch: int) -> bool:
    """Whether this process is the one that runs a batch."""
    if group.count(f"run/{run}/claim/{batch}") > 1:
        return False
    group.put(f"run/{run}/by/{batch}", str(group.rank).encode())
    return True


def claimed_by(group: Group, run: int, batch: int) -> int | None:
    """The process that runs a batch, if it has said so."""
    key = f"run/{run}/by/{batch}"
    return int(group.read(key)) if group.has(key) else None


def deliver(group: Group, run: int, part: Part) -> None:
    """Hands a batch's outcome to the main process."""
    number = group.count(f"run/{run}/parts")
    group.put(f"run/{run}/part/{number}", encode(part))


class Inbox:
    """Parts that come back to the main process, each once."""

    def __init__(self, group: Group, run: int) -> None:
        self._group, self._run = group, run
        self._announced, self._missing = 0, set[int]()

    def waiting(self) -> bool:
        """Whether a part has been announced since the last look."""
        return self._group.count(f"run/{self._run}/parts", 0) > self._announced

    def collect(self) -> list[Part]:
        """The parts that have come since the last look."""
        announced = self._group.count(f"run/{self._run}/parts", 0)
        self._missing |= set(range(self._announced + 1, announced + 1))
        self._announced = announced
        found = []
        for number in sorted(self._missing):
            key = f"run/{self._run}/part/{number}"
            # A process may die between the announcement and the part.
            if self._group.has(key):
                found.append(decode(self._group.take(key)))
                self._missing.discard(number)
        return found


def clear(group: Group, run: int, batches: int) -> None:
    """Takes a finished run off the store; claims stay taken until all have heard of it, so that none is run again."""
    for batch in range(batches):
        group.drop(f"run/{run}/by/{batch}")
    group.put(f"run/{run}/closed", b"1")


def closed(group: Group, run: int) -> bool:
    """Whether a run is over, so that nobody need look for batches of it."""
    return group.has(f"run/{run}/closed")


def encode(part: Part) -> bytes:
    """A part as safetensors, with what are no tensors in its header."""
    said = {
        "batch": part.batch,
        "numbers": part.numbers,
        "failures": part.failures,
        "error": part.error,
    }
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in part.tensors.items()}
    return safetensors.torch.save(tensors, {"part": json.dumps(said)})


def decode(data: bytes) -> Part:
    """The part that `encode` made of it."""
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    said = json.loads(header["__metadata__"]["part"])
    error = said["error"]
    return Part(
        batch=said["batch"],
        numbers=said["numbers"],
        tensors=safetensors.torch.load(data),
        failures=[(number, reason) for number, reason in said["failures"]],
        error=None if error is None else (error[0], error[1], error[2]),
    )
