"""Stages of long work as they go: how much of each is done, how fast, how long it will take, in words.

Kept apart from where it is shown: a terminal and a log say the same things of the same stages.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

# Speed is measured over so many seconds, so that the remaining time follows a change of pace.
_WINDOW = 30.0


@dataclass
class Stage:
    """One stage.

    Attributes:
        done: items that are finished, those of an earlier run of the same command among them.
        began: seconds, when its work began.
        marks: (seconds, items done then) within the last while.
    """

    name: str
    total: int
    began: float
    done: int = 0
    marks: deque[tuple[float, int]] = field(default_factory=deque)

    def reach(self, done: int, total: int, now: float) -> None:
        """Notes how far it is."""
        self.done, self.total = done, total
        self.marks.append((now, done))
        # The oldest mark may lie before the window, so that there is one to measure from.
        while len(self.marks) > 2 and now - self.marks[1][0] > _WINDOW:
            self.marks.popleft()

    @property
    def over(self) -> bool:
        return self.done >= self.total

    def rate(self) -> float | None:
        """Items a second lately; None as long as it cannot be told."""
        if len(self.marks) < 2:
            return None
        (first, before), (last, after) = self.marks[0], self.marks[-1]
        return (after - before) / (last - first) if last > first and after > before else None

    def remaining(self, now: float) -> float | None:
        """Seconds until it is over, at the present rate; None as long as it cannot be told."""
        rate = self.rate()
        if rate is None:
            return None
        # A long batch is under way: what it has taken by now is not remaining any more.
        return max(0.0, (self.total - self.done) / rate - (now - self.marks[-1][0]))


def clock(seconds: float) -> str:
    """`0:07`, `12:34`, `3:00:00`."""
    minutes, left = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{left:02}" if hours else f"{minutes}:{left:02}"


def pace(rate: float | None) -> str:
    """`12.3/s`, or by the minute or hour where that is the easier number; empty where it is not known."""
    if rate is None:
        return ""
    for factor, unit in ((1, "s"), (60, "min"), (3600, "h")):
        value = rate * factor
        if value >= 1 or unit == "h":
            return f"{value:,.0f}/{unit}" if value >= 100 else f"{value:.3g}/{unit}"
    raise AssertionError


def words(stage: Stage, failures: int, now: float) -> str:
    """A stage that goes on, in one line of a log."""
    left = stage.remaining(now)
    parts = [
        f"{stage.name}: {stage.done:,} of {stage.total:,}",
        pace(stage.rate()),
        "" if left is None else f"{clock(left)} left",
        f"{failures:,} failed" if failures else "",
    ]
    return ", ".join(part for part in parts if part)


def ended(stage: Stage, failures: int, now: float) -> str:
    """A stage that is over, in one line: how many items in which time."""
    failed = f", {failures:,} failed" if failures else ""
    return f"done: {stage.name} ({stage.total:,} in {clock(now - stage.began)}{failed})"
