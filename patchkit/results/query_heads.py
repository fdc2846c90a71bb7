"""Grouped KV heads in two graphs: one key and value receiver a KV head (native), or one a query head.

What the EAP-IG repository calls a graph has keys and values by query head. Of a score by query head the native one is
the sum over the group, where scores are linear in what is patched; the way back does not exist.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from patchkit.model.edges import EdgeGraph


def by_query_graph(graph: EdgeGraph) -> EdgeGraph:
    """The graph of the same model in which every query head has key and value receivers of its own."""
    return replace(graph, n_kv_heads=graph.n_heads)


def native_receivers(graph: EdgeGraph) -> Int[Tensor, " wide"]:
    """For each receiver of the graph by query head, its receiver in this one."""
    group = graph.n_heads // graph.n_kv_heads
    numbers: list[int] = []
    for layer in range(graph.n_layers):
        for letter in "qkv":
            first = graph.receivers_of(layer, letter).start
            numbers += [first + (head if letter == "q" else head // group) for head in range(graph.n_heads)]
        numbers.append(graph.mlp_receiver(layer))
    return torch.tensor([*numbers, graph.logits])


def sum_groups(
    graph: EdgeGraph, by_query: Float[Tensor, "*places senders wide"]
) -> Float[Tensor, "*places senders receivers"]:
    """Scores of a native graph from those of its graph by query head: sums over the heads that share a key or value.

    Exact for signed means of scores that are linear in what is patched (all that are a difference times a gradient);
    neither |.| nor exact effects add up.
    """
    summed = by_query.new_zeros(*by_query.shape[:-1], graph.n_receivers)
    return summed.index_add_(-1, native_receivers(graph).to(by_query.device), by_query)


def spread_groups(
    graph: EdgeGraph, native: Float[Tensor, "*places senders receivers"]
) -> Float[Tensor, "*places senders wide"]:
    """Scores by query head as far as native ones say them: NaN at keys and values that several heads share."""
    columns = native_receivers(graph)
    spread = native[..., columns].clone()
    spread[..., torch.bincount(columns)[columns] > 1] = torch.nan
    return spread
