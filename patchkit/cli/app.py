"""The application: how a command's end becomes a message and an exit status.

Errors that patchkit raises on purpose are one message on stderr, without a traceback. Any other exception is
a fault of patchkit's own: its traceback is kept, and the status is 1.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from patchkit.cli.console import say
from patchkit.errors import PatchkitError

#: Exit status of a run that was interrupted, by Ctrl-C or SIGTERM, and can go on.
INTERRUPTED = 130


@contextmanager
def message_and_status(how_to_resume: Callable[[], str]) -> Iterator[None]:
    """Inside, an error that is raised on purpose and an interrupt become one message on stderr and an exit status."""
    try:
        yield
    except PatchkitError as error:
        say(f"Error: {error}")
        raise typer.Exit(error.exit_code) from error
    except KeyboardInterrupt as error:
        say(f"Interrupted. {how_to_resume()}")
        raise typer.Exit(INTERRUPTED) from error


def go_on_with(words: list[str], *args: str) -> str:
    """How to go on with a command that keeps what it has finished."""
    again = shlex.join([*words, *args, *([] if "--resume" in args else ["--resume"])])
    started_by_others = os.environ.get("WORLD_SIZE", "1") != "1"
    how = "go on with the same processes and" if started_by_others else "go on with"
    return f"What is finished was kept; {how}: {again}"


class CommandGroup(TyperGroup):
    """The group of all commands, which ends each of them the same way."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.obj = list(args)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        with message_and_status(lambda: self._how_to_resume(ctx)):
            return super().invoke(ctx)

    def _how_to_resume(self, ctx: Any) -> str:
        """The command line that goes on, for commands that can."""
        args: list[str] = ctx.obj
        command = self.get_command(ctx, args[0]) if args else None
        if command is None or not any(parameter.name == "resume" for parameter in command.params):
            return "Nothing half-written was left; give the same command again."
        return go_on_with(["patchkit"], *args)


class ScriptCommand(TyperCommand):
    """The one command of a script, with the same ends."""

    def invoke(self, ctx: Any) -> Any:
        with message_and_status(lambda: go_on_with(["python"], *sys.argv)):
            return super().invoke(ctx)


app = typer.Typer(
    name="patchkit",
    cls=CommandGroup,
    help="Find, test and report the components of a language model that carry a behaviour.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _print_version(wanted: bool) -> bool:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"patchkit {version('patchkit')}")
        raise typer.Exit()
    return wanted


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Find, test and report the components of a language model that carry a behaviour."""
