"""A page as one HTML document that loads nothing, and its files."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from patchkit.files import atomic_write
from patchkit.report._html import arrows, escape, paragraph
from patchkit.report._style import style_sheet

REPORT = "report.html"

# Nothing may be loaded or run: a page that a person forwards must not call anywhere, whatever text it was
# made from.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"

_SECTION = re.compile(r'<section id="([^"]+)" data-short="([^"]+)"')


def write_files(directory: Path, page: str, drawn: Mapping[str, bytes], pictures: Sequence[str]) -> Path:
    """Writes the page and its pictures, each by rename, and removes those of `pictures` that are not drawn any more."""
    for name in pictures:
        if name not in drawn:
            (directory / name).unlink(missing_ok=True)
    for name, picture in drawn.items():
        atomic_write(directory / name, picture)
    atomic_write(directory / REPORT, page)
    return directory / REPORT


def lead(title: str, headline: str, warned: Sequence[str], tiles: str) -> str:
    """What stands on top: the title, the answer in a sentence, what limits it, and the main numbers."""
    said = "".join(paragraph(text, "warn") for text in warned if text)
    return f'<h1>{escape(title)}</h1><p class="headline">{arrows(headline)}</p>{said}{tiles}'


def document(title: str, top: str, sections: Sequence[str]) -> str:
    """The whole page: what stands on top, links to the sections, and the sections that are not empty."""
    sections = [part for part in sections if part]
    links = "".join(
        f'<a href="#{found.group(1)}">{found.group(2)}</a>'
        for part in sections
        if (found := _SECTION.match(part))
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{style_sheet()}</style></head>\n<body>"
        f'<header>{top}</header>\n<nav aria-label="Sections">{links}</nav>\n<main>\n'
        + "\n".join(sections)
        + "\n</main>\n<footer>Written by patchkit. The page loads nothing and runs no script.</footer></body></html>\n"
    )
