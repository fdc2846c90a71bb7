"""Where the nodes of a layered graph stand: their order in each row, and how far right, so that few links cross.

A link that passes rows gets a lane in each of them, so that it goes round the nodes and not through them. Order and
place come from one loop (the barycentre heuristic of Sugiyama, Tagawa and Toda 1981): each node wishes to stand at the
mean of its neighbours, and each row grants the wishes as nearly as the widths of its nodes allow.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Sequence
from dataclasses import dataclass

_LANE = 0.07
_GAP = 0.1
_SWEEPS, _SETTLING, _EAGER = 16, 40, 1.5
# A lane that is bent is uglier than a node that is off its middle.
_STRAIGHT = 6.0


@dataclass(frozen=True)
class Item:
    """A node: its row, counted from the start of all links, and its width."""

    row: int
    width: float


@dataclass(frozen=True)
class Link:
    """From one item to another in a later row, by number; how far right of their middles it leaves and arrives."""

    start: int
    end: int
    leaves: float = 0.0
    arrives: float = 0.0


@dataclass(frozen=True)
class Arrangement:
    """The middle of every item; for every link the lanes in the rows it passes; and how often links cross."""

    middles: list[float]
    lanes: list[list[float]]
    crossings: int


@dataclass(frozen=True)
class _Piece:
    """A part of a link between neighbouring rows."""

    lower: int
    upper: int
    leaves: float
    arrives: float
    weight: float


class _Sheet:
    """Items and lanes in their rows while they are moved about."""

    def __init__(self, items: Sequence[Item], links: Sequence[Link], rows: int) -> None:
        self.rows: list[list[int]] = [[] for _ in range(rows)]
        self.width = [item.width for item in items]
        for number, item in enumerate(items):
            self.rows[item.row].append(number)
        self.lanes: list[list[int]] = []
        self.pieces: list[list[_Piece]] = [[] for _ in range(rows)]
        for link in links:
            start, end = items[link.start].row, items[link.end].row
            passed = [self._lane(row) for row in range(start + 1, end)]
            self.lanes.append(passed)
            stops = [link.start, *passed, link.end]
            for place, row in enumerate(range(start, end)):
                first, last = place == 0, row == end - 1
                piece = _Piece(
                    stops[place],
                    stops[place + 1],
                    link.leaves if first else 0.0,
                    link.arrives if last else 0.0,
                    1.0 if first and last else 2.0 if first or last else _STRAIGHT,
                )
                self.pieces[row].append(piece)
        self.x = [0.0] * len(self.width)
        self.below: list[list[_Piece]] = [[] for _ in self.width]
        self.above: list[list[_Piece]] = [[] for _ in self.width]
        for piece in (piece for row in self.pieces for piece in row):
            self.above[piece.lower].append(piece)
            self.below[piece.upper].append(piece)
        for row in self.rows:
            self._settle(row, [0.0] * len(row))

    def _lane(self, row: int) -> int:
        self.width.append(_LANE)
        self.rows[row].append(len(self.width) - 1)
        return len(self.width) - 1

    def wish(self, number: int, down: bool, up: bool) -> float:
        """Where an item would stand if it were alone: at the weighted mean of its neighbours in the asked directions."""
        total, weight = 0.0, 0.0
        if down:
            for piece in self.below[number]:
                total += piece.weight * (self.x[piece.lower] + piece.leaves - piece.arrives)
                weight += piece.weight
        if up:
            for piece in self.above[number]:
                total += piece.weight * (self.x[piece.upper] + piece.arrives - piece.leaves)
                weight += piece.weight
        return total / weight if weight else self.x[number]

    def centre(self) -> None:
        """Puts items without links in the middle of all the others, where nothing else stands in their row."""
        held = [x for x, up, down in zip(self.x, self.above, self.below, strict=True) if up or down]
        middle = (min(held) + max(held)) / 2 if held else 0.0
        for row in self.rows:
            if len(row) == 1 and not self.above[row[0]] and not self.below[row[0]]:
                self.x[row[0]] = middle

    def reorder(self, rows: Sequence[int], down: bool, up: bool) -> None:
        """Sorts every row in turn by its wishes, and grants them."""
        for row in rows:
            wishes = {number: self.wish(number, down, up) for number in self.rows[row]}
            self.rows[row].sort(key=wishes.__getitem__)
            self._settle(self.rows[row], [wishes[number] for number in self.rows[row]])

    def relax(self, rows: Sequence[int]) -> None:
        """Grants every row in turn its wishes and a little more, which pulls long lanes straight in fewer turns."""
        for row in rows:
            wishes = [
                self.x[n] + _EAGER * (self.wish(n, down=True, up=True) - self.x[n]) for n in self.rows[row]
            ]
            self._settle(self.rows[row], wishes)

    def _settle(self, row: Sequence[int], wishes: Sequence[float]) -> None:
        """The places nearest to the wishes (least squares) at which nothing in a row overlaps: isotonic regression."""
        offsets = [0.0]
        for left, right in zip(row, row[1:], strict=False):
            both_lanes = self.width[left] == self.width[right] == _LANE
            between = 0.0 if both_lanes else _GAP
            offsets.append(offsets[-1] + (self.width[left] + self.width[right]) / 2 + between)
        blocks: list[tuple[float, int]] = []
        for wish, offset in zip(wishes, offsets, strict=False):
            mean, size = wish - offset, 1
            while blocks and blocks[-1][0] > mean:
                other, many = blocks.pop()
                mean, size = (mean * size + other * many) / (size + many), size + many
            blocks.append((mean, size))
        places = [mean for mean, size in blocks for _ in range(size)]
        for number, place, offset in zip(row, places, offsets, strict=False):
            self.x[number] = place + offset

    def crossings(self) -> int:
        """How many pairs of pieces between the same rows cross."""
        total = 0
        for pieces in self.pieces:
            ends = sorted((self.x[p.lower] + p.leaves, self.x[p.upper] + p.arrives) for p in pieces)
            seen: list[float] = []
            for _, arrival in ends:
                total += len(seen) - bisect_right(seen, arrival + 1e-9)
                insort(seen, arrival)
        return total


def arrange(items: Sequence[Item], links: Sequence[Link], rows: int) -> Arrangement:
    """Places the items of `rows` rows; the least middle less half its width is 0. The same input gives the same places.

    Links go from a lower row to a higher one.
    """
    sheet = _Sheet(items, links, rows)
    upward, downward = range(rows), range(rows - 1, -1, -1)
    best, order = sheet.crossings(), [list(row) for row in sheet.rows]
    for turn in range(_SWEEPS):
        rising = turn % 2 == 0
        sheet.reorder(upward if rising else downward, down=rising, up=not rising)
        found = sheet.crossings()
        if found < best:
            best, order = found, [list(row) for row in sheet.rows]
    sheet.rows = order
    for turn in range(_SETTLING):
        sheet.relax(upward if turn % 2 == 0 else downward)
    sheet.centre()
    left = min((sheet.x[number] - sheet.width[number] / 2 for row in order for number in row), default=0.0)
    return Arrangement(
        [sheet.x[number] - left for number in range(len(items))],
        [[sheet.x[number] - left for number in lanes] for lanes in sheet.lanes],
        sheet.crossings(),
    )
