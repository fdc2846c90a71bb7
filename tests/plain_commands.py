"""Commands in one Python process of their own, in which jaxtyping does not wrap the package's functions to check them.

What is wrapped does not travel to a host, so that commands on hosted models are run here. Started as a script, this takes
command lines as JSON from stdin, one a line, and gives back how each ended.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    exit_code: int
    stdout: str
    stderr: str


class Commands:
    """Runs `patchkit ...`, one after the other."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def __call__(self, *words: object) -> Ended:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps([str(word) for word in words]) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the process that runs commands is gone; its error is on stderr"
        return Ended(**json.loads(answer))

    def well(self, *words: object) -> Ended:
        """A command that must end well."""
        ended = self(*words)
        assert ended.exit_code == 0, ended.stdout + ended.stderr
        return ended


@contextmanager
def plain_commands(**environment: str) -> Iterator[Commands]:
    """Starts the process, with these variables in its environment, and ends it."""
    process = subprocess.Popen(
        [sys.executable, __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | plain_environment() | environment,
    )
    try:
        yield Commands(process)
    finally:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.close()
        process.stdout.close()
        process.wait(timeout=60)


def plain_environment() -> dict[str, str]:
    """Of a process that runs this package, on one thread and without the network."""
    root = str(Path(__file__).resolve().parent.parent)
    return {"PYTHONPATH": root, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "no_proxy": "127.0.0.1"}


def _serve() -> None:
    # What libraries print must not come between the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    import torch
    from typer.testing import CliRunner

    from patchkit.cli import app

    torch.set_num_threads(1)
    for line in sys.stdin:
        found: Any = CliRunner().invoke(app, json.loads(line))
        said = found.stderr
        if found.exception is not None and not isinstance(found.exception, SystemExit):
            said += repr(found.exception)
        answers.write(
            json.dumps({"exit_code": found.exit_code, "stdout": found.stdout, "stderr": said}) + "\n"
        )
        answers.flush()


if __name__ == "__main__":
    _serve()
