"""Handmade programs: right answers, exact patching that finds exactly the described circuit, and what is planted."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import patchkit
from patchkit import EdgeOptions, NodeOptions, patch_edges, patch_nodes
from patchkit.data import Pair
from patchkit.errors import InputError
from patchkit.methods import patch_sets
from patchkit.methods.attribution import attribute
from patchkit.model import EdgeGraph, PatchModel
from patchkit.results.scores import Scores
from patchkit.zoo import handmade, programs
from patchkit.zoo.known import KnownCircuit
from patchkit.zoo.programs import failures, simple
from patchkit.zoo.programs.language import VALUES, WORDS, At, Head, Mlp, Neuron, Offset, Program
from patchkit.zoo.programs.neurons import both, linear, step
from patchkit.zoo.programs.parts import TOKEN_VALUES, copier
from patchkit.zoo.programs.truth import known_circuit

#: What is in no true edge does exactly nothing: zeros are asked for, not small numbers.
GROUPED = [name for name in programs.names() if name.endswith("-gqa")]
#: Programs of up to three layers as a GPT-2, and of two as a Llama too; all the others are slow.
DEEPEST = {"gpt2": 3, "llama": 2, "gqa": 0}
FAST = [name for name in programs.names() if programs.find(name)[0].layers <= DEEPEST[programs.find(name)[1]]]
SLOW = [name for name in programs.names() if name not in FAST]
KINDS = ("q", "k", "v", "z", "mlp_out")


@functools.cache
def opened(name: str) -> PatchModel:
    return patchkit.load(name)


def test_there_are_enough_programs_in_all_shapes() -> None:
    depths = {program.layers for program in programs.PROGRAMS.values()}
    assert len(programs.PROGRAMS) >= 12 and min(depths) == 2 and max(depths) == 6
    assert {name.rpartition("-")[2] for name in programs.names()} == {"llama", "gqa", "gpt2"}
    for name in GROUPED:
        dims = opened(name).dims
        assert dims.n_heads == 2 * dims.n_kv_heads
        break


@pytest.mark.parametrize("name", programs.names())
def test_every_prompt_is_answered(name: str) -> None:
    """Answers come from a few lines of Python that know nothing of the weights."""
    model, _ = programs.build(name)
    pairs = programs.pairs(name, 100, seed=7)
    with torch.no_grad():
        for which, right in (("clean_ids", "answer_id"), ("corrupt_ids", "wrong_id")):
            logits = model(torch.tensor([getattr(pair, which) for pair in pairs])).logits[:, -1]
            assert logits.argmax(-1).tolist() == [getattr(pair, right) for pair in pairs]


def found_by_patching(name: str, pairs: Sequence[Pair]) -> tuple[frozenset[str], frozenset[str]]:
    """Names of the nodes (heads, MLPs and heads' inputs) and edges whose exact effect is not zero in some pair."""
    model = opened(name)
    graph = EdgeGraph.of(model.dims)
    sizes = patch_edges(model, pairs, EdgeOptions()).mean_abs
    edges = frozenset(graph.edge_name(*edge) for edge in (sizes > 0).nonzero().tolist())
    nodes = patch_nodes(model, pairs, NodeOptions(nodes=KINDS))
    moved = (nodes.mean_abs() > 0).nonzero()[:, 0]
    return frozenset(called(nodes, int(number)) for number in moved), edges


def called(scores: Scores, number: int) -> str:
    """`q.1.h2` as the receiver that it is."""
    name = scores.grid.name(number)
    letter, dot, rest = name.partition(".")
    layer, _, head = rest.partition(".")
    return f"a{layer}.{head}<{letter}>" if dot and letter in ("q", "k", "v") else name


def check(name: str, n: int) -> None:
    known = programs.circuit(name)
    pairs = programs.pairs(name, n, seed=0)
    nodes, edges = found_by_patching(name, pairs)
    assert edges == known.edges - known.silent
    inputs = frozenset(edge.partition("->")[2] for edge in known.edges - known.silent if "<" in edge)
    assert nodes == (known.nodes - known.silent) | inputs


@pytest.mark.parametrize("name", FAST)
def test_exact_patching_finds_exactly_the_true_nodes_and_edges(name: str) -> None:
    check(name, 6)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_exact_patching_finds_exactly_the_true_nodes_and_edges_of_larger_models(name: str) -> None:
    check(name, 6)


def test_a_wrong_description_is_found_out() -> None:
    """The truth and the weights come from one description: with a part left out of it they no longer agree."""
    whole = programs.circuit("handmade-lookup-gpt2")
    less = replace(simple.LOOKUP, parts=tuple(p for p in simple.LOOKUP.parts if p.name != "a0.h1"))
    assert known_circuit(less, "gpt2").edges != whole.edges
    _, edges = found_by_patching("handmade-lookup-gpt2", programs.pairs("handmade-lookup-gpt2", 6, 0))
    assert edges == whole.edges != known_circuit(less, "gpt2").edges


def test_circuits_known_by_hand() -> None:
    assert programs.circuit("handmade-lookup-llama").edges == set(handmade.TRUE_EDGES)
    # Two query heads of one KV head: each has its own query, and they share key and value.
    grouped = programs.circuit("handmade-two-lookups-gqa").edges
    assert {edge for edge in grouped if edge.startswith("a0")} == {
        "a0.h0->a1.h0<q>",
        "a0.h3->a1.h0<k>",
    }
    assert {edge for edge in grouped if edge.endswith("->m2")} == {"a1.h0->m2", "a1.h1->m2"}
    alone = programs.circuit("handmade-two-lookups-gpt2").edges
    assert {"a0.h1->a1.h0<k>", "a0.h1->a1.h1<k>"} <= alone


def test_the_compiled_lookup_says_what_the_handwritten_one_says() -> None:
    """Two independent ways to the same weights: logits of a saturated lookup are 10 and 0 in both."""
    texts = [prompt.text for prompt in handmade.sample_prompts(20, seed=0)]
    old, tokenizer = handmade.build(handmade.SATURATED)
    new, other = programs.build("handmade-saturated-lookup-llama")
    with torch.no_grad():
        logits = old(torch.tensor(tokenizer(texts)["input_ids"])).logits[:, -1]
        compiled = new(torch.tensor(other(texts)["input_ids"])).logits[:, -1]
    ours = compiled[:, [WORDS.index(value) for value in VALUES]]
    theirs = logits[:, [handmade.TOKEN_IDS[value] for value in VALUES]]
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def interchanged(model: PreTrainedModel, path: str, columns: slice, pair: Pair) -> Tensor:
    """The metric when one head's output is the corrupt prompt's, by plain hooks."""
    module = model.get_submodule(path)
    kept: list[Tensor] = []

    def keep(_m: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        kept.append(args[0][..., columns].clone())

    def put(_m: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        changed = args[0].clone()
        changed[..., columns] = kept[0]
        return (changed, *args[1:])

    with torch.no_grad():
        handle = module.register_forward_pre_hook(keep)
        model(torch.tensor([pair.corrupt_ids]))
        handle.remove()
        handle = module.register_forward_pre_hook(put)
        logits = model(torch.tensor([pair.clean_ids])).logits[0, -1]
        handle.remove()
    return logits[pair.answer_id] - logits[pair.wrong_id]


@pytest.mark.parametrize("shape", ["llama", "gpt2"])
def test_effects_by_plain_hooks(shape: str) -> None:
    """Without this package's tracing: the true head moves the metric, every other head leaves it as it is, to the bit."""
    name = f"handmade-crowded-{shape}"
    model, _ = programs.build(name)
    (pair,) = programs.pairs(name, 1, seed=0)
    size = 32 if shape == "llama" else model.config.hidden_size // 4
    with torch.no_grad():
        logits = model(torch.tensor([pair.clean_ids])).logits[0, -1]
    base = logits[pair.answer_id] - logits[pair.wrong_id]
    path = "model.layers.{}.self_attn.o_proj" if shape == "llama" else "transformer.h.{}.attn.c_proj"
    for layer in range(5):
        for head in range(4):
            columns = slice(head * size, (head + 1) * size)
            effect = interchanged(model, path.format(layer), columns, pair) - base
            assert (effect != 0) == ((layer, head) == (1, 2))


def effects_of(name: str, sets: Sequence[Sequence[str]], ablation: str = "resample") -> Tensor:
    model, pairs = opened(name), programs.pairs(name, 6, seed=0)
    options = NodeOptions(nodes=("z",), ablation=ablation)  # type: ignore[arg-type]
    grid = patch_nodes(model, pairs, options).grid
    chosen = [torch.cat([grid.find(node) for node in nodes]) for nodes in sets]
    rows = [ids for ids in chosen for _ in pairs]
    values = patch_sets(model, pairs, rows, list(range(len(pairs))) * len(sets), options).effects
    return values.reshape(len(sets), len(pairs)).abs().mean(1)


@pytest.mark.parametrize("shape", ["llama", "gpt2"])
def test_a_majority_is_silent_one_by_one_and_everything_together(shape: str) -> None:
    one, two, three = effects_of(
        f"handmade-majority-{shape}", [["a0.h0"], ["a0.h0", "a0.h1"], ["a0.h0", "a0.h1", "a0.h2"]]
    ).tolist()
    assert one == 0 and two == three == 20


@pytest.mark.parametrize("shape", ["llama", "gpt2"])
def test_a_backup_steps_in_when_the_first_finds_nothing(shape: str) -> None:
    """Zeroing the first head loses almost nothing, as the backup finds the digit; zeroing both loses all."""
    name = f"handmade-backup-{shape}"
    first, backup, together = effects_of(name, [["a1.h2"], ["a2.h1"], ["a1.h2", "a2.h1"]], "zero").tolist()
    assert backup == 0 and first < 0.1 and together == pytest.approx(10, abs=0.1)


@pytest.mark.parametrize("shape", ["llama", "gqa", "gpt2"])
@pytest.mark.parametrize(
    ("program", "nodes"),
    [("saturated-lookup", ("a1.h2<q>", "a1.h2<k>")), ("cancelling-gradient", ("a0.h1", "a0.h1<v>"))],
)
def test_atp_misses_what_atp_star_finds(program: str, nodes: tuple[str, ...], shape: str) -> None:
    name = f"handmade-{program}-{shape}"
    placed = nodes if shape != "gqa" else tuple(_grouped(node) for node in nodes)
    model, pairs = opened(name), programs.pairs(name, 6, seed=0)
    options = NodeOptions(nodes=KINDS)
    for method, finds in (("atp", False), ("atp-star", True)):
        found = attribute(model, pairs, options, method)  # type: ignore[arg-type]
        sizes = {called(found, number): float(value) for number, value in enumerate(found.mean_abs())}
        for node in placed:
            assert (sizes[node] > 1.0) == finds, (method, node, sizes[node])
    known = programs.circuit(name)
    assert all(known.kind_of(node) in (failures.ATTENTION, failures.CANCELLATION) for node in placed)


def _grouped(node: str) -> str:
    """Where the program's head stands in groups of two: query heads of even groups come first, of odd ones second."""
    layer, _, rest = node[1:].partition(".h")
    head = int(rest[0])
    return node if "<k>" in node or "<v>" in node else f"a{layer}.h{2 * head + head % 2}{rest[1:]}"


@pytest.mark.parametrize("value", [-0.5, 0.0, 0.3, 1.0])
def test_neurons_do_what_they_say(value: float) -> None:
    def run(neurons: Sequence[Neuron], held: dict[tuple[str, str], float]) -> dict[tuple[str, str], float]:
        out: dict[tuple[str, str], float] = {}
        for neuron in neurons:
            summed = sum(weight * held.get((space, symbol), 0.0) for space, symbol, weight in neuron.reads)
            active = max(0.0, summed + neuron.bias)
            for space, symbol, weight in neuron.writes:
                out[space, symbol] = out.get((space, symbol), 0.0) + weight * active
        return out

    one = {("one", "1"): 1.0}
    moved = run(linear(At("x", ("a",)), At("y", ("b",)), 2.0), {**one, ("x", "a"): value})
    assert moved["y", "b"] == pytest.approx(2 * value)
    rising = run(step(("x", "a"), 0.2, 0.4, [("y", "b", 1.0)]), {("x", "a"): value})
    assert rising["y", "b"] == pytest.approx(min(1.0, max(0.0, (value - 0.2) / 0.2)))
    joined = run([both(("x", "a"), ("z", "a"), [("y", "b", 1.0)])], {("x", "a"): 1.0, ("z", "a"): 1.0})
    assert joined["y", "b"] == 1.0


def program(*parts: Head | Mlp, silent: tuple[str, ...] = ()) -> Program:
    return replace(simple.COPY, parts=parts, silent=silent)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda: program(copier(2, 0, 1, TOKEN_VALUES, TOKEN_VALUES)), "a2.h0: the program has 2 layers"),
        (
            lambda: program(copier(0, 4, 1, TOKEN_VALUES, TOKEN_VALUES)),
            "a0.h4: the program has 2 layers of 4",
        ),
        (lambda: program(*2 * (copier(0, 0, 1, TOKEN_VALUES, TOKEN_VALUES),)), "two parts stand there"),
        (
            lambda: program(copier(0, 0, 1, At("nowhere", VALUES), TOKEN_VALUES)),
            "no space is called 'nowhere'",
        ),
        (lambda: program(copier(0, 0, 1, At("result", ("x",)), At("result", ("x",)))), "no symbol 'x'"),
        (lambda: program(Head(0, 1, (Offset(1),), (), twin=True)), "a twin needs the head before it"),
        (lambda: program(silent=("a0.h0",)), "silent a0.h0 is no part"),
    ],
)
def test_a_description_that_contradicts_itself(wrong: object, said: str) -> None:
    with pytest.raises(InputError, match=said):
        wrong().check()  # type: ignore[operator]


def test_names_are_checked() -> None:
    with pytest.raises(InputError, match="expected handmade-PROGRAM-SHAPE with PROGRAM one of copy"):
        programs.find("handmade-copy-mamba")
    with pytest.raises(InputError, match="no embedded model is called 'handmade-cop-llama'"):
        patchkit.zoo.build("handmade-cop-llama")
    with pytest.raises(InputError, match="silent, but it is not in the circuit"):
        KnownCircuit(frozenset(), frozenset(), frozenset({"a0.h0"})).check(
            EdgeGraph.of(opened("handmade-copy-llama").dims)
        )
    with pytest.raises(InputError, match="at least one pair, found 0"):
        programs.pairs("handmade-copy-llama", 0, 0)


def test_pairs_are_seeded_and_answers_differ() -> None:
    for name in ("handmade-chain-llama", "handmade-compare-gpt2"):
        pairs = programs.pairs(name, 20, seed=3)
        assert pairs == programs.pairs(name, 20, seed=3) != programs.pairs(name, 20, seed=4)
        assert all(
            len(pair.clean_ids) == len(pair.corrupt_ids) and pair.answer_id != pair.wrong_id for pair in pairs
        )
    prompt = simple.CHAIN.sample(random.Random(0))
    assert prompt.text.count("=") == 4 and prompt.answer in VALUES
