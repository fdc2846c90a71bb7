"""The test against chance: is the circuit more faithful than random circuits of equal size?

    p = (1 + number of random circuits with |1 - f| at most that of the circuit) / (1 + number of random circuits)

Under edge patching random circuits have the same number of edges, none of them a dead end, and as nearly as that allows
as many into the queries, keys, values and MLP of each layer and into the logits (`_evaluate_sampler`). Under node
patching they have as many heads and as many MLPs. p can be no smaller than 1 / (1 + number).
"""

from __future__ import annotations

import torch
from torch import Tensor

from patchkit.methods._evaluate_bootstrap import faithfulness
from patchkit.methods._evaluate_runs import CircuitRunner
from patchkit.methods._evaluate_sampler import edges_by_stratum, random_circuit
from patchkit.model.edges import EdgeGraph
from patchkit.results.circuit import Circuit
from patchkit.results.evaluation import RandomTest

#: Two distances from 1 closer than this are equal: the same circuit, or another that computes the same.
_ROUNDING = 1e-6


def p_value(found: float, random: list[float]) -> float:
    """p of a circuit's faithfulness among those of random circuits; ties count against it."""
    as_close = sum(abs(1 - each) <= abs(1 - found) + _ROUNDING for each in random)
    return (1 + as_close) / (1 + len(random))


def random_test(
    runner: CircuitRunner, circuit: Circuit, found: float, count: int, generator: torch.Generator
) -> RandomTest:
    """Runs `count` random circuits that match this one.

    Args:
        circuit: pruned, and not empty.
        found: its faithfulness.
    """
    graph = circuit.graph
    if runner.patching == "node":
        drawn = [_random_nodes(circuit, generator) for _ in range(count)]
        heads, mlps = _heads_and_mlps(graph, circuit.nodes)
        matched = (
            f"number of nodes: the input, {int(heads.sum())} heads and {int(mlps.sum())} MLPs, any layers"
        )
    else:
        quotas = edges_by_stratum(circuit)
        drawn = [random_circuit(graph, circuit.n_edges, quotas, generator) for _ in range(count)]
        shares = [
            float(torch.minimum(quotas, edges_by_stratum(each)).sum()) / circuit.n_edges for each in drawn
        ]
        matched = (
            "number of edges, none of them a dead end; and, as nearly as that allows, how many go into the queries, "
            f"keys, values and MLP of each layer and into the logits ({sum(shares) / count:.0%} of the edges on average)"
        )
    means = runner.means(drawn, "random circuits")
    values = [faithfulness(mean, *runner.ends) for mean in means]
    known = [value for value in values if value is not None]
    return RandomTest(
        count=count,
        faithfulness=values,
        n_edges=[each.n_edges for each in drawn],
        matched=matched,
        p_value=p_value(found, known),
    )


def _heads_and_mlps(graph: EdgeGraph, nodes: Tensor) -> tuple[Tensor, Tensor]:
    is_mlp = torch.zeros_like(nodes)
    is_mlp[[graph.mlp_sender(layer) for layer in range(graph.n_layers)]] = True
    is_head = ~is_mlp
    is_head[0] = False
    return nodes & is_head, nodes & is_mlp


def _random_nodes(circuit: Circuit, generator: torch.Generator) -> Circuit:
    graph = circuit.graph
    wanted = _heads_and_mlps(graph, circuit.nodes)
    every = _heads_and_mlps(graph, torch.ones(graph.n_senders, dtype=torch.bool))
    chosen = torch.zeros(graph.n_senders, dtype=torch.bool)
    for kind, among in zip(wanted, every, strict=True):
        numbers = among.nonzero()[:, 0]
        chosen[numbers[torch.randperm(len(numbers), generator=generator)[: int(kind.sum())]]] = True
    return Circuit.of_nodes(graph, chosen)
