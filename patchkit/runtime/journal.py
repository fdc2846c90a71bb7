"""The journal of a run: what every finished batch gave, on disk, so that an interrupted run goes on where it was."""

from __future__ import annotations

import hashlib
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from patchkit.files import atomic_write


class Journal:
    """Batches of one run in one directory, each a file that is written by rename.

    A batch is known by what it was: its name here is a digest of the caller's `key` and of the items' numbers, so a
    journal of another run, or of other batch sizes, is not mistaken for this one's.
    """

    def __init__(self, directory: Path | str, key: str) -> None:
        self._directory, self._key = Path(directory), key

    def read(self, items: list[int]) -> dict[str, Tensor] | None:
        """The tensors of a batch that was finished before, else None."""
        path = self._path(items)
        if not path.exists():
            return None
        try:
            return safetensors.torch.load(path.read_bytes())
        except (OSError, SafetensorError):
            # A file that a full disk cut short is a batch that was not finished.
            return None

    def write(self, items: list[int], tensors: dict[str, Tensor]) -> None:
        """Notes a finished batch, in the tensors' own precision."""
        self._directory.mkdir(parents=True, exist_ok=True)
        kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        atomic_write(self._path(items), safetensors.torch.save(kept))

    def _path(self, items: list[int]) -> Path:
        digest = hashlib.sha256(f"{self._key} {items}".encode()).hexdigest()[:32]
        return self._directory / f"{digest}.safetensors"
