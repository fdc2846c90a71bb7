"""Trained models, whose logits are large and whose attention is sharp: exact patching and the estimates of it."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from patchkit import tasks
from patchkit.data import Pair, read_places
from patchkit.methods._node_options import NodeOptions
from patchkit.methods.activation_patching import patch_nodes
from patchkit.methods.attribution import METHODS, attribute
from patchkit.model import PatchModel
from patchkit.results.scores import Scores
from patchkit.zoo.load import load
from tests.node_oracle import exact, spread

TASKS = {"varbind-llama": "variable-binding", "varbind-llama-gqa": "variable-binding", "ioi-gpt2": "ioi"}
KINDS = ("q", "k", "v", "z", "mlp_out")


@functools.cache
def material(name: str) -> tuple[PatchModel, PreTrainedModel, tuple[Pair, ...]]:
    """The model, a twin that nnsight never saw, and three short pairs, not of one length."""
    model = load(name)
    kind: Any = type(model.hf)
    twin = kind(model.config).eval()
    twin.load_state_dict(model.hf.state_dict())
    drawn = tasks.pairs(TASKS[name], model.tokenizer, 12, 0)
    pairs = tuple(sorted(drawn, key=lambda pair: len(pair.clean_ids))[:3])
    assert len({len(pair.clean_ids) for pair in pairs}) > 1
    return model, twin, pairs


@functools.cache
def sweep(name: str, positions: str) -> Scores:
    model, _, pairs = material(name)
    return patch_nodes(model, pairs, NodeOptions(nodes=KINDS, positions=positions))


@pytest.mark.parametrize("positions", ["all", "last"])
@pytest.mark.parametrize("name", TASKS)
def test_the_sweep_is_the_oracles(name: str, positions: str) -> None:
    """Logits are up to 20 and effects up to 40, where float32 has six digits and a forward loses one or two: 1e-4."""
    model, twin, pairs = material(name)
    scores = sweep(name, positions)
    nodes = spread(scores.grid, 2)
    for row, pair in enumerate(pairs):
        covered = read_places(positions, pairs).covered[row]
        expected = exact(twin, pair, covered, scores.grid, [[node] for node in nodes])
        gap = (scores.effects[row, nodes] - expected).abs()
        worst = int(gap.argmax())
        assert gap.max() <= 1e-4, f"{scores.grid.name(nodes[worst])} of {pair.id}: {float(gap[worst]):.2g}"
        assert expected.abs().max() > 1


def spearman(one: Tensor, other: Tensor) -> float:
    ranks = torch.stack([values.argsort().argsort().double() for values in (one, other)])
    return float(torch.corrcoef(ranks)[0, 1])


@pytest.mark.parametrize("name", TASKS)
def test_the_estimates_rank_nodes_as_patching_does(name: str) -> None:
    model, _, pairs = material(name)
    exact_sizes = sweep(name, "all").mean_abs()
    for method in METHODS:
        found = attribute(model, pairs, NodeOptions(nodes=KINDS), method)
        assert found.computed.all()
        # 0.95 to 0.99 are measured.
        assert spearman(found.mean_abs(), exact_sizes) > 0.9, method
        layers = model.dims.n_layers
        drops = method in ("atp-graddrop", "atp-star")
        assert found.layer_backwards == (layers * (layers - 1) // 2 if drops else 0)


def test_float64_agrees_to_ten_digits() -> None:
    """That float32 is all that stands between the sweep and the oracle."""
    _, twin, pairs = material("varbind-llama-gqa")
    model = load("varbind-llama-gqa", dtype=torch.float64)
    double: Any = type(twin)(twin.config).double().eval()
    double.load_state_dict(model.hf.state_dict())
    scores = patch_nodes(model, pairs, NodeOptions(nodes=KINDS))
    nodes = spread(scores.grid, 1)
    for row, pair in enumerate(pairs[:2]):
        covered = [tuple(range(len(pair.clean_ids)))]
        expected = exact(double, pair, covered, scores.grid, [[node] for node in nodes])
        assert (scores.effects[row, nodes] - expected).abs().max() < 1e-8
