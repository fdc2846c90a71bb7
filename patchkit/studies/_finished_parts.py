"""Finished parts of a study on disk: a JSON file each, with what it was made from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict

from patchkit.errors import InputError
from patchkit.results.formats import read_model, validated, write_model

Part = TypeVar("Part", bound=BaseModel)
#: `Checkpoint.unlike` of a study of several models.
OTHER_MODELS = "with other models or options"


class _Kept(BaseModel):
    """A finished part, and the study that it is of."""

    model_config = ConfigDict(extra="forbid")
    run: str
    part: dict[str, Any]


@dataclass(frozen=True)
class Checkpoint:
    """Where finished parts are kept.

    Attributes:
        directory: made when the first part is finished.
        run: what tells the study from one of another model or of other options.
        unlike: what such a one is called in a message.
    """

    directory: Path
    run: str
    unlike: str = "of another model or with other options"

    def part(self, name: str, kind: type[Part], make: Callable[[], Part]) -> Part:
        """The part of that name: from its file if it was finished before, else made and kept.

        Raises:
            InputError: the file is of a study of another model or with other options.
        """
        file = self.directory / f"{name}.json"
        if file.is_file():
            kept = read_model(file, _Kept)
            if kept.run != self.run:
                raise InputError(
                    f"{file}: the checkpoint of a study {self.unlike}; give the same ones to go on, or another directory "
                    "to begin"
                )
            return validated(file, kind, kept.part)
        made = make()
        write_model(file, _Kept(run=self.run, part=made.model_dump(mode="json")))
        return made

    def inside(self, name: str) -> Path:
        """A directory of its own, for a part that keeps what is finished of itself."""
        return self.directory / name
