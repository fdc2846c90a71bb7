"""Tables of the page: cells that know whether they are numbers and how strongly they are tinted."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from patchkit.report._html import ABSENT, breakable, escape, percent, scroll, span_of
from patchkit.report._palette import HEAT_MAX


@dataclass(frozen=True)
class Cell:
    """One table cell: `html` is already safe. `heat` in -1..1 tints it, negative in the other hue."""

    html: str
    heat: float | None = None
    head: bool = False
    number: bool = False
    mark: str = ""

    def render(self) -> str:
        classes = [*(["n"] if self.number else []), *(["h"] if self.heat is not None else [])]
        names = " ".join([*classes, *([self.mark] if self.mark else [])])
        attributes = f' class="{names}"' if names else ""
        if self.heat is not None:
            hue = "against" if self.heat < 0 else "heat"
            strength = HEAT_MAX * min(1.0, abs(self.heat))
            attributes += f' style="--t:var(--{hue}-rgb);--a:{strength:.3f}"'
        if self.head:
            return f'<th scope="row"{attributes}>{self.html}</th>'
        return f"<td{attributes}>{self.html}</td>"


def text_cell(value: object) -> Cell:
    """A cell of text."""
    return Cell(escape(value))


def head_cell(value: object, small: str = "") -> Cell:
    """The cell that names its row, with an optional remark under the name."""
    remark = f"<br><small>{escape(small)}</small>" if small else ""
    return Cell(breakable(value) + remark, head=True)


def number_cell(shown: str, mark: str = "") -> Cell:
    """A right-aligned number, already formatted."""
    return Cell(escape(shown), number=True, mark=mark)


def score_cell(value: float | None, mark: str = "") -> Cell:
    """A fraction in per cent."""
    return number_cell(percent(value), mark)


def random_cell(values: Sequence[float]) -> Cell:
    """Mean of several fractions with their range below, in per cent."""
    if not values:
        return number_cell(ABSENT)
    mean = sum(values) / len(values)
    return Cell(f"{percent(mean)}<br><small>{span_of(values)}</small>", number=True)


def heat_cell(value: float | None, sign: bool = False, mark: str = "") -> Cell:
    """A fraction in per cent on a tint of its size."""
    if value is None or math.isnan(value):
        return Cell(ABSENT, number=True, mark=mark)
    return Cell(percent(value, sign), heat=value, number=True, mark=mark)


@dataclass(frozen=True)
class Table:
    """A table with a caption, in a box of its own that scrolls sideways when the screen is narrow.

    Titles are text, not HTML. `groups` is an optional row of (title, columns spanned) above the column
    titles; `total` a last row set apart; `row_marks` a style class per row.
    """

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    total: Sequence[Cell] = ()
    groups: Sequence[tuple[str, int]] = ()
    row_marks: Sequence[str] = ()

    def render(self) -> str:
        numbers = [cell.number for cell in self.rows[0]] if self.rows else [False] * len(self.columns)
        titles = "".join(
            f'<th scope="col"{" class=n" if number else ""}>{breakable(title)}</th>'
            for title, number in zip(self.columns, numbers, strict=True)
        )
        head = f"<tr>{titles}</tr>"
        if self.groups:
            head = f'<tr class="groups">{"".join(_group(*group) for group in self.groups)}</tr>{head}'
        marks = self.row_marks or [""] * len(self.rows)
        body = "".join(_row(row, mark) for row, mark in zip(self.rows, marks, strict=True))
        foot = f"<tfoot>{_row(self.total)}</tfoot>" if self.total else ""
        caption = f"<caption><span>{escape(self.caption)}</span></caption>"
        return scroll(
            f"<table>{caption}<thead>{head}</thead><tbody>{body}</tbody>{foot}</table>", "table", "scroll t"
        )


def _group(title: str, span: int) -> str:
    if not title:
        return f'<td colspan="{span}"></td>'
    return f'<th scope="colgroup" colspan="{span}">{escape(title)}</th>'


def _row(cells: Iterable[Cell], mark: str = "") -> str:
    attribute = f' class="{mark}"' if mark else ""
    return f"<tr{attribute}>{''.join(cell.render() for cell in cells)}</tr>"
