"""`doctor`: is everything here, is the server there, and what to do where it is not."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.text import Text

from patchkit.cli.console import hush_loading, plain_table, results

_STYLES = {"ok": "green", "warning": "yellow", "failed": "red"}


def doctor(
    host: Annotated[
        str | None, typer.Option("--host", help="Address of an NDIF server to ask as well.")
    ] = None,
    timeout: Annotated[
        float, typer.Option("--timeout", min=0.1, help="Seconds to wait for each answer of the host.")
    ] = 10.0,
) -> None:
    """Check this installation, and an NDIF server if one is given. Exit status 1 if something failed."""
    from patchkit.cli.checks import host_checks, local_checks

    hush_loading()
    checks = [*local_checks(), *(host_checks(host, timeout) if host else [])]
    table = plain_table("", "", "found", "what to do")
    for check in checks:
        status = Text(check.status, style=_STYLES[check.status])
        table.add_row(status, Text(check.name), Text(check.found, overflow="fold"), Text(check.todo))
    results().print(table)
    if any(check.status == "failed" for check in checks):
        raise typer.Exit(1)
