"""The comparisons of edge attribution are able to fail: mistakes that give plausible, wrong numbers are caught."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from patchkit.methods import _edge_activation_paths, _edge_drops, _edge_products, _edge_receivers, _edge_runs
from patchkit.methods._edge_products import SenderChanges
from patchkit.methods._edge_receivers import LayerVectors
from patchkit.methods._pair_batch import PairBatch
from patchkit.model import Norm
from patchkit.tracing import edge_gradients, senders
from tests.comparisons import pair
from tests.edge_gradient_oracle import check_by_query, check_edges
from tests.node_oracle import LONG, SHORT

#: Beside `make test`, in a lane of its own.
pytestmark = pytest.mark.slow

PAIRS = [LONG, SHORT]


def refused(check: Callable[..., Any], *args: Any, **options: Any) -> None:
    with pytest.raises(AssertionError, match="relative difference|NaN where"):
        check(*args, **options)


@pytest.fixture(scope="module", autouse=True)
def opened() -> None:
    """Models are opened before anything is broken: validation on load would refuse it before the checks here see it."""
    for family in ("llama-gqa", "gpt2", "gemma2-post-norms-softcap", "neox-parallel", "qwen2-biases"):
        pair(family, torch.float64)


def test_without_a_mistake_the_checks_pass() -> None:
    for family in ("llama-gqa", "gpt2", "gemma2-post-norms-softcap", "neox-parallel", "qwen2-biases"):
        check_edges(family, PAIRS, "eap")
    check_by_query("llama-gqa", PAIRS, "eap")


def test_the_norms_scale_taken_for_constant(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frozen statistics: no gradient through the scale."""
    right = _edge_receivers._Reader.correct

    def wrong(self: Any, vectors: Tensor, rows: slice) -> None:
        right(replace(self, units=[], alongs=[]), vectors, rows)

    monkeypatch.setattr(_edge_receivers._Reader, "correct", wrong)
    refused(check_edges, "llama-gqa", PAIRS, "eap")


def test_the_mean_of_a_layer_norm_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    right = _edge_receivers._Reader.correct

    def wrong(self: Any, vectors: Tensor, rows: slice) -> None:
        right(replace(self, means=[]), vectors, rows)

    monkeypatch.setattr(_edge_receivers._Reader, "correct", wrong)
    check_edges("llama-gqa", PAIRS, "eap")
    refused(check_edges, "gpt2", PAIRS, "eap")


def test_biases_left_in_the_projection(monkeypatch: pytest.MonkeyPatch) -> None:
    """W_h (w u) is what the projection gives without its bias."""
    right = LayerVectors._add_normed

    def wrong(self: LayerVectors, norm: Norm, gradients: Any, reads: Any, weight: float) -> None:
        maps, self.maps = self.maps, [each._replace(bias=None) for each in self.maps]
        right(self, norm, gradients, reads, weight)
        self.maps = maps

    monkeypatch.setattr(LayerVectors, "_add_normed", wrong)
    refused(check_edges, "qwen2-biases", PAIRS, "eap")


def test_heads_add_up_behind_a_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(model: Any, layer: int, own: Tensor, other: Tensor) -> Tensor:
        return senders.head_outputs(model, layer, other - own)

    monkeypatch.setattr(_edge_products, "contributions", wrong)
    check_edges("llama-gqa", PAIRS, "eap")
    refused(check_edges, "gemma2-post-norms-softcap", PAIRS, "eap")


def test_source_and_base_swapped(monkeypatch: pytest.MonkeyPatch) -> None:
    right = PairBatch.of.__func__  # type: ignore[attr-defined]

    def wrong(cls: type, model: Any, pairs: Any, covered: Any, direction: str) -> PairBatch:
        return right(cls, model, pairs, covered, "denoise" if direction == "noise" else "noise")

    monkeypatch.setattr(PairBatch, "of", classmethod(wrong))
    refused(check_edges, "llama-gqa", PAIRS, "eap")
    refused(check_edges, "llama-gqa", PAIRS, "eap-ig-inputs")


def test_a_parallel_mlp_that_reads_its_layers_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    from patchkit.model import EdgeGraph

    right = EdgeGraph.of.__func__  # type: ignore[attr-defined]

    def wrong(cls: type, dims: Any, **options: Any) -> EdgeGraph:
        return replace(right(cls, dims, **options), parallel=False)

    monkeypatch.setattr(EdgeGraph, "of", classmethod(wrong))
    # The graph of the scores is wrong too, so that the check is made with the true one's edges.
    with pytest.raises(AssertionError):
        scores = check_edges("neox-parallel", PAIRS, "eap")
        assert scores.graph.parallel


def test_keys_of_another_group(monkeypatch: pytest.MonkeyPatch) -> None:
    right = edge_gradients._Backward._to_projection

    def wrong(self: Any, letter: str, layer: int, cotangent: Tensor) -> Tensor:
        return right(self, letter, layer, cotangent.roll(1, dims=2))

    monkeypatch.setattr(edge_gradients._Backward, "_to_projection", wrong)
    refused(check_by_query, "llama-gqa", PAIRS, "eap")


def test_a_group_split_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scores of a shared key, halved: sums over the group are right, and every head's own is wrong."""
    right = edge_gradients._Backward._to_projection

    def wrong(self: Any, letter: str, layer: int, cotangent: Tensor) -> Tensor:
        found = right(self, letter, layer, cotangent)
        return found.unflatten(2, (-1, 2)).mean(3, keepdim=True).expand(-1, -1, -1, 2, -1).flatten(2, 3)

    monkeypatch.setattr(edge_gradients._Backward, "_to_projection", wrong)
    check_edges("llama-gqa", PAIRS, "eap")
    refused(check_by_query, "llama-gqa", PAIRS, "eap")


def test_padding_that_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a shorter prompt beside a longer one tells."""
    right = SenderChanges.block

    def wrong(self: SenderChanges, first: int, last: int, rows: slice) -> Tensor:
        return right(replace(self, real=torch.ones_like(self.real)), first, last, rows) + 1e-3

    monkeypatch.setattr(SenderChanges, "block", wrong)
    refused(check_edges, "llama-gqa", PAIRS, "eap")


def test_the_integral_from_the_other_end(monkeypatch: pytest.MonkeyPatch) -> None:
    right = _edge_runs.edge_run

    def wrong(model: Any, batch: Any, metric: Any, *, start: Any = None, **options: Any) -> Any:
        return right(model, batch, metric, start=None if start is None else 0.9 * start, **options)

    monkeypatch.setattr(_edge_runs, "edge_run", wrong)
    refused(check_edges, "llama-gqa", PAIRS, "eap-ig-inputs")


def test_positions_interpolated_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """GPT-2 adds positions after the token embedding; added twice they are as good as interpolated."""
    right = edge_gradients.position_embedding

    def wrong(model: Any) -> Any:
        placed = right(model)
        return None if placed is None else 2 * placed

    monkeypatch.setattr(edge_gradients, "position_embedding", wrong)
    refused(check_edges, "gpt2", PAIRS, "eap-ig-inputs")


def test_a_path_through_the_whole_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Receivers that are not downstream of the sender would get its scores."""
    right = _edge_activation_paths.pushed

    def wrong(batch: Any, run: Any, change: Tensor, real: Tensor) -> Tensor:
        return right(batch, run, change, real) * 1.5

    monkeypatch.setattr(_edge_activation_paths, "pushed", wrong)
    refused(check_edges, "llama-gqa", [SHORT], "eap-ig-activations")


def test_drops_averaged_over_one_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    right = _edge_drops.mean_over_drops

    def wrong(scores: list[Tensor], weights: list[int]) -> tuple[Tensor, Tensor]:
        signed, magnitude = right(scores, weights)
        factor = sum(weights) / (sum(weights) + 1)
        return signed * factor, magnitude * factor

    monkeypatch.setattr(_edge_drops, "mean_over_drops", wrong)
    refused(check_edges, "gpt2", [SHORT], "eap", grad_drop=True)


def test_sizes_of_means_over_drops(monkeypatch: pytest.MonkeyPatch) -> None:
    """|mean| where the mean of |.| is meant."""
    right = _edge_drops.mean_over_drops

    def wrong(scores: list[Tensor], weights: list[int]) -> tuple[Tensor, Tensor]:
        signed, _ = right(scores, weights)
        return signed, signed.abs()

    monkeypatch.setattr(_edge_drops, "mean_over_drops", wrong)
    refused(check_edges, "gpt2", [SHORT], "eap", grad_drop=True)


def test_the_fix_with_the_other_kinds_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """Patched queries take the place of patched keys."""
    right = _edge_drops.query_effects

    def wrong(patched: Tensor, queries: Tensor, keys: Tensor, attention: Any) -> Any:
        return right(2 * patched - queries, queries, keys, attention)

    monkeypatch.setattr(_edge_drops, "query_effects", wrong)
    refused(check_edges, "llama-gqa", [SHORT], "eap", qk_fix=True)
