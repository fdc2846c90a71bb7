"""One progress line for long work, on stderr: what is being done, how far it is, how long it has taken."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from patchkit.cli.console import notes

if TYPE_CHECKING:
    from patchkit.runtime import Progress


@contextmanager
def progress_bar(quiet: bool = False) -> Iterator[Progress]:
    """Gives the callable that methods report to; a bar a stage, each kept on screen when the next one starts.

    Where stderr is no terminal, one line is written when a stage ends instead.
    """
    console = notes(quiet)
    if not console.is_terminal:
        yield lambda stage, done, total: _line(console, stage) if done == total else None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Bar(*columns, console=console) as bar:
        tasks: dict[str, int] = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
            bar.update(tasks[stage], completed=done, total=total)  # pyright: ignore[reportArgumentType]

        yield report


def _line(console: Console, stage: str) -> None:
    console.print(f"done: {stage}", markup=False, highlight=False)
