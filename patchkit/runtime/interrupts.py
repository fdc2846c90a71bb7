"""Ctrl-C and SIGTERM while batches run: the batch in hand is finished and kept, then the run ends.

A trace that is broken off in its middle would lose what the batch has computed, and a second of patience saves it. Who
cannot wait asks a second time. Where batches run on a host there is nothing to wait for: they run on there, and the run
ends at once.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, TypeVar

Part = TypeVar("Part")

_WAITING = "Interrupted: the batch in hand is finished first. Once more to stop at once."


class Terminated(KeyboardInterrupt):
    """The process was asked to end by SIGTERM, as batch systems and launchers do."""


@contextmanager
def terminable() -> Iterator[None]:
    """Inside, SIGTERM ends the work as Ctrl-C does, by an exception: what is open is closed, and what is kept says so."""
    mine = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    )
    if mine:
        signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        if mine:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


class Interrupts:
    """Inside, the first request to end is noted, and `check` raises it; the second is raised at once.

    Handlers that somebody else has set are left alone, and so are threads other than the main one, where Python handles
    no signals.
    """

    def __init__(self, say: Callable[[str], None] | None = None) -> None:
        self._say = say
        self._asked: int | None = None
        self._elsewhere = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number, usual in (
                (signal.SIGINT, (signal.default_int_handler,)),
                (signal.SIGTERM, (signal.SIG_DFL, _terminate)),
            ):
                if signal.getsignal(number) in usual:
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if kind is None:
            # Asked during the last batch: the caller goes on to other work otherwise.
            self.check()

    def check(self) -> None:
        """Raises KeyboardInterrupt (or `Terminated`) if the process has been asked to end."""
        if self._asked is not None:
            asked, self._asked = self._asked, None
            raise _raised(asked)

    def at_once(self, parts: Iterator[Part]) -> Iterator[Part]:
        """The parts, which are computed elsewhere: while one is waited for, a request to end is raised at once; while one
        is put away here, after that."""
        while True:
            self.check()
            self._elsewhere = True
            try:
                part = next(parts)
            except StopIteration:
                return
            finally:
                self._elsewhere = False
            yield part

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._asked is not None or self._elsewhere:
            raise _raised(number)
        self._asked = number
        if self._say is not None:
            self._say(_WAITING)


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated()


def _raised(number: int) -> KeyboardInterrupt:
    return Terminated() if number == signal.SIGTERM else KeyboardInterrupt()
