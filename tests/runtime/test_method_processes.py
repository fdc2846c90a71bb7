"""Every method in two processes gives what it gives in one, pair by pair; both of them did some of the work."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import BaseModel
from torch import Tensor

from patchkit import tasks
from patchkit.data import Pair
from patchkit.data import group as group_triples
from patchkit.methods import (
    MaskOptions,
    Objective,
    Schedule,
    _acdc_runs,
    learn_mask,
    patch_across,
    patch_sets_across,
    scores_of_sets,
)
from patchkit.methods._bounding import bound
from patchkit.methods._edge_options import EdgeOptions
from patchkit.methods._evaluate_options import EvaluateOptions
from patchkit.methods._node_options import NodeOptions
from patchkit.methods.acdc import acdc
from patchkit.methods.activation_patching import patch_nodes
from patchkit.methods.attribution import attribute
from patchkit.methods.causal_scrubbing import scrub
from patchkit.methods.circuits import run_circuits
from patchkit.methods.diagnostics import BoundOptions
from patchkit.methods.edge_attribution import EdgeMethodName, attribute_edges
from patchkit.methods.edge_patching import patch_edges
from patchkit.methods.evaluate import evaluate
from patchkit.methods.path_patching import patch_paths
from patchkit.methods.verification import verify
from patchkit.model import EdgeGraph, PatchModel
from patchkit.results.circuit import Circuit
from patchkit.runtime import Execution, Group, sharing, started_processes, use_execution
from patchkit.runtime.processes import Group as AnyGroup
from patchkit.studies.binding_hypotheses import BindingOptions, binding_inputs, hypotheses
from patchkit.zoo.load import load

#: Beside `make test`, in a lane of its own.
pytestmark = pytest.mark.slow

_MODEL = "varbind-llama-gqa"


@pytest.fixture(scope="module")
def group() -> Iterator[Group]:
    with started_processes(2) as made:
        yield made


@pytest.fixture(scope="module")
def model() -> PatchModel:
    """In double precision, where batches of other sizes add up to the same."""
    return load(_MODEL, dtype="float64")


@pytest.fixture(scope="module")
def pairs(model: PatchModel) -> list[Pair]:
    """Four of one length, and two shorter ones."""
    drawn = tasks.pairs("variable-binding", model.tokenizer, 60, 0)
    by_length: dict[int, list[Pair]] = {}
    for pair in drawn:
        by_length.setdefault(len(pair.clean_ids), []).append(pair)
    length = min(length for length, found in by_length.items() if len(found) >= 4)
    shorter = [pair for pair in drawn if len(pair.clean_ids) < length]
    return [*shorter[:2], *by_length[length][:4]]


@pytest.fixture
def both(group: Group, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Checks that a call gives in the group what it gives in this process alone."""
    came: list[int] = []
    collect = sharing.Inbox.collect
    monkeypatch.setattr(
        sharing.Inbox, "collect", lambda inbox: [came.append(1) or part for part in collect(inbox)]
    )

    def own(of: AnyGroup, run: int, batches: int) -> Iterator[int]:
        # The main process leaves the others theirs, so that a short run is not over before they have begun.
        for batch in sharing.own_order(batches, of.rank, of.size):
            if batch % of.size == of.rank and sharing.claim(of, run, batch):
                yield batch

    monkeypatch.setattr(sharing, "unclaimed", own)

    def check(call: Callable[[], Any], tolerance: float = 1e-6) -> Any:
        with use_execution(Execution()):
            alone = call()
        assert not came
        with use_execution(Execution(group=group)):
            found = call()
        assert came, "the other process gave nothing"
        came.clear()
        same(found, alone, tolerance)
        return found

    return check


def same(found: Any, expected: Any, tolerance: float, where: str = "result") -> None:
    """Equal but for rounding; what was paid may differ, since each process opens its own batches."""
    if isinstance(expected, Tensor):
        assert found.shape == expected.shape and found.dtype == expected.dtype, where
        known = (
            ~expected.isnan() if expected.is_floating_point() else torch.ones_like(expected, dtype=torch.bool)
        )
        if not expected.is_floating_point():
            assert torch.equal(found, expected), where
        elif bool(known.any()):
            assert torch.equal(found.isnan(), ~known), where
            gap = (found - expected)[known].abs().max() / expected[known].abs().max().clamp(min=1e-3)
            assert gap <= tolerance, f"{where}: {float(gap):.2g}"
    elif isinstance(expected, float):
        near = math.isclose(found, expected, rel_tol=tolerance, abs_tol=tolerance)
        assert near or found == expected or (math.isnan(found) and math.isnan(expected)), (
            f"{where}: {found}, {expected}"
        )
    elif isinstance(expected, Mapping):
        assert found.keys() == expected.keys(), where
        for name in expected:
            same(found[name], expected[name], tolerance, f"{where}.{name}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), where
        for number, (one, other) in enumerate(zip(found, expected, strict=True)):
            same(one, other, tolerance, f"{where}[{number}]")
    elif isinstance(expected, BaseModel) or is_dataclass(expected):
        every = (
            type(expected).model_fields
            if isinstance(expected, BaseModel)
            else [f.name for f in fields(expected)]
        )
        for name in every:
            if name not in ("cost", "forwards", "forward_equivalents"):
                same(getattr(found, name), getattr(expected, name), tolerance, f"{where}.{name}")
    else:
        assert found == expected, f"{where}: {found!r}, {expected!r}"


def test_the_comparison_can_fail() -> None:
    for found, expected in (
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.00001])),
        ({"a": [1.0]}, {"a": [1.00001]}),
        ((1, "a"), (1, "b")),
        (torch.tensor([math.nan]), torch.tensor([1.0])),
    ):
        same(expected, expected, 1e-6)
        with pytest.raises(AssertionError):
            same(found, expected, 1e-6)


def test_nodes(model: PatchModel, pairs: list[Pair], both: Callable[..., Any]) -> None:
    options = NodeOptions(nodes=("z", "mlp_out"), positions="last", layers=(1, 3))
    both(lambda: patch_nodes(model, pairs, options))
    mean = replace(options, ablation="mean")
    both(lambda: patch_nodes(model, pairs[2:], mean, reference=pairs[2:]))


def test_nodes_of_another_model(model: PatchModel, pairs: list[Pair], both: Callable[..., Any]) -> None:
    """Both ways: each process opens the donor that it lacks."""
    early = load(f"{_MODEL}-early", dtype="float64")
    options = NodeOptions(nodes=("z", "mlp_out"), layers=(1, 3))
    found = both(lambda: patch_across(model, early, pairs, options))
    assert float(found.effects[:, found.grid.select(("m1",))].abs().min()) > 1e-3
    both(lambda: patch_across(early, model, pairs, options))
    both(lambda: patch_sets_across(model, early, pairs, [("a1.h0", "m1"), ("z",)]))
    names = tasks.get("variable-binding").trained
    triples = tasks.desiderata("variable-binding", model.tokenizer, 0, 6, 0, names=names).triples()
    held_out = group_triples(triples, "test")
    both(lambda: scores_of_sets(model, held_out, [("a1.h0",), ("m1", "m2")], donor=early))


def test_attribution_its_verification_and_its_bound(
    model: PatchModel, pairs: list[Pair], both: Callable[..., Any]
) -> None:
    options = NodeOptions(nodes=("q", "k", "z"), positions="all")
    scores = both(lambda: attribute(model, pairs, options, "atp-star"))
    checked = both(lambda: verify(model, pairs, scores, options, 4))
    scores = replace(scores, verification=checked)
    both(lambda: bound(model, pairs, scores, options, draws=BoundOptions(min_count=2)))


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("eap", {"options": EdgeOptions(ablation="mean"), "keep_pairs": True}),
        ("eap-ig-inputs", {"options": EdgeOptions(), "steps": 2}),
    ],
)
def test_edge_attribution(
    method: EdgeMethodName,
    more: Mapping[str, Any],
    model: PatchModel,
    pairs: list[Pair],
    both: Callable[..., Any],
) -> None:
    both(lambda: attribute_edges(model, pairs, method=method, **more))


def some_edges(model: PatchModel, each: int) -> Tensor:
    edges = EdgeGraph.of(model.dims).real.clone()
    places = edges.nonzero()
    edges[:] = False
    edges[tuple(places[::each].T)] = True
    return edges


def test_exact_edges_and_paths(model: PatchModel, pairs: list[Pair], both: Callable[..., Any]) -> None:
    edges = some_edges(model, 17)
    both(lambda: patch_edges(model, pairs, edges=edges, keep_pairs=True))
    last = model.dims.n_layers - 1
    both(lambda: patch_paths(model, pairs, ["heads"], [f"a{last}.h0<q>", f"m{last}"]))


def test_circuits_and_their_evaluation(
    model: PatchModel, pairs: list[Pair], both: Callable[..., Any]
) -> None:
    graph = EdgeGraph.of(model.dims)
    circuits = [Circuit(graph, some_edges(model, each)) for each in (2, 3)]
    both(lambda: run_circuits(model, pairs, circuits, EdgeOptions(metric="kl")))
    asked = EvaluateOptions(random=2, completeness=1, candidates=2)
    both(lambda: evaluate(model, pairs, circuits[0].pruned(), evaluation=asked))


def test_acdc(
    model: PatchModel,
    pairs: list[Pair],
    both: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    numbered = iter(("alone", "shared"))

    def search(name: str) -> Any:
        options = EdgeOptions(metric="kl")
        return acdc(model, pairs[:4], options, tau=0.5, max_forwards=8.0, checkpoint=tmp_path / name)

    found = both(lambda: search(next(numbered)))
    assert 0 < int(found.scored.sum()) < found.graph.n_edges
    # What two processes have tried, one need not, though it makes other batches.
    monkeypatch.setattr(_acdc_runs, "circuit_logits", None)
    with use_execution(Execution()):
        same(search("shared"), found, 0.0)


def test_scrubbing(model: PatchModel, both: Callable[..., Any]) -> None:
    asked = BindingOptions(n=10)
    inputs = binding_inputs(model, asked)
    named = hypotheses(EdgeGraph.of(model.dims), ["a1.h0"])
    both(lambda: scrub(model, inputs, next(iter(named.values()))))


@pytest.mark.parametrize(
    ("loss", "more"),
    [
        # Weights that are drawn for every triple, wherever it is.
        ("cross-entropy", {"seeds": (1,), "own_masks": False, "random_sets": 2}),
        ("published", {"seeds": (0,), "components": ("mlp",), "random_sets": 1}),
    ],
)
def test_masks(loss: str, more: dict[str, Any], both: Callable[..., Any]) -> None:
    model = load(_MODEL)
    names = tasks.get("variable-binding").trained
    triples = tasks.desiderata("variable-binding", model.tokenizer, 8, 4, 0, names=names).triples()
    schedule = Schedule(lambdas=(0.02, 0.08), steps=8, steps_after=4, lr=0.1)
    options = MaskOptions(objective=Objective(loss, "l0.5"), schedule=schedule, **more)
    found = both(lambda: learn_mask(model, triples, options), 1e-5)
    assert min(float(values.min()) for values in found.values.values()) < 0.8
