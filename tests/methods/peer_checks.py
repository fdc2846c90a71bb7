"""Comparisons with what the EAP-IG repository found, as functions: the tests pass them, and planted mistakes must not.

Its numbers are in `tests/fixtures/eap_ig`; see `scripts/run_eap_ig.py`, and `conventions.json` beside them. It numbers
keys and values by query head; scores are compared in that graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from patchkit.data import Pair
from patchkit.methods import EdgeOptions, attribute_edges, patch_edges, run_circuits
from patchkit.model import EdgeGraph, PatchModel
from patchkit.results.circuit import SELECTIONS, Circuit
from patchkit.zoo.load import load
from tests.comparisons import agree
from tests.methods import peer_cases
from tests.methods.peer_cases import FAMILIES, SETS, STEPS, peer_numbers

TOLERANCE = 2e-5
ABLATIONS = {"patching": "resample", "zero": "zero", "mean-positional": "mean-positional"}
#: The repository's name of a method, and how it is asked for here.
METHODS: dict[str, dict[str, Any]] = {
    "EAP": {"method": "eap"},
    "EAP-IG-inputs": {"method": "eap-ig-inputs", "steps": STEPS},
    "EAP-IG-activations": {"method": "eap-ig-activations", "steps": STEPS, "rule": "repo"},
    "clean-corrupted": {"method": "clean-corrupted"},
    "information-flow-routes": {"method": "ifr"},
}


@cache
def opened(family: str) -> PatchModel:
    module = peer_cases.build(family)
    peer_cases.check_weights(family, module)
    return load(module)


def pairs_of(name: str) -> list[Pair]:
    return [
        Pair(given.clean, given.corrupt, given.answer, given.wrong, id=f"{name} {number}")
        for number, given in enumerate(SETS[name])
    ]


def wide_graph(model: PatchModel) -> EdgeGraph:
    return EdgeGraph.of(model.dims, by_query_head=True)


def by_query_head(model: PatchModel, scores: Any) -> Tensor:
    """Mean effects in the repository's graph."""
    if model.dims.group == 1:
        return scores.mean
    assert scores.by_query is not None, "no scores by query head"
    return scores.by_query[0]


def check_scores(family: str, what: str, found: Tensor, expected: Tensor, compared: Tensor) -> None:
    """Agreement at the edges that are compared, on the scale of the largest of them; the same edges exist."""
    graph = wide_graph(opened(family))
    assert torch.equal(~expected.isnan(), graph.real), f"{what}: the repository has other edges"
    assert torch.equal(~found.isnan(), graph.real), (
        f"{what}: scores at edges that do not exist, or none at some"
    )
    assert float(expected[compared].abs().max()) > 0.1, f"{what}: nothing has an effect"
    agree(found[compared], expected[compared], what, TOLERANCE, floor=1e-12)


def comparable(model: PatchModel, method: str) -> Tensor:
    """Edges at which the repository computes what its method says.

    In EAP-IG-activations on rotary models it does not: the run with interpolated embeddings puts a tensor without
    gradient in their place, and since nothing is added to it before layer 0, the gradients at the queries, keys and
    values of that layer are missing from the average. GPT-2's position embeddings, which have a gradient, hide it.
    """
    graph = wide_graph(model)
    real = graph.real.clone()
    if method == "EAP-IG-activations" and model.arch.position_embed is None:
        real[0, graph.attention_receivers(0)] = False
    return real


def kept(name: str, method: str) -> Sequence[str]:
    """Interventions of a method that the fixture has."""
    prefix = f"{name}/{method}/"
    return [key.removeprefix(prefix) for key in peer_numbers(FAMILIES[0]) if key.startswith(prefix)]


def check_estimates(family: str, name: str, method: str, intervention: str) -> None:
    """One method; where the repository has a defect, that it is there: else edges would be left out for nothing."""
    model, expected = opened(family), peer_numbers(family)[f"{name}/{method}/{intervention}"]
    options = EdgeOptions(ablation=ABLATIONS[intervention])  # type: ignore[arg-type]
    found = by_query_head(model, attribute_edges(model, pairs_of(name), options, **METHODS[method]))
    compared = comparable(model, method)
    check_scores(family, f"{family} {name} {method} {intervention}", found, expected, compared)
    left_out = wide_graph(model).real & ~compared
    # With zeros the embeddings are only scaled, which an RMSNorm takes back: their gradient is nearly zero.
    if left_out.any() and intervention == "patching":
        assert float((found - expected)[left_out].abs().max()) > 1e-2


def check_exact(family: str, name: str, intervention: str) -> None:
    model = opened(family)
    options = EdgeOptions(ablation=ABLATIONS[intervention])  # type: ignore[arg-type]
    scores = patch_edges(model, pairs_of(name), options, by_query=True)
    expected = peer_numbers(family)[f"{name}/exact/{intervention}"]
    what = f"{family} {name} exact {intervention}"
    check_scores(family, what, by_query_head(model, scores), expected, wide_graph(model).real)


def circuits_of(family: str, name: str) -> dict[str, Tensor]:
    prefix = f"{name}/circuit/"
    return {
        key.removeprefix(prefix): edges
        for key, edges in peer_numbers(family).items()
        if key.startswith(prefix)
    }


def check_selection(family: str, name: str) -> None:
    """The repository's own top-n and greedy circuits from its own scores, pruned."""
    graph = wide_graph(opened(family))
    importance = -peer_numbers(family)[f"{name}/EAP/patching"]
    selected = {key: edges for key, edges in circuits_of(family, name).items() if key != "random"}
    assert len(selected) == 5
    for key, expected in selected.items():
        selection, keys, n = key.split("-")
        circuit = SELECTIONS[selection](graph, importance, int(n), absolute=keys == "absolute")
        assert torch.equal(circuit.pruned().edges, expected), f"{family} {name} {key}"


def native(model: PatchModel, edges: Tensor) -> Circuit:
    """A circuit by query head, the same for all heads that share a key or value, in the model's own graph."""
    graph, wide = EdgeGraph.of(model.dims), wide_graph(model)
    chosen = torch.zeros_like(graph.real)
    for layer in range(graph.n_layers):
        for letter in "qkv":
            every = 1 if letter == "q" else model.dims.group
            chosen[:, graph.receivers_of(layer, letter)] = edges[:, wide.receivers_of(layer, letter)][
                :, ::every
            ]
        chosen[:, graph.mlp_receiver(layer)] = edges[:, wide.mlp_receiver(layer)]
    chosen[:, graph.logits] = edges[:, wide.logits]
    circuit = Circuit(graph, chosen)
    assert torch.equal(circuit.by_query_head().edges, edges)
    return circuit


def check_circuits(family: str, name: str, intervention: str) -> None:
    """Circuits by query head, and the one that tells no heads of a group apart also in the model's own graph."""
    model, numbers = opened(family), peer_numbers(family)
    edges = circuits_of(family, name)
    circuits = {key: Circuit(wide_graph(model), each) for key, each in edges.items()}
    options = EdgeOptions(ablation=ABLATIONS[intervention])  # type: ignore[arg-type]
    run = [*circuits.values(), native(model, edges["random"])]
    found = run_circuits(model, pairs_of(name), run, options)
    for column, key in enumerate([*circuits, "random"]):
        what = f"{family} {name} circuit {key} {intervention}"
        agree(found.metric[:, column], numbers[f"{name}/evaluate/{key}/{intervention}"], what, TOLERANCE)
    agree(found.clean, numbers[f"{name}/baseline/clean"], f"{family} {name} clean", TOLERANCE)
    if intervention == "patching":
        agree(found.corrupt, numbers[f"{name}/baseline/corrupted"], f"{family} {name} corrupted", TOLERANCE)
