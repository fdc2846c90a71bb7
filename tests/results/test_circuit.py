"""Circuits against sets of names: selection, pruning, taking away, and both graphs of grouped heads."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from patchkit.errors import InputError, RunError
from patchkit.model import EdgeGraph
from patchkit.results import _circuit_files
from patchkit.results.circuit import SELECTIONS, Circuit, greedy, threshold, top_n
from patchkit.results.formats import save_tensors

FIXTURE = Path(__file__).resolve().parent.parent / "fixtures" / "graph_files"
GRAPHS = {
    "sequential": EdgeGraph(3, 2, 2, False, 4),
    "parallel": EdgeGraph(3, 2, 2, True, 4),
    "grouped": EdgeGraph(2, 4, 2, False, 8),
    "grouped-parallel": EdgeGraph(2, 4, 1, True, 8),
    "one-layer": EdgeGraph(1, 1, 1, False, 2),
}
NAN = float("nan")


# Everything again, with sets of names.


def parts(receiver: str) -> tuple[str, int | None]:
    """(`m2`, None) or (`a1`, 3) of a receiver."""
    match = re.fullmatch(r"(a\d+)\.h(\d+)<[qkv]>", receiver)
    return (match[1], int(match[2])) if match else (receiver, None)


def owners(graph: EdgeGraph, receiver: str) -> set[str]:
    """The senders whose input a receiver is."""
    block, head = parts(receiver)
    if receiver == "logits":
        return set()
    if head is None:
        return {receiver}
    if receiver.endswith("<q>"):
        return {f"{block}.h{head}"}
    group = graph.n_heads // graph.n_kv_heads
    return {f"{block}.h{group * head + each}" for each in range(group)}


def naive_prune(graph: EdgeGraph, names: set[str]) -> set[str]:
    """Edges that lie on a path from the input to the logits, found by walking both ways along edges."""
    ends = [tuple(name.split("->")) for name in names]
    reached = {"input"}
    while True:
        more = {owner for u, v in ends if u in reached for owner in owners(graph, v)} - reached
        if not more:
            break
        reached |= more
    leads: set[str] = set()
    while True:
        more = {u for u, v in ends if v == "logits" or owners(graph, v) & leads} - leads
        if not more:
            break
        leads |= more
    good = reached & (leads | {"input"})
    return {
        f"{u}->{v}"
        for u, v in ends
        if u in good and u in leads and (v == "logits" or owners(graph, v) & good & leads)
    }


def edges_of(graph: EdgeGraph, flags: list[bool]) -> Circuit:
    edges = torch.zeros_like(graph.real)
    edges[graph.real] = torch.tensor(flags)
    return Circuit(graph, edges)


@functools.cache
def names_of(graph: EdgeGraph) -> list[str]:
    return Circuit.full(graph).names()


@st.composite
def circuits(draw: st.DrawFn) -> tuple[str, list[bool]]:
    """A graph's name and which of its edges are in; sparse ones have the most to prune."""
    name = draw(st.sampled_from(sorted(GRAPHS)))
    count = GRAPHS[name].n_edges
    if draw(st.booleans()):
        chosen = draw(st.sets(st.integers(0, count - 1), max_size=12))
        return name, [number in chosen for number in range(count)]
    return name, draw(st.lists(st.booleans(), min_size=count, max_size=count))


@settings(deadline=None, max_examples=120)
@given(circuits())
def test_pruning_keeps_what_lies_on_a_path(drawn: tuple[str, list[bool]]) -> None:
    graph = GRAPHS[drawn[0]]
    circuit = edges_of(graph, drawn[1])
    pruned = circuit.pruned()
    assert set(pruned.names()) == naive_prune(graph, set(circuit.names()))
    assert torch.equal(pruned.pruned().edges, pruned.edges)
    assert not (pruned.edges & ~circuit.edges).any()
    assert pruned.is_empty == (pruned.n_edges == 0)


def test_pruning_goes_on_to_a_fixed_point() -> None:
    """Each step uncovers the next dead end, from both ends of a chain through all layers."""
    graph = GRAPHS["sequential"]
    chain = ["input->m0", "m0->a1.h0<v>", "a1.h0->m1", "m1->a2.h1<q>", "a2.h1->m2", "m2->logits"]
    assert Circuit.of_names(graph, chain).pruned().n_edges == 6
    for gone in range(6):
        broken = [name for number, name in enumerate(chain) if number != gone]
        assert Circuit.of_names(graph, broken).pruned().is_empty
    aside = ["a0.h0->logits", "input->a2.h0<k>", "m0->a2.h0<k>"]
    assert set(Circuit.of_names(graph, chain + aside).pruned().names()) == set(chain)


def test_an_edge_into_a_shared_key_needs_one_head_of_the_group() -> None:
    graph = GRAPHS["grouped"]
    shared = ["input->a0.h1<k>", "a0.h3->logits"]
    # KV head 1 is that of heads 2 and 3.
    assert Circuit.of_names(graph, shared).pruned().n_edges == 2
    assert Circuit.of_names(graph, ["input->a0.h0<k>", "a0.h3->logits"]).pruned().is_empty


def test_a_head_is_kept_by_any_of_its_three_inputs() -> None:
    for letter in "qkv":
        found = Circuit.of_names(GRAPHS["parallel"], [f"input->a1.h0<{letter}>", "a1.h0->logits"])
        assert found.pruned().n_edges == 2 and found.node_names == ["input", "a1.h0"]


# Selection.


@st.composite
def scored(draw: st.DrawFn) -> tuple[str, list[int], int, bool]:
    """Few different scores, so that there are many ties."""
    name = draw(st.sampled_from(sorted(GRAPHS)))
    count = GRAPHS[name].n_edges
    scores = draw(st.lists(st.integers(-4, 4), min_size=count, max_size=count))
    return name, scores, draw(st.integers(0, count)), draw(st.booleans())


def matrix(graph: EdgeGraph, scores: list[int]) -> Tensor:
    importance = torch.full(graph.real.shape, NAN)
    importance[graph.real] = torch.tensor(scores, dtype=torch.float32)
    return importance


def naive_greedy(graph: EdgeGraph, keys: dict[str, float], n: int) -> set[str]:
    """Always the best edge into what is in; of equal ones the first sender's, then the first receiver's."""
    senders, receivers = list(graph.senders), list(graph.receivers)
    inside, chosen = set[str](), set[str]()
    for _ in range(n):
        open_edges = []
        for name, key in keys.items():
            start, end = name.split("->")
            if name not in chosen and (end == "logits" or owners(graph, end) & inside):
                open_edges.append((-key, senders.index(start), receivers.index(end), name))
        best = min(open_edges)[3]
        chosen.add(best)
        inside.add(best.split("->")[0])
    return chosen


@settings(deadline=None, max_examples=40)
@given(scored())
def test_selections_are_those_of_sorted_names(drawn: tuple[str, list[int], int, bool]) -> None:
    name, scores, n, absolute = drawn
    graph = GRAPHS[name]
    importance = matrix(graph, scores)
    keys = {
        edge: abs(score) if absolute else score for edge, score in zip(names_of(graph), scores, strict=True)
    }
    ranked = sorted(keys, key=lambda edge: -keys[edge])
    top = top_n(graph, importance, n, absolute=absolute)
    assert set(top.names()) == set(ranked[:n]) and top.requested == top.n_edges == n
    back = greedy(graph, importance, n, absolute=absolute)
    assert set(back.names()) == naive_greedy(graph, keys, n) and back.requested == back.n_edges == n
    # From the logits backwards: everything chosen leads there.
    leads = {"logits"} | {edge.split("->")[0] for edge in back.names()}
    assert all(owners(graph, e.split("->")[1]) & leads or e.endswith("->logits") for e in back.names())
    limit = threshold(graph, importance, 2.0, absolute=absolute)
    assert set(limit.names()) == {edge for edge, key in keys.items() if key >= 2}
    assert limit.requested == limit.n_edges


@functools.cache
def published() -> list[dict[str, Any]]:
    return json.loads((FIXTURE / "selections.json").read_text(encoding="utf-8"))


def unpacked(text: str, shape: torch.Size | tuple[int, ...]) -> Tensor:
    count = torch.Size(shape).numel()
    return torch.tensor([digit == "1" for digit in f"{int(text, 16):0{count}b}"]).reshape(shape)


@pytest.mark.parametrize("name", ["sequential", "parallel"])
def test_selections_are_those_of_the_eap_ig_repository(name: str) -> None:
    graph = EdgeGraph(3, 2, 2, name == "parallel", 3)
    mine = [entry for entry in published() if entry["graph"] == name]
    known = next(entry for entry in mine if entry["how"] == "scores")
    importance = torch.tensor(known["edges"]) / 1024
    nodes = torch.tensor([NAN if score is None else score for score in known["nodes"]])
    compared = 0
    for entry in mine:
        if entry["how"] == "scores":
            continue
        amount, absolute = entry["amount"], entry["absolute"]
        if entry["how"] == "nodes":
            keys = (nodes.abs() if absolute else nodes).nan_to_num(torch.inf)
            # What has no score stays in: the input.
            kept = torch.zeros(graph.n_senders, dtype=torch.bool)
            kept[keys.argsort(descending=True)[: amount + 1]] = True
            found = Circuit.of_nodes(graph, kept)
            if not entry["pruned"]:
                # The repository marks all receivers of a node then, chosen or not.
                continue
        elif entry["how"] == "threshold":
            found = threshold(graph, importance, amount, absolute=absolute)
        else:
            found = SELECTIONS["top" if entry["how"] == "topn" else "greedy"](
                graph, importance, amount, absolute=absolute
            )
        if entry["pruned"]:
            found = found.pruned()
            assert torch.equal(found.nodes, unpacked(entry["nodes"], (graph.n_senders,))), entry
        assert torch.equal(found.edges, unpacked(entry["edges"], graph.real.shape) & graph.real), entry
        compared += 1
    # 56 of a number of edges, 12 of a threshold, 8 of nodes.
    assert compared == 76


def test_selections_that_cannot_be_are_refused() -> None:
    graph = GRAPHS["grouped"]
    importance = torch.randn(graph.real.shape).where(graph.real, NAN)
    unscored = importance.clone()
    unscored[graph.find_edge("m0->a1.h1<v>")] = NAN
    infinite = importance.clone()
    infinite[graph.find_edge("m0->logits")] = -torch.inf
    for select in (top_n, greedy):
        for n in (-1, graph.n_edges + 1):
            with pytest.raises(InputError, match=f"{n} edges were asked for; the graph has {graph.n_edges}"):
                select(graph, importance, n, absolute=False)
    for choose in (
        functools.partial(top_n, n=3),
        functools.partial(greedy, n=3),
        functools.partial(threshold, tau=0.0),
    ):
        for wrong, words in (
            (unscored, r"edge m0->a1\.h1<v> has no score \(1 edges have none\)"),
            (infinite, r"edge m0->logits has the score -inf; expected finite numbers"),
            (importance[1:], r"importances of this graph have shape \[11, 19\], found \[10, 19\]"),
        ):
            with pytest.raises(InputError, match=words):
                choose(graph, wrong, absolute=True)


# Nodes.


@settings(deadline=None, max_examples=60)
@given(circuits(), st.sets(st.integers(0, 12)))
def test_circuits_of_nodes_and_without_nodes(drawn: tuple[str, list[bool]], numbers: set[int]) -> None:
    graph = GRAPHS[drawn[0]]
    circuit = edges_of(graph, drawn[1])
    mask = torch.tensor([number in numbers for number in range(graph.n_senders)])
    named = {graph.sender_name(number) for number in mask.nonzero()[:, 0].tolist()}
    among = {
        edge
        for edge in names_of(graph)
        if edge.split("->")[0] in named | {"input"}
        and (edge.endswith("->logits") or owners(graph, edge.split("->")[1]) & named)
    }
    assert set(Circuit.of_nodes(graph, mask).names()) == among
    left = {
        edge
        for edge in circuit.names()
        if edge.split("->")[0] not in named
        and (edge.endswith("->logits") or owners(graph, edge.split("->")[1]) - named)
    }
    assert set(circuit.without(mask).names()) == left


def test_taking_one_head_of_a_group_away_leaves_the_shared_key() -> None:
    graph = GRAPHS["grouped"]
    full = Circuit.full(graph)
    one = torch.tensor([name == "a0.h0" for name in graph.senders])
    both = torch.tensor([name in ("a0.h0", "a0.h1") for name in graph.senders])
    assert "input->a0.h0<k>" in full.without(one).names()
    assert "input->a0.h0<q>" not in full.without(one).names()
    assert "input->a0.h0<k>" not in full.without(both).names()
    assert "input->a0.h1<k>" in full.without(both).names()


# Both graphs of grouped heads.


@settings(deadline=None, max_examples=60)
@given(circuits())
def test_by_query_head_and_back(drawn: tuple[str, list[bool]]) -> None:
    graph = GRAPHS[drawn[0]]
    circuit = edges_of(graph, drawn[1])
    wide = circuit.by_query_head()
    assert wide.graph.by_query_head and wide.graph.n_senders == graph.n_senders
    expected = set()
    for name in circuit.names():
        start, end = name.split("->")
        for owner in sorted(owners(graph, end)) or [end]:
            expected.add(f"{start}->{owner}{end[end.index('<') :] if '<' in end else ''}")
    assert set(wide.names()) == expected
    back = wide.by_kv_head(graph.n_kv_heads)
    assert back.graph == graph and torch.equal(back.edges, circuit.edges)


def test_groups_that_do_not_agree_have_no_native_circuit() -> None:
    wide = EdgeGraph(2, 4, 4, False, 8)
    uneven = Circuit.of_names(wide, ["input->a1.h2<k>", "input->logits"])
    with pytest.raises(
        InputError, match=r"edge input->a1\.h3<k> is not in the circuit, .* found 1 such edges"
    ):
        uneven.by_kv_head(2)
    assert uneven.by_kv_head(4) is uneven


def test_what_was_asked_for_is_not_carried_to_a_graph_that_counts_otherwise() -> None:
    grouped, plain = GRAPHS["grouped"], GRAPHS["parallel"]
    assert Circuit(grouped, grouped.real, 5).by_query_head().requested is None
    assert Circuit(plain, plain.real, 5).by_query_head().requested == 5


def test_circuits_that_are_none_are_refused() -> None:
    graph = GRAPHS["sequential"]
    for edges, words in (
        (torch.ones(3, 4, dtype=torch.bool), r"shape \[10, 22\] .*; found torch.bool of shape \[3, 4\]"),
        (~graph.real, r"edge a0\.h0->a0\.h0<q> is in the circuit, but the graph has no such edge"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=words):
            Circuit(graph, edges)
    with pytest.raises(InputError, match="there is no such edge"):
        Circuit.of_names(graph, ["m2->m1"])
    for use in (functools.partial(Circuit.of_nodes, graph), Circuit.full(graph).without):
        with pytest.raises(InputError, match=r"boolean mask of 10 senders; found torch\.bool of shape \[4\]"):
            use(torch.ones(4, dtype=torch.bool))
    assert Circuit.empty(graph).is_empty and Circuit.full(graph).n_edges == graph.n_edges


# Files.


@pytest.mark.parametrize("named", [0, 20_000])
@pytest.mark.parametrize("name", sorted(GRAPHS))
def test_circuits_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, named: int) -> None:
    monkeypatch.setattr(_circuit_files, "_NAMED", named)
    graph = GRAPHS[name]
    for circuit in (
        Circuit.full(graph),
        Circuit.empty(graph),
        Circuit.of_names(graph, ["input->logits"]),
        top_n(graph, torch.randn(graph.real.shape), graph.n_edges // 2, absolute=True),
    ):
        circuit.save(tmp_path)
        back = Circuit.load(tmp_path)
        assert back.graph == graph and back.requested == circuit.requested
        assert torch.equal(back.edges, circuit.edges)
        assert (tmp_path / "circuit.safetensors").exists() == (circuit.n_edges > named)


def edit(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        path = directory / "circuit.json"
        data = json.loads(path.read_text(encoding="utf-8"))
        change(data)
        path.write_text(json.dumps(data), encoding="utf-8")

    return apply


def masked(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        edit(lambda data: data.update(edges=None))(directory)
        graph = GRAPHS["grouped"]
        found = {"in_circuit": graph.find_edges(["input->logits", "input->m0"])}
        change(found)
        save_tensors(directory / "circuit.safetensors", found)

    return apply


def test_a_file_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="a file is where a directory should be"):
        Circuit.empty(GRAPHS["grouped"]).save(tmp_path / "file")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda d: (d / "circuit.json").unlink(), r"circuit\.json: no such file"),
        (lambda d: (d / "circuit.json").write_text("{"), r"circuit\.json, line 1"),
        (edit(lambda data: data.pop("edges")), r"field edges"),
        (edit(lambda data: data.update(n_edges=3)), r"n_edges: expected 2, as many as are named, found 3"),
        (edit(lambda data: data.update(requested=-1)), r"field requested"),
        (edit(lambda data: data["edges"].append("m1->m0")), r"circuit\.json: edge 'm1->m0': m1 is not upstream"),
        (edit(lambda data: data["edges"].append("m9->logits")), r"circuit\.json: sender 'm9'"),
        (edit(lambda data: data["edges"].append(3)), r"field edges\.2"),
        (edit(lambda data: data["graph"].update(n_kv_heads=3)), r"multiple of n_kv_heads, found 4 and 3"),
        (edit(lambda data: data["graph"].update(n_layers=10**9)), r"expected the sizes of a model"),
        (edit(lambda data: data.update(edges=None)), r"circuit\.safetensors: no such file"),
        (masked(lambda found: found.pop("in_circuit")), r"no tensor 'in_circuit', found none"),
        (masked(lambda found: found.update(in_circuit=torch.zeros(3, 3).bool())), r"found torch\.bool of shape \[3, 3\]"),
        (masked(lambda found: found["in_circuit"].fill_(True)), r"'in_circuit': there is no edge"),
        (masked(lambda found: found["in_circuit"].fill_(False)), r"expected 0, as many as are named, found 2"),
    ],
)  # fmt: skip
def test_damaged_circuits_are_refused_in_one_line(
    tmp_path: Path, damage: Callable[[Path], Any], words: str
) -> None:
    Circuit.of_names(GRAPHS["grouped"], ["input->logits", "input->m0"]).save(tmp_path)
    damage(tmp_path)
    with pytest.raises(InputError, match=words) as caught:
        Circuit.load(tmp_path)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)
