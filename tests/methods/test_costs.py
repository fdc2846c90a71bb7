"""The memory that Programs say their batches take, against what is live on the embedded models: within a quarter."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from patchkit.data import Pair
from patchkit.methods import EdgeOptions, EvaluateOptions, MaskOptions, NodeOptions
from patchkit.methods._acdc_runs import Try, pack
from patchkit.methods.edge_plans import (
    acdc_stages,
    attribution_stages,
    circuits_stage,
    evaluate_stages,
    evenly_spread,
    exact_stages,
    paths_stages,
    synthetic_pairs,
)
from patchkit.methods.mask_plans import mask_stages, synthetic_triples
from patchkit.methods.node_plans import attribution_stages as node_attribution_stages
from patchkit.methods.node_plans import patching_stages
from patchkit.model import EdgeGraph, PatchModel
from patchkit.results.circuit import Circuit
from patchkit.runtime import length_buckets
from patchkit.runtime.batch_memory import batch_bytes
from patchkit.runtime.plan import Stage
from patchkit.zoo.load import load
from tests.memory import LiveBytes

#: In the lane of what takes longest.
pytestmark = pytest.mark.nightly

MODELS = ("varbind-llama-gqa", "ioi-gpt2")
#: (pairs, tokens, whether lengths differ).
SIZES = ((1, 16, False), (3, 24, False), (5, 28, True))
NODES = ("q", "k", "v", "z", "mlp_out")

Stages = Callable[[PatchModel, Sequence[Pair]], list[Stage]]


def nodes(method: Any, positions: str = "all", kinds: tuple[str, ...] = NODES, **more: Any) -> Stages:
    def stages(model: PatchModel, pairs: Sequence[Pair]) -> list[Stage]:
        options = NodeOptions(nodes=kinds, positions=positions, **more)
        if method is None:
            return patching_stages(model, pairs, options)
        return node_attribution_stages(model, pairs, options, method)

    return stages


def edges(method: str, **more: Any) -> Stages:
    return lambda model, pairs: attribution_stages(model, pairs, EdgeOptions(), method, **more)


def paths(*receivers: str) -> Stages:
    return lambda model, pairs: paths_stages(model, pairs, EdgeOptions(), receivers=receivers)


def circuits(model: PatchModel, pairs: Sequence[Pair]) -> list[Stage]:
    graph = EdgeGraph.of(model.dims)
    several = [evenly_spread(graph, graph.n_edges // 4), Circuit.full(graph)]
    return [circuits_stage(model, pairs, EdgeOptions(), several, "circuits")]


def knockout(model: PatchModel, pairs: Sequence[Pair]) -> list[Stage]:
    empty = evenly_spread(EdgeGraph.of(model.dims), 20)
    return evaluate_stages(model, pairs, empty, EdgeOptions(), EvaluateOptions(knockout=("a1.h0",)))[-1:]


METHODS: dict[str, Stages] = {
    "patch at the last token": nodes(None, "last", ("z", "mlp_out")),
    "patch": nodes(None, kinds=("z", "mlp_out")),
    "patch queries": nodes(None, kinds=("q", "k", "v")),
    "patch neurons": nodes(None, "last", ("neuron",), layers=(1,)),
    "patch to zero": nodes(None, kinds=("z", "mlp_out"), ablation="zero"),
    "atp": nodes("atp"),
    "atp of neurons": nodes("atp", kinds=("neuron",)),
    "atp-qk": nodes("atp-qk"),
    "atp-graddrop": nodes("atp-graddrop"),
    "atp-star": nodes("atp-star"),
    "eap": edges("eap"),
    "eap-ig-inputs": edges("eap-ig-inputs", steps=3),
    "eap-ig-activations": edges("eap-ig-activations", steps=3),
    "eap-ig-activations repo": edges("eap-ig-activations", steps=2, rule="repo"),
    "clean-corrupted": edges("clean-corrupted"),
    "ifr": edges("ifr"),
    "eap with the QK fix": edges("eap", qk_fix=True),
    "eap with GradDrop": edges("eap", grad_drop=True),
    "exact edges": lambda model, pairs: exact_stages(model, pairs, EdgeOptions()),
    "paths to the logits": paths("logits"),
    "paths to heads": paths("a2.h1<q>", "a1.h1<v>"),
    "circuits": circuits,
    "knockout": knockout,
}
AT_POSITIONS: dict[str, Stages] = {
    "patch at each": nodes(None, "each", ("z", "mlp_out")),
    "atp-star at each": nodes("atp-star", "each", ("q", "k", "z")),
}


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> PatchModel:
    return load(request.param)


@pytest.fixture(scope="module", autouse=True)
def few_to_collect() -> Iterator[None]:
    """What was there before is not looked at whenever garbage is collected."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def pairs_of(model: PatchModel, count: int, tokens: int, uneven: bool) -> list[Pair]:
    made = synthetic_pairs(count, tokens, model.dims.vocab_size)
    if not uneven:
        return made
    cut = [tokens - 3 * (number % 3) for number in range(count)]
    return [
        Pair(pair.clean_ids[:end], pair.corrupt_ids[:end], pair.answer_id, pair.wrong_id, {}, pair.id)
        for pair, end in zip(made, cut, strict=True)
    ]


#: Kinds of Programs that run many small forwards, between which Python's collector may wait.
_OF_ROWS = ("PatchSets", "PatchEdges", "PatchPaths")


def ratio(model: PatchModel, stage: Stage) -> float:
    """Estimated over live bytes, of the stage's last batch."""
    numbers = length_buckets([stage.program.tokens(item) for item in stage.items])[-1]
    items = [stage.items[number] for number in numbers]
    program: Any = stage.program
    with LiveBytes(collect=type(program).__name__ in _OF_ROWS) as held:
        program.run(model, items)
    return batch_bytes(program, model.dims, model.dtype.itemsize, items) / held.peak


@pytest.mark.parametrize("method", METHODS)
def test_memory_is_within_a_quarter(model: PatchModel, method: str) -> None:
    found = {size: ratio(model, METHODS[method](model, pairs_of(model, *size))[-1]) for size in SIZES}
    assert all(0.75 <= each <= 1.25 for each in found.values()), found


@pytest.mark.parametrize("method", AT_POSITIONS)
def test_memory_at_every_position(model: PatchModel, method: str) -> None:
    found = {
        n: ratio(model, AT_POSITIONS[method](model, pairs_of(model, n, 16, False))[-1]) for n in (1, 2, 5)
    }
    assert all(0.75 <= each <= 1.25 for each in found.values()), found


@pytest.mark.parametrize("components", [("head", "mlp"), ("neuron",), ("layer",)])
def test_memory_of_a_mask(model: PatchModel, components: tuple[str, ...]) -> None:
    """Opening the triples and a step on them, forward and backward."""
    for count, tokens in ((2, 16), (6, 24), (20, 28)):
        triples = synthetic_triples(("a", "b"), count, tokens, model.dims.vocab_size)
        stage = mask_stages(model, triples, MaskOptions(components=components))[-1]
        opener: Any = stage.program
        assert stage.steps is not None and stage.steps.example is not None
        with LiveBytes() as held:
            stage.steps.example[0].run(model, opener.open(model, stage.items))
        found = batch_bytes(opener, model.dims, 4, stage.items) / held.peak
        assert 0.75 <= found <= 1.25, (count, tokens, found)


def test_memory_of_acdc(model: PatchModel) -> None:
    """Opening the pairs and trying one circuit, of those that a search comes to half of all edges."""
    graph = EdgeGraph.of(model.dims)
    tried = evenly_spread(graph, graph.n_edges // 2).edges
    for count, tokens in ((1, 16), (3, 24), (8, 28)):
        pairs = pairs_of(model, count, tokens, False)
        opener: Any = acdc_stages(model, pairs, EdgeOptions())[-1].program
        with LiveBytes() as held:
            Try(1, (pack(tried),), 1024).run(model, opener.open(model, pairs))
        found = batch_bytes(opener, model.dims, 4, pairs) / held.peak
        assert 0.75 <= found <= 1.25, (count, tokens, found)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("how", [{"attn_implementation": "eager"}, {"dtype": "bfloat16"}])
def test_memory_of_eager_attention_and_of_half_precision(name: str, how: dict[str, str]) -> None:
    model = load(name, **how)  # type: ignore[arg-type]
    for method in ("patch", "atp", "eap"):
        found = ratio(model, METHODS[method](model, pairs_of(model, 4, 64, False))[-1])
        assert 0.75 <= found <= 1.25, (method, found)


def test_token_forwards_are_those_that_are_paid(model: PatchModel) -> None:
    """Exact patching counts what it runs."""
    for positions in ("last", "all", "each"):
        (stage,) = nodes(None, positions, ("q", "z", "mlp_out"))(model, pairs_of(model, 3, 12, False))
        program: Any = stage.program
        paid = float(program.run(model, stage.items)["work"].double().sum())
        planned = program.cost(model.dims, stage.items).forwards
        # Rows of neighbouring tokens share a small forward, and start with the first of them.
        assert planned <= paid * (1 + 1e-6) and planned == pytest.approx(paid, rel=0.25), positions


def test_prompts_that_begin_alike_cost_less() -> None:
    model = load("ioi-gpt2")
    (pair,) = pairs_of(model, 1, 12, False)
    late = Pair(pair.clean_ids, (*pair.clean_ids[:8], *pair.corrupt_ids[8:]), 0, 1, {}, "late")
    costs = [
        stage.program.cost(model.dims, stage.items).forwards
        for each in (pair, late)
        for stage in nodes(None, "all", ("z",))(model, [each])
    ]
    # Of twelve tokens four are run again, and both prompts whole.
    assert costs[1] - 24 == pytest.approx((costs[0] - 24) * 4 / 12, rel=0.2)
