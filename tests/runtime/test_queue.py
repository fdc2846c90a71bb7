"""What processes say to each other, with threads in their places and a store of this process: nothing lost or twice."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from patchkit.errors import InputError, RunError
from patchkit.model import Dims, PatchModel
from patchkit.runtime import (
    Cost,
    Execution,
    Group,
    Journal,
    Session,
    queue,
    run_program,
    serve,
    use_execution,
)
from patchkit.runtime.queue import CloseWork, End, Inbox, Part, RunStep, claim, claimed_by, deliver
from patchkit.runtime.sharing import own_order
from tests.comparisons import pair

HashStore: Any = dist.HashStore  # pyright: ignore[reportPrivateImportUsage]
#: What each process was given to run, by the name of its thread.
RAN: dict[str, list[int]] = {}
#: Set when a process that is to hang may go on.
GO_ON = threading.Event()


@pytest.fixture(autouse=True)
def fresh() -> None:
    RAN.clear()
    GO_ON.clear()


class Team:
    """Groups of one store, which are closed in the end."""

    def __init__(self) -> None:
        self.groups: list[Group] = []
        self.threads: list[threading.Thread] = []

    def form(self, size: int) -> list[Group]:
        store = HashStore()
        self.groups += [Group(store, rank, size, rank) for rank in range(size)]
        return self.groups

    def start(self, function: Any, name: str) -> None:
        thread = threading.Thread(target=function, name=name, daemon=True)
        self.threads.append(thread)
        thread.start()

    def serve(self, model: PatchModel) -> None:
        for group in self.groups[1:]:
            self.start(lambda group=group: serve(model, group=group), f"{group.rank}")

    def end(self) -> None:
        GO_ON.set()
        if self.groups:
            queue.say_end(self.groups[0])
        for thread in self.threads:
            thread.join(20)
            assert not thread.is_alive(), f"process {thread.name} does not end"
        for group in self.groups:
            group.close()


@pytest.fixture
def team() -> Iterator[Team]:
    team = Team()
    yield team
    team.end()


@dataclass(frozen=True)
class Squares:
    """Squares of numbers and their sum. Some numbers are a mistake, or make whoever meets them hang."""

    wrong: int | None = None
    error: type[Exception] = ValueError
    hang: int | None = None
    summed = frozenset({"total"})

    def tokens(self, item: int) -> int:
        return item

    def run(self, model: PatchModel, items: Sequence[int]) -> dict[str, Tensor]:
        name = threading.current_thread().name
        RAN.setdefault(name, []).extend(items)
        # So that nobody is through with everything before the others have begun.
        time.sleep(0.01)
        if self.hang in items and name != "MainThread":
            GO_ON.wait(30)
        if self.wrong in items and name != "MainThread":
            raise self.error(f"number {self.wrong} is a mistake")
        numbers = torch.tensor(items)
        return {"square": numbers**2, "total": numbers.double().sum()}

    def cost(self, dims: Dims, items: Sequence[int]) -> Cost:
        return Cost()


MODEL = pair("gpt2")[0]
ITEMS = [7, 3, 9, 3, 12, 5, 5, 1, 20, 11, 2, 30, 4, 8, 6]


def check(found: dict[str, Tensor], items: Sequence[int] = ITEMS) -> None:
    assert found["square"].tolist() == [item**2 for item in items]
    assert found["total"].item() == sum(items)


# Claims, parts, messages.


@given(st.integers(0, 60), st.integers(1, 9), st.data())
def test_every_process_looks_at_all_batches_its_own_first(
    batches: int, size: int, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(0, size - 1))
    order = own_order(batches, rank, size)
    assert sorted(order) == list(range(batches))
    own = len(range(rank, batches, size))
    assert all(batch % size == rank for batch in order[:own])
    for part in (order[:own], order[own:]):
        assert part == sorted(part, reverse=True), "longest first"


def test_one_process_gets_a_batch(team: Team) -> None:
    groups = team.form(4)
    got: list[list[int]] = [[] for _ in groups]

    def pull(group: Group) -> None:
        got[group.rank] += [batch for batch in range(200) if claim(group, 1, batch)]

    threads = [threading.Thread(target=pull, args=(group,)) for group in groups]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(sum(got, [])) == list(range(200))
    for rank, batches in enumerate(got):
        assert all(claimed_by(groups[0], 1, batch) == rank for batch in batches)
    assert claimed_by(groups[0], 1, 200) is None and claimed_by(groups[0], 2, 0) is None
    # Of another run they are free.
    assert claim(groups[3], 2, 0) and not claim(groups[0], 2, 0)


def test_a_part_comes_back_as_it_was() -> None:
    part = Part(
        4,
        [9, 2],
        {
            "half": torch.tensor([[0.5, -1.0], [float("nan"), 3.0]], dtype=torch.bfloat16),
            "turned": torch.arange(6).reshape(2, 3).T[:2],
            "sum": torch.tensor(1 / 3, dtype=torch.float64),
            "none": torch.zeros(2, 0),
        },
        [(7, 'no room for "7"')],
    )
    found = queue.decode(queue.encode(part))
    assert (found.batch, found.numbers, found.failures, found.error) == (4, [9, 2], part.failures, None)
    assert found.tensors.keys() == part.tensors.keys()
    for name, value in part.tensors.items():
        assert found.tensors[name].dtype == value.dtype
        assert torch.equal(found.tensors[name].nan_to_num(9), value.nan_to_num(9))
    failed = queue.decode(queue.encode(Part(0, error=("KeyError", "'x'", "Traceback ..."))))
    assert failed.error == ("KeyError", "'x'", "Traceback ...") and not failed.tensors


def test_parts_come_once_and_one_that_was_only_announced_is_waited_for(team: Team) -> None:
    main, other = team.form(2)
    inbox = Inbox(main, 1)
    assert not inbox.waiting() and inbox.collect() == []
    deliver(other, 1, Part(5))
    # Announced by a process that has not handed it in yet, or died before.
    number = other.count("run/1/parts")
    deliver(other, 1, Part(6))
    assert inbox.waiting()
    assert [part.batch for part in inbox.collect()] == [5, 6]
    assert not inbox.waiting() and inbox.collect() == []
    other.put(f"run/1/part/{number}", queue.encode(Part(7)))
    assert [part.batch for part in inbox.collect()] == [7]
    assert inbox.collect() == []


def test_messages_and_runs_are_taken_off_the_store_when_all_have_gone_on(team: Team) -> None:
    main, first, second = team.form(3)
    speaker = queue.speaker(main)

    def there(*numbers: int) -> list[int]:
        return [number for number in numbers if main.has(f"message/{number}")]

    speaker.say(RunStep(1, 0, None, [[0], [1]], 10))
    assert claim(first, 1, 0) and claim(second, 1, 1)
    deliver(first, 1, Part(0))
    speaker.say(CloseWork(0))
    assert queue.hear(first, 0).batches == [[0], [1]] and isinstance(queue.hear(first, 1), CloseWork)
    # One process is through with it, the other has not even heard of it.
    speaker.say(CloseWork(1))
    assert there(0, 1, 2) == [0, 1, 2] and main.has("run/1/claim/0", "run/1/claim/1", "run/1/part/1")
    queue.hear(second, 0)
    speaker.say(CloseWork(2))
    assert there(0, 1, 2, 3) == [0, 1, 2, 3], "the second may be running it still"
    queue.hear(second, 1)
    speaker.say(CloseWork(3))
    assert there(0, 1, 2, 3, 4) == [1, 2, 3, 4]
    assert not any(main.has(f"run/1/{key}") for key in ("claim/0", "claim/1", "part/1", "parts", "closed"))


def test_a_message_waits_for_the_living_though_a_dead_process_had_heard_it(team: Team) -> None:
    main, first, second = team.form(3)
    speaker = queue.speaker(main)
    speaker.say(CloseWork(0))
    speaker.say(CloseWork(1))
    for number in range(2):
        queue.hear(first, number)
    main.children = {1: lambda: False, 2: lambda: True}
    assert main.find_dead() == [1] and main.others == [2]
    speaker.say(CloseWork(2))
    assert [queue.hear(second, number).number for number in range(3)] == [0, 1, 2]


def test_a_process_that_was_given_up_ends_when_it_comes_back(
    team: Team, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue, "_LOOK_SECONDS", 0.01)
    main, _, late = team.form(3)
    main.children = {1: lambda: True, 2: lambda: False}
    main.find_dead()
    speaker = queue.speaker(main)
    for number in range(4):
        speaker.say(CloseWork(number))
        queue.hear(team.groups[1], number)
    speaker.say(CloseWork(4))
    assert not main.has("message/0")
    assert isinstance(queue.hear(late, 0), End)


# Whole runs.


@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_batch_is_run_once_somewhere(size: int, team: Team) -> None:
    main = team.form(size)[0]
    team.serve(MODEL)
    seen: list[int] = []
    with use_execution(Execution(group=main)):
        for budget in (1, 12, 10_000):
            RAN.clear()
            found = run_program(
                Squares(),
                MODEL,
                ITEMS,
                max_batch_tokens=budget,
                progress=lambda label, done, total: seen.append(done),
            )
            check(found)
            assert sorted(sum(RAN.values(), [])) == sorted(ITEMS)
            # Also where the budget would make one batch of them all.
            assert size == 1 or len(RAN) > 1, f"only {list(RAN)} had anything to do"
            assert seen == sorted(seen) and seen[-1] == len(ITEMS)
            seen.clear()


def test_what_the_journal_holds_is_not_run_again_anywhere(team: Team, tmp_path: Any) -> None:
    main = team.form(3)[0]
    run_program(Squares(), MODEL, ITEMS[:6], max_batch_tokens=1, journal=Journal(tmp_path))
    RAN.clear()
    team.serve(MODEL)
    with use_execution(Execution(group=main)):
        check(run_program(Squares(), MODEL, ITEMS, max_batch_tokens=1, journal=Journal(tmp_path)))
        assert sorted(sum(RAN.values(), [])) == sorted(ITEMS[6:])
        RAN.clear()
        check(run_program(Squares(), MODEL, ITEMS, max_batch_tokens=1, journal=Journal(tmp_path)))
    assert not RAN


@dataclass(frozen=True)
class Opener:
    """Opens numbers to themselves, and notes where."""

    def tokens(self, item: int) -> int:
        return item

    def open(self, model: PatchModel, items: Sequence[int]) -> list[int]:
        RAN.setdefault(f"opened {threading.current_thread().name}", []).extend(items)
        return list(items)

    def cost(self, dims: Dims, items: Sequence[int]) -> Cost:
        return Cost()


@dataclass(frozen=True)
class Times:
    """Numbers times a factor, added up."""

    factor: int
    summed = frozenset({"total"})

    def run(self, model: PatchModel, opened: list[int]) -> dict[str, Tensor]:
        time.sleep(0.005)
        return {"total": torch.tensor(opened).sum() * self.factor}


def test_steps_of_a_session_find_what_their_process_has_opened(team: Team) -> None:
    main = team.form(2)[0]
    team.serve(MODEL)
    with use_execution(Execution(group=main)), Session(Opener(), MODEL, ITEMS) as session:
        for factor in range(1, 21):
            assert session.run(Times(factor))["total"].item() == factor * sum(ITEMS)
    opened = {name: numbers for name, numbers in RAN.items() if name.startswith("opened")}
    assert opened.keys() == {"opened MainThread", "opened 1"}
    # One that has nothing else to do takes batches of the other; then it keeps them as well.
    assert sum(map(len, opened.values())) <= 2 * len(ITEMS)


# Mistakes and deaths.


@pytest.mark.parametrize(
    ("error", "raised", "said"),
    [
        (InputError, InputError, "^number 40 is a mistake$"),
        (RunError, RunError, "^number 40 is a mistake$"),
        (
            KeyError,
            RunError,
            "process 1 failed: KeyError: .*number 40 is a mistake(.|\n)*Traceback(.|\n)*in run",
        ),
    ],
)
def test_a_mistake_in_another_process_is_raised_here_as_what_it_is(
    error: type[Exception], raised: type[Exception], said: str, team: Team
) -> None:
    main = team.form(2)[0]
    # So that the other process has it: its own batches are those of odd numbers, the longest first.
    items = [*range(1, 29), 30, 40]
    team.serve(MODEL)
    with use_execution(Execution(group=main)):
        with pytest.raises(raised, match=said):
            run_program(Squares(wrong=40, error=error), MODEL, items, max_batch_tokens=1)
        # And the processes are there for the next run.
        check(run_program(Squares(), MODEL, ITEMS, max_batch_tokens=1))


@pytest.mark.parametrize("late", [False, True])
def test_what_a_dead_process_had_begun_is_run_here_and_counts_once(late: bool, team: Team) -> None:
    """Also where it hands it in after all, when its work has been done again."""
    main = team.form(2)[0]
    main.children = {1: lambda: "1" not in RAN}
    items = [*range(1, 29), 30, 40]
    said: list[str] = []

    class Watcher:
        def batch(self, rows: int, width: int) -> None:
            # The last batch of all: those of the dead are run again when nothing else is left.
            if late and main.dead:
                GO_ON.set()
                time.sleep(0.1)

        def failed(self, count: int) -> None: ...

        def message(self, text: str) -> None:
            said.append(text)

    team.serve(MODEL)
    with use_execution(Execution(group=main, watcher=Watcher())):
        check(run_program(Squares(hang=40), MODEL, items, max_batch_tokens=1), items)
        assert RAN["1"][0] == 40 and 40 in RAN["MainThread"]
        assert said == ["Process 1 has died; its work is done by the others."]
        # What it hands in of an old run does no harm to the next.
        GO_ON.set()
        check(run_program(Squares(), MODEL, ITEMS, max_batch_tokens=1))


def test_a_process_that_is_silent_is_dead(team: Team, monkeypatch: pytest.MonkeyPatch) -> None:
    from patchkit.runtime import processes

    monkeypatch.setattr(processes, "BEAT_SECONDS", 0.01)
    monkeypatch.setattr(processes, "DEAD_SECONDS", 0.3)
    main, first, _ = team.form(3)
    assert main.find_dead() == []
    first.close()
    deadline = time.monotonic() + 20
    while not (found := main.find_dead()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert found == [1] and main.dead == {1} and main.others == [2]
    assert main.find_dead() == [], "said once"


def test_a_store_that_is_gone_is_said_with_what_to_do() -> None:
    class Gone:
        def __getattr__(self, name: str) -> Any:
            raise AttributeError(name)

    group = Group(HashStore(), 1, 2, 1)
    try:

        def broken(*_: Any) -> bytes:
            raise RuntimeError("Broken pipe\nmore")

        with pytest.raises(RunError, match=r"process 1: .* has ended \(Broken pipe\).*--resume"):
            group._call(broken, "key")
    finally:
        group.close()
