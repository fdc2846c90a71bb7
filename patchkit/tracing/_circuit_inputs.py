"""What the receivers of a circuit read: the stream with every edge cut, plus the differences of the senders with an edge.

The differences of all senders are rows of one matrix, and so is the stream itself: the inputs of many receivers are its
product with the circuit's 0/1 matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from patchkit.model.edges import EdgeGraph

#: (layer, the sum of its heads `[*, tokens, d_model]`) to what is added to the stream: the norm behind the heads.
BehindHeads = Callable[[int, Tensor], Tensor]


@dataclass(eq=False)
class Rows:
    """Differences of senders: current value minus what a cut edge carries.

    Attributes:
        values: `[tokens, rows, d_model]`: token by token, their product with the circuit's matrix stays in the caches.
        senders: which sender each row is of; -1 for the stream with every edge cut, if that is a row.
        filled: how many rows have been computed.
    """

    values: Float[Tensor, "tokens rows d_model"]
    senders: Int[Tensor, " rows"]
    filled: int

    def add(self, computed: Float[Tensor, "tokens new d_model"]) -> None:
        """The next senders' differences, in their order."""
        end = self.filled + computed.shape[1]
        self.values[:, self.filled : end] = computed
        self.filled = end


@dataclass(eq=False)
class Part:
    """Rows and the receivers of one circuit that read them.

    Attributes:
        reads: 1 where a receiver reads a row.
        alone: the same without heads behind whose sum a norm stands: those do not add up.
        layers: such heads' rows, by layer.
    """

    rows: Rows
    reads: Float[Tensor, "receivers rows"]
    alone: Float[Tensor, "receivers rows"]
    layers: dict[int, slice] = field(default_factory=dict)


class Inputs:
    """Builds what receivers of one circuit read.

    Args:
        edges: the circuit.
        rows: differences of its senders, in one or several pieces; exactly one has the stream as its first row.
        behind: the norm behind the heads of a layer, in a model that has one.
    """

    def __init__(
        self,
        graph: EdgeGraph,
        edges: Bool[Tensor, "senders receivers"],
        rows: Sequence[Rows],
        behind: BehindHeads | None,
    ) -> None:
        self.behind, self.parts = behind, []
        for each in rows:
            device = each.values.device
            streams = each.senders < 0
            reads = edges[each.senders.clamp(min=0)] | streams[:, None]
            weights = reads.T.to(device=device, dtype=each.values.dtype).contiguous()
            part = Part(each, weights, weights)
            if behind is not None:
                part.alone = weights.clone()
                for layer in range(graph.n_layers):
                    heads = graph.heads(layer)
                    mine = ((each.senders >= heads.start) & (each.senders < heads.stop)).nonzero()[:, 0]
                    if len(mine):
                        part.layers[layer] = slice(int(mine[0]), int(mine[-1]) + 1)
                        part.alone[:, part.layers[layer]] = 0
            self.parts.append(part)

    @property
    def filled(self) -> tuple[int, ...]:
        """How many rows of each piece have been computed."""
        return tuple(part.rows.filled for part in self.parts)

    def read(
        self, receivers: Int[Tensor, " n"], sums: Sequence[Float[Tensor, "tokens d_model"]]
    ) -> Float[Tensor, "tokens n_or_1 d_model"]:
        """The streams of some receivers; one for all of them if they read the same.

        Args:
            sums: the sum of each layer's heads when every edge is cut; used where a norm stands behind it.
        """
        reads = [part.reads[receivers, : part.rows.filled] for part in self.parts]
        if len(receivers) > 1 and all(bool((each == each[:1]).all()) for each in reads):
            receivers = receivers[:1]
        return self.add(None, receivers, sums, (0,) * len(self.parts))

    def add(
        self,
        total: Float[Tensor, "tokens n d_model"] | None,
        receivers: Int[Tensor, " n"],
        sums: Sequence[Float[Tensor, "tokens d_model"]],
        since: Sequence[int],
    ) -> Float[Tensor, "tokens n d_model"]:
        """The receivers' streams, from what they were when `since` rows had been computed; `total` is written to."""
        for part, first in zip(self.parts, since, strict=True):
            values = part.rows.values[:, first : part.rows.filled]
            if values.shape[1]:
                weights = part.alone[receivers, first : part.rows.filled].expand(len(values), -1, -1)
                total = torch.bmm(weights, values) if total is None else total.baddbmm_(weights, values)
        assert total is not None
        if self.behind is not None:
            for part, first in zip(self.parts, since, strict=True):
                for layer, heads in part.layers.items():
                    if first <= heads.start and heads.stop <= part.rows.filled:
                        self._add_heads(total, part, layer, heads, receivers, sums[layer])
        return total

    def _add_heads(
        self,
        total: Float[Tensor, "tokens n d_model"],
        part: Part,
        layer: int,
        heads: slice,
        receivers: Int[Tensor, " n"],
        cut: Float[Tensor, "tokens d_model"],
    ) -> None:
        """Adds what the heads of a layer that each receiver reads bring together: norm(sum + differences) - norm(sum)."""
        assert self.behind is not None
        # Many receivers read the same of a layer's few heads.
        sets, which = part.reads[receivers, heads].unique(dim=0, return_inverse=True)
        if not bool(sets.any()):
            return
        values = part.rows.values[:, heads]
        cut = cut[:, None].to(values)
        change = torch.baddbmm(cut, sets.expand(len(values), -1, -1), values)
        total += (self.behind(layer, change) - self.behind(layer, cut))[:, which]
