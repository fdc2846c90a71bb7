"""A circuit: a set of edges of a graph, as one boolean matrix; how it is selected from scores, and pruned.

Scores here are **importances**: higher = the edge helps the behaviour more. An effect has the contract's sign (a helping
edge lowers the metric when the clean run is corrupted), so `EdgeScores.importance` turns it round where it must be.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from patchkit.errors import InputError
from patchkit.model.edges import EdgeGraph
from patchkit.results import _circuit_files as files
from patchkit.results.query_heads import by_query_graph, native_receivers


@dataclass(frozen=True, eq=False)
class Circuit:
    """Some edges of a graph.

    Attributes:
        graph: senders and receivers, and how they are numbered.
        edges: which edges are in it; none that the graph does not have.
        requested: how many edges were asked for before pruning; None where that means nothing.
    """

    graph: EdgeGraph
    edges: Bool[Tensor, "senders receivers"] = field(repr=False)
    requested: int | None = None

    def __post_init__(self) -> None:
        shape = (self.graph.n_senders, self.graph.n_receivers)
        if tuple(self.edges.shape) != shape or self.edges.dtype != torch.bool:
            raise InputError(
                f"a circuit of this graph is a boolean mask of shape {list(shape)} (senders, receivers); found "
                f"{self.edges.dtype} of shape {list(self.edges.shape)}"
            )
        object.__setattr__(self, "edges", self.edges.detach().cpu())
        unreal = self.edges & ~self.graph.real
        if bool(unreal.any()):
            sender, receiver = unreal.nonzero()[0].tolist()
            raise InputError(
                f"edge {self.graph.edge_name(sender, receiver)} is in the circuit, but the graph has no such edge"
            )

    @classmethod
    def full(cls, graph: EdgeGraph) -> Circuit:
        """Every edge."""
        return cls(graph, graph.real.clone(), graph.n_edges)

    @classmethod
    def empty(cls, graph: EdgeGraph) -> Circuit:
        return cls(graph, torch.zeros_like(graph.real), 0)

    @classmethod
    def of_names(cls, graph: EdgeGraph, names: Iterable[str]) -> Circuit:
        """The circuit of these edges; InputError for a name that is none of the graph's."""
        return cls(graph, graph.find_edges(names))

    @classmethod
    def of_nodes(cls, graph: EdgeGraph, nodes: Bool[Tensor, " senders"]) -> Circuit:
        """All edges among some nodes, the input and the logits: what node patching compares with."""
        _check_nodes(graph, nodes)
        kept = nodes.clone()
        kept[0] = True
        into = (kept.double() @ graph.owner.double()) > 0
        into[graph.logits] = True
        return cls(graph, graph.real & kept[:, None] & into)

    @property
    def n_edges(self) -> int:
        return int(self.edges.sum())

    @property
    def is_empty(self) -> bool:
        return not bool(self.edges.any())

    @property
    def nodes(self) -> Bool[Tensor, " senders"]:
        """Which senders are in it: those with an edge out."""
        return self.edges.any(1)

    @property
    def node_names(self) -> list[str]:
        return [self.graph.sender_name(sender) for sender in self.nodes.nonzero()[:, 0].tolist()]

    def names(self) -> list[str]:
        """Names of its edges, by sender and then by receiver."""
        return [self.graph.edge_name(*edge) for edge in self.edges.nonzero().tolist()]

    def pruned(self) -> Circuit:
        """Without dead ends: edges and nodes that no path from the input to the logits goes through, to a fixed point.

        A head or MLP needs an edge in (a head: at its query, key or value) and an edge out; an edge needs both its ends.
        The input needs no edge in, the logits none out. With grouped KV heads an edge into a shared key or value stays as
        long as one query head of the group does.
        """
        edges, owner = self.edges.clone(), self.graph.owner
        while True:
            inward = (owner & edges.any(0)).any(1)
            inward[0] = True
            nodes = inward & edges.any(1)
            into = (owner & nodes[:, None]).any(0)
            into[self.graph.logits] = True
            kept = edges & nodes[:, None] & into
            if torch.equal(kept, edges):
                return Circuit(self.graph, edges, self.requested)
            edges = kept

    def without(self, nodes: Bool[Tensor, " senders"]) -> Circuit:
        """Without the edges out of some nodes, and without those into inputs that only such nodes own."""
        _check_nodes(self.graph, nodes)
        owner = self.graph.owner
        orphaned = owner.any(0) & ~(owner & ~nodes[:, None]).any(0)
        return Circuit(self.graph, self.edges & ~nodes[:, None] & ~orphaned)

    def by_query_head(self) -> Circuit:
        """The same circuit in the graph by query head: an edge into a shared key or value goes to each head of its group.

        Membership is all that is copied; scores cannot be.
        """
        wide = by_query_graph(self.graph)
        return Circuit(wide, self.edges[:, native_receivers(self.graph)], self._requested_of(wide))

    def by_kv_head(self, n_kv_heads: int) -> Circuit:
        """The same circuit in the graph with one key and one value receiver a KV head.

        Raises:
            InputError: a sender has an edge into one query head's key or value and none into another's of its group,
                which no such circuit can say.
        """
        native = replace(self.graph, n_kv_heads=n_kv_heads)
        if native == self.graph:
            return self
        columns = native_receivers(native)
        edges = torch.zeros(native.real.shape, dtype=torch.int).index_add_(1, columns, self.edges.int()) > 0
        uneven = (edges[:, columns] != self.edges).nonzero()
        if len(uneven):
            sender, receiver = uneven[0].tolist()
            raise InputError(
                f"edge {self.graph.edge_name(sender, receiver)} is not in the circuit, but the same edge into another "
                f"query head of its group is, and the heads of a group share their keys and values; found "
                f"{len(uneven)} such edges. Evaluate the circuit by query head"
            )
        return Circuit(native, edges, self._requested_of(native))

    def _requested_of(self, graph: EdgeGraph) -> int | None:
        """How many edges were asked for, where the other graph counts edges alike."""
        return self.requested if graph == self.graph else None

    def save(self, directory: Path | str) -> None:
        """Writes `circuit.json`, and `circuit.safetensors` where there are too many edges to name them one by one.

        Raises:
            RunError: the directory cannot be written to.
        """
        files.save_circuit(Path(directory), self.graph, self.edges, self.requested)

    @classmethod
    def load(cls, directory: Path | str) -> Circuit:
        """Reads what `save` wrote.

        Raises:
            InputError: a file is missing or malformed, or its edges are not those of its graph.
        """
        return cls(*files.load_circuit(Path(directory)))


def top_n(
    graph: EdgeGraph, importance: Float[Tensor, "senders receivers"], n: int, *, absolute: bool
) -> Circuit:
    """The n edges of the highest importance, or of the largest |importance|; not pruned. Ties by number.

    Raises:
        InputError: n is not between 0 and the number of edges, or an edge has no score.
    """
    keys = _keys(graph, importance, absolute)
    _check_size(graph, n)
    flat = torch.sort(keys.flatten(), descending=True, stable=True).indices[:n]
    chosen = torch.zeros(keys.numel(), dtype=torch.bool)
    chosen[flat] = True
    return Circuit(graph, chosen.reshape(keys.shape), n)


def threshold(
    graph: EdgeGraph, importance: Float[Tensor, "senders receivers"], tau: float, *, absolute: bool
) -> Circuit:
    """Every edge whose importance (or its absolute value) is at least tau; not pruned."""
    keys = _keys(graph, importance, absolute)
    chosen = (keys >= tau) & graph.real
    return Circuit(graph, chosen, int(chosen.sum()))


def greedy(
    graph: EdgeGraph, importance: Float[Tensor, "senders receivers"], n: int, *, absolute: bool
) -> Circuit:
    """n edges from the logits backwards: always the best edge into a node that is in already (Hanna et al. 2024).

    Every edge chosen leads to the logits; those whose sender got no edge in are left to pruning. With fewer than n edges
    within reach all of these are taken.
    """
    keys = _keys(graph, importance, absolute)
    _check_size(graph, n)
    # Of equal keys the first sender comes first, as in the heap of all edges.
    ordered = torch.sort(keys, dim=0, descending=True, stable=True)
    taken: list[tuple[int, int]] = []
    # The best edge that is left of each receiver that is open: (-key, sender, receiver), with what comes after it.
    heap: list[tuple[float, int, int]] = []
    left: dict[int, Iterator[tuple[float, int]]] = {}

    def push(receiver: int) -> None:
        best = next(left[receiver], None)
        if best is not None:
            heapq.heappush(heap, (-best[0], best[1], receiver))

    def open_receiver(receiver: int) -> None:
        if receiver not in left:
            upstream = int(graph.upstream[receiver])
            column, senders = (part[:upstream, receiver].tolist() for part in ordered)
            left[receiver] = iter(list(zip(column, senders, strict=True)))
            push(receiver)

    included: set[int] = set()
    open_receiver(graph.logits)
    for _ in range(n):
        if not heap:
            break
        _, sender, receiver = heapq.heappop(heap)
        push(receiver)
        taken.append((sender, receiver))
        if sender not in included:
            included.add(sender)
            for owned in graph.owner[sender].nonzero()[:, 0].tolist():
                open_receiver(owned)
    chosen = torch.zeros_like(graph.real)
    chosen[tuple(torch.tensor(taken, dtype=torch.long).reshape(-1, 2).T)] = True
    return Circuit(graph, chosen, n)


SELECTIONS = {"top": top_n, "greedy": greedy}


def _keys(graph: EdgeGraph, importance: Tensor, absolute: bool) -> Tensor:
    if tuple(importance.shape) != (graph.n_senders, graph.n_receivers):
        raise InputError(
            f"importances of this graph have shape {[graph.n_senders, graph.n_receivers]}, found "
            f"{list(importance.shape)}"
        )
    unscored = importance.isnan() & graph.real
    if bool(unscored.any()):
        sender, receiver = unscored.nonzero()[0].tolist()
        raise InputError(
            f"edge {graph.edge_name(sender, receiver)} has no score ({int(unscored.sum())} edges have none), so edges "
            "cannot be ranked; evaluate the circuit as it stands, or score all edges"
        )
    infinite = importance.isinf() & graph.real
    if bool(infinite.any()):
        sender, receiver = infinite.nonzero()[0].tolist()
        raise InputError(
            f"edge {graph.edge_name(sender, receiver)} has the score {float(importance[sender, receiver])}; expected "
            "finite numbers"
        )
    importance = importance.detach().cpu()
    keys = importance.abs() if absolute else importance
    return torch.where(graph.real, keys, torch.full_like(keys, -torch.inf))


def _check_size(graph: EdgeGraph, n: int) -> None:
    if not 0 <= n <= graph.n_edges:
        raise InputError(f"{n} edges were asked for; the graph has {graph.n_edges}")


def _check_nodes(graph: EdgeGraph, nodes: Tensor) -> None:
    if tuple(nodes.shape) != (graph.n_senders,) or nodes.dtype != torch.bool:
        raise InputError(
            f"nodes of this graph are a boolean mask of {graph.n_senders} senders; found {nodes.dtype} of shape "
            f"{list(nodes.shape)}"
        )
