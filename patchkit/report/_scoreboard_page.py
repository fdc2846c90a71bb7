"""The page of the ground-truth study, and its files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from patchkit.errors import InputError
from patchkit.report import _scoreboard_sections as parts
from patchkit.report._canvas import to_png
from patchkit.report._document import document, write_files
from patchkit.report._html import escape, paragraph
from patchkit.report._scoreboard_pictures import pictures
from patchkit.report._scoreboard_words import TITLE, headline
from patchkit.report._words import state
from patchkit.results.manifest import MANIFEST, Manifest, read_manifest
from patchkit.results.scoreboard import SCOREBOARD, Scoreboard

SCOREBOARD_PICTURES = tuple(
    f"{name}.png" for name in ("heat-nodes", "heat-edges", "overlap", "curves", "costs")
)


def write_scoreboard_report(directory: Path | str) -> Path:
    """Writes report.html and the pictures there is data for from `scoreboard.json`; returns report.html's path.

    Raises InputError for missing or malformed files and RunError when writing fails.
    """
    directory = Path(directory)
    board = Scoreboard.load(directory)
    manifest = read_manifest(directory) if (directory / MANIFEST).exists() else None
    page = scoreboard_page(board, manifest, place=directory.name)
    drawn = {f"{each.name}.png": to_png(each.draw()) for each in pictures(board)}
    return write_files(directory, page, drawn, SCOREBOARD_PICTURES)


def scoreboard_page(board: Scoreboard, manifest: Manifest | None = None, place: str = "DIR") -> str:
    """The page as HTML; `place` is how commands call the run's directory.

    Raises InputError when the board has no cases or no methods.
    """
    check(board)
    sections = [
        parts.findings(board),
        parts.which(board),
        parts.means(board),
        *(parts.picture(drawn) for drawn in pictures(board)),
        parts.missed(board),
        parts.cases(board),
        parts.notes(board),
        parts.reading(board),
        parts.again(board, manifest, place),
    ]
    ended = state(manifest)
    lead = (
        f'<h1>{escape(TITLE)}</h1><p class="headline">{escape(headline(board))}</p>'
        f"{paragraph(ended, 'warn') if ended else ''}{parts.tiles(board)}"
    )
    return document(TITLE, lead, sections)


def check(board: Scoreboard) -> None:
    """InputError when there is nothing to show."""
    for field in ("cases", "methods"):
        if not getattr(board, field):
            raise InputError(
                f"{SCOREBOARD}: field {field} is empty, so there is nothing to show. Run the study again."
            )


WRITERS: dict[str, tuple[str, Callable[[Path], Path]]] = {
    SCOREBOARD: ("`patchkit study ground-truth`", write_scoreboard_report),
}
