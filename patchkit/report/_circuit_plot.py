"""A circuit as a picture in layers, drawn without graphviz: heads and MLPs as boxes, edges as curves that flow upwards.

An edge has the colour of what it arrives at (query, key, value; grey into MLPs and the logits), is dashed where it works
against the behaviour, and is the wider the larger its score. Of a large circuit the largest edges are drawn, and the
rest are arcs from layer to layer on the right.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, PathPatch
from matplotlib.path import Path
from torch import Tensor

from patchkit.report._canvas import style
from patchkit.report._circuit_key import BUNDLES, KEY_HEIGHT, Bundle, bundles, draw_bundles, draw_key
from patchkit.report._circuit_layout import (
    DASHED,
    DOTTED,
    INSIDE,
    KIND_ROLE,
    Box,
    Curve,
    Drawn,
    Layout,
    choose,
    lay_out,
)
from patchkit.report._html import count
from patchkit.report._palette import LIGHT
from patchkit.results.circuit import Circuit

#: Edges of a picture; of a larger circuit only the largest.
MOST_EDGES = 60

_THINNEST, _THICKEST = 0.6, 4.0
_LEFT, _TOP, _NARROWEST = 0.72, 0.34, 6.4
_BESIDE = 2.3
_STEEPEST = 1.1


@style()
def circuit_figure(
    circuit: Circuit,
    importance: Float[Tensor, "senders receivers"] | None = None,
    *,
    sizes: Float[Tensor, "senders receivers"] | None = None,
    signed: bool = True,
    limit: int = MOST_EDGES,
    what: str = "|score|",
) -> Figure:
    """The circuit in layers.

    Args:
        importance: higher = the edge helps; its sign makes an edge solid or dashed.
        sizes: what widths and the choice of edges go by; |importance| when None, all alike without scores.
        signed: whether the sign means anything (information-flow routes have none).
        limit: most edges drawn one by one.
        what: what the sizes are called in the key.
    """
    drawn, rest = choose(circuit, importance, sizes, limit)
    grouped = bundles(circuit.graph, rest, importance if sizes is None else sizes)
    beyond = sorted({layer for bundle in grouped for layer in bundle.ends(circuit.graph.n_layers)})
    layout = lay_out(circuit, drawn, beyond)
    bottoms = _heights(layout)
    height = bottoms[-1] + layout.rows[-1].height + KEY_HEIGHT + _TOP + 0.1
    width = max(_NARROWEST, _LEFT + layout.width + 0.2) + (_BESIDE if grouped else 0.0)
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, width)
    axes.set_ylim(0, height)
    axes.axis("off")
    middle = (width - (_BESIDE if grouped else 0.0) - _LEFT - layout.width) / 2
    left = _LEFT + max(0.0, middle - 0.1)
    base = [KEY_HEIGHT + bottom for bottom in bottoms]
    _bands(axes, layout, base, width - (_BESIDE if grouped else 0.0))
    largest = max((edge.size for edge in drawn), default=0.0)
    for curve in sorted(layout.curves, key=lambda curve: curve.edge.size):
        axes.add_patch(_edge(curve, layout, base, left, largest))
    for row, bottom in zip(layout.rows, base, strict=True):
        for group in row.groups:
            _group(axes, group, left, bottom, row.height)
    if grouped:
        anchors = _anchors(layout, base)
        draw_bundles(axes, grouped[:BUNDLES], anchors, width - _BESIDE + 0.3, circuit.graph.n_layers)
    axes.text(
        0.16, height - 0.2, _title(circuit, drawn, grouped, what), va="center", size=8.5, color=LIGHT["soft"]
    )
    dead = any(not box.live for row in layout.rows for group in row.groups for box in group if _inner(box))
    draw_key(axes, drawn, signed=signed, dead=dead, scored=largest > 0 and (importance is not None or sizes is not None),
             what=what, width_of=lambda size: _width(size, largest))  # fmt: skip
    return figure


def _inner(box: Box) -> bool:
    return box.kind not in ("input", "logits")


def _title(circuit: Circuit, drawn: Sequence[Drawn], grouped: Sequence[Bundle], what: str) -> str:
    if circuit.is_empty:
        return "The circuit is empty: no edge is in it."
    said = "edge" if len(drawn) == 1 else "edges"
    if not grouped:
        return f"{count(len(drawn))} {said}. Information flows upwards, from the input to the logits."
    rest = circuit.n_edges - len(drawn)
    hidden = max(0, len(grouped) - BUNDLES)
    more = f"; the {count(hidden)} thinnest of its bundles are not drawn" if hidden else ""
    return (
        f"The {count(len(drawn))} {said} with the largest {what} of {count(circuit.n_edges)}. On the right: the other "
        f"{count(rest)}, by layer{more}."
    )


def _heights(layout: Layout) -> list[float]:
    """Where each row begins, from 0: wider jumps between rows need more room."""
    across = [0.0] * len(layout.rows)
    for curve in layout.curves:
        for place, (x, following) in enumerate(zip(curve.xs, curve.xs[1:], strict=False)):
            across[curve.start + place] = max(across[curve.start + place], abs(following - x))
    bottoms = [0.0]
    for place, row in enumerate(layout.rows[:-1]):
        bare = not row.groups or not layout.rows[place + 1].groups
        room = min(0.8, max(0.1 if bare else 0.27, 0.24 + 0.16 * across[place]))
        bottoms.append(bottoms[-1] + row.height + room)
    return bottoms


def _anchors(layout: Layout, base: Sequence[float]) -> dict[int, float]:
    """The height of every layer, for the arcs."""
    spans: dict[int, tuple[float, float]] = {}
    for row, bottom in zip(layout.rows, base, strict=True):
        low, _ = spans.get(row.layer, (bottom, 0.0))
        spans[row.layer] = (low, bottom + row.height)
    return {layer: (low + high) / 2 for layer, (low, high) in spans.items()}


def _bands(axes: Axes, layout: Layout, base: Sequence[float], right: float) -> None:
    """A light band behind each layer, and its number on the left."""
    spans: dict[int, tuple[float, float]] = {}
    last = layout.rows[-1].layer
    for row, bottom in zip(layout.rows, base, strict=True):
        if -1 < row.layer < last:
            low, _ = spans.get(row.layer, (bottom, 0.0))
            spans[row.layer] = (low, bottom + row.height)
    for layer, (low, high) in spans.items():
        axes.add_patch(
            FancyBboxPatch(
                (0.16, low - 0.04),
                right - 0.26,
                high - low + 0.08,
                boxstyle="round,pad=0,rounding_size=0.06",
                fc=LIGHT["grid"],
                ec="none",
                alpha=0.55,
                zorder=0,
            )
        )
        axes.text(0.22, (low + high) / 2, f"layer {layer}", va="center", size=7.5, color=LIGHT["soft"])


def _width(size: float, largest: float) -> float:
    return _THINNEST + (_THICKEST - _THINNEST) * (size / largest if largest else 0.0)


def _edge(curve: Curve, layout: Layout, base: Sequence[float], left: float, largest: float) -> PathPatch:
    """An edge as a smooth path, upright where it leaves and where it arrives."""
    last = len(curve.xs) - 1
    knots = []
    for place, x in enumerate(curve.xs):
        row = curve.start + place
        height = layout.rows[row].height
        knots.append((left + x, base[row] + (height if place == 0 else 0.0 if place == last else height / 2)))
    edge = curve.edge
    return PathPatch(
        smooth_path(knots), fc="none", ec=LIGHT[KIND_ROLE[edge.letter]], lw=_width(edge.size, largest), alpha=0.8,
        ls="-" if edge.helps else DASHED, zorder=1, gid=f"{edge.sender}-{edge.receiver}",
    )  # fmt: skip


def smooth_path(knots: Sequence[tuple[float, float]]) -> Path:
    """A curve through knots of rising y, upright at both ends, that never swings out beyond two knots in a row."""
    steps = [(b[0] - a[0]) / (b[1] - a[1]) for a, b in zip(knots, knots[1:], strict=False)]
    # Fritsch and Butland's slopes: the harmonic mean, and none at a turn, keep a cubic between its knots.
    inner = [
        _limited(2 * p * q / (p + q)) if p * q > 0 else 0.0 for p, q in zip(steps, steps[1:], strict=False)
    ]
    slopes = [0.0, *inner, 0.0]
    points, codes = [knots[0]], [int(Path.MOVETO)]
    for (start, begin), (end, finish) in zip(
        zip(knots, slopes, strict=True), zip(knots[1:], slopes[1:], strict=True), strict=False
    ):
        # Upright ends hold on for longer, so that an edge is seen to enter its box.
        rise = end[1] - start[1]
        first, second = (rise / 2 if slope == 0.0 else rise / 3 for slope in (begin, finish))
        points += [
            (start[0] + begin * first, start[1] + first),
            (end[0] - finish * second, end[1] - second),
            end,
        ]
        codes += [int(Path.CURVE4)] * 3
    return Path(points, codes)


def _limited(slope: float) -> float:
    """A slope at which a curve keeps to its lane between two boxes."""
    return max(-_STEEPEST, min(_STEEPEST, slope))


def _group(axes: Axes, group: Sequence[Box], left: float, bottom: float, height: float) -> None:
    """Boxes that share a row's place; heads that share a key and a value are framed together."""
    if len(group) > 1:
        first, last = group[0], group[-1]
        start = left + first.x - first.width / 2 - INSIDE
        wide = last.x + last.width / 2 - first.x + first.width / 2 + 2 * INSIDE
        axes.add_patch(
            FancyBboxPatch(
                (start, bottom - INSIDE),
                wide,
                height + 2 * INSIDE,
                boxstyle="round,pad=0,rounding_size=0.08",
                fc=LIGHT["panel"],
                ec=LIGHT["line"],
                lw=0.8,
                zorder=2,
            )
        )
    for box in group:
        _box(axes, box, left + box.x, bottom)


def _box(axes: Axes, box: Box, x: float, bottom: float) -> None:
    inner = _inner(box)
    faded = inner and not box.live
    fill = LIGHT["panel"] if box.kind in ("head", "kv") else LIGHT["grid"]
    round_by = 0.1 if inner and box.kind != "mlp" else 0.02 if inner else 0.12
    axes.add_patch(
        FancyBboxPatch(
            (x - box.width / 2, bottom), box.width, box.height, boxstyle=f"round,pad=0,rounding_size={round_by}",
            fc=fill, ec=LIGHT["soft"], lw=0.9, ls=DOTTED if faded else "-", zorder=3,
        )
    )  # fmt: skip
    middle = bottom + box.height * (0.66 if box.ports else 0.5)
    # A box of keys and values stands beside its queries: the layer is said by them and by the band.
    text = box.name.partition(".")[2] if box.kind == "kv" else box.name
    axes.text(x, middle, text, ha="center", va="center", size=7.5, zorder=4, weight="normal" if inner else "bold",
              color=LIGHT["soft"] if faded or box.kind == "kv" else LIGHT["ink"])  # fmt: skip
    for letter, offset in box.ports.items():
        axes.text(x + offset, bottom + 0.085, letter, ha="center", va="center", size=7, weight="bold", zorder=4,
                  color=LIGHT[KIND_ROLE[letter]])  # fmt: skip
