"""The circuit that the traced heads make, and whether it holds.

Nodes: the heads that a stage kept, every MLP, and the input; all edges among them (Wang et al. 2022 count all MLPs in
too, and put no bound on which of the nodes read which). It is run by node patching: what is outside carries the value of
the source run, for all that read it. The same nodes with no more edges between heads than were traced are run besides,
by edge patching, which asks more of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

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


def traced_circuit(dims: Dims, paths: PathResult) -> Circuit:
    """The same nodes; of the edges between heads, and from heads to the logits, only those that a stage found."""
    whole = head_circuit(dims, chosen_heads(paths))
    graph = whole.graph
    from_head = torch.zeros(graph.n_senders, 1, dtype=torch.bool)
    into_head = torch.zeros(1, graph.n_receivers, dtype=torch.bool)
    for layer in range(graph.n_layers):
        from_head[graph.heads(layer)] = True
        into_head[:, graph.attention_receivers(layer)] = True
    into_head[:, graph.logits] = True
    found = torch.zeros_like(whole.edges)
    for sender, receiver in paths.edges():
        edge = graph.find_sender(sender), graph.find_receiver(receiver)
        # A stage's senders are upstream of its highest receivers, not of all.
        found[edge] = bool(graph.real[edge])
    return Circuit(graph, whole.edges & (found | ~(from_head & into_head))).pruned()
