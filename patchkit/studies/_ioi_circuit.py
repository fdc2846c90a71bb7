"""The circuit that the traced heads make, with all edges among its nodes or with those alone that were traced.

Nodes: the heads that a stage kept, every MLP, and the input; all edges among them (Wang et al. 2022 count all MLPs in
too, and put no bound on which of the nodes read which). It is run by node patching: what is outside carries the value of
the source run, for all that read it. The same nodes with no more edges between heads than were traced are run besides,
by edge patching, which asks more of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool
from torch import Tensor

from patchkit.model import Dims
from patchkit.model.edges import EdgeGraph
from patchkit.results.circuit import Circuit
from patchkit.results.paths import PathResult
from patchkit.studies._ioi_paths import chosen_heads


def head_circuit(dims: Dims, heads: Sequence[str]) -> Circuit:
    """The input, some heads and every MLP, with all edges among them."""
    graph = EdgeGraph.of(dims)
    nodes = torch.zeros(graph.n_senders, dtype=torch.bool)
    for name in [*heads, *(f"m{layer}" for layer in range(dims.n_layers))]:
        nodes[graph.find_sender(name)] = True
    return Circuit.of_nodes(graph, nodes).pruned()


def traced_circuit(dims: Dims, paths: Sequence[PathResult]) -> Circuit:
    """The same nodes; of the edges between heads, and from heads to the logits, only those that a stage found."""
    whole = head_circuit(dims, chosen_heads(paths))
    graph = whole.graph
    found = torch.zeros_like(whole.edges)
    for sender, receiver in (edge for result in paths for edge in result.edges()):
        edge = graph.find_sender(sender), graph.find_receiver(receiver)
        # A stage's senders are upstream of its highest receivers, not of all.
        found[edge] = bool(graph.real[edge])
    return Circuit(graph, whole.edges & (found | ~_between_heads(graph))).pruned()


def head_edges(circuit: Circuit) -> list[str]:
    """Names of its edges between heads, and from heads to the logits."""
    edges = (circuit.edges & _between_heads(circuit.graph)).nonzero().tolist()
    return [circuit.graph.edge_name(*edge) for edge in edges]


def _between_heads(graph: EdgeGraph) -> Bool[Tensor, "senders receivers"]:
    sends = torch.zeros(graph.n_senders, dtype=torch.bool)
    reads = torch.zeros(graph.n_receivers, dtype=torch.bool)
    for layer in range(graph.n_layers):
        sends[graph.heads(layer)] = True
        reads[graph.attention_receivers(layer)] = True
    reads[graph.logits] = True
    return graph.real & sends[:, None] & reads
