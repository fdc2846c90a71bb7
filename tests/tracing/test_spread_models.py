"""A model spread over devices gives the numbers of one that is not, and no operation mixes devices.

Every method is run on models whose layers accelerate has put on three virtual accelerators (`tests/virtual_devices.py`):
the hooks are accelerate's, and a tensor that is used where it is not fails as on GPUs. On one device a move that is
forgotten is noticed by nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from patchkit.data import Pair
from patchkit.methods import METHODS as ATTRIBUTION
from patchkit.methods import (
    EdgeOptions,
    EvaluateOptions,
    MaskOptions,
    NodeOptions,
    Schedule,
    ScrubOptions,
    StagePlan,
    acdc,
    attribute,
    attribute_edges,
    bound,
    evaluate,
    learn_mask,
    patch_edges,
    patch_nodes,
    patch_paths,
    run_circuits,
    scrub,
    trace_paths_back,
    verify,
)
from patchkit.model import EdgeGraph, PatchModel
from patchkit.results.circuit import Circuit
from patchkit.results.edge_scores import EdgeScores
from patchkit.results.scores import Scores
from patchkit.tracing.prefixes import Prefixes, use_prefixes
from patchkit.tracing.validate import available_kinds
from tests.comparisons import agree, pair
from tests.methods.mask_cases import random_triples
from tests.node_oracle import LONG, MIDDLE, SHORT
from tests.scrub_oracle import mixed, prompts
from tests.virtual_devices import (
    ACROSS,
    OFFLOADED,
    WITH_OFFLOADED,
    Devices,
    spread_model,
    virtual_devices,
)

#: In the lane of what takes longest.
pytestmark = pytest.mark.nightly

PAIRS = (LONG, SHORT)
#: The last one begins as the first does, so that a prefix is shared.
ALIKE = (LONG, Pair((*LONG.clean_ids[:5], 8, 21), (*LONG.clean_ids[:5], 9, 20), 3, 8, {"s": (2, 5)}, "alike"))
Found = dict[str, Tensor]


def reference_of(asked: NodeOptions | EdgeOptions) -> tuple[Pair, ...] | None:
    """Prompts of one length, so that means may be taken position by position."""
    return (LONG, MIDDLE) if "mean" in asked.ablation else None


def _scores(scores: Scores) -> Found:
    return {"effects": scores.effects, "base": scores.base_metric, "source": scores.source_metric}


def _nodes(method: Any, pairs: tuple[Pair, ...] = PAIRS, **options: Any) -> Callable[[PatchModel], Found]:
    def call(model: PatchModel) -> Found:
        asked = NodeOptions(**{"nodes": tuple(available_kinds(model)), "positions": "s,-1", **options})
        if method == "exact":
            return _scores(patch_nodes(model, pairs, asked, reference=reference_of(asked)))
        return _scores(attribute(model, pairs, asked, method, reference=reference_of(asked)))

    return call


def _edge_scores(scores: EdgeScores) -> Found:
    found = {"mean": scores.mean, "mean_abs": scores.mean_abs, "base": scores.base_metric}
    return found if scores.by_query is None else found | {"by_query": scores.by_query[0]}


def _edges(
    method: Any, options: Mapping[str, Any] | None = None, **given: Any
) -> Callable[[PatchModel], Found]:
    def call(model: PatchModel) -> Found:
        asked = EdgeOptions(**(options or {}))
        return _edge_scores(
            attribute_edges(model, PAIRS, asked, method, reference=reference_of(asked), **given)
        )

    return call


def some_edges(model: PatchModel, share: float, *, by_query_head: bool = False) -> Tensor:
    real = EdgeGraph.of(model.dims, by_query_head=by_query_head).real
    return real & (torch.rand(real.shape, generator=torch.Generator().manual_seed(3)) < share)


def _numbers(found: Any) -> Found:
    """All numbers of a result, in the order of its fields; its words must be the same too, and are hashed."""
    numbers: list[float] = []

    def walk(value: Any) -> None:
        if isinstance(value, dict):
            for each in value.values():
                walk(each)
        elif isinstance(value, list | tuple):
            for each in value:
                walk(each)
        elif isinstance(value, bool | int | float):
            numbers.append(float(value))

    walk(found.model_dump())
    return {"numbers": torch.tensor(numbers, dtype=torch.float64)}


def _exact_edges(model: PatchModel) -> Found:
    edges = some_edges(model, 0.15)
    return _edge_scores(patch_edges(model, PAIRS, EdgeOptions(), edges=edges)) | {
        f"each {key}": value
        for key, value in _edge_scores(
            patch_edges(model, PAIRS, EdgeOptions(positions="s,-1"), edges=edges, by_query=True)
        ).items()
    }


def _circuits(patching: str, by_query_head: bool = False, **options: Any) -> Callable[[PatchModel], Found]:
    def call(model: PatchModel) -> Found:
        graph = EdgeGraph.of(model.dims, by_query_head=by_query_head)
        circuits = [
            Circuit(graph, some_edges(model, share, by_query_head=by_query_head)) for share in (0.2, 0.7)
        ]
        asked = EdgeOptions(**options)
        found = run_circuits(model, PAIRS, circuits, asked, patching=patching, reference=reference_of(asked))
        return {"metric": found.metric, "clean": found.clean, "corrupt": found.corrupt}

    return call


def _paths(model: PatchModel) -> Found:
    return _numbers(patch_paths(model, PAIRS, ["all"], ["logits", "m2", "a1.h0<k>", "a2.h1<q>"])) | {
        f"stages {key}": value
        for key, value in _numbers(
            trace_paths_back(
                model,
                PAIRS,
                EdgeOptions(direction="denoise"),
                stages=[StagePlan("one", k=3, letters="qkv"), StagePlan("two", k=2)],
                mlps="frozen",
            )
        ).items()
    }


def _acdc(model: PatchModel) -> Found:
    return _edge_scores(acdc(model, PAIRS, EdgeOptions(metric="kl"), tau=0.05))


def _scrub(model: PatchModel) -> Found:
    hypothesis = mixed(model.dims.group)
    return _numbers(scrub(model, prompts(3), hypothesis, ScrubOptions(samples=2), pool=prompts(4)))


def _evaluate(model: PatchModel) -> Found:
    circuit = Circuit(EdgeGraph.of(model.dims), some_edges(model, 0.6))
    asked = EvaluateOptions(completeness=1, random=1, knockout=("a1.h0", "m0"), candidates=1)
    return _numbers(evaluate(model, PAIRS, circuit, EdgeOptions(), asked))


def _mask(*components: str, reuse: bool = True, position: str = "last") -> Callable[[PatchModel], Found]:
    def call(model: PatchModel) -> Found:
        schedule = Schedule(lambdas=(0.02,), steps=6, steps_after=2, check_every=3)
        options = MaskOptions(
            components=components,
            schedule=schedule,
            seeds=(0,),
            own_masks=False,
            random_sets=2,
            reuse=reuse,
            position=position,
        )
        found = learn_mask(model, random_triples(6), options)
        return {"values": torch.cat([value.flatten() for value in found.values.values()])}

    return call


def _checked(model: PatchModel) -> Found:
    """Attribution that verifies itself and bounds what it missed."""
    options = NodeOptions(nodes=("z", "mlp_out"))
    scores = attribute(model, PAIRS, options)
    return _numbers(verify(model, PAIRS, scores, options, k=3)) | {
        f"bound {key}": value for key, value in _numbers(bound(model, PAIRS, scores, options)).items()
    }


METHODS: dict[str, Callable[[PatchModel], Found]] = {
    "patch": _nodes("exact"),
    "patch, denoise": _nodes("exact", positions="all", direction="denoise", ablation="zero"),
    "patch, mean": _nodes("exact", (LONG, MIDDLE), nodes=("z", "resid_post", "k"), ablation="mean"),
    "patch, noise": _nodes("exact", nodes=("z", "neuron", "q"), ablation="noise"),
    "patch, shared prefix": _nodes("exact", ALIKE),
    **{method: _nodes(method) for method in ATTRIBUTION},
    "atp-star, denoise": _nodes("atp-star", direction="denoise", metric="prob-diff", nodes=("q", "k", "z")),
    "atp-star, shared prefix": _nodes("atp-star", ALIKE),
    "verify and bound": _checked,
    "eap": _edges("eap"),
    "eap, query heads": _edges("eap", qk_fix=True, grad_drop=True, options={"positions": "s,-1"}),
    "eap, mean": _edges("eap", options={"ablation": "mean", "metric": "target-logprob"}),
    "eap-ig-inputs": _edges("eap-ig-inputs", steps=2),
    "eap-ig-activations": _edges("eap-ig-activations", steps=2),
    "eap-ig-activations, repo": _edges("eap-ig-activations", steps=1, rule="repo"),
    "clean-corrupted": _edges("clean-corrupted"),
    "ifr": _edges("ifr"),
    "exact edges": _exact_edges,
    "paths": _paths,
    "circuits": _circuits("edge"),
    "circuits, mean": _circuits("edge", ablation="mean"),
    "circuits by query head": _circuits("edge", by_query_head=True),
    "circuits, nodes": _circuits("node"),
    "acdc": _acdc,
    "scrubbing": _scrub,
    "evaluate": _evaluate,
    "mask": _mask("head", "mlp"),
    "mask, layers": _mask("layer"),
    "mask, neurons, whole prompts": _mask("neuron", "k", "q", reuse=False),
    "mask, a span": _mask("head", "neuron", position="middle"),
}
#: A model, and where accelerate puts its layers.
MODELS = {
    "llama-gqa": ("llama-gqa", ACROSS),
    "gpt2": ("gpt2", ACROSS),
    "llama-gqa, a layer offloaded": ("llama-gqa", WITH_OFFLOADED),
    "gemma2": ("gemma2-post-norms-softcap", ACROSS),
    "neox, a layer offloaded": ("neox-parallel", WITH_OFFLOADED),
}
SHORTLY = ("patch", "atp-star", "eap", "eap, query heads", "exact edges", "paths", "circuits", "acdc", "mask")
#: Every method, then those of each kind on what else there is.
CASES = [
    *(("llama-gqa", method) for method in METHODS),
    *(("gpt2", method) for method in METHODS if "," not in method),
    *(("llama-gqa, a layer offloaded", method) for method in SHORTLY),
    *(
        ("gemma2", method)
        for method in ("patch", "atp-star", "eap", "exact edges", "paths", "circuits", "scrubbing")
    ),
    *(("neox, a layer offloaded", method) for method in ("atp-graddrop", "eap, query heads", "evaluate")),
]


@functools.cache
def spread_over(name: str) -> tuple[PatchModel, Devices]:
    family, layers = MODELS[name]
    with virtual_devices() as devices:
        return spread_model(family, layers), devices


@pytest.fixture(autouse=True)
def short_prefixes() -> Iterator[None]:
    """Prefixes of two tokens are shared."""
    with use_prefixes(Prefixes(least=2, worth=1)):
        yield


@pytest.mark.filterwarnings("ignore:Some parameters are on the meta device")
@pytest.mark.parametrize(("name", "method"), CASES)
def test_a_spread_model_gives_the_same_numbers(name: str, method: str) -> None:
    plain, _ = pair(MODELS[name][0])
    expected = METHODS[method](plain)
    model, devices = spread_over(name)
    moves, operations = len(devices.moves), devices.operations
    with virtual_devices(devices):
        found = {key: value.cpu() for key, value in METHODS[method](model).items()}
    assert found.keys() == expected.keys()
    for key, value in found.items():
        agree(value.nan_to_num(), expected[key].nan_to_num(), f"{method}, {key}", 1e-5)
        assert torch.equal(value.isnan(), expected[key].isnan()), (
            f"{method}, {key}: other numbers are missing"
        )
    used = {to for _, to in devices.moves[moves:]}
    assert used >= set(MODELS[name][1]) - {OFFLOADED} and devices.operations > operations + 100
