"""Paths on disk, lambda by lambda, so that an interrupted mask goes on where it stopped."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from pydantic import BaseModel, ConfigDict

from patchkit.errors import InputError
from patchkit.files import atomic_write, remove
from patchkit.methods._mask_path import PathPoint, PathResult
from patchkit.reading import exists, read_bytes
from patchkit.results.formats import load_tensors, read_model, save_tensors, write_model
from patchkit.runtime.content import content_digest
from patchkit.runtime.job_notes import JobNotes


class _Point(BaseModel):
    model_config = ConfigDict(extra="forbid")
    lam: float
    validation: dict[str, float]
    steps: int


class _Path(BaseModel):
    model_config = ConfigDict(extra="forbid")
    run: str
    points: list[_Point]
    history: list[dict[str, float]]
    stopped: str


class Checkpoint:
    """Paths by name in a directory, as far as they came. With no directory nothing is kept.

    What is not `stopped` is not at its end: later lambdas are still to be trained.

    Args:
        run: everything that a path depends on, as text. A path of another run is refused, never taken for one's own.
    """

    def __init__(self, directory: Path | None, run: str) -> None:
        self.directory = directory
        self._run = hashlib.sha256(run.encode()).hexdigest()[:32]

    def load(self, name: str) -> PathResult | None:
        """The path of this name, as far as it was trained before.

        Raises:
            InputError: the file is of another run (another model, other triples or options), or it is damaged.
        """
        file = self._file(name)
        if file is None or not exists(file):
            return None
        record = read_model(file, _Path)
        self._check_run(file, record.run)
        values = load_tensors(file.with_suffix(".safetensors")).get("values")
        # Stopped between the two files, there is one mask more than is described; never of a whole path.
        allowed = {len(record.points)} if record.stopped else {len(record.points), len(record.points) + 1}
        if (
            values is None
            or values.ndim != 2
            or not bool(values.isfinite().all())
            or not record.points
            or len(values) not in allowed
        ):
            raise InputError(
                f"{file.with_suffix('.safetensors')}: does not hold the {len(record.points)} masks of {file.name}; "
                "delete both, and this path is trained again"
            )
        points = [
            PathPoint(point.lam, values[i].clone(), point.validation, point.steps)
            for i, point in enumerate(record.points)
        ]
        return PathResult(points=points, history=record.history, stopped=record.stopped)

    def save(self, name: str, path: PathResult) -> None:
        """Keeps a path as far as it is; the JSON is written last, and says how far that is."""
        file = self._file(name)
        if file is None:
            return
        save_tensors(
            file.with_suffix(".safetensors"), {"values": torch.stack([p.values for p in path.points])}
        )
        points = [_Point(lam=p.lam, validation=p.validation, steps=p.steps) for p in path.points]
        write_model(file, _Path(run=self._run, points=points, history=path.history, stopped=path.stopped))
        self.drop_state(name)

    def load_state(self, name: str) -> dict[str, Any] | None:
        """Where the path of this name stood in the middle of a lambda, if it was left there.

        Raises:
            InputError: the file is of another run, or it is damaged.
        """
        file = self._state_file(name)
        if file is None or not exists(file):
            return None
        try:
            record = torch.load(io.BytesIO(read_bytes(file, "a checkpoint")), weights_only=True)
            run, state = record["run"], record["state"]
        except InputError:
            raise
        except Exception as error:
            # Whatever torch or zipfile raise for a damaged file.
            raise InputError(
                f"{file}: expected where training stood, found something else ({type(error).__name__}); delete it, and "
                "this lambda is trained again"
            ) from error
        self._check_run(file, run)
        return state

    def save_state(self, name: str, state: dict[str, Any]) -> None:
        """Keeps where a path stands; see `PathTraining.state`."""
        file = self._state_file(name)
        if file is not None:
            buffer = io.BytesIO()
            torch.save({"run": self._run, "state": state}, buffer)
            atomic_write(file, buffer.getvalue())

    def drop_state(self, name: str) -> None:
        """Forgets where a path stood: it is at the end of a lambda, or went wrong."""
        file = self._state_file(name)
        if file is not None:
            remove(file)

    def notes(self, url: str) -> JobNotes:
        """The jobs that are under way on a host for these paths."""
        return JobNotes(self.directory, url)

    def job_key(self, name: str, state: dict[str, Any]) -> str:
        """What a job that goes on from this state is known by."""
        return content_digest(self._run, name, state)

    def _check_run(self, file: Path, run: str) -> None:
        if run != self._run:
            raise InputError(
                f"{file}: the checkpoint of another run (another model, other triples or other options); give the same "
                "ones to go on, or another directory to begin"
            )

    def _state_file(self, name: str) -> Path | None:
        file = self._file(name)
        return None if file is None else file.with_suffix(".state.pt")

    def _file(self, name: str) -> Path | None:
        # Names of desiderata are the user's: a slash in one must not lead to another directory.
        return (
            None
            if self.directory is None
            else self.directory / f"{quote(name, safe=' ').replace('.', '%2E')}.json"
        )
