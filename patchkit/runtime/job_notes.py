"""Jobs that are under way on a host, on disk: a run that is gone on with takes up those it has sent already.

One small file a job, beside the journal's shards: `jobs/ID.json` with the host, and the digest of the keys of the items
whose numbers it will give.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

from patchkit.errors import InputError
from patchkit.files import atomic_write, remove

_ID = re.compile(r"[\w.-]{1,100}")


class JobNotes:
    """The jobs of one run.

    Args:
        directory: of the run's journal; None keeps nothing.
    """

    def __init__(self, directory: Path | None, url: str) -> None:
        self.url = url
        self._directory = None if directory is None else directory / "jobs"
        self._jobs = self._read()

    def take(self, keys: Sequence[str]) -> str | None:
        """The job that was sent for just these items, in this order; it is another's from then on."""
        return self._jobs.pop(_digest(keys), None)

    def add(self, job: str, keys: Sequence[str]) -> None:
        """Notes a job that was sent."""
        if self._directory is None or not _ID.fullmatch(job):
            return
        note = {"host": self.url, "items": _digest(keys)}
        self._directory.mkdir(parents=True, exist_ok=True)
        atomic_write(self._directory / f"{job}.json", json.dumps(note).encode())

    def drop(self, job: str) -> None:
        """Forgets a job: what it gave is kept, or it gave nothing."""
        if self._directory is not None and _ID.fullmatch(job):
            remove(self._directory / f"{job}.json")

    def _read(self) -> dict[str, str]:
        if self._directory is None or not self._directory.is_dir():
            return {}
        found = {}
        for path in sorted(self._directory.glob("*.json")):
            try:
                note = json.loads(path.read_text(encoding="utf-8"))
                items, host = note["items"], note["host"]
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise InputError(
                    f"{path}: expected the note of a job that was sent, found something else ({type(error).__name__}); "
                    "remove it, and its job is sent again"
                ) from error
            if host == self.url and isinstance(items, str):
                found[items] = path.stem
        return found


def _digest(keys: Sequence[str]) -> str:
    return sha256(" ".join(keys).encode()).hexdigest()[:32]
