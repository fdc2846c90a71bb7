"""Finished paths on disk, so that an interrupted mask goes on where it stopped."""

from __future__ import annotations

import hashlib
from pathlib import Path
from urllib.parse import quote

import torch
from pydantic import BaseModel, ConfigDict

from patchkit.errors import InputError
from patchkit.methods._mask_train import PathPoint, PathResult
from patchkit.results.formats import load_tensors, read_model, save_tensors, write_model


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
    """Paths by name in a directory; a path is there whole or not at all. With no directory nothing is kept.

    Args:
        run: everything that a path depends on, as text. A path of another run is refused, never taken for one's own.
    """

    def __init__(self, directory: Path | None, run: str) -> None:
        self.directory = directory
        self._run = hashlib.sha256(run.encode()).hexdigest()[:32]

    def load(self, name: str) -> PathResult | None:
        """The path of this name, if it was finished before.

        Raises:
            InputError: the file is of another run (another model, other triples or options), or it is damaged.
        """
        file = self._file(name)
        if file is None or not file.is_file():
            return None
        record = read_model(file, _Path)
        if record.run != self._run:
            raise InputError(
                f"{file}: the checkpoint of another run (another model, other triples or other options); give the same "
                "ones to go on, or another directory to begin"
            )
        values = load_tensors(file.with_suffix(".safetensors")).get("values")
        if values is None or len(values) != len(record.points):
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
        """Keeps a finished path; the JSON is written last, and without it the path counts as not there."""
        file = self._file(name)
        if file is None:
            return
        save_tensors(
            file.with_suffix(".safetensors"), {"values": torch.stack([p.values for p in path.points])}
        )
        points = [_Point(lam=p.lam, validation=p.validation, steps=p.steps) for p in path.points]
        write_model(file, _Path(run=self._run, points=points, history=path.history, stopped=path.stopped))

    def _file(self, name: str) -> Path | None:
        # Names of desiderata are the user's: a slash in one must not lead to another directory.
        return (
            None
            if self.directory is None
            else self.directory / f"{quote(name, safe=' ').replace('.', '%2E')}.json"
        )
