"""Minimality (Wang et al. 2022, section 4): is every node of the circuit needed?

    |F(C without K and v) - F(C without K)|        large for some K if node v is needed

A node that another makes up for changes nothing while the other is there, so K matters. Tried for every v: no K; random
ones, the same for all nodes; and v's partners, the nodes of the circuit that write to some receiver that v writes to: of
these each alone, and as one set those that hide v most, at most 30 % of them (Prakash et al. 2024, with groups of heads).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from patchkit.methods._evaluate_bootstrap import share
from patchkit.methods._evaluate_completeness import random_subsets, removable
from patchkit.methods._evaluate_options import EvaluateOptions
from patchkit.methods._evaluate_runs import CircuitRunner
from patchkit.results.circuit import Circuit
from patchkit.results.evaluation import Minimality, MinimalNode

#: Share of |clean - corrupt| that a needed node changes, as published.
LIMIT = 0.01
#: Share of its partners that are taken away together.
TOGETHER = 0.3

#: K, and what taking the node away as well changes.
Change = tuple[Tensor, float]


@dataclass(frozen=True, eq=False)
class _Nodes:
    """The nodes whose need is in question.

    Attributes:
        numbers: of the senders.
        partners: of each node, places in `numbers`.
    """

    circuit: Circuit
    numbers: Int[Tensor, " nodes"]
    partners: list[list[int]]

    def set_of(self, *places: int) -> Tensor:
        taken = torch.zeros(self.circuit.graph.n_senders, dtype=torch.bool)
        taken[self.numbers[list(places)]] = True
        return taken


def minimality(
    runner: CircuitRunner, circuit: Circuit, asked: EvaluateOptions, generator: torch.Generator
) -> Minimality:
    """The change that shows each node's need best, of all K tried."""
    numbers = removable(circuit).nonzero()[:, 0]
    nodes = _Nodes(circuit, numbers, _partners(circuit, numbers, asked.candidates))
    if not len(numbers):
        return Minimality(limit=LIMIT, nodes=[])
    tried = [[change] for change in _alone(runner, nodes)]
    for found in (_beside_partners(runner, nodes, tried), _random(runner, nodes, asked.removals, generator)):
        for place, changes in enumerate(found):
            tried[place] += changes
    ends, graph = runner.ends, circuit.graph
    results = []
    for number, changes in zip(numbers.tolist(), tried, strict=True):
        largest = max(abs(change) for _, change in changes)
        # The first of equals, up to rounding: the simplest K.
        taken, change = next(each for each in changes if abs(each[1]) >= (1 - 1e-6) * largest)
        results.append(
            MinimalNode(
                node=graph.sender_name(number),
                change=change,
                share=share(change, *ends),
                removed=[graph.sender_name(other) for other in taken.nonzero()[:, 0].tolist()],
            )
        )
    return Minimality(limit=LIMIT, nodes=results)


def _partners(circuit: Circuit, numbers: Tensor, most: int) -> list[list[int]]:
    """For each node those that share receivers with it, the most first; ties by number."""
    rows = circuit.edges[numbers].double()
    shared = rows @ rows.T
    shared.fill_diagonal_(0)
    order = torch.sort(shared, dim=1, descending=True, stable=True).indices
    return [
        [other for other in line[:most].tolist() if shared[place, other] > 0]
        for place, line in enumerate(order)
    ]


def _means(runner: CircuitRunner, nodes: _Nodes, sets: list[Tensor], label: str) -> Float[Tensor, " sets"]:
    stripped = (runner.without(nodes.circuit, taken) for taken in sets)
    return torch.tensor(runner.means(stripped, f"minimality {label}"), dtype=torch.float64)


def _alone(runner: CircuitRunner, nodes: _Nodes) -> list[Change]:
    places = range(len(nodes.numbers))
    found = _means(runner, nodes, [nodes.set_of(), *map(nodes.set_of, places)], "alone")
    return [(nodes.set_of(), float(found[1 + place] - found[0])) for place in places]


def _random(
    runner: CircuitRunner, nodes: _Nodes, draws: int, generator: torch.Generator
) -> list[list[Change]]:
    """Each K serves all nodes: one that is in it is put back."""
    changes: list[list[Change]] = [[] for _ in nodes.numbers]
    for taken in random_subsets(nodes.set_of(*range(len(nodes.numbers))), draws, generator):
        others = [taken ^ nodes.set_of(place) for place in range(len(nodes.numbers))]
        found = _means(runner, nodes, [taken, *others], "random")
        for place, other in enumerate(others):
            change = float(found[1 + place] - found[0])
            inside = bool(taken[nodes.numbers[place]])
            changes[place].append((other, -change) if inside else (taken, change))
    return changes


def _beside_partners(runner: CircuitRunner, nodes: _Nodes, alone: list[list[Change]]) -> list[list[Change]]:
    whole = float(_means(runner, nodes, [nodes.set_of()], "partners")[0])
    single = [whole + changes[0][1] for changes in alone]
    together = [(place, other) for place, others in enumerate(nodes.partners) for other in others]
    if not together:
        return [[] for _ in nodes.numbers]
    found = _means(runner, nodes, [nodes.set_of(*each) for each in together], "partners")
    changes: list[list[Change]] = [[] for _ in nodes.numbers]
    hiding: list[list[tuple[float, int]]] = [[] for _ in nodes.numbers]
    for (place, other), value in zip(together, found.tolist(), strict=True):
        change = value - single[other]
        changes[place].append((nodes.set_of(other), change))
        gain = abs(change) - abs(alone[place][0][1])
        if gain > 0:
            hiding[place].append((-gain, other))
    sets = []
    for place, found_here in enumerate(hiding):
        most = max(1, int(TOGETHER * len(nodes.partners[place])))
        sets.append([other for _, other in sorted(found_here)[:most]])
    several = [place for place, others in enumerate(sets) if len(others) > 1]
    if several:
        pairs = [nodes.set_of(*sets[place], *extra) for place in several for extra in ((), (place,))]
        before, after = _means(runner, nodes, pairs, "partners").reshape(-1, 2).T.tolist()
        for place, first, second in zip(several, before, after, strict=True):
            changes[place].append((nodes.set_of(*sets[place]), second - first))
    return changes
