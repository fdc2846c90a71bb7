"""How a command ends: one message and the right status, and a traceback only for faults of our own."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from patchkit.cli import app
from patchkit.cli.app import CommandGroup
from patchkit.cli.options import batch_tokens
from patchkit.errors import InputError, RunError

SCRIPT = Path(sys.executable).with_name("patchkit")


def ending_with(error: BaseException) -> typer.Typer:
    """An application whose `mask` can be resumed, whose `report` cannot, and which both end with `error`."""
    made = typer.Typer(cls=CommandGroup, pretty_exceptions_enable=False)

    @made.command()
    def mask(
        lam: Annotated[float, typer.Option()] = 0.1, resume: Annotated[bool, typer.Option("--resume")] = False
    ) -> None:
        raise error

    @made.command()
    def report(directory: str) -> None:
        raise error

    return made


@pytest.mark.parametrize(
    ("error", "status"),
    [(InputError("pairs.jsonl, line 3: [bold]no answer[/bold]"), 2), (RunError("disk full"), 1)],
)
def test_our_errors_are_one_message_on_stderr(error: Exception, status: int) -> None:
    result = CliRunner().invoke(ending_with(error), ["mask"])
    assert (result.exit_code, result.stdout, result.stderr) == (status, "", f"Error: {error}\n")


def test_a_long_message_is_not_broken_into_lines() -> None:
    path = "/a/very/long/path" * 20
    result = CliRunner().invoke(ending_with(InputError(path)), ["mask"])
    assert result.stderr == f"Error: {path}\n"


def test_a_fault_of_our_own_keeps_its_traceback() -> None:
    error = ZeroDivisionError("oh")
    result = CliRunner().invoke(ending_with(error), ["mask"])
    assert result.exit_code == 1 and result.exception is error


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["mask", "--lam", "0.5"], "go on with: patchkit mask --lam 0.5 --resume\n"),
        (["mask", "--resume"], "go on with: patchkit mask --resume\n"),
        (["report", "my run"], "give the same command again.\n"),
    ],
)
def test_an_interrupt_says_how_to_go_on(arguments: list[str], words: str) -> None:
    result = CliRunner().invoke(ending_with(KeyboardInterrupt()), arguments)
    assert result.exit_code == 130
    assert result.stderr.startswith("Interrupted.") and result.stderr.endswith(words)


@pytest.mark.parametrize("arguments", [["nonsense"], ["pairs"], ["report"], ["models", "--colour"]])
def test_a_wrong_command_line_is_bad_input(arguments: list[str]) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2 and "Usage:" in result.stderr and "Traceback" not in result.stderr


def test_the_version_is_printed() -> None:
    from importlib.metadata import version

    assert CliRunner().invoke(app, ["--version"]).stdout == f"patchkit {version('patchkit')}\n"


@pytest.mark.parametrize(("text", "number"), [("auto", None), ("1", 1), ("4096", 4096)])
def test_batch_tokens_are_a_number_or_auto(text: str, number: int | None) -> None:
    assert batch_tokens(text) == number


@pytest.mark.parametrize("text", ["0", "-3", "many", "", "1.5"])
def test_other_batch_tokens_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="--max-batch-tokens"):
        batch_tokens(text)


def start(*arguments: str, cwd: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [str(SCRIPT), *arguments],
        cwd=cwd,
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_the_console_script_refuses_bad_input_without_a_traceback(tmp_path: Path) -> None:
    process = start("report", "nowhere", cwd=tmp_path)
    stdout, stderr = process.communicate(timeout=120)
    assert (process.returncode, stdout) == (2, "")
    assert stderr.startswith("Error: nowhere: ") and len(stderr.splitlines()) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_ctrl_c_ends_a_running_command_with_130(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        process = start("doctor", "--host", f"http://127.0.0.1:{port}", "--timeout", "100", cwd=tmp_path)
        server.settimeout(120)
        # The request has arrived, so the command is in the middle of its work; it is never answered.
        connection, _ = server.accept()
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
        connection.close()
    assert process.returncode == 130
    assert "Interrupted." in stderr and "Traceback" not in stderr
