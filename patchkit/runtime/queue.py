"""What the processes of a group say to each other: work, claims on its batches, and what the batches gave.

    message/M     the M-th thing the main process says: work to open, a step to run on it, the end
    heard/P       how many of these process P has heard
    run/R/claim/B the process that runs batch B of run R: who writes it first
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

#: Seconds between two looks whether this process has been given up.
_LOOK_SECONDS = 5.0


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
    group.count("said")


def hear(group: Group, number: int) -> Any:
    """Waits for the message of this number and says that it was heard."""
    while not group.wait(lambda: group.has(f"message/{number}"), _LOOK_SECONDS):
        # Messages are not kept for a process that was silent for so long that it counts as dead.
        if group.count("said", 0) > number and not group.has(f"message/{number}"):
            return End()
    message = pickle.loads(group.read(f"message/{number}"))
    group.count(f"heard/{group.rank}")
    return message


class Speaker:
    """The main process's messages, in order.

    Once all others have heard the one after it, a message is taken off the store, and what is left of its run as well.
    """

    def __init__(self, group: Group) -> None:
        self._group, self._next, self._kept = group, 0, list[RunStep | None]()

    def say(self, message: Any) -> int:
        """Says it; how many messages there have been."""
        say(self._group, self._next, message)
        self._kept.append(message if isinstance(message, RunStep) else None)
        self._next += 1
        heard = min(
            (self._group.count(f"heard/{rank}", 0) for rank in self._group.others), default=self._next
        )
        first = self._next - len(self._kept)
        for number in range(first, heard - 1):
            self._group.drop(f"message/{number}")
            if (step := self._kept.pop(0)) is not None:
                _forget(self._group, step.number, len(step.batches))
        return self._next


def _forget(group: Group, run: int, batches: int) -> None:
    """Takes a run off the store that no process has a part in any more."""
    for batch in range(batches):
        group.drop(f"run/{run}/claim/{batch}")
    # Parts that came when they were not wanted any more.
    for number in range(1, group.count(f"run/{run}/parts", 0) + 1):
        group.drop(f"run/{run}/part/{number}")
    group.drop(f"run/{run}/parts")
    group.drop(f"run/{run}/closed")


_SPEAKERS: dict[int, Speaker] = {}


def speaker(group: Group) -> Speaker:
    """The one speaker of a group."""
    return _SPEAKERS.setdefault(id(group), Speaker(group))


def say_end(group: Group, seconds: float = 0.0) -> None:
    """Sends the other processes home, and gives them so long to hear it: the store may end with this process."""
    said = speaker(group).say(End())
    _SPEAKERS.pop(id(group), None)
    group.wait(lambda: all(group.count(f"heard/{rank}", 0) >= said for rank in group.others), seconds)


def claim(group: Group, run: int, batch: int) -> bool:
    """Whether this process is the one that runs a batch."""
    return group.claim(f"run/{run}/claim/{batch}") == group.rank


def claimed_by(group: Group, run: int, batch: int) -> int | None:
    """The process that runs a batch, if one does."""
    key = f"run/{run}/claim/{batch}"
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
        """Whether a part has been announced since the last look, or one that was announced has come."""
        if self._group.count(f"run/{self._run}/parts", 0) > self._announced:
            return True
        return any(self._group.has(f"run/{self._run}/part/{number}") for number in self._missing)

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


def close(group: Group, run: int) -> None:
    """Says that a run is over."""
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
