"""The layered picture of a circuit: every edge arrives where it should, nothing overlaps, large circuits stay small."""

from __future__ import annotations

import re
import time
from itertools import combinations

import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, PathPatch

from patchkit.model.edges import EdgeGraph
from patchkit.report._canvas import to_png, to_svg
from patchkit.report._circuit_key import BUNDLES, bundles
from patchkit.report._circuit_layout import DOTTED, Layout, choose, lay_out, letter_of
from patchkit.report._circuit_plot import MOST_EDGES, circuit_figure, smooth_path
from patchkit.report._largest import largest
from patchkit.report._layers import Item, Link, arrange
from patchkit.report._palette import LIGHT
from patchkit.results.circuit import Circuit, top_n

NAN = float("nan")
GRAPHS = {
    "plain": EdgeGraph(4, 6, 6, False, 64),
    "grouped": EdgeGraph(4, 6, 2, False, 64),
    "parallel": EdgeGraph(4, 6, 6, True, 64),
}


def scores_of(graph: EdgeGraph, seed: int = 0) -> torch.Tensor:
    """Importances of both signs, a few nodes much larger than the rest; NaN where there is no edge."""
    generator = torch.Generator().manual_seed(seed)
    sender = torch.rand(graph.n_senders, 1, generator=generator) ** 4
    receiver = torch.rand(graph.n_receivers, generator=generator) ** 4
    noise = torch.randn(graph.n_senders, graph.n_receivers, generator=generator)
    return ((noise + 0.5) * sender * receiver).masked_fill(~graph.real, NAN)


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def curves(figure: Figure) -> dict[str, PathPatch]:
    """Paths of edges by their number, `sender-receiver`."""
    found = [patch for patch in figure.axes[0].patches if isinstance(patch, PathPatch) and patch.get_gid()]
    return {str(patch.get_gid()): patch for patch in found}


def laid_out(graph: EdgeGraph, n: int) -> Layout:
    circuit = top_n(graph, scores_of(graph), n, absolute=True)
    drawn, _ = choose(circuit, scores_of(graph), None, n)
    return lay_out(circuit, drawn)


@pytest.mark.parametrize("name", GRAPHS)
def test_every_edge_is_drawn_from_its_sender_to_its_port(name: str) -> None:
    graph = GRAPHS[name]
    layout = laid_out(graph, 40)
    box_of = {
        box.name: (row, box) for row, line in enumerate(layout.rows) for group in line.groups for box in group
    }
    assert len(layout.curves) == 40
    for curve in layout.curves:
        edge = curve.edge
        row, box = box_of[graph.sender_name(edge.sender)]
        assert curve.start == row
        assert abs(curve.xs[0] - box.x) <= (box.width / 2 if box.kind == "input" else 1e-9)
        end = graph.receiver_name(edge.receiver).partition("<")[0]
        if edge.letter in ("k", "v") and not graph.by_query_head:
            end = end.replace("h", "kv")
        row, box = box_of[end]
        assert curve.end == row > curve.start
        assert letter_of(graph, edge.receiver) == edge.letter
        wanted = box.x + box.ports.get(edge.letter, 0.0)
        assert abs(curve.xs[-1] - wanted) <= (box.width / 2 if box.kind == "logits" else 1e-9)
        assert len(curve.xs) == curve.end - curve.start + 1
        if edge.letter:
            assert edge.letter in box.ports and abs(box.ports[edge.letter]) < box.width / 2


@pytest.mark.parametrize("name", GRAPHS)
def test_boxes_of_a_row_do_not_overlap_and_lanes_go_round_them(name: str) -> None:
    layout = laid_out(GRAPHS[name], 60)
    for place, row in enumerate(layout.rows):
        boxes = [box for group in row.groups for box in group]
        for one, two in combinations(boxes, 2):
            assert abs(one.x - two.x) >= (one.width + two.width) / 2 - 1e-6
        lanes = [c.xs[place - c.start] for c in layout.curves if c.start < place < c.end]
        for box in boxes:
            assert all(abs(x - box.x) > box.width / 2 for x in lanes)
        assert all(-1e-6 <= box.x - box.width / 2 and box.x + box.width / 2 <= layout.width for box in boxes)


def test_layers_rise_and_the_mlp_stands_above_its_heads() -> None:
    layers = [row.layer for row in laid_out(GRAPHS["plain"], 60).rows]
    assert layers == sorted(layers) and layers[0] == -1 and layers[-1] == 4
    for name, above in (("plain", True), ("parallel", False)):
        kinds = [
            {box.kind for group in row.groups for box in group} for row in laid_out(GRAPHS[name], 60).rows
        ]
        assert any({"head", "mlp"} <= kind for kind in kinds) != above


def test_heads_that_share_a_key_stand_beside_it() -> None:
    layout = laid_out(GRAPHS["grouped"], 60)
    groups = [[box.name for box in group] for row in layout.rows for group in row.groups]
    shared = [group for group in groups if any("kv" in name for name in group)]
    assert shared
    for group in shared:
        place = int(group[0].partition("kv")[2])
        assert all(int(name.partition("h")[2]) // 3 == place for name in group[1:])
    named = texts(circuit_figure(top_n(GRAPHS["grouped"], scores_of(GRAPHS["grouped"]), 60, absolute=True)))
    assert any(name.startswith("kv") for name in named)


def test_a_circuit_that_can_be_drawn_without_crossings_is() -> None:
    # Two ladders whose rungs are numbered crosswise.
    items = [Item(row, 0.5) for row in range(4) for _ in range(3)]
    links = [
        Link(3 * row + i, 3 * (row + 1) + (2 - i if row % 2 else (i + 1) % 3))
        for row in range(3)
        for i in range(3)
    ]
    assert arrange(items, links, 4).crossings == 0
    crossed = [Link(0, 4), Link(0, 5), Link(1, 4), Link(1, 5)]
    assert arrange([Item(0, 0.5)] * 3 + [Item(1, 0.5)] * 3, crossed, 2).crossings == 1


def test_links_that_pass_a_row_get_a_lane_in_it() -> None:
    found = arrange([Item(0, 0.5), Item(1, 0.5), Item(2, 0.5)], [Link(0, 1), Link(1, 2), Link(0, 2)], 3)
    assert [len(lanes) for lanes in found.lanes] == [0, 0, 1]
    assert abs(found.lanes[2][0] - found.middles[1]) > 0.25


def test_a_curve_stays_between_its_knots() -> None:
    knots = [(0.0, 0.0), (1.0, 1.0), (1.1, 2.0), (0.4, 3.0)]
    path = smooth_path(knots)
    vertices = path.interpolated(40).vertices
    assert vertices[:, 0].min() >= -1e-9 and vertices[:, 0].max() <= 1.1 + 1e-9
    assert tuple(path.vertices[0]) == knots[0] and tuple(path.vertices[-1]) == knots[-1]
    # Upright where it leaves and arrives.
    assert path.vertices[1][0] == 0.0 and path.vertices[-2][0] == 0.4


def test_colour_dash_and_width_say_kind_sign_and_size() -> None:
    graph = GRAPHS["plain"]
    importance = torch.zeros(graph.n_senders, graph.n_receivers).masked_fill(~graph.real, NAN)
    named = {"input->a0.h1<q>": 1.0, "input->a0.h2<k>": -4.0, "a0.h1->a1.h0<v>": 2.0, "a1.h0->logits": 3.0}
    for name, value in named.items():
        importance[graph.find_edge(name)] = value
    figure = circuit_figure(Circuit.of_names(graph, named), importance)
    drawn = curves(figure)
    looks = {}
    for name in named:
        patch = drawn["{}-{}".format(*graph.find_edge(name))]
        red, green, blue, _ = patch.get_edgecolor()
        colour = f"#{round(255 * red):02x}{round(255 * green):02x}{round(255 * blue):02x}"
        looks[name] = (colour, patch.get_linestyle() != "-", patch.get_linewidth())
    assert [looks[name][0] for name in named] == [LIGHT[role] for role in ("s2", "s3", "s4", "s5")]
    assert [looks[name][1] for name in named] == [False, True, False, False]
    widths = [looks[name][2] for name in named]
    assert sorted(widths) == [widths[0], widths[2], widths[3], widths[1]]
    said = " ".join(texts(figure))
    for words in ("into a query", "into a key", "into a value", "into an MLP or the logits", "helps",
                  "works against it", "|score| 1.00", "4.00"):  # fmt: skip
        assert words in said
    unsigned = " ".join(texts(circuit_figure(Circuit.of_names(graph, named), importance.abs(), signed=False)))
    assert "helps" not in unsigned and "works against" not in unsigned


def test_dead_ends_are_dotted() -> None:
    graph = GRAPHS["plain"]
    names = ["input->a0.h1<q>", "a0.h1->logits", "a0.h2->a1.h3<k>"]
    figure = circuit_figure(Circuit.of_names(graph, names))
    boxes = [patch for patch in figure.axes[0].patches if isinstance(patch, FancyBboxPatch)]
    dotted = [box for box in boxes if box.get_linestyle() == DOTTED]
    # Two boxes and the sample of the key.
    assert len(dotted) == 3
    assert "on no path from the input to the logits" in texts(figure)
    assert "on no path" not in " ".join(texts(circuit_figure(Circuit.of_names(graph, names[:2]))))


def test_a_large_circuit_draws_its_largest_edges_and_bundles_the_rest() -> None:
    graph = EdgeGraph(6, 8, 8, False, 64)
    importance = scores_of(graph)
    circuit = top_n(graph, importance, 900, absolute=True)
    figure = circuit_figure(circuit, importance)
    assert len(curves(figure)) == MOST_EDGES
    said = texts(figure)
    assert any(
        f"The {MOST_EDGES} edges with the largest |score| of 900. On the right: the other 840" in one
        for one in said
    )
    drawn, rest = choose(circuit, importance, None, MOST_EDGES)
    assert min(edge.size for edge in drawn) >= float(importance[rest].abs().max())
    grouped = bundles(graph, rest, importance)
    assert sum(bundle.edges for bundle in grouped) == 840 == int(rest.sum())
    assert sum(bundle.size for bundle in grouped) == pytest.approx(
        float(importance[rest].double().abs().sum())
    )
    assert [bundle.size for bundle in grouped] == sorted((bundle.size for bundle in grouped), reverse=True)
    slow: dict[tuple[int, int], int] = {}
    for sender, receiver in rest.nonzero().tolist():
        key = (graph.layer_of_sender(sender), graph.layer_of_receiver(receiver))
        slow[key] = slow.get(key, 0) + 1
    assert {(bundle.start, bundle.end): bundle.edges for bundle in grouped} == slow


def test_pictures_of_the_same_circuit_are_the_same_bytes() -> None:
    graph = GRAPHS["grouped"]
    circuit = top_n(graph, scores_of(graph), 300, absolute=True)
    one, two = (circuit_figure(circuit, scores_of(graph)) for _ in range(2))
    assert to_svg(one, "alt", "x") == to_svg(two, "alt", "x")
    assert to_png(one, 50) == to_png(two, 50)
    assert "var(--s2)" in to_svg(one, "alt", "x") and "$" not in to_svg(one, "alt", "x")


def test_empty_circuits_and_edges_without_a_score() -> None:
    graph = GRAPHS["plain"]
    empty = circuit_figure(Circuit.empty(graph), scores_of(graph))
    assert "The circuit is empty: no edge is in it." in texts(empty)
    assert {"input", "logits"} <= set(texts(empty)) and curves(empty) == {}
    unscored = torch.full((graph.n_senders, graph.n_receivers), NAN)
    figure = circuit_figure(Circuit.of_names(graph, ["input->m0", "m0->logits"]), unscored)
    assert len(curves(figure)) == 2
    assert to_png(figure, 40).startswith(b"\x89PNG")


def test_a_model_of_eight_billion_is_drawn_in_seconds() -> None:
    graph = EdgeGraph(32, 32, 32, False, 4096)
    assert graph.n_edges == 1_592_881
    importance = scores_of(graph)
    circuit = Circuit(graph, graph.real.clone())
    started = time.process_time()
    figure = circuit_figure(circuit, importance)
    svg = to_svg(figure, "alt", "big")
    assert time.process_time() - started < 5
    assert len(curves(figure)) == MOST_EDGES and len(svg) < 400_000
    said = " ".join(texts(figure))
    assert f"of 1,592,881. On the right: the other {1_592_881 - MOST_EDGES:,}" in said
    assert re.search(r"the \d+ thinnest of its bundles are not drawn", said)
    arcs = [p for p in figure.axes[0].patches if isinstance(p, PathPatch) and not p.get_gid()]
    assert len(arcs) == BUNDLES


def test_the_largest_of_many_are_those_of_a_full_sort() -> None:
    values = torch.tensor([1.0, NAN, 3.0, 3.0, -2.0, 3.0, 0.0, float("-inf")])
    assert largest(values, 4).tolist() == [2, 3, 5, 0]
    assert largest(values, 2).tolist() == [2, 3]
    assert largest(values, 99).tolist() == [2, 3, 5, 0, 6, 4]
    assert largest(values, 0).tolist() == [] and largest(torch.tensor([NAN]), 3).tolist() == []
