"""The comparisons with the EAP-IG repository can fail: plausible mistakes are refused by each of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from torch import Tensor

from patchkit.methods import EdgeOptions, edge_attribution
from patchkit.methods._edge_receivers import _Reader
from patchkit.methods._edge_replacement import edge_replacement
from patchkit.methods._pair_batch import PairBatch
from patchkit.results.circuit import Circuit
from patchkit.tracing import edge_gradients
from tests.methods.peer_checks import (
    METHODS,
    check_circuits,
    check_estimates,
    check_exact,
    check_selection,
    opened,
)

#: Beside `make test`, in a lane of its own.
pytestmark = pytest.mark.slow

FAMILY = "llama-gqa"


def refused(check: Callable[..., None], *case: str) -> None:
    with pytest.raises(AssertionError, match="relative difference|other edges|greedy|top"):
        check(*case)


@pytest.fixture(scope="module", autouse=True)
def opened_before() -> None:
    """Models are opened before anything is broken: validation on load would refuse it before the checks here see it."""
    for family in (FAMILY, "gpt2"):
        opened(family)


def test_without_a_mistake_the_checks_pass() -> None:
    check_estimates(FAMILY, "mixed", "EAP", "patching")
    check_estimates(FAMILY, "mixed", "EAP-IG-inputs", "patching")
    check_estimates(FAMILY, "one-length", "EAP", "mean-positional")
    check_estimates("gpt2", "mixed", "EAP", "zero")
    check_exact(FAMILY, "mixed", "patching")
    check_circuits(FAMILY, "mixed", "patching")
    check_selection("gpt2", "mixed")


def test_clean_and_corrupt_prompts_swapped(monkeypatch: pytest.MonkeyPatch) -> None:
    right = PairBatch.of.__func__  # type: ignore[attr-defined]

    def wrong(cls: type, model: Any, pairs: Any, covered: Any, direction: str) -> PairBatch:
        return right(cls, model, pairs, covered, "denoise" if direction == "noise" else "noise")

    monkeypatch.setattr(PairBatch, "of", classmethod(wrong))
    for method in ("EAP", "EAP-IG-inputs", "information-flow-routes"):
        refused(check_estimates, FAMILY, "mixed", method, "patching")
    refused(check_exact, FAMILY, "mixed", "patching")
    refused(check_circuits, FAMILY, "mixed", "patching")


def test_a_norm_whose_statistics_are_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(self: _Reader, vectors: Tensor, rows: slice) -> None:
        if self.norm is not None:
            vectors.mul_(self.norm.weight.to(vectors))

    monkeypatch.setattr(_Reader, "correct", wrong)
    for family in (FAMILY, "gpt2"):
        for method in ("EAP", "EAP-IG-inputs", "clean-corrupted"):
            refused(check_estimates, family, "mixed", method, "patching")


def test_shared_keys_split_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    right = edge_gradients._Backward._by_query_head

    def wrong(self: Any, layer: int, z_gradient: Tensor) -> tuple[Tensor, Tensor]:
        group = self.model.dims.group
        return tuple(  # type: ignore[return-value]
            each.unflatten(2, (-1, group)).mean(3).repeat_interleave(group, dim=2)
            for each in right(self, layer, z_gradient)
        )

    monkeypatch.setattr(edge_gradients._Backward, "_by_query_head", wrong)
    refused(check_estimates, FAMILY, "mixed", "EAP", "patching")


def test_another_rule_of_the_integral(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "EAP-IG-inputs", METHODS["EAP-IG-inputs"] | {"rule": "midpoint"})
    refused(check_estimates, FAMILY, "mixed", "EAP-IG-inputs", "patching")


def test_positions_counted_with_the_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge_gradients, "position_embedding", lambda model: None)
    refused(check_estimates, "gpt2", "mixed", "EAP", "zero")


def test_means_over_the_clean_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(model: Any, pairs: Any, options: EdgeOptions, reference: Any = None) -> Any:
        return edge_replacement(model, pairs, replace(options, direction="denoise"), reference)

    monkeypatch.setattr(edge_attribution, "edge_replacement", wrong)
    refused(check_estimates, FAMILY, "one-length", "EAP", "mean-positional")


def test_dead_ends_left_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Circuit, "pruned", lambda self: self)
    refused(check_selection, "gpt2", "mixed")


def test_an_edge_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """One edge of many, from the input to the first head's value."""
    right = Circuit.__post_init__

    def wrong(self: Circuit) -> None:
        right(self)
        more = self.edges.clone()
        more[0, self.graph.receivers_of(0, "v").start] ^= True
        object.__setattr__(self, "edges", more)

    monkeypatch.setattr(Circuit, "__post_init__", wrong)
    refused(check_circuits, "gpt2", "mixed", "patching")


def test_keys_for_values(monkeypatch: pytest.MonkeyPatch) -> None:
    right = edge_gradients._Backward._reads

    def wrong(self: Any, layer: int, gradients: Any) -> Any:
        reads = right(self, layer, gradients)
        queries, keys, values = reads.gradients
        return replace(reads, gradients=(queries, values, keys))

    monkeypatch.setattr(edge_gradients._Backward, "_reads", wrong)
    refused(check_estimates, "gpt2", "mixed", "EAP", "patching")
