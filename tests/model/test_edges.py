"""The graph of edges: published counts from sizes alone, names both ways, and what is upstream of what, by loops."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patchkit.errors import InputError
from patchkit.model import Dims, EdgeGraph

#: (layers, heads, parallel): senders, edges; keys and values by query head.
COUNTS = {
    "GPT-2 small": (12, 12, False, 157, 32_491),
    "GPT-2 medium": (24, 16, False, 409, 231_877),
    "GPT-2 large": (36, 20, False, 757, 810_703),
    "GPT-2 XL": (48, 25, False, 1249, 2_235_025),
    "Qwen2.5-0.5B": (24, 14, False, 361, 179_749),
    "Gemma-2-2B": (26, 8, False, 235, 74_218),
    "Llama-3.1-8B": (32, 32, False, 1057, 1_592_881),
    "Llama-13B": (40, 40, False, 1641, 3_877_661),
    "Pythia-2.8B": (32, 32, True, 1057, 1_591_857),
    "InterpBench IOI": (6, 4, False, 31, 1_108),
}


def dims(layers: int, heads: int, kv_heads: int, parallel: bool) -> Dims:
    return Dims(layers, heads, kv_heads, 4, 4 * heads, 7, 50, parallel)


@pytest.mark.parametrize("model", list(COUNTS))
def test_counts_are_the_published_ones(model: str) -> None:
    layers, heads, parallel, senders, edges = COUNTS[model]
    graph = EdgeGraph.of(dims(layers, heads, heads, parallel))
    assert (graph.n_senders, graph.n_edges) == (senders, edges)
    assert int(graph.real.sum()) == edges


def test_counts_by_query_head_are_those_of_grouped_models_too() -> None:
    grouped = dims(32, 32, 8, False)
    assert EdgeGraph.of(grouped, by_query_head=True).n_edges == 1_592_881
    native = EdgeGraph.of(grouped)
    assert not native.by_query_head and native.n_senders == 1057
    # 48 receivers of queries, keys and values a layer instead of 96.
    before = [1 + layer * 33 for layer in range(32)]
    assert native.n_edges == sum(48 * b + b + 32 for b in before) + 1057
    assert native.n_edges == int(native.real.sum())


sizes = st.tuples(
    st.integers(1, 4),
    st.sampled_from([(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (6, 3), (5, 5)]),
    st.booleans(),
)


def graph_of(drawn: tuple[int, tuple[int, int], bool]) -> EdgeGraph:
    layers, (heads, kv_heads), parallel = drawn
    return EdgeGraph.of(dims(layers, heads, kv_heads, parallel))


def by_loops(graph: EdgeGraph) -> tuple[list[str], list[str], set[tuple[str, str]]]:
    """(senders, receivers, edges) in the order that a forward pass meets them."""
    senders, receivers = ["input"], []
    edges = set()
    for layer in range(graph.n_layers):
        read = list(senders)
        inputs = [f"a{layer}.h{head}<q>" for head in range(graph.n_heads)]
        inputs += [f"a{layer}.h{head}<{letter}>" for letter in "kv" for head in range(graph.n_kv_heads)]
        heads = [f"a{layer}.h{head}" for head in range(graph.n_heads)]
        edges |= {(sender, receiver) for sender in read for receiver in inputs}
        if not graph.parallel:
            read += heads
        edges |= {(sender, f"m{layer}") for sender in read}
        senders += [*heads, f"m{layer}"]
        receivers += [*inputs, f"m{layer}"]
    return senders, [*receivers, "logits"], edges | {(sender, "logits") for sender in senders}


@settings(deadline=None)
@given(sizes)
def test_order_and_edges_are_those_of_a_loop_over_the_forward_pass(
    drawn: tuple[int, tuple[int, int], bool],
) -> None:
    graph = graph_of(drawn)
    senders, receivers, edges = by_loops(graph)
    assert list(graph.senders) == senders and list(graph.receivers) == receivers
    assert (graph.n_senders, graph.n_receivers, graph.n_edges) == (len(senders), len(receivers), len(edges))
    found = {(senders[sender], receivers[receiver]) for sender, receiver in graph.real.nonzero().tolist()}
    assert found == edges
    for receiver, name in enumerate(receivers):
        above = [sender for sender in senders if (sender, name) in edges]
        assert above == senders[: int(graph.upstream[receiver])]


@settings(deadline=None, max_examples=25)
@given(sizes)
def test_names_come_back(drawn: tuple[int, tuple[int, int], bool]) -> None:
    graph = graph_of(drawn)
    for sender, name in enumerate(graph.senders):
        assert graph.find_sender(name) == sender
    for receiver, name in enumerate(graph.receivers):
        assert graph.find_receiver(name) == receiver
    edges = graph.real.nonzero().tolist()
    names = [graph.edge_name(*edge) for edge in edges]
    assert len(set(names)) == len(names)
    for name, edge in list(zip(names, edges, strict=True))[::7]:
        assert list(graph.find_edge(name)) == edge
    assert torch.equal(graph.find_edges(names), graph.real)
    assert not graph.find_edges([]).any()


@settings(deadline=None)
@given(sizes)
def test_parts_of_a_layer_are_where_their_names_are(drawn: tuple[int, tuple[int, int], bool]) -> None:
    graph = graph_of(drawn)
    group = graph.n_heads // graph.n_kv_heads
    for layer in range(graph.n_layers):
        heads = [f"a{layer}.h{head}" for head in range(graph.n_heads)]
        assert list(graph.senders[graph.heads(layer)]) == heads
        assert (
            graph.senders[graph.mlp_sender(layer)]
            == f"m{layer}"
            == graph.receivers[graph.mlp_receiver(layer)]
        )
        attention: list[str] = []
        for letter in "qkv":
            count = graph.n_heads if letter == "q" else graph.n_kv_heads
            attention += [f"a{layer}.h{head}<{letter}>" for head in range(count)]
            assert list(graph.receivers[graph.receivers_of(layer, letter)]) == attention[-count:]
        assert list(graph.receivers[graph.attention_receivers(layer)]) == attention
    for sender, name in enumerate(graph.senders):
        expected: set[str] = set()
        if name.startswith("m"):
            expected = {name}
        elif name != "input":
            block, head = name.split(".h")
            expected = {
                f"{block}.h{head}<q>",
                *(f"{block}.h{int(head) // group}<{letter}>" for letter in "kv"),
            }
        owned = graph.owner[sender].nonzero()[:, 0].tolist()
        assert {graph.receivers[receiver] for receiver in owned} == expected
        assert graph.layer_of_sender(sender) == (-1 if name == "input" else int(name[1:].split(".")[0]))
    for receiver, name in enumerate(graph.receivers):
        layer = graph.n_layers if name == "logits" else int(name[1:].split(".")[0])
        assert graph.layer_of_receiver(receiver) == layer


GROUPED = EdgeGraph.of(dims(3, 4, 2, False))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a0.h1", r"edge 'a0\.h1': expected sender->receiver"),
        ("", r"edge '': expected sender->receiver"),
        ("a0.h1-> a1.h0<q>", r"receiver ' a1\.h0<q>'"),
        ("a0.h4->m0", r"sender 'a0\.h4': expected input, .* layers 0 to 2 and heads 0 to 3"),
        ("a3.h0->logits", r"sender 'a3\.h0'"),
        ("m3->logits", r"sender 'm3'"),
        ("m-1->logits", r"sender 'm-1'"),
        ("logits->m0", r"sender 'logits'"),
        ("a0.h1<q>->m0", r"sender 'a0\.h1<q>'"),
        ("input->input", r"receiver 'input'"),
        ("input->a1.h3<k>", r"receiver 'a1\.h3<k>': .* query heads 0 to 3, key and value heads 0 to 1"),
        ("input->a1.h3<z>", r"receiver 'a1\.h3<z>'"),
        ("input->a1.h3", r"receiver 'a1\.h3'"),
        ("input->m3", r"receiver 'm3'"),
        ("input->m²", r"receiver 'm²'"),
        ("input->m٢", r"receiver 'm٢'"),
        ("m00->logits", r"sender 'm00'"),
        ("input->m01", r"receiver 'm01'"),
        ("input->a01.h0<q>", r"receiver 'a01\.h0<q>'"),
        ("a0.h00->logits", r"sender 'a0\.h00'"),
        ("m" + "9" * 5000 + "->logits", r"sender 'm9999"),
        ("input->m" + "9" * 5000, r"receiver 'm9999"),
        ("input->m0->logits", r"receiver 'm0->logits'"),
        ("m0->m0", r"edge 'm0->m0': m0 is not upstream of m0"),
        ("m1->a1.h0<q>", r"m1 is not upstream of a1\.h0<q>"),
        ("a1.h0->a1.h1<v>", r"a1\.h0 is not upstream of a1\.h1<v>"),
        ("a2.h0->m1", r"a2\.h0 is not upstream of m1"),
    ],
)
def test_edges_that_do_not_exist_are_refused_by_name(name: str, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        GROUPED.find_edge(name)
    assert "\n" not in str(caught.value)


def test_a_parallel_block_has_no_edge_from_its_heads_to_its_mlp() -> None:
    parallel, sequential = (EdgeGraph.of(dims(2, 2, 2, each)) for each in (True, False))
    assert sequential.find_edge("a0.h1->m0") and parallel.find_edge("a0.h1->m1")
    with pytest.raises(InputError, match=r"a0\.h1 is not upstream of m0"):
        parallel.find_edge("a0.h1->m0")
    assert sequential.n_edges - parallel.n_edges == 4


@settings(deadline=None, max_examples=300)
@given(st.text(st.sampled_from("am01.h<>qkv->inputlogits²"), max_size=16))
def test_any_text_is_an_edge_or_refused(name: str) -> None:
    try:
        assert GROUPED.edge_name(*GROUPED.find_edge(name)) == name
    except InputError as error:
        assert "\n" not in str(error)


MEASURE = """
import json, resource, sys, time
import torch
torch.set_num_threads(1)
from patchkit.model.edges import EdgeGraph
def build(layers, heads):
    start = time.process_time()
    graph = EdgeGraph(layers, heads, heads, False, 128 * heads)
    kept = graph.senders, graph.receivers, graph.upstream, graph.real, graph.owner
    return graph.n_edges, time.process_time() - start, kept
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
# The first call of an operation loads what it needs.
build(1, 1)
before = peak()
found = [build(40, 40), build(32, 32)]
print(json.dumps({"found": [each[:2] for each in found], "bytes": peak() - before}))
"""


def test_graphs_of_large_models_are_small_and_fast() -> None:
    """All there is of the graphs of 13 and 8 billion parameters, in a process whose memory nothing else has grown."""
    run = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, check=True, text=True)
    measured = json.loads(run.stdout)
    assert [edges for edges, _ in measured["found"]] == [3_877_661, 1_592_881]
    assert all(seconds < 1 for _, seconds in measured["found"]), measured
    assert measured["bytes"] < 50e6, measured
