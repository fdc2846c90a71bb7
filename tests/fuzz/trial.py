"""What a reader makes of a damaged file: a complaint where it is neither one line of error nor the sound content."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from patchkit.errors import InputError
from tests.fuzz.specimens import Specimen

LONGEST = 2_000


class Bench:
    """A sound specimen on disk, of which damaged copies are read."""

    def __init__(self, specimen: Specimen, directory: Path) -> None:
        self.specimen = specimen
        self._sound, self._copy = directory / "sound", directory / "damaged"
        self._sound.mkdir()
        specimen.make(self._sound)
        self.content = specimen.read(self._sound)

    def bytes_of(self, file: str) -> bytes:
        return self.specimen.path(self._sound, file).read_bytes()

    def complaint(self, file: str, damage: Callable[[Path], object], *, harmless: bool = False) -> str | None:
        """What is wrong with how the damage was taken; None where it was refused, or harmless and not seen."""
        shutil.rmtree(self._copy, ignore_errors=True)
        shutil.copytree(self._sound, self._copy, symlinks=True)
        damage(self.specimen.path(self._copy, file))
        try:
            found: Any = self.specimen.read(self._copy)
        except InputError as error:
            if harmless:
                return f"is harmless, but was refused: {error}"
            return unfit(str(error), self._copy)
        except Exception as error:
            return f"{type(error).__name__}: {str(error)[:300]}"
        if harmless:
            return None if found == self.content else "is harmless, but other content was read"
        return "was read as if nothing were wrong" + ("" if found == self.content else ", as other content")


def unfit(message: str, directory: Path) -> str | None:
    """What is wrong with a message."""
    if not message.isprintable() or len(message) > LONGEST:
        return f"not one line of limited length: {message[:300]!r}"
    return None if str(directory) in message else f"names no file: {message}"
