"""The stand-in host of `stand_in_host.py`, started for tests: its URL, what is to go wrong, and what it has seen."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_SCRIPT = Path(__file__).with_name("stand_in_host.py")


@dataclass(frozen=True)
class StandIn:
    """A host that runs."""

    url: str

    def fault(self, kind: str, times: int = 1, after: int = 0) -> None:
        """Makes the next jobs or calls go wrong, but for so many before them. See `stand_in_host.py`."""
        self._ask("/fault", json.dumps({"kind": kind, "times": times, "after": after}).encode())

    def go_on(self) -> None:
        """Runs the jobs that were stalled."""
        self.fault("go-on")

    def seen(self) -> dict[str, int]:
        """How often each path was asked for, and the bytes of the bodies of requests."""
        return self._ask("/seen")

    def _ask(self, path: str, body: bytes | None = None) -> Any:
        # Past whatever proxy the environment names.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(urllib.request.Request(self.url + path, data=body), timeout=30) as answer:
            return json.loads(answer.read())


@contextmanager
def stand_in(*models: Path | str) -> Iterator[StandIn]:
    """Starts a host of these directories, each `DIR` or `DIR=DTYPE`, and ends it.

    It runs from its own directory, so that it cannot import patchkit by accident.
    """
    process = subprocess.Popen(
        [sys.executable, str(_SCRIPT), *map(str, models)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=_SCRIPT.parent,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        port = process.stdout.readline().strip()
        assert port.isdecimal(), "the stand-in host did not start; its error is on stderr"
        yield StandIn(f"http://127.0.0.1:{port}")
    finally:
        process.stdin.close()
        process.stdout.close()
        process.wait(timeout=60)
