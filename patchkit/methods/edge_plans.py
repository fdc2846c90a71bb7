"""What edge methods, circuits and paths take on prompts of given lengths, as functions of sizes alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from patchkit.data import Pair
from patchkit.errors import InputError
from patchkit.methods._circuit_work import circuit_work
from patchkit.methods._edge_cost import attribution_cost
from patchkit.model import Dims, EdgeGraph
from patchkit.results.edge_scores import EdgeMethod
from patchkit.runtime import Cost

#: From the lengths of a batch's prompts to its cost.
CostOfLengths = Callable[[Sequence[int]], Cost]


def edges_cost(dims: Dims, method: EdgeMethod) -> CostOfLengths:
    """Of scoring every edge, in forward-equivalents of a token; `acdc` is counted as if no edge came to be out of reach.

    Raises:
        InputError: an unknown method.
    """
    name, layers = method.name, dims.n_layers
    if name in ("exact", "acdc"):
        graph = EdgeGraph.of(dims)
        share = _mean_restart(graph)

        def sweep(lengths: Sequence[int]) -> Cost:
            # An edge's run begins at its receiver's layer; half of the tokens, where prompts differ, are run on average
            # no less than that, so that this is the most.
            runs = graph.n_edges * share * (2 if name == "acdc" else 1)
            kept = 4 * sum(lengths) * layers * (4 * dims.d_model + 2 * dims.n_kv_heads * dims.d_head)
            return Cost(sum(lengths) * (2 + runs), kept)

        return sweep
    if name not in ("eap", "eap-ig-inputs", "eap-ig-activations", "clean-corrupted", "ifr"):
        raise InputError(f"method '{name}' is not known to the plan")
    by_query = dims.group > 1 and not (method.qk_fix or method.grad_drop or name == "ifr")
    return lambda lengths: attribution_cost(dims, lengths, method, by_query)


def circuits_cost(dims: Dims, sizes: Sequence[int]) -> CostOfLengths:
    """Of running circuits of so many edges: a base and a source run, and what each computes at the most."""
    graph = EdgeGraph.of(dims)
    works = [circuit_work(dims, graph, _spread(graph, size)) for size in sizes]

    def cost(lengths: Sequence[int]) -> Cost:
        kept = 4 * sum(lengths) * dims.n_layers * 8 * dims.d_model
        return Cost(sum(lengths) * (2 + sum(works)), kept)

    return cost


def paths_cost(dims: Dims, stages: int) -> CostOfLengths:
    """Of path patching every sender, so many stages of it: MLPs from each sender on, then the layers behind receivers."""
    graph = EdgeGraph.of(dims)
    layers = torch.tensor([max(0, graph.layer_of_sender(sender)) for sender in range(graph.n_senders)])
    above = float((1 - layers / dims.n_layers).sum())

    def cost(lengths: Sequence[int]) -> Cost:
        kept = 4 * sum(lengths) * dims.n_layers * (4 * dims.d_model + 2 * dims.n_kv_heads * dims.d_head)
        return Cost(sum(lengths) * (2 + stages * 2 * above), kept)

    return cost


def synthetic_pairs(count: int, tokens: int) -> list[Pair]:
    """Pairs that stand for prompts of one length where there are none yet."""
    ids = tuple(range(1, tokens + 1))
    return [Pair(ids, ids, 0, 1, {}, str(number)) for number in range(count)]


def _mean_restart(graph: EdgeGraph) -> float:
    """Mean share of the layers that run behind an edge's receiver."""
    total = 0.0
    for receiver, upstream in enumerate(graph.upstream.tolist()):
        layer = min(graph.layer_of_receiver(receiver), graph.n_layers)
        total += upstream * (1 - layer / graph.n_layers)
    return total / graph.n_edges


def _spread(graph: EdgeGraph, size: int) -> torch.Tensor:
    """So many edges, evenly over all: senders and receivers of every layer are in it."""
    flat = graph.real.flatten().nonzero()[:, 0]
    chosen = torch.zeros(graph.real.numel(), dtype=torch.bool)
    chosen[flat[torch.linspace(0, len(flat) - 1, min(size, len(flat))).long()]] = True
    return chosen.reshape(graph.real.shape)
