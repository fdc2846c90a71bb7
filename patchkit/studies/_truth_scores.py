"""Scores of every method on one case, in one form: of heads and MLPs, of heads' inputs, and of edges."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from patchkit.model.edges import EdgeGraph
from patchkit.results.edge_scores import EdgeScores
from patchkit.results.scores import Scores

#: Node kinds that node methods score: what an edge's ends are, and each head's inputs.
NODE_KINDS = ("q", "k", "v", "z", "mlp_out")


@dataclass(frozen=True, eq=False)
class MethodScores:
    """What a method says, as sizes: higher = matters more.

    Attributes:
        of_nodes: it scores nodes; edges are made from their ends. Else it scores edges, and nodes are made from those.
        cost: forwards a pair.
        nodes: of senders but the input, in their order.
        inputs: of all queries, keys and values, in the order of receivers; None if it does not score them.
        edges: `[senders, receivers]`, NaN where there is none.
        pair_nodes, pair_inputs, pair_edges: the same of each pair alone; None where the method has no such numbers.
        by_seed: nodes' scores of other seeds, of methods that draw at random.
    """

    method: str
    of_nodes: bool
    cost: float
    nodes: Float[Tensor, " nodes"]
    inputs: Float[Tensor, " inputs"] | None
    edges: Float[Tensor, "senders receivers"]
    pair_nodes: Float[Tensor, "pairs nodes"] | None = None
    pair_inputs: Float[Tensor, "pairs inputs"] | None = None
    pair_edges: Float[Tensor, "pairs senders receivers"] | None = None
    by_seed: tuple[Float[Tensor, " nodes"], ...] = field(default=())

    @property
    def scale(self) -> float:
        """The largest score of all: what is far below it is rounding."""
        parts = [self.nodes, self.edges] + ([] if self.inputs is None else [self.inputs])
        return max(float(part.abs().nan_to_num(0.0, posinf=0.0).max()) for part in parts)

    def drawn(
        self, graph: EdgeGraph, weights: Float[Tensor, "draws pairs"]
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """Nodes, inputs and edges of bootstraps of the pairs; None for a method without numbers of single pairs.

        Args:
            weights: shares of the pairs, each row summing to 1.
        """
        if self.pair_nodes is None or self.pair_inputs is None or self.pair_edges is None:
            return None
        if self.of_nodes:
            nodes, inputs = weights @ self.pair_nodes, weights @ self.pair_inputs
            each = zip(nodes, inputs, strict=True)
            return nodes, inputs, torch.stack([edges_of_nodes(graph, *ends) for ends in each])
        flat = self.pair_edges.nan_to_num(0.0).flatten(1)
        edges = (weights @ flat).reshape(-1, *graph.real.shape)
        return _out_of(edges), _into(graph, edges), edges


def from_node_scores(method: str, graph: EdgeGraph, found: Scores) -> MethodScores:
    """Of a method that scores each pair's nodes of `NODE_KINDS`."""
    made = from_nodes(method, graph, found.cost, *_by_graph(graph, found.mean_abs(), found))
    nodes, inputs = _by_graph(graph, found.magnitudes, found)
    edges = torch.stack([edges_of_nodes(graph, n, i) for n, i in zip(nodes, inputs, strict=True)])
    return replace(made, pair_nodes=nodes, pair_inputs=inputs, pair_edges=edges)


def from_grid(method: str, graph: EdgeGraph, cost: float, flat: Tensor, like: Scores) -> MethodScores:
    """Of one number a node of `like`'s grid."""
    return from_nodes(method, graph, cost, *_by_graph(graph, flat, like))


def from_nodes(
    method: str,
    graph: EdgeGraph,
    cost: float,
    nodes: Float[Tensor, " nodes"],
    inputs: Float[Tensor, " inputs"] | None,
) -> MethodScores:
    """Of sizes of heads and MLPs, and of heads' inputs where there are any."""
    return MethodScores(method, True, cost, nodes.double(), inputs, edges_of_nodes(graph, nodes, inputs))


def _by_graph(graph: EdgeGraph, flat: Tensor, like: Scores) -> tuple[Tensor, Tensor]:
    """Numbers of a grid's nodes in the order of senders, and of attention's receivers."""
    parts = like.grid.split(flat.double())
    nodes = torch.cat([parts["z"], parts["mlp_out"].unsqueeze(-1)], -1).flatten(-2)
    return nodes, torch.cat([parts["q"], parts["k"], parts["v"]], -1).flatten(-2)


def edges_of_nodes(
    graph: EdgeGraph, nodes: Float[Tensor, " nodes"], inputs: Float[Tensor, " inputs"] | None
) -> Float[Tensor, "senders receivers"]:
    """An edge is as large as the smaller of its ends: its sender, and its receiver or, without scores of inputs, the head
    that the receiver is an input of. The input and the logits limit nothing; the edge between them has no end to go by.
    """
    senders = torch.cat([torch.tensor([torch.inf], dtype=torch.float64), nodes.double().abs()])
    receivers = torch.where(graph.owner, senders[:, None], -torch.inf).amax(0)
    if inputs is not None:
        receivers[attention_inputs(graph)] = inputs.double().abs()
    receivers[graph.logits] = torch.inf
    edges = torch.minimum(senders[:, None], receivers[None, :])
    edges[0, graph.logits] = 0.0
    return edges.masked_fill(~graph.real, torch.nan)


def attention_inputs(graph: EdgeGraph) -> Tensor:
    """Numbers of the receivers that are queries, keys or values."""
    numbers = [torch.arange(graph.n_receivers)[graph.attention_receivers(i)] for i in range(graph.n_layers)]
    return torch.cat(numbers)


def from_edge_scores(
    method: str, found: EdgeScores, per_pair: Float[Tensor, "pairs senders receivers"] | None
) -> MethodScores:
    """Of a method that scores edges; `per_pair` are sizes. A node is as large as the largest edge out of it, an input as
    the largest edge into it.
    """
    graph = found.graph
    edges = found.mean_abs.double()
    if found.circuit is not None:
        # ACDC: what it keeps comes before all that it cuts, each by what cutting it did; untried edges come last.
        edges = edges.nan_to_num(0.0)
        edges = edges + found.circuit.edges * (edges.max() + 1.0)
        edges = edges.masked_fill(~graph.real, torch.nan)
    made = MethodScores(method, False, found.cost, _out_of(edges), _into(graph, edges), edges)
    if per_pair is None:
        return made
    per_pair = per_pair.double()
    return replace(
        made, pair_nodes=_out_of(per_pair), pair_inputs=_into(graph, per_pair), pair_edges=per_pair
    )


def _out_of(edges: Float[Tensor, "*pairs senders receivers"]) -> Float[Tensor, "*pairs nodes"]:
    return edges.abs().nan_to_num(0.0)[..., 1:, :].amax(-1)


def _into(
    graph: EdgeGraph, edges: Float[Tensor, "*pairs senders receivers"]
) -> Float[Tensor, "*pairs inputs"]:
    return edges.abs().nan_to_num(0.0)[..., attention_inputs(graph)].amax(-2)
