"""A scoreboard without what only its page needs: small enough to be shipped in the package, for `patchkit recommend`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from patchkit.files import atomic_write
from patchkit.results.scoreboard import Scoreboard

_DIGITS = 4
#: Fields of any part: names of what was missed, curves, seeds, silent nodes. All have defaults, or are emptied.
_DROPPED = ("names", "curve", "seeds", "note")
_EMPTIED = ("silent",)


def shortened(board: Scoreboard) -> Scoreboard:
    """The same board with four digits a number, and without names, curves, seeds and notes."""
    return Scoreboard.model_validate(_plain(board.model_dump(mode="json", exclude_defaults=True)))


def write_short(path: Path | str, board: Scoreboard) -> None:
    """Writes it as one file of JSON without white space, by rename; `Scoreboard.load` reads it from its directory."""
    short = shortened(board).model_dump(mode="json", exclude_defaults=True)
    atomic_write(path, json.dumps(short, ensure_ascii=False, allow_nan=False, separators=(",", ":")) + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        kept = {key: _plain(item) for key, item in value.items() if key not in _DROPPED}
        return kept | {key: [] for key in _EMPTIED if key in kept}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return round(value, _DIGITS) if isinstance(value, float) else value
