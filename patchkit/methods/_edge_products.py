"""Edge products: what each sender's replacement adds to the stream, times each receiver's gradient, summed over tokens.

    score(u -> v) = sum over tokens and width of (what the stream gains when u is replaced) . (gradient at v's stream)

Senders' vectors exist for a few pairs, or for a few layers of one pair, at a time, and receivers' for one layer: beyond
the forward and backward, memory stays within about twice one layer's receivers over the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from patchkit.methods._edge_receivers import ReceiverVectors, clean
from patchkit.model import EdgeGraph, PatchModel
from patchkit.tracing.senders import Senders, contributions

#: Below this many numbers, cutting senders into blocks saves memory that nobody misses.
SMALL_BLOCK = 1 << 20


@dataclass(frozen=True, eq=False)
class SenderChanges:
    """What the stream gains when each sender alone is replaced.

    Attributes:
        own: of the run that is patched, and
        other: what is put in.
        real: columns that are no padding.
    """

    model: PatchModel
    graph: EdgeGraph
    own: Senders
    other: Senders
    real: Bool[Tensor, "batch position"]

    def block(self, first: int, last: int, rows: slice) -> Float[Tensor, "sender batch position d_model"]:
        """Vectors of the senders of layers `first` to `last`, the input with layer 0; for some rows."""
        real = self.real[rows]
        given = clean(self.other.input[rows], real) - clean(self.own.input[rows], real)
        at = 0 if first == 0 else self.graph.heads(first).start
        count = self.graph.mlp_sender(last) + 1 - at
        made = given.new_empty(count, *given.shape)
        if first == 0:
            made[0] = given
        for layer in range(first, last + 1):
            # In float32 at least before they are subtracted: the difference is what half precision would round away.
            own, other = (clean(run.heads[layer][rows], real) for run in (self.own, self.other))
            heads = contributions(self.model, layer, own, other)
            mine = self.graph.heads(layer)
            made[mine.start - at : mine.stop - at] = clean(heads, real).permute(2, 0, 1, 3)
            own, other = (clean(run.mlps[layer][rows], real) for run in (self.own, self.other))
            made[self.graph.mlp_sender(layer) - at] = other - own
        return made


@dataclass(frozen=True)
class Blocks:
    """How the work is cut: pairs at a time, and sender layers at a time."""

    pairs: int
    layers: int

    @classmethod
    def of(cls, graph: EdgeGraph, pairs: int, width: int) -> Blocks:
        """As large as one layer's receivers over the whole batch allow."""
        budget = max(graph.receivers_a_layer * pairs * width * graph.d_model, SMALL_BLOCK)
        one_pair = width * graph.d_model * graph.n_senders
        if one_pair <= budget:
            return cls(min(pairs, max(1, budget // one_pair)), graph.n_layers)
        return cls(1, max(1, budget // (width * graph.d_model * (graph.n_heads + 1))))

    def numbers(self, graph: EdgeGraph, width: int) -> int:
        """Numbers held at once: the senders of a block and the receivers of a layer."""
        senders = min(self.layers * (graph.n_heads + 1) + 1, graph.n_senders)
        # A layer of senders is made before it is copied into its block, and receivers part by part before they are one.
        return self.pairs * width * graph.d_model * (senders + graph.n_heads + 3 * graph.receivers_a_layer)


def edge_products(
    changes: SenderChanges, vectors: ReceiverVectors, cover: Bool[Tensor, "batch places position"]
) -> Iterator[tuple[slice, Float[Tensor, "pairs places senders receivers"]]]:
    """Scores of every edge for a few pairs at a time, as (rows, scores); zero where there is no edge.

    Args:
        cover: the columns of each place.
    """
    graph = changes.graph
    pairs, places, width = cover.shape
    blocks = Blocks.of(graph, pairs, width)
    for begin in range(0, pairs, blocks.pairs):
        rows = slice(begin, min(begin + blocks.pairs, pairs))
        held = rows.stop - rows.start
        scores: Tensor | None = None
        for first in range(0, graph.n_layers, blocks.layers):
            last = min(first + blocks.layers, graph.n_layers) - 1
            senders = changes.block(first, last, rows)
            if scores is None:
                shape = (held, places, graph.n_senders, graph.n_receivers)
                scores = torch.zeros(shape, dtype=senders.dtype, device=senders.device)
            at = 0 if first == 0 else graph.heads(first).start
            for layer in range(first, graph.n_layers):
                receivers = vectors.layers[layer].vectors(rows).to(senders.device)
                columns = slice(graph.attention_receivers(layer).start, graph.mlp_receiver(layer) + 1)
                # Of the senders in this block those that come before the layer's MLP; those that do not come before its
                # attention are struck out below.
                count = min(int(graph.upstream[columns.stop - 1]), at + len(senders)) - at
                _multiply(scores[:, :, at : at + count, columns], senders[:count], receivers, cover[rows])
            logits = vectors.logits(rows).to(senders.device)
            _multiply(scores[:, :, at : at + len(senders), graph.logits :], senders, logits, cover[rows])
            # Otherwise the next block would be made beside this one.
            del senders, receivers, logits
        assert scores is not None
        yield rows, scores.masked_fill(~graph.real.to(scores.device), 0.0)


def layer_products(
    changes: SenderChanges,
    layer: int,
    receivers: Sequence[Callable[[slice], Tensor]],
    cover: Bool[Tensor, "batch places position"],
) -> Iterator[tuple[slice, list[Float[Tensor, "pairs places senders receivers"]]]]:
    """Scores of one layer's receivers, or of others that read the stream there, for several gradients at once.

    Args:
        layer: senders below it, and those in it, are multiplied; which are upstream is the caller's to know.
        receivers: for some rows, the vectors of a gradient.
    """
    graph = changes.graph
    pairs, places, width = cover.shape
    blocks = Blocks.of(graph, pairs, width)
    last_layer = min(layer, graph.n_layers - 1)
    count = graph.mlp_sender(last_layer) + 1
    for begin in range(0, pairs, blocks.pairs):
        rows = slice(begin, min(begin + blocks.pairs, pairs))
        found: list[Tensor] = []
        for first in range(0, last_layer + 1, blocks.layers):
            senders = changes.block(first, min(first + blocks.layers - 1, last_layer), rows)
            at = 0 if first == 0 else graph.heads(first).start
            for number, of in enumerate(receivers):
                vectors = of(rows).to(senders.device)
                if number == len(found):
                    shape = (rows.stop - rows.start, places, count, len(vectors))
                    found.append(torch.zeros(shape, dtype=senders.dtype, device=senders.device))
                _multiply(found[number][:, :, at : at + len(senders)], senders, vectors, cover[rows])
        yield rows, found


def _multiply(out: Tensor, senders: Tensor, receivers: Tensor, cover: Tensor) -> None:
    """out[b, p, s, r] = sum over the tokens t of place p of senders[s, b, t] . receivers[r, b, t]."""
    for place in range(cover.shape[1]):
        inside = cover[:, place].to(senders.device)
        columns = inside.any(0).nonzero()[:, 0]
        if len(columns) < inside.shape[1]:
            mine, theirs = senders[:, :, columns], receivers[:, :, columns]
        else:
            mine, theirs = senders, receivers
        if not bool(inside[:, columns].all()):
            mine = mine * inside[None, :, columns, None]
        product = torch.bmm(mine.flatten(2).transpose(0, 1), theirs.flatten(2).permute(1, 2, 0))
        out[:, place] = product
