"""Circuits against the oracle, in every family; what must be equal to what; what is refused."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from patchkit import tasks
from patchkit.data import Batch, Pair
from patchkit.errors import InputError
from patchkit.methods import circuits as methods
from patchkit.methods._circuit_work import circuit_work, share_out
from patchkit.methods._edge_options import EdgeOptions
from patchkit.methods.acdc import acdc
from patchkit.methods.circuits import run_circuits
from patchkit.model import PatchModel
from patchkit.model.edges import EdgeGraph
from patchkit.results.circuit import Circuit, greedy
from patchkit.tracing.circuit import circuit_logits, cut_run, start_at
from patchkit.tracing.senders import capture_senders
from patchkit.zoo.load import load
from tests import oracles
from tests.circuit_oracle import (
    check_circuits,
    check_metrics,
    expected_metrics,
    graphs_of,
    kl,
    prompts,
    random_circuits,
    tolerance_of,
)
from tests.comparisons import agree, pair
from tests.families import build
from tests.node_oracle import DENSE, LONG, MIDDLE, SHORT

PAIRS = [LONG, SHORT]


# Against the oracle.


@pytest.mark.parametrize("family", DENSE)
def test_circuits_are_the_oracles(family: str) -> None:
    model = pair(family, torch.float64)[0]
    native, *wide = graphs_of(model)
    by_query = [each for graph in wide for each in random_circuits(graph, (0.3,))]
    circuits = [*random_circuits(native), Circuit.full(native), *by_query]
    found = check_circuits(family, PAIRS, circuits=circuits)
    # Circuits that all do the same would say little.
    assert found.metric.std(1).min() > 1e-3
    halves = [each for graph in graphs_of(model) for each in random_circuits(graph, (0.5,), seed=1)]
    check_circuits(family, PAIRS, circuits=halves, direction="denoise")


@pytest.mark.parametrize("family", ["llama-gqa", "gemma2-post-norms-softcap", "mixtral-experts"])
def test_circuits_are_the_oracles_in_float32(family: str) -> None:
    model = pair(family)[0]
    circuits = [each for graph in graphs_of(model) for each in random_circuits(graph, (0.5,), seed=2)]
    check_circuits(family, [SHORT, MIDDLE], torch.float32, circuits=circuits)


@pytest.mark.parametrize(
    ("family", "ablation"),
    [
        ("llama-gqa", "mean"),
        ("llama-gqa", "zero"),
        ("gpt2", "mean"),
        ("gpt2", "mean-positional"),
        ("gpt2", "zero"),
        ("gemma2-post-norms-softcap", "mean"),
        ("neox-parallel", "zero"),
        ("olmo2", "mean-positional"),
    ],
)
def test_other_ablations(family: str, ablation: str) -> None:
    pairs = [LONG, MIDDLE] if ablation == "mean-positional" else PAIRS
    circuits = random_circuits(EdgeGraph.of(pair(family, torch.float64)[0].dims), (0.3, 0.8))
    direction = "denoise" if ablation == "zero" else "noise"
    check_circuits(family, pairs, circuits=circuits, ablation=ablation, direction=direction)


def test_kl_is_measured_from_the_base_run() -> None:
    found = check_circuits("llama-gqa", PAIRS, metric="kl", score=kl)
    assert found.clean.abs().max() < 1e-12 < 1e-3 < found.metric.min()


TASKS = {"varbind-llama-gqa": "variable-binding", "ioi-gpt2": "ioi"}


@functools.cache
def trained(name: str) -> tuple[PatchModel, PreTrainedModel, list[Pair]]:
    """The model, a twin that nnsight never saw, and two short pairs."""
    model = load(name)
    kind: Any = type(model.hf)
    twin = kind(model.config).eval()
    twin.load_state_dict(model.hf.state_dict())
    drawn = tasks.pairs(TASKS[name], model.tokenizer, 12, 0)
    return model, twin, sorted(drawn, key=lambda each: len(each.clean_ids))[:2]


@pytest.mark.parametrize("name", TASKS)
def test_trained_models(name: str) -> None:
    """Logits are up to 20, where float32 has six digits and a forward loses one or two."""
    model, twin, pairs = trained(name)
    circuits = [each for graph in graphs_of(model) for each in random_circuits(graph, (0.5,))]
    found = run_circuits(model, pairs, circuits, EdgeOptions())
    check_metrics(found, expected_metrics(twin, pairs, circuits, EdgeOptions()), pairs, 2e-5)
    assert found.clean.min() > 1 > -1 > found.corrupt.max()


# Identities.


@pytest.mark.parametrize(
    "family", ["gemma2-post-norms-softcap", "gpt2", "mixtral-experts", "neox-sequential", "olmo2"]
)
def test_the_ends_are_the_base_and_the_source_run(family: str) -> None:
    model, twin = pair(family)
    for direction in ("noise", "denoise"):
        circuits = [make(graph) for graph in graphs_of(model) for make in (Circuit.full, Circuit.empty)]
        found = run_circuits(model, PAIRS, circuits, EdgeOptions(direction=direction))
        for row, each in enumerate(PAIRS):
            for place, (ids, end) in enumerate(
                zip(prompts(each, direction), (found.clean, found.corrupt), strict=True)
            ):
                logits = oracles.read(twin, ids)[1]
                expected = logits[each.answer_id] - logits[each.wrong_id]
                agree(end[row], expected, f"end {place} of {each.id}")
                agree(found.metric[row, place::2], expected.expand(len(circuits) // 2), f"circuit {place}")


@pytest.mark.parametrize(
    "family", ["llama-gqa", "mixtral-experts", "gemma3-two-thetas", "olmo2", "phi3-fused-gqa"]
)
def test_a_native_circuit_by_query_head_is_the_same(family: str) -> None:
    model, _ = pair(family)
    native = random_circuits(EdgeGraph.of(model.dims), (0.1, 0.5, 0.9))
    wide = [circuit.by_query_head() for circuit in native]
    assert all(circuit.graph.n_kv_heads == 4 for circuit in wide)
    # In one call, mixed.
    found = run_circuits(model, PAIRS, [*wide, *native], EdgeOptions()).metric
    agree(found[:, :3], found[:, 3:], family, 5e-6)


def test_direct_edges_add_up_where_nothing_bends_them() -> None:
    """The handmade model's norms are the identity, so its logits are linear in what enters them."""
    model = load("handmade-llama")
    graph = EdgeGraph.of(model.dims)
    full = Circuit.full(graph)
    single, pairs = [], [Pair((1, 3, 19, 12, 3), (1, 4, 19, 15, 4), 13, 16, {}, "p")]
    for sender in range(graph.n_senders):
        edges = full.edges.clone()
        edges[sender, graph.logits] = False
        single.append(Circuit(graph, edges))
    edges = full.edges.clone()
    edges[1::2, graph.logits] = False
    found = run_circuits(model, pairs, [full, Circuit(graph, edges), *single], EdgeOptions()).metric[0]
    effects = found[2:] - found[0]
    assert effects.abs().max() > 1
    agree(found[1] - found[0], effects[1::2].sum(), "sum over edges", 1e-5)


@pytest.mark.parametrize("family", ["llama-gqa", "gemma3-two-thetas", "neox-parallel"])
def test_circuits_that_start_higher_are_the_same(family: str) -> None:
    model, _ = pair(family)
    base, source = (Batch.from_ids([prompts(each, "noise")[i] for each in PAIRS]) for i in (0, 1))
    own, other = capture_senders(model, base)[0], capture_senders(model, source)[0]
    cut = cut_run(model, base, own, other)
    for graph in graphs_of(model):
        for known in (1, 5, 6, 15, graph.n_senders):
            layer, behind = divmod(known - 1, 5)
            first = graph.mlp_receiver(layer) if behind else layer * graph.receivers_a_layer
            circuits = [each.edges.clone() for each in random_circuits(graph, (0.3, 0.8))]
            for edges in circuits:
                edges[:, :first] = graph.real[:, :first]
            start = start_at(model, own, other, graph, known)
            found = circuit_logits(model, cut, graph, circuits, start)
            agree(found, circuit_logits(model, cut, graph, circuits), f"from sender {known}", 5e-6)
            circuits[1][0, 0] = False
            if first > 0:
                with pytest.raises(
                    InputError, match="edge input->a0.h0<q> is cut, but the circuit is started"
                ):
                    circuit_logits(model, cut, graph, circuits, start)
    with pytest.raises(InputError, match="sender 3 is the first of neither"):
        start_at(model, own, other, EdgeGraph.of(model.dims), 3)


def test_batches_and_order_change_nothing() -> None:
    model, _ = pair("qwen3-qk-norm")
    circuits = [each for graph in graphs_of(model) for each in random_circuits(graph)]
    pairs = [LONG, SHORT, MIDDLE]
    together = run_circuits(model, pairs, circuits, EdgeOptions())
    alone = run_circuits(model, pairs, circuits, EdgeOptions(max_batch_tokens=1))
    back = run_circuits(model, pairs[::-1], circuits[::-1], EdgeOptions(max_batch_tokens=60))
    for name in ("metric", "clean", "corrupt"):
        agree(getattr(alone, name), getattr(together, name), name, 1e-6)
        turned = getattr(back, name).flip(0)
        agree(turned.flip(1) if name == "metric" else turned, getattr(together, name), name, 1e-6)


# Nodes.


@pytest.mark.parametrize("direction", ["noise", "denoise"])
@pytest.mark.parametrize("family", ["llama-gqa", "gemma2-post-norms-softcap", "gpt2", "neox-parallel"])
def test_node_patching_is_activation_patching_of_the_rest(family: str, direction: Any) -> None:
    """The oracle edits the output of every sender that is left out, in an ordinary run."""
    model, twin = pair(family, torch.float64)
    graph = EdgeGraph.of(model.dims)
    circuits = random_circuits(graph, (0.01, 0.03, 0.06)) + [Circuit.full(graph), Circuit.empty(graph)]
    found = run_circuits(model, PAIRS, circuits, EdgeOptions(direction=direction), patching="node")
    assert {int(circuit.nodes.sum()) for circuit in circuits} > {0, 16}
    for row, each in enumerate(PAIRS):
        base, source = prompts(each, direction)
        values = oracles.read(twin, source)[0]
        for column, circuit in enumerate(circuits):
            edits: dict[tuple[str, int], Any] = {}
            if not circuit.nodes[0]:
                edits["resid_pre", 0] = lambda own, new=values["resid_pre", 0]: new
            for layer in range(3):
                out = (~circuit.nodes[graph.heads(layer)]).nonzero()[:, 0]

                def heads(own: Tensor, new: Tensor = values["z", layer], out: Tensor = out) -> Tensor:
                    own[:, out] = new[:, out]
                    return own

                edits["z", layer] = heads
                if not circuit.nodes[graph.mlp_sender(layer)]:
                    edits["mlp_out", layer] = lambda own, new=values["mlp_out", layer]: new
            logits = oracles.patched_logits(twin, base, edits)
            expected = logits[each.answer_id] - logits[each.wrong_id]
            what = f"nodes of circuit {column} in {each.id}"
            agree(found.metric[row, column], expected, what, tolerance_of(family, torch.float64))


def test_node_patching_differs_from_edge_patching_unless_all_edges_are_there() -> None:
    model, _ = pair("llama-gqa")
    graph = EdgeGraph.of(model.dims)
    some = random_circuits(graph, (0.05,))[0]
    whole = Circuit.of_nodes(graph, some.nodes)
    by_edge, by_node = (
        run_circuits(model, PAIRS, [some, whole], EdgeOptions(), patching=patching).metric
        for patching in ("edge", "node")
    )
    agree(by_node[:, 0], by_node[:, 1], "nodes", 1e-6)
    agree(by_edge[:, 1], by_node[:, 1], "all edges among them", 1e-6)
    assert (by_edge[:, 0] - by_node[:, 0]).abs().min() > 1e-3


# Small and spread models.


def test_one_layer_and_prompts_of_one_token() -> None:
    """The last layer is the first, and the last position the only one."""
    config = LlamaConfig(
        vocab_size=37,
        hidden_size=16,
        intermediate_size=20,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=16,
    )
    torch.manual_seed(1)
    twin = LlamaForCausalLM(config).eval()
    model = load(copy.deepcopy(twin))
    pairs = [Pair((3,), (5,), 4, 6, {}, "one"), Pair((3, 7), (5, 8), 4, 6, {}, "two")]
    circuits = [
        make(graph)
        for graph in graphs_of(model)
        for make in (Circuit.full, Circuit.empty, lambda g: random_circuits(g)[1])
    ]
    found = run_circuits(model, pairs, circuits, EdgeOptions())
    check_metrics(found, expected_metrics(twin, pairs, circuits, EdgeOptions()), pairs, 1e-5)
    assert acdc(model, pairs, tau=1e-4).circuit.n_edges < 13  # type: ignore[union-attr]


def test_a_model_with_layers_on_disk(tmp_path: Path) -> None:
    module = build("gpt2")
    places = {name: "cpu" for name in ("transformer.wte", "transformer.wpe", "transformer.ln_f", "lm_head")}
    places |= {"transformer.h.0": "cpu", "transformer.h.1": "disk", "transformer.h.2": "cpu"}
    dispatch_model(module, places, main_device="cpu", offload_dir=tmp_path)  # pyright: ignore
    spread, model = load(module), pair("gpt2")[0]
    circuits = random_circuits(EdgeGraph.of(model.dims), (0.5,))
    for ablation in ("resample", "zero"):
        found, expected = (
            run_circuits(each, PAIRS, circuits, EdgeOptions(ablation=ablation)).metric  # type: ignore[arg-type]
            for each in (spread, model)
        )
        agree(found, expected, ablation, 1e-6)


@pytest.mark.parametrize("family", ["gpt2", "gemma2-post-norms-softcap"])
def test_half_precision_is_near(family: str) -> None:
    model, exact = load(build(family).to(torch.bfloat16)), pair(family)[0]
    graph = EdgeGraph.of(model.dims)
    circuits = [Circuit.full(graph), *random_circuits(graph, (0.5,))]
    found, expected = (run_circuits(each, PAIRS, circuits, EdgeOptions()) for each in (model, exact))
    assert found.metric.dtype == torch.float32
    agree(found.metric, expected.metric, family, 0.03)


# What it takes.


def test_a_circuit_takes_less_than_two_forwards() -> None:
    """Counted in FLOPs: base and source run, then the circuit and its products, whose share of the whole is that at twice
    the depth and the width."""
    config = GPT2Config(
        vocab_size=500, n_embd=192, n_layer=6, n_head=12, n_positions=16, bos_token_id=0, eos_token_id=0
    )
    hf = GPT2LMHeadModel(config).eval()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(500, (2, 8, 16), generator=generator).tolist()
    with FlopCounterMode(display=False) as plain, torch.no_grad():
        hf(input_ids=torch.tensor(ids[0]), use_cache=False)
    model = load(hf)
    graph = EdgeGraph.of(model.dims)
    importance = torch.randn(graph.real.shape, generator=generator)
    pairs = [Pair(tuple(a), tuple(b), 1, 2, {}, str(i)) for i, (a, b) in enumerate(zip(*ids, strict=True))]
    for n, most in ((200, 2.6), (1500, 3.1), (graph.n_edges, 2.8)):
        circuit = greedy(graph, importance, n, absolute=True).pruned()
        with FlopCounterMode(display=False) as counter:
            found = run_circuits(model, pairs, [circuit], EdgeOptions())
        ratio = counter.get_total_flops() / plain.get_total_flops()
        assert circuit.n_edges > n / 3 and ratio < most, f"{circuit.n_edges} edges: {ratio:.2f} forwards"
        # What is said to have been paid is no less, but for the unembedding and attention patterns.
        assert found.cost > ratio - 0.3, f"{n} edges: {found.cost:.2f} said, {ratio:.2f} counted"


def test_what_is_counted() -> None:
    model, _ = pair("llama-gqa")
    graph = EdgeGraph.of(model.dims)
    full, empty = Circuit.full(graph).edges, Circuit.empty(graph).edges
    assert circuit_work(model.dims, graph, empty) == 0
    assert 1 < circuit_work(model.dims, graph, full) < 2
    assert circuit_work(model.dims, graph, full, graph.n_senders) == 0
    above = [circuit_work(model.dims, graph, full, 1 + layer * 5) for layer in range(4)]
    assert above == sorted(above, reverse=True)
    found = run_circuits(model, PAIRS, [Circuit.empty(graph)], EdgeOptions())
    assert found.cost == 2
    assert run_circuits(model, PAIRS, [Circuit.empty(graph)], EdgeOptions(ablation="mean")).cost == 3


def test_groups_of_circuits_are_alike_and_within_the_budget() -> None:
    rooms = [5.0, 1.0, 4.0, 2.0, 9.0]
    assert list(share_out(rooms, 6.0, 10)) == [[1, 3], [2], [0], [4]]
    assert list(share_out(rooms, 100.0, 2)) == [[1, 3], [2, 0], [4]]
    assert list(share_out([], 1.0, 1)) == []


def test_an_interrupted_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = pair("llama-gqa")
    circuits = random_circuits(EdgeGraph.of(model.dims))
    options = EdgeOptions(max_batch_tokens=1)
    whole = run_circuits(model, PAIRS, circuits, options)
    right, calls = circuit_logits, []

    def counted(*args: Any, **given: Any) -> Tensor:
        calls.append(1)
        if len(calls) > 3:
            raise KeyboardInterrupt
        return right(*args, **given)

    monkeypatch.setattr(methods, "circuit_logits", counted)
    with pytest.raises(KeyboardInterrupt):
        run_circuits(model, PAIRS, circuits, options, checkpoint=tmp_path)
    monkeypatch.setattr(methods, "circuit_logits", right)
    seen: list[tuple[str, int, int]] = []
    found = run_circuits(
        model, PAIRS, circuits, options, checkpoint=tmp_path, progress=lambda *each: seen.append(each)
    )
    assert torch.equal(found.metric, whole.metric) and seen[-1] == ("circuits", 2, 2)
    # Nothing is left to run.
    monkeypatch.setattr(methods, "circuit_logits", None)
    assert torch.equal(
        run_circuits(model, PAIRS, circuits, options, checkpoint=tmp_path).metric, whole.metric
    )
    # Other circuits are not taken for these.
    with pytest.raises(TypeError):
        run_circuits(model, PAIRS, circuits[::-1], options, checkpoint=tmp_path)


# What is refused.


def not_a_number(logits: Tensor) -> Tensor:
    return logits[:, 0] * torch.nan


def test_bad_input() -> None:
    model, _ = pair("llama-gqa")
    graph = EdgeGraph.of(model.dims)
    circuit = Circuit.full(graph)
    other = EdgeGraph.of(pair("llama-mha-wide-head")[0].dims)
    parallel = replace(graph, parallel=True)
    cases: list[tuple[str, dict[str, Any]]] = [
        ("no prompt pairs", {"pairs": []}),
        ("no circuits to run", {"circuits": []}),
        (
            "3 layers, 4 heads, 2 KV heads.* parallel blocks, but .* sequential",
            {"circuits": [Circuit.full(parallel)]},
        ),
        (
            "positions 'last': a circuit cuts its edges at all tokens",
            {"options": EdgeOptions(positions="last")},
        ),
        ("patching 'edges' is not known", {"patching": "edges"}),
        ("unknown metric 'x'", {"options": EdgeOptions(metric="x")}),
        ("is nan in row 0", {"options": EdgeOptions(metric=f"{__name__}:not_a_number")}),
        ("a reference set is for", {"reference": PAIRS}),
        ("must all have one length", {"options": EdgeOptions(ablation="mean-positional")}),
    ]
    for message, changed in cases:
        given: dict[str, Any] = {"pairs": PAIRS, "circuits": [circuit], "options": EdgeOptions()} | changed
        head = [given.pop(name) for name in ("pairs", "circuits", "options")]
        with pytest.raises(InputError, match=message):
            run_circuits(model, *head, **given)
    # The graph by query head of another model with as many heads is this one's too; its native one is not of a wider one.
    assert other == EdgeGraph.of(model.dims, by_query_head=True)
    with pytest.raises(InputError, match="give a circuit of this model"):
        run_circuits(pair("llama-mha-wide-head")[0], PAIRS, [circuit], EdgeOptions())
