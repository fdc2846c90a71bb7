"""A table that is written twice from the same cells: as HTML on a page, as GitHub's markdown in the repository."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from patchkit.report._html import breakable, escape, visible
from patchkit.report._tables import Cell, Table

_SPECIAL = re.compile(r"([\\`*_\[\]|~$#])")
_CODE = re.compile(r"`([^`]+)`")


@dataclass(frozen=True)
class Entry:
    """A cell: text, a remark under it, a tint from -1 to 1 (on the page alone), and whether it stands out."""

    text: str
    small: str = ""
    heat: float | None = None
    bold: bool = False
    number: bool = True


def name(text: str, small: str = "") -> Entry:
    """A cell of words."""
    return Entry(text, small, number=False)


@dataclass(frozen=True)
class Grid:
    """A table; the first cell of a row names it. `groups` are titles over several columns, with how many each."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Entry]]
    groups: Sequence[tuple[str, int]] = ()

    def html(self) -> str:
        rows = [[_cell(entry, first=place == 0) for place, entry in enumerate(row)] for row in self.rows]
        return Table(self.caption, self.columns, rows, groups=self.groups).render()

    def markdown(self) -> str:
        """The caption as a paragraph, then the table. A group's title stands before each of its columns' titles."""
        heads = [title for title, span in self.groups for _ in range(span)] or [""] * len(self.columns)
        titles = [
            plain(f"{head}: {title}" if head else title)
            for head, title in zip(heads, self.columns, strict=True)
        ]
        numbers = [entry.number for entry in self.rows[0]] if self.rows else [False] * len(titles)
        lines = [titles, ["---:" if number else "---" for number in numbers]]
        lines += [[_marked(entry) for entry in row] for row in self.rows]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return f"{sentence(self.caption)}\n\n{table}\n"


def plain(text: str) -> str:
    """Text that stands in markdown as it is, also in a cell of a table."""
    escaped = visible(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _SPECIAL.sub(r"\\\1", escaped)


def sentence(text: str) -> str:
    """A person's sentence in markdown: as it is, with `backquoted` pieces as code."""
    pieces = _CODE.split(" ".join(text.split()))
    return "".join(f"`{visible(piece)}`" if place % 2 else plain(piece) for place, piece in enumerate(pieces))


def _cell(entry: Entry, first: bool) -> Cell:
    remark = f"<br><small>{escape(entry.small)}</small>" if entry.small else ""
    text = escape(entry.text) if entry.number else breakable(entry.text)
    return Cell(text + remark, entry.heat, head=first, number=entry.number, mark="key" if entry.bold else "")


def _marked(entry: Entry) -> str:
    text = plain(entry.text)
    text = f"**{text}**" if entry.bold and text else text
    return f"{text}<br><sub>{plain(entry.small)}</sub>" if entry.small else text
