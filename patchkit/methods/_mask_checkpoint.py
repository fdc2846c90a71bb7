"""Finished paths on disk, so that an interrupted mask goes on where it stopped."""

from __future__ import annotations

from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict

from patchkit.methods._mask_train import PathPoint, PathResult
from patchkit.results.formats import load_tensors, read_model, save_tensors, write_model


class _Point(BaseModel):
    model_config = ConfigDict(extra="forbid")
    lam: float
    validation: dict[str, float]
    steps: int


class _Path(BaseModel):
    model_config = ConfigDict(extra="forbid")
    points: list[_Point]
    history: list[dict[str, float]]
    stopped: str


class Checkpoint:
    """Paths by name in a directory; a path is there whole or not at all. With no directory nothing is kept."""

    def __init__(self, directory: Path | None) -> None:
        self.directory = directory

    def load(self, name: str) -> PathResult | None:
        """The path of this name, if it was finished before."""
        if self.directory is None or not (self.directory / f"{name}.json").is_file():
            return None
        record = read_model(self.directory / f"{name}.json", _Path)
        values = load_tensors(self.directory / f"{name}.safetensors")["values"]
        points = [
            PathPoint(point.lam, values[i].clone(), point.validation, point.steps)
            for i, point in enumerate(record.points)
        ]
        return PathResult(points=points, history=record.history, stopped=record.stopped)

    def save(self, name: str, path: PathResult) -> None:
        """Keeps a finished path; the JSON is written last, and without it the path counts as not there."""
        if self.directory is None:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        save_tensors(
            self.directory / f"{name}.safetensors", {"values": torch.stack([p.values for p in path.points])}
        )
        points = [_Point(lam=p.lam, validation=p.validation, steps=p.steps) for p in path.points]
        write_model(
            self.directory / f"{name}.json", _Path(points=points, history=path.history, stopped=path.stopped)
        )
