"""One NDIF server for all tests of this folder: started with the first that asks for it, and ended with the last.

With PATCHKIT_TEST_HOST (its address) and PATCHKIT_TEST_STATE (the `--state` given to control.py) they use one that is up
already, and leave it up.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.remote.server import control

ROOT = Path(__file__).resolve().parents[2]
MODELS = tuple(ROOT / "patchkit" / "zoo" / "models" / name for name in ("varbind-llama", "varbind-llama-gqa"))


@dataclass(frozen=True)
class Server:
    """A server that is up."""

    url: str
    state: Path
    python: Path
    models: tuple[Path, ...] = MODELS

    @property
    def logs(self) -> Path:
        """The folder of what each program printed: api.log, head.log (Ray, controller), redis.log, store.log."""
        return self.state / "logs"

    def deploy(self, *models: str) -> None:
        """Deploy directories, each as `DIR[,dtype=NAME][,timeout=SECONDS][,sandbox]`; those that are deployed stay."""
        known = {model["model_key"] for model in control.read(self.state)["deployments"]}
        new = [model for model in models if control.deployment(model)["model_key"] not in known]
        if new:
            control.deploy(self.state, new)

    def kill_api(self) -> None:
        """As a crash would: connections are cut, then refused. The models stay loaded."""
        control.kill_api(self.state)

    def restart_api(self, **settings: str) -> None:
        """Until it takes requests again; `settings` are of the environment, until the next restart."""
        control.restart_api(self.state, **settings)

    def processes(self) -> dict[str, dict[str, Any]]:
        return control.read(self.state)["processes"]


@dataclass(frozen=True)
class Row:
    """What one method gave there: the largest difference, and what went over the wire, in bytes."""

    model: str
    case: str
    difference: float
    jobs: int
    sent: int
    received: int


_ROWS: list[Row] = []


@pytest.fixture(scope="session")
def rows() -> list[Row]:
    """The table that is printed in the end."""
    return _ROWS


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not _ROWS:
        return
    terminalreporter.write_sep("-", "hosted against here")
    head = ("model", "method or node kind", "difference", "jobs", "kB out", "kB back")
    terminalreporter.write_line("{:<18} {:<34} {:>10} {:>5} {:>8} {:>8}".format(*head))
    for row in _ROWS:
        terminalreporter.write_line(
            f"{row.model:<18} {row.case:<34} {row.difference:>10.1e} {row.jobs:>5} {row.sent / 1e3:>8.1f} "
            f"{row.received / 1e3:>8.1f}"
        )


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    if url := os.environ.get("PATCHKIT_TEST_HOST"):
        state = Path(os.environ.get("PATCHKIT_TEST_STATE", control.DEFAULT_STATE))
        found = control.read(state)
        assert found["url"] == url, f"PATCHKIT_TEST_HOST is {url}, but {state} is of {found['url']}"
        running = Server(url, state, Path(found["venv"]) / "bin" / "python")
        running.deploy(*map(str, MODELS))
        yield running
        return
    state = tmp_path_factory.mktemp("server")
    venv = Path(os.environ.get("PATCHKIT_SERVER_VENV", control.DEFAULT_VENV))
    found = control.up(state, venv, [str(model) for model in MODELS])
    try:
        yield Server(found["url"], state, venv / "bin" / "python")
    finally:
        control.down(state)
