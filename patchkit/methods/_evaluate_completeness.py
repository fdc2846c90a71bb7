"""Completeness (Wang et al. 2022, section 4): take nodes K away from the circuit C and from the whole model M alike.

    |F(C without K) - F(M without K)|        small for every K if the circuit lacks nothing that the model uses

A faithful circuit may still be incomplete: where two heads do the same and the circuit has one of them, taking that one
away ruins the circuit and not the model. K is drawn at random, and built greedily to find the worst.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from patchkit.methods._evaluate_bootstrap import share
from patchkit.methods._evaluate_options import EvaluateOptions
from patchkit.methods._evaluate_runs import CircuitRunner
from patchkit.results.circuit import Circuit
from patchkit.results.evaluation import Completeness, Removal

#: Nodes of the greedy set at the most, as published.
GREEDY_NODES = 10


def removable(circuit: Circuit) -> Bool[Tensor, " senders"]:
    """Heads and MLPs of the circuit: without the input there is no prompt."""
    nodes = circuit.nodes.clone()
    nodes[0] = False
    return nodes


def random_subsets(
    nodes: Bool[Tensor, " senders"], draws: int, generator: torch.Generator
) -> list[Bool[Tensor, " senders"]]:
    """Subsets of some nodes, of sizes drawn log-uniformly from 1 to all.

    With every node in at even odds, half of a large circuit goes at once, which breaks model and circuit alike and tells
    nothing; here half of the draws take fewer than the square root.
    """
    numbers = nodes.nonzero()[:, 0]
    found = []
    for _ in range(draws):
        spread = math.log(len(numbers) + 1) * float(torch.rand((), generator=generator))
        size = min(len(numbers), math.floor(math.exp(spread)))
        subset = torch.zeros_like(nodes)
        subset[numbers[torch.randperm(len(numbers), generator=generator)[:size]]] = True
        found.append(subset)
    return found


def completeness(
    runner: CircuitRunner, circuit: Circuit, asked: EvaluateOptions, generator: torch.Generator
) -> Completeness:
    """Random sets K, then the greedy one, each step of it a removal of its own, from the empty K on.

    A greedy step adds the node that widens the gap most, and the last is the one before no node does.
    """
    nodes, whole = removable(circuit), Circuit.full(circuit.graph)
    graph = circuit.graph

    def gaps(sets: list[Tensor], label: str) -> Float[Tensor, "sets two"]:
        both = (runner.without(each, taken) for each in (circuit, whole) for taken in sets)
        return torch.tensor(runner.means(both, label), dtype=torch.float64).reshape(2, -1).T

    def removal(taken: Tensor, how: str, found: Tensor) -> Removal:
        names = [graph.sender_name(number) for number in taken.nonzero()[:, 0].tolist()]
        return Removal(
            nodes=names,
            how="random" if how == "random" else "greedy",
            circuit_metric=float(found[0]),
            model_metric=float(found[1]),
        )

    removals: list[Removal] = []
    if bool(nodes.any()):
        sets = random_subsets(nodes, asked.completeness, generator)
        found = gaps(sets, "completeness random")
        removals += [removal(taken, "random", each) for taken, each in zip(sets, found, strict=True)]
    taken = torch.zeros_like(nodes)
    best = gaps([taken], "completeness greedy")[0]
    removals.append(removal(taken, "greedy", best))
    while int(taken.sum()) < GREEDY_NODES and bool((left := nodes & ~taken).any()):
        numbers = left.nonzero()[:, 0]
        if len(numbers) > asked.candidates:
            numbers = numbers[torch.randperm(len(numbers), generator=generator)[: asked.candidates]]
            numbers = numbers.sort().values
        tried = [taken | (torch.arange(len(nodes)) == number) for number in numbers]
        found = gaps(tried, "completeness greedy")
        widest = int((found[:, 0] - found[:, 1]).abs().argmax())
        if not float((found[widest, 0] - found[widest, 1]).abs()) > float((best[0] - best[1]).abs()):
            break
        taken, best = tried[widest], found[widest]
        removals.append(removal(taken, "greedy", best))
    worst = max(each.gap for each in removals)
    return Completeness(removals=removals, worst=worst, worst_share=share(worst, *runner.ends))
