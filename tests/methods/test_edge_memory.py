"""What edge attribution holds beside a forward and its backward: measured, and as the plan says it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from patchkit.data import Pair, read_places, resolve_metric
from patchkit.methods._edge_batch import EdgeBatch
from patchkit.methods._edge_cost import attribution_cost
from patchkit.methods._edge_products import Blocks, SenderChanges, edge_products
from patchkit.methods._edge_replacement import EdgeReplacement
from patchkit.methods._edge_runs import at_base
from patchkit.methods._pair_batch import PairBatch
from patchkit.methods.edge_attribution import attribute_edges
from patchkit.model import EdgeGraph, PatchModel
from patchkit.zoo.load import load
from tests.memory import LiveBytes

#: In the lane of what takes longest.
pytestmark = pytest.mark.nightly

LENGTH = 48


@pytest.fixture(scope="module")
def model() -> PatchModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=64,
    )
    return load(LlamaForCausalLM(config).eval())


def pairs_of(count: int) -> list[Pair]:
    ids = torch.randint(300, (2, count, LENGTH), generator=torch.Generator().manual_seed(0)).tolist()
    return [Pair(tuple(a), tuple(b), 1, 2, {}, str(i)) for i, (a, b) in enumerate(zip(*ids, strict=True))]


def prepared(model: PatchModel, count: int) -> EdgeBatch:
    pairs = pairs_of(count)
    batch = PairBatch.of(model, pairs, read_places("all", pairs).covered, "noise")
    metric = resolve_metric("logit-diff")
    return EdgeBatch(model, EdgeGraph.of(model.dims), batch, metric, EdgeReplacement("resample"))


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("eap", {}),
        ("clean-corrupted", {}),
        ("eap-ig-inputs", {"steps": 5}),
        ("eap", {"grad_drop": True}),
        ("eap", {"qk_fix": True}),
    ],
)
def test_the_estimate_is_near_what_is_held(model: PatchModel, method: str, options: dict[str, Any]) -> None:
    with LiveBytes(collect=True) as held:
        scores = attribute_edges(model, pairs_of(8), method=method, **options)  # type: ignore[arg-type]
    cost = attribution_cost(model.dims, [LENGTH] * 8, scores.method, by_query=False)
    assert cost.passes is not None
    assert 0.75 * held.peak <= cost.bytes + cost.passes <= 1.25 * held.peak, (held.peak, cost)


@pytest.mark.parametrize("pairs", [1, 2, 8])
def test_products_hold_about_one_layer_of_heads(model: PatchModel, pairs: int) -> None:
    """Senders of a few pairs, and receivers of one layer."""
    batch = prepared(model, pairs)
    graph = batch.graph
    with torch.no_grad():
        made = at_base(batch)
    changes = SenderChanges(model, graph, made.own, made.other, batch.real)
    with torch.no_grad(), LiveBytes() as held:
        for _ in edge_products(changes, made.vectors, batch.pairs.cover):
            pass
    blocks = Blocks.of(graph, pairs, LENGTH)
    estimate = 4 * (blocks.numbers(graph, LENGTH) + 3 * blocks.pairs * graph.n_senders * graph.n_receivers)
    assert 0.5 * estimate <= held.peak <= 1.25 * estimate, (held.peak, estimate)
    if pairs == 8:
        # Not the vectors of every sender and of every layer's receivers, as a product in one piece would hold.
        one_layer = 4 * pairs * LENGTH * graph.receivers_a_layer * graph.d_model
        in_one_piece = 4 * pairs * LENGTH * (graph.n_senders + graph.n_receivers) * graph.d_model
        assert held.peak < 2.5 * one_layer and held.peak < in_one_piece / 3, (
            held.peak,
            one_layer,
            in_one_piece,
        )


def test_nothing_is_left_behind(model: PatchModel) -> None:
    """Ten runs hold no more than the first."""
    pairs = pairs_of(2)
    with LiveBytes() as held:
        attribute_edges(model, pairs, method="eap")
        first = held.live
        for _ in range(9):
            attribute_edges(model, pairs, method="eap")
        assert held.live <= 1.05 * first + 4096, (first, held.live)
