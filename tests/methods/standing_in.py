"""Circuits whose metric is a known function of their edges, in place of runs of a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from patchkit.data import Pair
from patchkit.methods import circuits as running
from patchkit.methods._edge_options import EdgeOptions
from patchkit.methods.circuits import CircuitMetrics
from patchkit.model import PatchModel
from patchkit.model.edges import EdgeGraph
from patchkit.results.circuit import Circuit
from patchkit.results.edge_scores import EdgeMethod, EdgeScores
from tests.comparisons import pair

#: A circuit to its metric on each pair.
Known = Callable[[Circuit], Tensor]

FAMILY = "llama-mha-wide-head"


def model() -> PatchModel:
    """Its sizes are all that is used of it: three layers of four heads."""
    return pair(FAMILY)[0]


GRAPH = EdgeGraph(3, 4, 4, False, 32)


def pairs(count: int) -> list[Pair]:
    return [Pair((3, 5, 7), (4, 5, 7), 4, 6, {}, f"p{number}") for number in range(count)]


def stand_in(monkeypatch: pytest.MonkeyPatch, known: Known) -> list[int]:
    """Puts `known` in place of runs; gives the number of circuits of each call, as they come in."""
    calls: list[int] = []

    def run(
        model: PatchModel,
        pairs: Sequence[Pair],
        circuits: Sequence[Circuit],
        options: EdgeOptions,
        **given: Any,
    ) -> CircuitMetrics:
        calls.append(len(circuits))
        if given["progress"] is not None:
            given["progress"]("anything", len(pairs), len(pairs))
        return CircuitMetrics(
            metric=torch.stack([known(circuit) for circuit in circuits], dim=1).double(),
            clean=known(Circuit.full(GRAPH)).double(),
            corrupt=known(Circuit.empty(GRAPH)).double(),
            cost=float(len(circuits)),
        )

    monkeypatch.setattr(running, "run_circuits", run)
    return calls


def alive(circuit: Circuit, *names: str) -> bool:
    """Whether all these nodes are on a path from the input to the logits."""
    nodes = circuit.pruned().nodes
    return all(bool(nodes[GRAPH.find_sender(name)]) for name in names)


def chain(*heads: str) -> list[str]:
    """Edges input -> head -> logits of each."""
    return [edge for head in heads for edge in (f"input->{head}<v>", f"{head}->logits")]


def scores(
    importance: Tensor, *, per_pair: Tensor | None = None, count: int = 1, **changes: Any
) -> EdgeScores:
    """Scores whose importance is this, as of direction noise."""
    given: dict[str, Any] = {
        "graph": GRAPH,
        "method": EdgeMethod(name="eap"),
        "convention": EdgeOptions().convention,
        "pair_ids": tuple(f"p{number}" for number in range(count)),
        "mean": -importance,
        "mean_abs": importance.abs(),
        "base_metric": torch.zeros(count),
        "source_metric": torch.zeros(count),
        "cost": 1.0,
        "per_pair": None if per_pair is None else -per_pair,
    }
    return EdgeScores(**(given | changes))
