"""Random circuits of a given size: grown from the logits backwards, so that none of their edges is a dead end.

Edges drawn at random are nearly always a heap of dead ends, and pruned they are empty: against those every circuit is
better than chance. Here every edge drawn leads to the logits, and a node that got an edge out gets a random edge in, and
so on down to the input, before the next is drawn (random paths, as in Shi et al. 2024, arXiv 2410.13032). What is grown
is its own pruned self and has exactly the number of edges asked for.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from patchkit.model.edges import EdgeGraph
from patchkit.results.circuit import Circuit

#: Times that growing begins anew when no edge is left that would end in the last place.
_ATTEMPTS = 50
#: Share of the edges within reach that may be drawn at once, before those drawn bring others within reach.
_AT_ONCE = 8

Edge = tuple[int, int]


def receiver_strata(graph: EdgeGraph) -> Int[Tensor, " receivers"]:
    """The stratum of each receiver: its layer, and query, key, value or MLP input; that of the logits is the last."""
    strata = torch.empty(graph.n_receivers, dtype=torch.long)
    for layer in range(graph.n_layers):
        for place, letter in enumerate("qkv"):
            strata[graph.receivers_of(layer, letter)] = 4 * layer + place
        strata[graph.mlp_receiver(layer)] = 4 * layer + 3
    strata[graph.logits] = 4 * graph.n_layers
    return strata


def edges_by_stratum(circuit: Circuit) -> Int[Tensor, " strata"]:
    """How many edges a circuit has into each stratum of receivers."""
    strata = receiver_strata(circuit.graph)
    counts = torch.zeros(4 * circuit.graph.n_layers + 1, dtype=torch.long)
    return counts.scatter_add_(0, strata, circuit.edges.sum(0))


def random_circuit(
    graph: EdgeGraph, n: int, quotas: Int[Tensor, " strata"], generator: torch.Generator
) -> Circuit:
    """A random circuit of n edges without dead ends, n between 1 and the number of edges.

    Args:
        quotas: edges into each stratum of receivers that are drawn first; they are kept as far as a circuit without dead
            ends allows. With quotas of 0 all edges within reach are equally likely.
    """
    random = np.random.default_rng(int(torch.randint(1 << 62, (), generator=generator)))
    grown = _Grown(graph, quotas, random)
    for _ in range(_ATTEMPTS):
        grown = _Grown(graph, quotas, random)
        while grown.count < n and grown.grow(n - grown.count):
            pass
        if grown.count == n:
            break
    return Circuit(graph, torch.from_numpy(grown.edges), n)


class _Layout(NamedTuple):
    """A graph as arrays: which edges exist, senders upstream of each receiver, strata, and whose inputs are whose."""

    real: np.ndarray
    upstream: np.ndarray
    strata: np.ndarray
    owner: np.ndarray
    owned: list[np.ndarray]


@lru_cache(maxsize=4)
def _layout(graph: EdgeGraph) -> _Layout:
    owner = graph.owner.numpy()
    return _Layout(
        graph.real.numpy(),
        graph.upstream.numpy(),
        receiver_strata(graph).numpy(),
        owner,
        [np.flatnonzero(row) for row in owner],
    )


class _Reach(NamedTuple):
    """How many edges into each receiver can be drawn, and how likely one into it is, up to a factor."""

    available: np.ndarray
    weights: np.ndarray
    senders: np.ndarray


class _Grown:
    """A circuit while it grows; between two calls of `grow` it has no dead ends."""

    def __init__(self, graph: EdgeGraph, quotas: Tensor, random: np.random.Generator) -> None:
        self.random = random
        self.real, self.upstream, self.strata, self.owner, self.owned = _layout(graph)
        self.quotas = quotas.numpy().astype(np.float64)
        self.edges = np.zeros(self.real.shape, dtype=bool)
        self.count, self.inward = 0, np.zeros(graph.n_receivers, dtype=np.int64)
        #: Senders that have an edge in (the input needs none), and those that have an edge out and not yet one in.
        self.fed = np.zeros(graph.n_senders, dtype=bool)
        self.fed[0] = True
        self.hungry: list[int] = []
        #: Receivers from which an edge on leads to the logits.
        self.open = np.zeros(graph.n_receivers, dtype=bool)
        self.open[graph.logits] = True

    def grow(self, room: int) -> bool:
        """Adds edges, with what feeds them, at most `room`; False where none fits."""
        reach = self._reach(self.open)
        within = int(reach.available[reach.weights > 0].sum())
        wanted = int(self.quotas[np.unique(self.strata[reach.weights > 0])].clip(min=0).sum())
        # Whatever is drawn, each node is fed at most once.
        many = min(room - int((~self.fed).sum()), within // _AT_ONCE, wanted // 2 or within)
        if many > 1:
            for edge in self._draw_many(reach, many):
                self._add(edge)
            self._feed()
            return True
        if not within:
            return False
        before = (self.count, self.quotas.copy(), self.inward.copy(), self.fed.copy(), self.open.copy())
        added = [self._draw(reach)]
        self._add(added[0])
        added += self._feed()
        if len(added) <= room:
            return True
        # Too long a path for the room: an edge from a node that is fed already needs none.
        for edge in added:
            self.edges[edge] = False
        self.count, self.quotas, self.inward, self.fed, self.open = before
        near = self._reach(self.open, self.fed)
        if not near.weights.any():
            return False
        self._add(self._draw(near))
        return True

    def _add(self, edge: Edge) -> None:
        sender, receiver = edge
        self.edges[edge] = True
        self.count += 1
        self.inward[receiver] += 1
        self.quotas[self.strata[receiver]] -= 1
        self.open[self.owned[sender]] = True
        if not self.fed[sender] and sender not in self.hungry:
            self.hungry.append(sender)

    def _feed(self) -> list[Edge]:
        """Gives every node with an edge out an edge in; the nodes nearest to the logits first."""
        added: list[Edge] = []
        while self.hungry:
            node = max(self.hungry)
            self.hungry.remove(node)
            self.fed[node] = True
            if self.inward[self.owned[node]].any():
                # A key or value shared with another head has one already.
                continue
            mine = np.zeros_like(self.open)
            mine[self.owned[node]] = True
            added.append(self._draw(self._reach(mine)))
            self._add(added[-1])
        return added

    def _reach(self, receivers: np.ndarray, senders: np.ndarray | None = None) -> _Reach:
        """The edges into some receivers that are not drawn yet, from some senders.

        Strata are as likely as what is left of their quotas, the edges of each alike. A node that is not fed is drawn
        only if its own inputs have some quota left. Where that leaves nothing, all edges are alike.
        """
        wanting = self.quotas.clip(min=0)[self.strata]
        if senders is None:
            likely = self.fed | self.owner[:, wanting > 0].any(1)
            likely[self.hungry] = True
            reach = self._weighted(receivers, likely, wanting)
            if reach.weights.any():
                return reach
            senders = np.ones_like(self.fed)
        reach = self._weighted(receivers, senders, wanting)
        return reach if reach.weights.any() else reach._replace(weights=reach.available.astype(np.float64))

    def _weighted(self, receivers: np.ndarray, senders: np.ndarray, wanting: np.ndarray) -> _Reach:
        before = np.concatenate([[0], senders.cumsum()])
        # Every sender that has an edge out is among the senders: it is fed, or about to be.
        available = np.where(receivers, before[self.upstream] - self.inward, 0)
        in_stratum = np.bincount(self.strata, available, minlength=len(self.quotas))
        return _Reach(available, wanting * available / in_stratum.clip(min=1)[self.strata], senders)

    def _draw(self, reach: _Reach) -> Edge:
        sums = reach.weights.cumsum()
        receiver = int(np.searchsorted(sums, self.random.random() * sums[-1], side="right"))
        column = reach.senders & self.real[:, receiver] & ~self.edges[:, receiver]
        return int(self.random.choice(np.flatnonzero(column))), receiver

    def _draw_many(self, reach: _Reach, count: int) -> list[Edge]:
        """Some edges, without replacement: the first of as many clocks, each running at its edge's weight."""
        among = self.real & ~self.edges & reach.senders[:, None] & (reach.weights > 0)
        senders, receivers = among.nonzero()
        rates = (reach.weights / reach.available.clip(min=1))[receivers]
        order = np.argpartition(self.random.standard_exponential(len(rates)) / rates, count - 1)[:count]
        return list(zip(senders[order].tolist(), receivers[order].tolist(), strict=True))
