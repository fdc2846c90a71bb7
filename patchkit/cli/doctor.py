"""`doctor`: is everything here, is the server there, and what to do where it is not."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.text import Text

from patchkit.cli.console import hush_loading, plain_table, results
from patchkit.errors import InputError

_STYLES = {"ok": "green", "warning": "yellow", "failed": "red"}


def doctor(
    host: Annotated[
        str | None, typer.Option("--host", help="Address of an NDIF server to ask as well.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="With --host: what it has under this name, and can do.")
    ] = None,
    timeout: Annotated[
        float, typer.Option("--timeout", min=0.1, help="Seconds to wait for each answer of the host.")
    ] = 10.0,
) -> None:
    """Check this installation, and an NDIF server if one is given. Exit status 1 if something failed."""
    if model is not None and host is None:
        raise InputError(f"--model {model} belongs to --host URL; give both")
    from patchkit.cli.checks import local_checks

    hush_loading()
    checks = local_checks()
    if host is not None:
        from patchkit.cli.host_checks import host_checks

        checks += host_checks(host, timeout, model)
    table = plain_table("", "", "found", "what to do")
    for check in checks:
        status = Text(check.status, style=_STYLES[check.status])
        table.add_row(status, Text(check.name), Text(check.found, overflow="fold"), Text(check.todo))
    results().print(table)
    if any(check.status == "failed" for check in checks):
        raise typer.Exit(1)
