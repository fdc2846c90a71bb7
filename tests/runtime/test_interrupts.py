"""Ctrl-C and SIGTERM: the first waits for the batch in hand, the second does not; other handlers are left alone."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from patchkit.model import Dims, PatchModel
from patchkit.runtime import Cost, Journal, Terminated, run_program
from patchkit.runtime.interrupts import Interrupts, terminable
from tests.comparisons import pair

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")


@pytest.fixture(autouse=True)
def usual_handlers() -> Iterator[None]:
    """Those that Python begins with, which a test runner may have changed; and the runner's own again afterwards."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number: int = signal.SIGINT) -> None:
    os.kill(os.getpid(), number)


def handlers() -> tuple[Any, Any]:
    return signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)


USUAL = (signal.default_int_handler, signal.SIG_DFL)


@pytest.mark.parametrize(
    ("number", "kind"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)]
)
def test_the_first_waits_until_it_is_asked_for(number: int, kind: type[BaseException]) -> None:
    said: list[str] = []
    done = False
    with pytest.raises(KeyboardInterrupt) as raised:
        with Interrupts(said.append) as interrupts:
            interrupts.check()
            send(number)
            done = True
            interrupts.check()
    assert done and type(raised.value) is kind
    assert said == ["Interrupted: the batch in hand is finished first. Once more to stop at once."]
    assert handlers() == USUAL


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_the_second_does_not_wait(second: int) -> None:
    after = False
    with pytest.raises(KeyboardInterrupt) as raised:
        with Interrupts():
            send()
            send(second)
            after = True
    assert not after and isinstance(raised.value, Terminated) == (second == signal.SIGTERM)
    assert handlers() == USUAL


def test_one_that_comes_in_the_last_batch_is_raised_at_the_end() -> None:
    with pytest.raises(KeyboardInterrupt):
        with Interrupts():
            send()


def test_an_error_in_the_batch_is_not_hidden() -> None:
    with pytest.raises(ValueError, match="of the batch"):
        with Interrupts():
            send()
            raise ValueError("of the batch")
    assert handlers() == USUAL


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_other_handlers_are_left_alone(number: int) -> None:
    seen: list[int] = []

    def mine(number: int, frame: Any) -> None:
        seen.append(number)

    signal.signal(number, mine)
    with Interrupts() as interrupts:
        send(number)
        assert seen == [number]
        interrupts.check()
    assert signal.getsignal(number) is mine
    signal.signal(number, signal.SIG_IGN)
    with Interrupts():
        send(number)
    assert signal.getsignal(number) is signal.SIG_IGN


def test_what_is_terminable_by_an_exception_waits_for_its_batch_too() -> None:
    with pytest.raises(Terminated):
        with terminable():
            send(signal.SIGTERM)
            pytest.fail("a signal outside of batches ends the work at once")
    assert handlers() == USUAL
    reached = False
    with pytest.raises(Terminated):
        with terminable(), Interrupts() as interrupts:
            send(signal.SIGTERM)
            reached = True
            interrupts.check()
    assert reached and handlers() == USUAL


def in_a_thread(function: Callable[[], None]) -> list[BaseException]:
    errors: list[BaseException] = []

    def run() -> None:
        try:
            function()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return errors


def test_in_other_threads_nothing_is_handled() -> None:
    def inside() -> None:
        with Interrupts() as interrupts, terminable():
            assert handlers() == USUAL
            interrupts.check()

    assert in_a_thread(inside) == []
    assert handlers() == USUAL


@dataclass(frozen=True)
class Sending:
    """Numbers; in one of them the process is asked to end, once or twice."""

    times: int = field(default=1, compare=False)
    ran: list[int] = field(default_factory=list, compare=False)

    def tokens(self, item: int) -> int:
        return item

    def run(self, model: PatchModel, items: Sequence[int]) -> dict[str, Tensor]:
        if 5 in items:
            for _ in range(self.times):
                send()
        self.ran.extend(items)
        return {"item": torch.tensor(items)}

    def cost(self, dims: Dims, items: Sequence[int]) -> Cost:
        return Cost()


@pytest.mark.parametrize(("times", "kept"), [(1, [9, 5]), (2, [9])])
def test_a_run_keeps_the_batch_in_hand_and_goes_on_from_there(
    times: int, kept: list[int], tmp_path: Path
) -> None:
    model, items = pair("gpt2")[0], [3, 9, 5, 1]
    with pytest.raises(KeyboardInterrupt):
        run_program(first := Sending(times), model, items, max_batch_tokens=1, journal=Journal(tmp_path))
    assert first.ran == kept
    second = Sending(0)
    found = run_program(second, model, items, max_batch_tokens=1, journal=Journal(tmp_path))
    assert found["item"].tolist() == items and second.ran == [n for n in (9, 5, 3, 1) if n not in kept]
