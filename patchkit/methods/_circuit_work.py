"""What running a circuit takes, counted from its edges."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Bool
from torch import Tensor

from patchkit.model import Dims
from patchkit.model.edges import EdgeGraph

#: Differences of senders that take as much memory at a token as a forward does there.
SENDERS_A_FORWARD = 16


def circuit_work(
    dims: Dims, graph: EdgeGraph, edges: Bool[Tensor, "senders receivers"], known: int = 1
) -> float:
    """Forwards that one run of a circuit takes: projections, heads and MLPs that it computes, and the products.

    Attention patterns, norms and the unembedding are left out on both sides.

    Args:
        known: senders, from the first, that are not computed.
    """
    width, head = dims.d_model, dims.d_model * dims.d_head
    # Of a mixture of experts the neurons are not known; four widths is what dense models have.
    mlp = 3 * width * dims.d_mlp if dims.d_mlp else 8 * width * width
    layer_work = 2 * (dims.n_heads + dims.n_kv_heads) * head + mlp
    computed = edges.any(1)
    computed[:known] = False
    rows, work = known, 0
    for layer in range(graph.n_layers):
        heads = computed[graph.heads(layer)].nonzero()[:, 0]
        if len(heads):
            apart = graph.n_kv_heads == graph.n_heads
            slots = heads if apart else (heads // dims.group).unique()
            firsts = (graph.receivers_of(layer, letter).start for letter in "qkv")
            receivers = torch.cat(
                [first + part for first, part in zip(firsts, (heads, slots, slots), strict=True)]
            )
            read = edges[: graph.heads(layer).start, receivers]
            # Receivers that read the same are given one stream.
            streams = 1 if bool((read == read[:, :1]).all()) else len(receivers)
            work += (len(receivers) + len(heads)) * head + streams * rows * width
            rows += len(heads)
        if computed[graph.mlp_sender(layer)]:
            work += mlp + rows * width
            rows += 1
    return work / (layer_work * graph.n_layers)


def room(edges: Bool[Tensor, "senders receivers"], copies: int) -> float:
    """Memory of a circuit's run at one token, in that of a forward there.

    Args:
        copies: how often the attention runs on every row.
    """
    return copies + int(edges.any(1).sum()) / SENDERS_A_FORWARD


def share_out(rooms: Sequence[float], budget: float, most: int) -> Iterator[list[int]]:
    """Numbers of circuits in groups that are run at once: the smallest first, so that those of one group are alike.

    Args:
        rooms: of each circuit.
        budget: of a group; a circuit larger than that is a group of its own.
        most: circuits in a group.
    """
    group: list[int] = []
    for number in sorted(range(len(rooms)), key=lambda i: rooms[i]):
        if group and (len(group) >= most or sum(rooms[i] for i in group) + rooms[number] > budget):
            yield group
            group = []
        group.append(number)
    if group:
        yield group
