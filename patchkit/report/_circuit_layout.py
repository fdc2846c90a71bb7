"""What the picture of a circuit shows and where: which edges are drawn, the boxes they join, and the rows these are in.

Information flows upwards: the input at the bottom, then each layer's heads with its MLP above them (beside them in a
parallel block, whose MLP does not read its heads), the logits on top. Layers without a node are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from patchkit.model.edges import EdgeGraph
from patchkit.report._largest import largest
from patchkit.report._layers import Item, Link, arrange
from patchkit.results.circuit import Circuit

HEAD_WIDTH, HEAD_HEIGHT = 0.54, 0.34
MLP_WIDTH, MLP_HEIGHT = 0.42, 0.24
PORT = 0.145
#: Between the boxes of heads that share a key and a value, and around them.
INSIDE = 0.06
# Rows wider than this are split into several of the same layer.
_WIDEST = 8.6
_AT_END = 0.09
_LETTERS = "qkv"

#: How an edge is drawn: the colour of what it arrives at, and the dash of one that works against the behaviour.
KIND_ROLE = {"q": "s2", "k": "s3", "v": "s4", "": "s5"}
DASHED = (0, (3.2, 1.6))
#: The outline of a box that no path from the input to the logits goes through.
DOTTED = (0, (1, 1.6))


@dataclass(frozen=True)
class Drawn:
    """One edge of the picture. `letter` is q, k, v, or empty for an edge into an MLP or the logits."""

    sender: int
    receiver: int
    letter: str
    size: float
    helps: bool


@dataclass
class Box:
    """A node of the picture; `x` is its middle in inches. `ports` are letters and how far right of it they stand."""

    name: str
    kind: str
    width: float
    height: float
    live: bool = False
    x: float = 0.0
    ports: dict[str, float] = field(default_factory=dict)


@dataclass
class Row:
    """Boxes that stand at one height; `layer` is -1 for the input and the number of layers for the logits."""

    layer: int
    groups: list[list[Box]]

    @property
    def height(self) -> float:
        return max((box.height for group in self.groups for box in group), default=MLP_HEIGHT)


@dataclass(frozen=True)
class Curve:
    """The way of a drawn edge, from row to row: where it leaves, its lanes, where it arrives (inches from the left)."""

    edge: Drawn
    start: int
    end: int
    xs: list[float]


@dataclass(frozen=True)
class Layout:
    """Rows from the bottom, the ways of the edges through them, and the width of it all."""

    rows: list[Row]
    curves: list[Curve]
    width: float
    crossings: int


def choose(
    circuit: Circuit,
    importance: Float[Tensor, "senders receivers"] | None,
    sizes: Float[Tensor, "senders receivers"] | None,
    limit: int,
) -> tuple[list[Drawn], Bool[Tensor, "senders receivers"]]:
    """The `limit` largest edges of a circuit, largest first, and which edges are left over.

    Without scores all edges have one size and come by number; one without a score counts as 0.
    """
    if sizes is None:
        sizes = torch.ones(circuit.edges.shape) if importance is None else importance.abs()
    where = circuit.edges.nonzero()
    found = sizes[circuit.edges].double().nan_to_num(nan=0.0)
    order = largest(found, limit)
    graph, rest = circuit.graph, circuit.edges.clone()
    drawn = []
    for size, (sender, receiver) in zip(found[order].tolist(), where[order].tolist(), strict=True):
        against = importance is not None and float(importance[sender, receiver]) < 0
        drawn.append(Drawn(sender, receiver, letter_of(graph, receiver), size, not against))
        rest[sender, receiver] = False
    return drawn, rest


def letter_of(graph: EdgeGraph, receiver: int) -> str:
    """q, k or v; empty for an MLP and the logits."""
    if receiver == graph.logits:
        return ""
    place = receiver % graph.receivers_a_layer
    if place < graph.n_heads:
        return "q"
    if place == graph.receivers_a_layer - 1:
        return ""
    return "k" if place < graph.n_heads + graph.n_kv_heads else "v"


def lay_out(circuit: Circuit, drawn: Sequence[Drawn], empty_layers: Sequence[int] = ()) -> Layout:
    """Places the boxes that the drawn edges join; rows for `empty_layers` too, where they have no box.

    A box is `live` when a path from the input to the logits goes through it in the whole circuit.
    """
    boxes = _boxes(circuit, drawn)
    rows = _rows(circuit.graph, boxes, empty_layers)
    numbers: dict[str, tuple[int, float]] = {}
    items: list[Item] = []
    groups: list[list[Box]] = []
    for place, row in enumerate(rows):
        for group in row.groups:
            width = sum(box.width for box in group) + INSIDE * (len(group) - 1)
            left = -width / 2
            for box in group:
                numbers[box.name] = (len(items), left + box.width / 2)
                left += box.width + INSIDE
            items.append(Item(place, width + (2 * INSIDE if len(group) > 1 else 0.0)))
            groups.append(group)
    ends = [_ends(circuit.graph, edge) for edge in drawn]
    links = []
    for edge, (start, end) in zip(drawn, ends, strict=True):
        (first, leaves), (last, arrives) = numbers[start], numbers[end]
        links.append(Link(first, last, leaves, arrives + boxes[end].ports.get(edge.letter, 0.0)))
    found = arrange(items, links, len(rows))
    for number, group in enumerate(groups):
        for box in group:
            box.x = found.middles[number] + numbers[box.name][1]
    curves = []
    for edge, link, lanes, (start, end) in zip(drawn, links, found.lanes, ends, strict=True):
        begin = boxes[start].x
        arrival = boxes[end].x + boxes[end].ports.get(edge.letter, 0.0)
        curves.append(Curve(edge, items[link.start].row, items[link.end].row, [begin, *lanes, arrival]))
    _spread_ends(curves, boxes, ends)
    widest = [box.x + box.width / 2 for group in groups for box in group]
    widest += [x for curve in curves for x in curve.xs]
    return Layout(rows, curves, max(widest, default=1.0) + INSIDE, found.crossings)


def _ends(graph: EdgeGraph, edge: Drawn) -> tuple[str, str]:
    """Names of the boxes that an edge joins: with shared keys and values these have a box of their own."""
    name = graph.receiver_name(edge.receiver).partition("<")[0]
    if edge.letter in ("k", "v") and not graph.by_query_head:
        name = name.replace("h", "kv")
    return graph.sender_name(edge.sender), name


def _boxes(circuit: Circuit, drawn: Sequence[Drawn]) -> dict[str, Box]:
    graph = circuit.graph
    whole = circuit.pruned()
    living = {name for name in whole.node_names}
    reached = whole.edges.any(0)
    boxes: dict[str, Box] = {}
    for edge in drawn:
        start, end = _ends(graph, edge)
        for name in (start, end):
            if name not in boxes:
                boxes[name] = _box(name, name in living)
        box = boxes[end]
        if edge.letter:
            box.ports[edge.letter] = 0.0
        box.live |= box.kind in ("kv", "logits") and bool(reached[edge.receiver])
    for box in boxes.values():
        letters = [letter for letter in _LETTERS if letter in box.ports]
        # Fixed places, so that a head's query is always on the left.
        shown = letters if box.kind == "kv" else list(_LETTERS) if graph.by_query_head else ["q"]
        for letter in letters:
            box.ports[letter] = PORT * (shown.index(letter) - (len(shown) - 1) / 2)
    for end, along in (("input", [edge for edge in drawn if edge.sender == 0]),
                       ("logits", [edge for edge in drawn if edge.receiver == graph.logits])):  # fmt: skip
        box = boxes.setdefault(end, _box(end, False))
        box.width = max(box.width, 0.3 + _AT_END * len(along))
    return boxes


def _box(name: str, live: bool) -> Box:
    if name in ("input", "logits"):
        return Box(name, name, 0.8, MLP_HEIGHT, live)
    if name.startswith("m"):
        return Box(name, "mlp", MLP_WIDTH, MLP_HEIGHT, live)
    kind = "kv" if "kv" in name else "head"
    # Six letters fit; `a31.h31` needs a little more.
    return Box(name, kind, HEAD_WIDTH + 0.06 * max(0, len(name) - 6), HEAD_HEIGHT, live)


def _rows(graph: EdgeGraph, boxes: dict[str, Box], empty_layers: Sequence[int]) -> list[Row]:
    heads: dict[int, dict[int, list[Box]]] = {}
    mlps: dict[int, Box] = {}
    group = graph.n_heads // graph.n_kv_heads
    for name in sorted(boxes, key=_number):
        box = boxes[name]
        if box.kind == "mlp":
            mlps[int(name[1:])] = box
        elif box.kind in ("head", "kv"):
            layer, place = _number(name)[:2]
            heads.setdefault(layer, {}).setdefault(
                place // group if box.kind == "head" else place, []
            ).append(box)
    rows = [Row(-1, [[boxes["input"]]])]
    for layer in sorted({*heads, *mlps, *empty_layers}):
        groups = list(heads.get(layer, {}).values())
        if graph.parallel and layer in mlps:
            groups.append([mlps[layer]])
        rows += [Row(layer, part) for part in _split(groups)]
        if layer in mlps and not graph.parallel:
            rows.append(Row(layer, [[mlps[layer]]]))
        if layer not in heads and layer not in mlps:
            rows.append(Row(layer, []))
    return [*rows, Row(graph.n_layers, [[boxes["logits"]]])]


def _number(name: str) -> tuple[int, int, bool]:
    """Layer and number of a box, keys and values before their queries; the ends first."""
    layer, _, place = name[1:].partition(".")
    if not layer.isdigit():
        return (-1, 0, False)
    return int(layer), int(place.lstrip("hkv") or 0), "kv" not in name


def _split(groups: list[list[Box]]) -> list[list[list[Box]]]:
    """Groups of a layer in as many rows as they need, dealt out in turn."""
    width = sum(sum(box.width for box in group) + 0.2 for group in groups)
    parts = -(-width // _WIDEST)
    return [part for start in range(int(parts)) if (part := groups[start :: int(parts)])]


def _spread_ends(curves: list[Curve], boxes: dict[str, Box], ends: Sequence[tuple[str, str]]) -> None:
    """Lets edges leave the input and reach the logits beside each other, in the order in which they go on."""
    for name, place, beside in (("input", 0, 1), ("logits", -1, -2)):
        mine = [curve for curve, pair in zip(curves, ends, strict=True) if pair[place] == name]
        mine.sort(key=lambda curve: (curve.xs[beside], curve.edge.receiver))
        box = boxes[name]
        step = min(2 * _AT_END, (box.width - 0.2) / max(1, len(mine) - 1))
        for number, curve in enumerate(mine):
            curve.xs[place] = box.x + step * (number - (len(mine) - 1) / 2)
