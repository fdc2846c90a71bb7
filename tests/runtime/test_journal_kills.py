"""Killed at any moment, out of disk: the run that goes on gives the same, bit for bit, and runs nothing twice."""

from __future__ import annotations

import os
import random
import resource
import signal
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from patchkit import files
from patchkit.errors import RunError
from patchkit.runtime import Journal, Session, journal, run_program
from tests.comparisons import pair
from tests.runtime.journals import BATCHES, ITEMS, Totals, ended, equal, fork, run, shards

#: Beside `make test`, in a lane of its own.
pytestmark = pytest.mark.slow

MANY = [*range(2, 42)]
UNDISTURBED = run(Totals(), None, MANY, 40)


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every batch is written as soon as it is finished, so that there is much to interrupt."""
    monkeypatch.setattr(journal, "PATIENCE", 0.0)


def check(directory: Path, finished: set[int]) -> set[int]:
    """What is on disk is whole, holds all that was there before, and goes on to the right result without running it
    again. Returns what is there."""
    program = Totals(last_run=0)
    model = pair("gpt2")[0]
    with Session(program, model, MANY) as session:
        found = Journal(directory).find(session.keys(program))
    there = {MANY[place] for place in found.items}
    assert there >= finished
    for place, item in found.items.items():
        assert all(torch.equal(item[name], UNDISTURBED[name][place]) for name in item)
    assert sum(int(each["total"][0]) for each in found.sums) == sum(there)
    return there


def killed_in(directory: Path, batches: int, seconds: float) -> bool:
    """A run that is killed so long after its n-th batch began; whether it was still running then."""
    reading, writing = os.pipe()
    child = fork(lambda: run(Totals(tell=writing), directory, MANY, 40))
    os.close(writing)
    for _ in range(batches):
        os.read(reading, 1)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    os.close(reading)
    return ended(child) == -signal.SIGKILL


def test_killed_at_fifty_moments(tmp_path: Path) -> None:
    random_ = random.Random(5)
    directories = (tmp_path / str(number) for number in count())
    directory = next(directories)
    there: set[int] = set()
    kills, stages, ends = 0, set[int](), 0
    while kills < 50:
        kills += killed_in(directory, random_.randrange(8), random_.uniform(0.0, 0.01))
        there = check(directory, there)
        stages.add(len(there))
        if len(there) == len(MANY) or kills == 50:
            program = Totals()
            assert equal(run(program, directory, MANY, 40), UNDISTURBED)
            assert sorted(item for batch in program.runs for item in batch) == sorted(set(MANY) - there)
            directory, there, ends = next(directories), set(), ends + 1
    # Runs were killed at many stages and several times each, or this has shown nothing.
    assert len(stages) > 10 and 3 <= ends <= 25


def killed(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def halfway(write: Callable[..., Any]) -> Callable[..., Any]:
    """`os.fdopen` of a file in whose middle the process is killed."""

    def opened(*given: Any, **named: Any) -> Any:
        file = write(*given, **named)

        class Half:
            def __enter__(self) -> Half:
                return self

            def __exit__(self, *_: object) -> None: ...

            def write(self, data: bytes) -> None:
                file.write(data[: len(data) // 2])
                file.flush()
                killed()

        return Half()

    return opened


def after(calls: int, then: Callable[..., Any], before: Callable[..., Any]) -> Callable[..., Any]:
    left = [calls]

    def counted(*given: Any, **named: Any) -> Any:
        left[0] -= 1
        return (then if left[0] < 0 else before)(*given, **named)

    return counted


@pytest.mark.parametrize("calls", [0, 1, 3])
@pytest.mark.parametrize("moment", ["open", "fdopen", "fsync", "replace", "replaced"])
def test_killed_inside_of_a_write(tmp_path: Path, moment: str, calls: int) -> None:
    """Before the temporary file is there, in its middle, before it is safe, before and after it has its name."""

    def work() -> None:
        def replaced(*given: Any) -> None:
            os_replace(*given)
            killed()

        os_replace = files.os.replace
        then = {"fdopen": halfway(files.os.fdopen), "replaced": replaced}.get(moment, killed)
        name = "replace" if moment == "replaced" else moment
        setattr(files.os, name, after(calls, then, getattr(files.os, name)))
        run(Totals(), tmp_path, MANY, 40)

    assert ended(fork(work)) == -signal.SIGKILL
    assert len(shards(tmp_path)) == calls + (moment == "replaced")
    left = list(tmp_path.glob(".*.tmp"))
    assert len(left) == (moment in ("fdopen", "fsync", "replace"))
    there = check(tmp_path, set())
    assert not list(tmp_path.glob(".*.tmp"))
    program = Totals()
    assert equal(run(program, tmp_path, MANY, 40), UNDISTURBED)
    assert sorted(item for batch in program.runs for item in batch) == sorted(set(MANY) - there)


class Large(Totals):
    """32 kB an item; the last batch has two of them."""

    def run(self, model: Any, items: Any) -> dict[str, torch.Tensor]:
        return super().run(model, items) | {"much": torch.zeros(len(items), 8000)}


@pytest.mark.parametrize("limit", [0, 50_000])
def test_a_full_disk_is_said_and_what_was_finished_stays(tmp_path: Path, limit: int) -> None:
    """A real limit of the system: a file of a shard's size cannot be written any more."""
    said = tmp_path / "said"
    directory = tmp_path / "journal"

    def go(one: Large) -> dict[str, torch.Tensor]:
        return run_program(one, pair("gpt2")[0], ITEMS, max_batch_tokens=9, journal=Journal(directory))

    def work() -> None:
        pipe = os.open(said, os.O_WRONLY)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            go(Large())
        except RunError as error:
            os.write(pipe, str(error).encode())

    os.mkfifo(said)
    child = fork(work)
    with said.open("rb") as pipe:
        message = pipe.read().decode()
    assert ended(child) == 0
    assert message.startswith(f"{directory}/") and "no space left for" in message
    assert "Free some space" in message and "go on with --resume" in message
    assert not list(directory.glob(".*")) and bool(shards(directory)) == bool(limit)
    undisturbed = run_program(Large(), pair("gpt2")[0], ITEMS, max_batch_tokens=9)
    again = Large()
    assert equal(go(again), undisturbed)
    assert again.runs == (BATCHES[3:] if limit else BATCHES)
