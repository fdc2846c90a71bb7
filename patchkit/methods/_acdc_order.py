"""In which order ACDC visits receivers, and the edges into each.

`reverse`, the default: the logits, then layer by layer from the last: the MLP, then KV head by KV head from 0 its value,
its key, and the queries of the heads that share it. Into each receiver the latest sender comes first: MLPs before the
heads of their layer, heads from the last to the first, the input at the end.

`by-size`: the same receivers, but into each the sender first whose replacement changes the stream least, by the norm of
the change over all tokens of all pairs: what matters least is tried while most of the circuit still stands.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from patchkit.model import PatchModel
from patchkit.model.edges import EdgeGraph
from patchkit.tracing.senders import Senders, contributions

ACDC_ORDERS = ("reverse", "by-size")


def receivers_in_order(graph: EdgeGraph) -> Iterator[int]:
    """All receivers, from the logits back; see the module's docstring."""
    yield graph.logits
    group = graph.n_heads // graph.n_kv_heads
    for layer in reversed(range(graph.n_layers)):
        yield graph.mlp_receiver(layer)
        queries, keys, values = (graph.receivers_of(layer, letter).start for letter in "qkv")
        for shared in range(graph.n_kv_heads):
            yield values + shared
            yield keys + shared
            yield from range(queries + shared * group, queries + (shared + 1) * group)


def known_at(graph: EdgeGraph, receiver: int) -> int:
    """How many senders, from the first, still have the base run's values when a receiver is visited."""
    layer = graph.layer_of_receiver(receiver)
    first = 1 + layer * (graph.n_heads + 1)
    mlp = receiver != graph.logits and receiver == graph.mlp_receiver(layer)
    return first + graph.n_heads if mlp else first


def senders_in_order(graph: EdgeGraph, receiver: int, sizes: Float[Tensor, " senders"] | None) -> list[int]:
    """The senders of a receiver: the latest first, or that of the smallest size."""
    latest = torch.arange(int(graph.upstream[receiver])).flip(0)
    if sizes is not None:
        latest = latest[torch.sort(sizes[latest], stable=True).indices]
    return latest.tolist()


def squared_sizes(
    model: PatchModel, graph: EdgeGraph, own: Senders, other: Senders, mask: Tensor
) -> Float[Tensor, " senders"]:
    """Squared norm, over the real tokens of a batch, of what the stream gains when each sender is replaced.

    Args:
        mask: of the batch's prompts, `[pairs, width]`; 0 on padding.
    """
    with torch.no_grad():
        sizes = torch.zeros(graph.n_senders, dtype=torch.float64)

        def size(change: Tensor) -> Tensor:
            real = mask.to(change.device).bool()
            return change[real].double().square().sum((0, -1)).cpu()

        sizes[0] = size(other.input - own.input)
        for layer in range(graph.n_layers):
            sizes[graph.heads(layer)] = size(
                contributions(model, layer, own.heads[layer], other.heads[layer])
            )
            sizes[graph.mlp_sender(layer)] = size(other.mlps[layer] - own.mlps[layer])
        return sizes
