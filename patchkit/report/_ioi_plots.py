"""Pictures of the IOI study: heads from the names to the logits by who acts on whom, and maps of what every head does.

In the staged picture the logits are on the right and every column is one group of heads. The lines of those that act on
the queries, keys or values of a group meet in a point each, since a stage patches into all of a group's inputs together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, PathPatch
from matplotlib.path import Path

from patchkit.report._canvas import label, style
from patchkit.report._circuit_layout import DASHED, KIND_ROLE
from patchkit.report._html import count, signed
from patchkit.report._matrix_plot import Matrix, tint
from patchkit.report._palette import LIGHT
from patchkit.results.ioi import INPUTS, HeadRow, IoiStudy, StageShare, read_stage

#: Heads of a column; of more only those with the largest effects.
MOST_HEADS = 18

_WIDE, _LOGITS, _TALL, _APART, _BETWEEN = 2.0, 0.86, 0.28, 0.11, 1.1
_TOP, _BOTTOM, _SIDE, _FRAME = 0.7, 0.46, 0.3, 0.1
_THINNEST, _THICKEST = 0.7, 4.5
_KNOTS_APART = 0.62


@dataclass(frozen=True)
class Link:
    """What a head does to one set of receivers: its largest share over corruptions, where a stage kept it.

    Attributes:
        letter: q, k or v; empty for the logits.
        group: whose inputs; 0 for the logits.
    """

    head: str
    letter: str
    group: int
    share: float


_SPOKEN = {
    "last": "END",
    "s2": "S2",
    "s1+1": "S1+1",
    "clause": "clause",
    "io": "IO",
    "s1": "S1",
    "names": "names",
    "rest of clause": "clause",
    "token before": "before",
}


_SHORT = {
    "negative name mover": "negative mover",
    "duplicate token": "duplicate",
    "previous token": "previous",
}


def spoken(row: HeadRow) -> str:
    """In few letters: the first class of a head, or where it looks, in brackets where that is not far above even."""
    if row.classes:
        return _SHORT.get(row.classes[0], row.classes[0])
    places = (_SPOKEN.get(place, place) for place in (row.looks.query, row.looks.target))
    said = " → ".join(places)
    return said if row.looks.clear else f"({said})"


@dataclass(frozen=True)
class _Column:
    """A group as it is drawn: its left edge, the middles of its pills, and how many heads are left out."""

    left: float
    heads: dict[str, float]
    more: int


def links(study: IoiStudy) -> list[Link]:
    """One a head and stage that kept it."""
    best: dict[tuple[str, str], StageShare] = {}
    for row in study.heads:
        for one in row.stages:
            known = best.get((row.head, one.stage))
            if one.chosen and (known is None or abs(one.share) > abs(known.share)):
                best[row.head, one.stage] = one
    found = []
    for (head, stage), one in best.items():
        letter, group = read_stage(stage) or ("", 0)
        found.append(Link(head, letter, group, one.share))
    return found


@style()
def stages_figure(study: IoiStudy) -> Figure:
    """The groups as columns, the logits on the right."""
    found = links(study)
    shares = {link.head: link.share for link in sorted(found, key=lambda link: abs(link.share))}
    ordered = [sorted(group, key=lambda head: -abs(shares[head])) for group in study.groups]
    rows = max([1, *(min(len(group), MOST_HEADS + 1) for group in ordered)])
    knots = max([1, *(len(_letters(found, group)) for group in range(len(ordered) + 1))])
    tall = max(rows * (_TALL + _APART), knots * _KNOTS_APART)
    width = max(4.0, 2 * _SIDE + _LOGITS + len(ordered) * (_WIDE + _BETWEEN))
    height = _TOP + tall + _BOTTOM
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, width)
    axes.set_ylim(0, height)
    axes.axis("off")
    middle = _BOTTOM + tall / 2
    columns = [_Column(width - _SIDE - _LOGITS, {"logits": middle}, 0)]
    for number, group in enumerate(ordered, 1):
        kept = group[:MOST_HEADS]
        slots = len(kept) + (len(group) > MOST_HEADS)
        top = middle + (slots - 1) * (_TALL + _APART) / 2
        places = {head: top - place * (_TALL + _APART) for place, head in enumerate(kept)}
        left = width - _SIDE - _LOGITS - number * (_WIDE + _BETWEEN)
        columns.append(_Column(left, places, len(group) - len(kept)))
    largest = max((abs(link.share) for link in found), default=1.0)
    rows_of = {row.head: row for row in study.heads}
    where = {head: column for column in columns for head in column.heads}
    for group, column in enumerate(columns):
        letters = _letters(found, group)
        for place, letter in enumerate(letters):
            y = middle + ((len(letters) - 1) / 2 - place) * min(_KNOTS_APART, tall / len(letters))
            mine = [link for link in found if (link.group, link.letter) == (group, letter)]
            _join(axes, [link for link in mine if link.head in where], column, letter, y, where, largest)
    for number, column in enumerate(columns):
        _title(axes, column, number, height)
        for head, y in column.heads.items():
            at = column.left, y, _WIDE if number else _LOGITS
            _pill(axes, at, head, rows_of.get(head), shares.get(head), largest)
    _key(axes, found)
    return figure


def _letters(found: Sequence[Link], group: int) -> list[str]:
    """Which inputs of a group something acts on, in the order q, k, v."""
    there = {link.letter for link in found if link.group == group}
    return [letter for letter in ("", *INPUTS) if letter in there]


def _join(
    axes: Axes,
    mine: Sequence[Link],
    column: _Column,
    letter: str,
    y: float,
    where: dict[str, _Column],
    largest: float,
) -> None:
    """Lines from the senders of one stage to their point, and from it to the column."""
    knot = (column.left - _FRAME - 0.42, y)
    colour = LIGHT[KIND_ROLE[letter]]
    for link in mine:
        from_ = where[link.head]
        # A head of the same group, or of one nearer to the logits, leaves from its left side.
        behind = from_.left + _WIDE > knot[0]
        start = (from_.left if behind else from_.left + _WIDE, from_.heads[link.head])
        axes.add_patch(
            PathPatch(_bow(start, knot), fc="none", ec=colour, alpha=0.75, zorder=1,
                      ls="-" if link.share < 0 else DASHED,
                      lw=_THINNEST + (_THICKEST - _THINNEST) * abs(link.share) / largest)
        )  # fmt: skip
    end = (column.left - _FRAME, y)
    axes.plot([knot[0], end[0]], [y, y], color=colour, lw=2.4, zorder=2, solid_capstyle="butt")
    axes.plot(*knot, "o", ms=5, color=colour, zorder=3)
    if letter:
        axes.text(end[0] - 0.03, y + 0.1, INPUTS[letter], ha="right", va="center", size=7.5, color=colour,
                  weight="bold", zorder=4, bbox={"boxstyle": "square,pad=0.08", "fc": LIGHT["panel"], "ec": "none",
                                                 "alpha": 0.8})  # fmt: skip


def _bow(start: tuple[float, float], end: tuple[float, float]) -> Path:
    """A curve that is level at both ends."""
    half = 0.55 * (end[0] - start[0])
    points = [start, (start[0] + half, start[1]), (end[0] - half, end[1]), end]
    return Path(points, [Path.MOVETO, Path.CURVE4, Path.CURVE4, Path.CURVE4])


def _title(axes: Axes, column: _Column, number: int, height: float) -> None:
    """What a column is called, its frame, and how many heads it leaves out."""
    x = column.left + (_WIDE if number else _LOGITS) / 2
    title, under = ("the end", "") if number == 0 else (f"group {number}", _acts(number))
    axes.text(x, height - 0.2, title, ha="center", va="center", size=9.5, weight="bold")
    axes.text(x, height - 0.43, under, ha="center", va="center", size=8, color=LIGHT["soft"])
    if number == 0:
        return
    low = min(column.heads.values()) - _TALL / 2 - (_TALL + _APART) * bool(column.more)
    high = max(column.heads.values()) + _TALL / 2
    corner = (column.left - _FRAME, low - _FRAME)
    shape = "round,pad=0,rounding_size=0.12"
    size = (_WIDE + 2 * _FRAME, high - low + 2 * _FRAME)
    axes.add_patch(FancyBboxPatch(corner, *size, boxstyle=shape, fc="none", ec=LIGHT["line"], lw=1, zorder=1))
    if column.more:
        said = f"and {count(column.more)} more"
        axes.text(x, low + _TALL / 2, said, ha="center", va="center", size=8, color=LIGHT["soft"])


def _pill(
    axes: Axes,
    at: tuple[float, float, float],
    head: str,
    row: HeadRow | None,
    share: float | None,
    largest: float,
) -> None:
    """A head: its name, its class or where it looks, its largest share; the logits have a name only."""
    left, y, wide = at
    fill = LIGHT["grid"] if share is None else tint(share, largest)
    shape = f"round,pad=0,rounding_size={_TALL / 2}"
    # Tints are transparent: lines that end here must not shine through.
    for colour, edge in ((LIGHT["panel"], "none"), (fill, LIGHT["soft"])):
        axes.add_patch(
            FancyBboxPatch(
                (left, y - _TALL / 2), wide, _TALL, boxstyle=shape, fc=colour, ec=edge, lw=0.9, zorder=3
            )
        )
    if row is None or share is None:
        axes.text(left + wide / 2, y, head, ha="center", va="center", size=8.5, weight="bold", zorder=4)
        return
    axes.text(left + 0.1, y, label(head, 8), va="center", size=8.5, weight="bold", zorder=4)
    axes.text(left + 0.51 * wide, y, label(spoken(row), 18), ha="center", va="center", size=7.2, zorder=4)
    shown = f"{signed(100 * share, 0, plus=True)}\u00a0%"
    axes.text(left + wide - 0.09, y, shown, ha="right", va="center", size=8, zorder=4)


def _acts(number: int) -> str:
    return "acts on the logits" if number == 1 else f"acts on group {number - 1}"


def _key(axes: Axes, found: Sequence[Link]) -> None:
    x, y = _SIDE - 0.1, 0.16
    for said, dashes, there in (
        ("helps", "-", any(link.share < 0 for link in found)),
        ("works against", DASHED, any(link.share > 0 for link in found)),
    ):
        if there:
            axes.plot([x, x + 0.34], [y, y], color=LIGHT["soft"], lw=1.8, ls=dashes, solid_capstyle="butt")
            axes.text(x + 0.4, y, said, va="center", size=8, color=LIGHT["soft"])
            x += 0.4 + 0.066 * len(said) + 0.22
    if found:
        axes.text(x, y, "the wider, the more", va="center", size=8, color=LIGHT["soft"])


#: Maps of attention on the prompts, (title, from, to); and of the other numbers, (title, field).
ATTENTION = (
    ("END → IO", "last", "io"),
    ("END → S2", "last", "s2"),
    ("S2 → S1", "s2", "s1"),
    ("S2 → S1+1", "s2", "s1+1"),
    ("S2 → rest of clause", "s2", "rest of clause"),
    ("S1+1 → S1", "s1+1", "s1"),
)
NUMBERS = (
    ("copies names", "copying"),
    ("pushes names down", "negative_copying"),
    ("writes IO at END", "writes_io"),
    ("random: before", "previous"),
    ("random: same", "duplicate"),
    ("random: after", "induction"),
)


def attention_maps(study: IoiStudy) -> list[Matrix]:
    """Where every head looks, a map a pair of places; heads of the circuit are outlined."""
    return [
        _map(study, title, {row.head: row.behaviour.attention[query][target] for row in study.heads})
        for title, query, target in ATTENTION
    ]


def number_maps(study: IoiStudy) -> list[Matrix]:
    """The other numbers of every head."""
    return [
        _map(study, title, {row.head: getattr(row.behaviour, field) for row in study.heads})
        for title, field in NUMBERS
    ]


def _map(study: IoiStudy, title: str, values: dict[str, float]) -> Matrix:
    places = {head: tuple(int(part) for part in head[1:].split(".h")) for head in values}
    layers, heads = (1 + max(place[axis] for place in places.values()) for axis in (0, 1))
    cells = torch.full((layers, heads), torch.nan)
    for head, value in values.items():
        cells[places[head]] = value
    outlined = frozenset(places[row.head] for row in study.heads if row.in_circuit)
    return Matrix(title, cells, [str(head) for head in range(heads)], "head", outlined)  # pyright: ignore[reportArgumentType]
