"""The circuits that methods' scores select, run on held-out pairs: at the true size, and along MIB's sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from patchkit.data import Pair
from patchkit.methods import run_circuits
from patchkit.model import EdgeGraph, PatchModel
from patchkit.results.circuit import Circuit, top_n
from patchkit.results.curves import FRACTIONS, curve
from patchkit.results.evaluation import Curve
from patchkit.studies._truth_measures import floored
from patchkit.studies._truth_scores import MethodScores


@dataclass(frozen=True, eq=False)
class Chosen:
    """What is run of one method: its circuit at the true size (of nodes or of edges), and one circuit a fraction."""

    at_size: Circuit
    of_nodes: bool
    along: tuple[Circuit, ...]
    asked: tuple[int, ...]


def choose(scores: MethodScores, graph: EdgeGraph, true_nodes: int, true_edges: int) -> Chosen:
    """The top edges by size, pruned of dead ends; of a node method, all edges among its top nodes."""
    sizes = floored(scores.edges[graph.real], scores.scale)
    edges = torch.full(graph.real.shape, torch.nan, dtype=torch.float64)
    edges[graph.real] = sizes
    asked = tuple(max(1, int(fraction * graph.n_edges)) for fraction in FRACTIONS)
    along = tuple(top_n(graph, edges, n, absolute=True).pruned() for n in asked)
    if scores.of_nodes:
        return Chosen(_top_nodes(floored(scores.nodes, scores.scale), graph, true_nodes), True, along, asked)
    return Chosen(top_n(graph, edges, true_edges, absolute=True).pruned(), False, along, asked)


def _top_nodes(sizes: Float[Tensor, " nodes"], graph: EdgeGraph, n: int) -> Circuit:
    order = torch.sort(sizes, descending=True, stable=True).indices[:n]
    # A node without a score is not chosen to fill the circuit up.
    order = order[sizes[order] > 0]
    chosen = torch.zeros(graph.n_senders, dtype=torch.bool)
    chosen[1 + order] = True
    return Circuit.of_nodes(graph, chosen)


@dataclass(frozen=True)
class CircuitResult:
    """What running a method's circuits gave.

    Attributes:
        faithfulness: at the true size; 0 of a circuit that pruning emptied, which is the corrupt run.
        overlap: Jaccard index with the true edges, or nodes.
    """

    faithfulness: float | None
    n_edges: int | None
    overlap: float | None
    curve: Curve | None
    empty: bool


class CircuitRuns:
    """Runs many circuits together, each once, under edge patching and under node patching."""

    def __init__(self, model: PatchModel, pairs: Sequence[Pair]) -> None:
        self.model, self.pairs = model, pairs
        self._wanted: dict[tuple[str, bytes], Circuit] = {}
        self._found: dict[tuple[str, bytes], float | None] = {}

    def want(self, circuit: Circuit, patching: str) -> None:
        """Asks for a circuit; `run` runs it."""
        if not circuit.is_empty:
            self._wanted[_key(circuit, patching)] = circuit

    def run(self) -> None:
        """Runs all that was asked for."""
        for patching in ("edge", "node"):
            keys = [key for key in self._wanted if key[0] == patching and key not in self._found]
            if not keys:
                continue
            found = run_circuits(
                self.model, self.pairs, [self._wanted[key] for key in keys], patching=patching
            )
            clean, corrupt = float(found.clean.double().mean()), float(found.corrupt.double().mean())
            for key, metric in zip(keys, found.metric.double().mean(0).tolist(), strict=True):
                self._found[key] = None if clean == corrupt else (metric - corrupt) / (clean - corrupt)

    def faithfulness(self, circuit: Circuit, patching: str) -> float | None:
        """(circuit - corrupt) / (clean - corrupt) of a circuit that was run; 0 of an empty one."""
        return 0.0 if circuit.is_empty else self._found[_key(circuit, patching)]


def _key(circuit: Circuit, patching: str) -> tuple[str, bytes]:
    return patching, circuit.edges.numpy().tobytes()


def want(runs: CircuitRuns, chosen: Chosen) -> None:
    """Asks for all circuits of a method."""
    runs.want(chosen.at_size, "node" if chosen.of_nodes else "edge")
    for circuit in chosen.along:
        runs.want(circuit, "edge")


def result(
    runs: CircuitRuns,
    chosen: Chosen,
    true_nodes: Bool[Tensor, " nodes"],
    true_edges: Bool[Tensor, "senders receivers"],
) -> CircuitResult:
    """What the runs say of a method's circuits."""
    circuit = chosen.at_size
    found = runs.faithfulness(circuit, "node" if chosen.of_nodes else "edge")
    if chosen.of_nodes:
        ours, theirs = circuit.nodes[1:], true_nodes
    else:
        ours, theirs = circuit.edges, true_edges
    either = int((ours | theirs).sum())
    along = [runs.faithfulness(each, "edge") for each in chosen.along]
    line = curve(
        FRACTIONS,
        chosen.asked,
        [each.n_edges for each in chosen.along],
        along,
        True,
        "top",
        "resample",
        "edge",
    )
    return CircuitResult(
        faithfulness=found,
        n_edges=None if chosen.of_nodes else circuit.n_edges,
        overlap=int((ours & theirs).sum()) / either if either else None,
        curve=line,
        empty=circuit.is_empty,
    )
