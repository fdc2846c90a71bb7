"""How long work shows on stderr: a live line on a terminal, few plain lines in a log, nothing when quiet.

A `Display` is both things that work reports to: the progress of a method (stage, done, total), and the watcher of the
scheduler (the batch in hand, items that failed, a message).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from patchkit.cli.console import notes
from patchkit.cli.stages import Stage, clock, ended, pace, words

# Of a stage in a log, at most one line in so many seconds.
_EVERY = 30.0
_BAR = 24
_LEAST_NAME = 8


class Display:
    """What is reported, kept; quiet: the kinds of display below show it.

    Args:
        now: the clock, in seconds.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._stages: dict[str, Stage] = {}
        self._shape: tuple[int, int] | None = None
        # Of stages that are over, and of the one that goes on.
        self._failed_before, self._failed_now = 0, 0
        self._last_over = now()
        self._batch_began: float | None = None

    def __call__(self, stage: str, done: int, total: int) -> None:
        """A method's progress."""
        now = self._now()
        current = self._stages.get(stage)
        if current is None or done < current.done:
            current = self._stages[stage] = self._begun(stage, total)
        current.reach(done, total, now)
        if current.over:
            del self._stages[stage]
            self._line(ended(current, self.failures, now))
            self._shape, self._batch_began, self._last_over = None, None, now
            self._failed_before, self._failed_now = self.failures, 0
        else:
            self._changed(current)

    @property
    def failures(self) -> int:
        """Items that failed so far."""
        return self._failed_before + self._failed_now

    def batch(self, rows: int, width: int) -> None:
        """The batch in hand: items, and tokens of the longest."""
        self._shape, self._batch_began = (rows, width), self._now()

    def failed(self, count: int) -> None:
        """So many items of the stage that goes on have failed."""
        self._failed_now = count

    def message(self, text: str) -> None:
        """Something to know about the run that goes on."""
        self._line(text)

    def close(self) -> None:
        """Says how far a stage is that does not come to its end."""
        for stage in self._stages.values():
            self._line(words(stage, self.failures, self._now()))

    def _begun(self, stage: str, total: int) -> Stage:
        if self._batch_began is None:
            # What is done of it at once was done by an earlier run, and says nothing of the pace.
            return Stage(stage, total, self._last_over)
        made = Stage(stage, total, self._batch_began)
        made.reach(0, total, self._batch_began)
        return made

    def _changed(self, stage: Stage) -> None:
        """A stage went on and is not over."""

    def _line(self, text: str) -> None:
        """A line that stays."""


class LogDisplay(Display):
    """Plain lines, without control characters: one at a stage's end, and of a long stage one now and then."""

    def __init__(self, console: Console, now: Callable[[], float] = time.monotonic) -> None:
        super().__init__(now)
        self._console = console
        self._said = self._last_over

    def _changed(self, stage: Stage) -> None:
        now = self._now()
        if now - max(self._said, stage.began) >= _EVERY:
            self._line(words(stage, self.failures, now))

    def _line(self, text: str) -> None:
        self._said = self._now()
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


class TerminalDisplay(Display):
    """A live line a stage that goes on, below the lines of those that are over."""

    def __init__(self, console: Console, now: Callable[[], float] = time.monotonic) -> None:
        super().__init__(now)
        self._console = console
        self._live = Live(
            get_renderable=self.render,
            console=console,
            refresh_per_second=4,
            transient=True,
            redirect_stdout=False,
        )

    def __enter__(self) -> TerminalDisplay:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def _line(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def render(self) -> RenderableType:
        """The live lines at this moment, each in the width that there is."""
        rows = Table.grid()
        for stage in list(self._stages.values()):
            rows.add_row(self._row(stage, self._console.width))
        return rows

    def _row(self, stage: Stage, width: int) -> Table:
        now = self._now()
        left = stage.remaining(now)
        count = f"{stage.done:,}/{stage.total:,}"
        shape = "" if self._shape is None else "batch {} x {}".format(*self._shape)
        # What a narrow terminal leaves out first stands last here.
        optional = {
            "left": "" if left is None else f"{clock(left)} left",
            "rate": pace(stage.rate()),
            "bar": " " * _BAR,
            "shape": shape,
            "elapsed": f"elapsed {clock(now - stage.began)}",
        }
        failures = f"{self.failures:,} failed" if self.failures else ""
        fixed = len(count) + 2 + (len(failures) + 2 if failures else 0)
        room = width - 1 - fixed - min(len(stage.name), max(_LEAST_NAME, width // 3))
        kept: dict[str, str] = {}
        for part, text in optional.items():
            if text and len(text) + 2 <= room:
                kept[part] = text
                room -= len(text) + 2
        name = Text(stage.name, no_wrap=True, overflow="ellipsis")
        name.truncate(width - 1 - fixed - sum(len(text) + 2 for text in kept.values()), overflow="ellipsis")
        cells: list[RenderableType] = [name]
        if "bar" in kept:
            cells.append(ProgressBar(total=stage.total, completed=stage.done, width=_BAR))
        cells.append(Text(count, style="bold"))
        cells += [Text(kept[part]) for part in ("rate", "left", "elapsed", "shape") if part in kept]
        if failures:
            cells.append(Text(failures, style="bold red"))
        row = Table.grid(padding=(0, 2, 0, 0))
        for _ in cells:
            row.add_column(no_wrap=True)
        row.add_row(*cells)
        return row


@contextmanager
def shown(quiet: bool = False) -> Iterator[Display]:
    """Gives the display of stderr: live on a terminal that can, plain lines elsewhere, nothing when quiet."""
    console = notes(quiet)
    if quiet:
        yield Display()
        return
    live = sys.stderr.isatty() and not console.is_dumb_terminal
    display = TerminalDisplay(console) if live else LogDisplay(console)
    try:
        with display if isinstance(display, TerminalDisplay) else nullcontext():
            yield display
    finally:
        # Below what the live lines were, when these are gone.
        display.close()


@contextmanager
def progress_bar(quiet: bool = False) -> Iterator[Display]:
    """Gives what methods report their progress to; the scheduler reports to it too."""
    from patchkit.runtime import current_execution, use_execution

    with shown(quiet) as display, use_execution(replace(current_execution(), watcher=display)):
        yield display
