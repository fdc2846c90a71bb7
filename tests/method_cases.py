"""Every method and every node kind once, small: what is run on a model here, and on the same model where it is hosted.

`cases(local)` gives them by name; a case takes the model that it runs on, and what it returns is compared with `gap`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor

from patchkit import tasks
from patchkit.data import Pair
from patchkit.methods import MaskOptions, Objective, Schedule, learn_mask
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
from patchkit.methods.edge_attribution import attribute_edges
from patchkit.methods.edge_patching import patch_edges
from patchkit.methods.evaluate import evaluate
from patchkit.methods.path_patching import patch_paths
from patchkit.methods.verification import verify
from patchkit.model import KINDS, EdgeGraph, PatchModel
from patchkit.results.circuit import Circuit
from patchkit.studies.binding_hypotheses import BindingOptions, binding_inputs, hypotheses

Case = Callable[[PatchModel], Any]
#: What was paid is not the same where batches are opened anew.
_PAID = ("cost", "forwards", "forward_equivalents")


def pairs_of(model: PatchModel, count: int = 3) -> list[Pair]:
    """Pairs of the model's own task, of one length."""
    drawn = tasks.pairs("variable-binding", model.tokenizer, 60, 0)
    by_length: dict[int, list[Pair]] = {}
    for pair in drawn:
        by_length.setdefault(len(pair.clean_ids), []).append(pair)
    return next(found for _, found in sorted(by_length.items()) if len(found) >= count)[:count]


def cases(local: PatchModel) -> dict[str, Case]:
    """By name, in the order of the table. Inputs are made once, from the model that is here."""
    pairs, two = pairs_of(local), pairs_of(local)[:2]
    graph = EdgeGraph.of(local.dims)
    some, fewer = _some_edges(graph, 3), _some_edges(graph, 41)
    circuits = [Circuit(graph, some).pruned(), Circuit(graph, _some_edges(graph, 2)).pruned()]
    last = local.dims.n_layers - 1
    heads = NodeOptions(nodes=("q", "k", "v", "z", "mlp_out"))
    kinds = NodeOptions(nodes=("q", "k", "z"), positions="all")
    drawn = BoundOptions(min_count=2)
    inputs = binding_inputs(local, BindingOptions(n=10))
    hypothesis = next(iter(hypotheses(graph, ["a1.h0"]).values()))
    found: dict[str, Case] = {}
    for kind in KINDS:
        found[f"patch {kind}"] = lambda model, kind=kind: patch_nodes(model, two, NodeOptions(nodes=(kind,)))
    for ablation in ("mean", "zero"):
        options = NodeOptions(nodes=("z",), ablation=ablation)
        found[f"patch, {ablation}"] = lambda model, options=options: patch_nodes(
            model, pairs, options, reference=pairs if options.ablation == "mean" else None
        )
    for method in ("atp", "atp-qk", "atp-graddrop", "atp-star"):
        found[f"attribute, {method}"] = lambda model, method=method: attribute(model, pairs, heads, method)
    scores = attribute(local, pairs, kinds, "atp-star")
    found["verify"] = lambda model: verify(model, pairs, scores, kinds, 4)
    found["bound"] = lambda model: bound(model, pairs, scores, kinds, draws=drawn)
    for method in ("eap", "eap-ig-inputs", "eap-ig-activations", "clean-corrupted", "ifr"):
        found[f"edges, {method}"] = lambda model, method=method: attribute_edges(model, two, method=method)
    found["edges, exact"] = lambda model: patch_edges(model, two, edges=fewer, keep_pairs=True)
    found["edges, acdc"] = lambda model: acdc(model, two, EdgeOptions(metric="kl"), tau=0.5, max_forwards=4.0)
    found["paths"] = lambda model: patch_paths(model, two, ["heads"], [f"a{last}.h0<q>", f"m{last}"])
    found["circuits"] = lambda model: run_circuits(model, pairs, circuits, EdgeOptions(metric="kl"))
    found["evaluate"] = lambda model: evaluate(
        model, two, circuits[0], evaluation=EvaluateOptions(random=2, completeness=1, candidates=2)
    )
    found["scrub"] = lambda model: scrub(model, inputs, hypothesis)
    for loss, sparsity in (
        ("cross-entropy", "l0.5"),
        ("published", "l0.5"),
        ("cross-entropy", "hard-concrete"),
    ):
        chosen = _mask(Objective(loss, sparsity))
        found[f"mask, {loss}, {sparsity}"] = lambda model, options=chosen: learn_mask(
            model, _triples(local), options
        )
    return found


def _some_edges(graph: EdgeGraph, each: int) -> Tensor:
    places = graph.real.nonzero()[::each]
    edges = torch.zeros_like(graph.real)
    edges[tuple(places.T)] = True
    return edges


def _triples(model: PatchModel) -> Any:
    names = tasks.get("variable-binding").trained
    return tasks.desiderata("variable-binding", model.tokenizer, 8, 4, 0, names=names).triples()


def _mask(objective: Objective) -> MaskOptions:
    lambdas = (0.02, 0.08) if objective.is_direct else (0.2,)
    schedule = Schedule(lambdas=lambdas, steps=4, steps_after=2, lr=0.1)
    return MaskOptions(objective=objective, schedule=schedule, seeds=(1,), own_masks=False, random_sets=2)


def gap(found: Any, expected: Any) -> float:
    """The largest difference of two results anywhere, of numbers as a part of the largest beside them; infinite where
    they differ in anything but numbers."""
    if isinstance(expected, Tensor):
        return _of_tensors(found, expected)
    if isinstance(expected, bool) or not isinstance(expected, float | int | Mapping | list | tuple):
        if isinstance(expected, BaseModel) or is_dataclass(expected):
            names = (
                list(type(expected).model_fields)
                if isinstance(expected, BaseModel)
                else [field.name for field in fields(expected)]
            )
            return max(
                [gap(getattr(found, n), getattr(expected, n)) for n in names if n not in _PAID] + [0.0]
            )
        return 0.0 if found == expected else math.inf
    if isinstance(expected, float | int):
        if found == expected or (math.isnan(found) and math.isnan(expected)):
            return 0.0
        return abs(found - expected) / max(1.0, abs(expected))
    if isinstance(expected, Mapping):
        if list(found) != list(expected):
            return math.inf
        return max([gap(found[name], expected[name]) for name in expected if name not in _PAID] + [0.0])
    if len(found) != len(expected):
        return math.inf
    return max([gap(one, other) for one, other in zip(found, expected, strict=True)] + [0.0])


def _of_tensors(found: Tensor, expected: Tensor) -> float:
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return math.inf
    if not expected.is_floating_point():
        return 0.0 if torch.equal(found, expected) else math.inf
    if not torch.equal(found.isnan(), expected.isnan()):
        return math.inf
    known = ~expected.isnan()
    if not bool(known.any()):
        return 0.0
    return float((found - expected)[known].abs().max() / expected[known].abs().max().clamp(min=1e-3))
