"""Where the command line writes: results to stdout, what is said about them to stderr.

So a pipe gets the result alone, and `--quiet` silences the rest without touching it.
"""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table

# A file or a pipe has no width of its own; lines are not broken at a terminal's 80 columns there.
_PIPE_WIDTH = 160


def results() -> Console:
    """The console of results: tables, paths, numbers."""
    console = Console()
    return console if console.is_terminal else Console(width=_PIPE_WIDTH)


def notes(quiet: bool = False) -> Console:
    """The console of messages and progress; prints nothing when `quiet`. Errors go to one that is not."""
    return Console(stderr=True, quiet=quiet)


def say(text: str, quiet: bool = False) -> None:
    """One message on stderr, exactly as it is: no markup, no colours of its own, no line breaks added."""
    notes(quiet).print(text, markup=False, highlight=False, soft_wrap=True)


def give(text: str) -> None:
    """One line of result on stdout, such as the path of what was written."""
    results().print(text, markup=False, highlight=False, soft_wrap=True)


def plain_table(*columns: str) -> Table:
    """A table in the house's look; text columns first, `add_column(..., justify="right")` for numbers."""
    return Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False)


def hush_loading() -> None:
    """Keeps transformers from drawing a bar for every small model that is opened on the way, and from lists of weights.

    What is missing or too much among these is an error of patchkit's own.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
