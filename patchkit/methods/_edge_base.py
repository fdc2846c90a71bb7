"""The base run of a batch of pairs, and what its residual stream gains when a sender is replaced."""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from patchkit.methods._edge_replacement import EdgeReplacement
from patchkit.methods._pair_batch import PairBatch
from patchkit.model import PatchModel, Site
from patchkit.model.edges import EdgeGraph
from patchkit.tracing.restart import BaseRun, compute_base
from patchkit.tracing.senders import Senders, contributions

#: A number for each row: which pair, which place, which sender.
Numbers = Int[Tensor, " rows"]


@dataclass(frozen=True, eq=False)
class EdgeBase:
    """Pairs, their base runs, and what their senders hold there and where an edge is cut.

    Attributes:
        own, other: the senders of the base runs, and what is put in for them.
        live: padded columns in which what is put in may differ from the base run's own: of the input, and of all others,
            `[2, pairs, width]`.
    """

    model: PatchModel
    graph: EdgeGraph
    batch: PairBatch
    base: BaseRun
    own: Senders
    other: Senders
    source_logits: Float[Tensor, "pairs vocab"]
    live: Bool[Tensor, "2 pairs width"]

    @classmethod
    def of(
        cls,
        model: PatchModel,
        graph: EdgeGraph,
        batch: PairBatch,
        replacement: EdgeReplacement,
        *,
        attention: bool = False,
    ) -> EdgeBase:
        """Runs base and source prompts once each; `attention`: what heads add to the stream is kept too."""
        layers = range(model.dims.n_layers)
        kinds = ("attn_out", "mlp_out") if attention else ("mlp_out",)
        read = [Site(kind, layer) for layer in layers for kind in kinds]
        read.append(Site("resid_post", model.dims.n_layers - 1))
        if not model.dims.parallel:
            read += [Site("resid_mid", layer) for layer in layers]
        base = compute_base(model, batch.base, sorted(read), behind_attention=layers)
        own = Senders(
            _embedded(model, batch, base),
            tuple(base.heads[layer] for layer in layers),
            tuple(base.own[Site("mlp_out", layer)] for layer in layers),
        )
        other, source_logits = replacement.senders(model, batch, own)
        first = batch.first_difference() if replacement.causal else torch.zeros(len(batch.pairs)).long()
        after = torch.arange(batch.base.width) >= first[:, None]
        moved = (own.input != other.input).any(-1).cpu()
        return cls(model, graph, batch, base, own, other, source_logits, torch.stack([after & moved, after]))

    def columns(self, pair: Numbers, place: Numbers, sender: Numbers) -> Bool[Tensor, "rows width"]:
        """Padded columns in which the stream gains anything when the sender is replaced at the tokens of the place."""
        return self.batch.cover[pair, place] & self.live[(sender > 0).long(), pair]

    def changes(
        self, pair: Numbers, place: Numbers, sender: Numbers, start: int
    ) -> Float[Tensor, "rows position d_model"]:
        """What the stream gains in each row, from column `start` on, when its sender is replaced at its place."""
        gained = self.own.input.new_zeros(len(pair), self.batch.base.width - start, self.graph.d_model)
        with torch.no_grad():
            # Senders of one module are numbered one after the other: the input, each layer's heads, its MLP.
            for layer in range(-1, self.graph.n_layers):
                modules = [slice(0, 1)] if layer < 0 else [self.graph.heads(layer), self._mlp(layer)]
                for module in modules:
                    rows = ((sender >= module.start) & (sender < module.stop)).nonzero()[:, 0]
                    if len(rows):
                        change = self._gained(layer, pair[rows], sender[rows] - module.start, module, start)
                        gained[rows.to(gained.device)] = change.to(gained.device)
        columns = self.columns(pair, place, sender)[:, start:].to(gained.device)
        return gained.masked_fill(~columns[..., None], 0.0)

    def read_by_attention(self, layer: int) -> Float[Tensor, "pairs width d_model"]:
        """The stream that a layer's attention reads in the base run."""
        return self.base.streams[layer]

    def read_by_mlp(self, layer: int) -> Float[Tensor, "pairs width d_model"]:
        """The stream that a layer's MLP reads in the base run."""
        return self.base.streams[layer] if self.graph.parallel else self.base.own[Site("resid_mid", layer)]

    def attention(self, layer: int) -> Float[Tensor, "pairs width d_model"]:
        """What a layer's heads add to the stream in the base run."""
        return self.base.own[Site("attn_out", layer)]

    @property
    def final(self) -> Float[Tensor, "pairs width d_model"]:
        """The stream that becomes the logits of the base run."""
        return self.base.own[Site("resid_post", self.graph.n_layers - 1)]

    def _mlp(self, layer: int) -> slice:
        number = self.graph.mlp_sender(layer)
        return slice(number, number + 1)

    def _gained(self, layer: int, pair: Numbers, member: Numbers, module: slice, start: int) -> Tensor:
        """Of some members of one module, each in one pair."""
        if layer >= 0 and module == self.graph.heads(layer):
            # Of all heads in the pairs that occur, since a norm behind them needs their sum.
            pairs, place = pair.unique(return_inverse=True)
            own, other = self.own.heads[layer], self.other.heads[layer]
            pairs = pairs.to(own.device)
            gained = contributions(self.model, layer, own[pairs, start:], other[pairs, start:])
            return gained[place.to(gained.device), :, member.to(gained.device)]
        own, other = (each.input if layer < 0 else each.mlps[layer] for each in (self.own, self.other))
        rows = pair.to(own.device)
        return other[rows, start:] - own[rows, start:]


def pad_front(value: Tensor, width: int) -> Tensor:
    """`[rows, position, ...]` of the last columns, with zeros for those before them."""
    missing = width - value.shape[1]
    if not missing:
        return value
    return torch.cat([value.new_zeros(value.shape[0], missing, *value.shape[2:]), value], dim=1)


def _embedded(model: PatchModel, batch: PairBatch, base: BaseRun) -> Tensor:
    with torch.no_grad():
        path = model.arch.position_embed
        if path is None:
            return base.streams[0]
        placed = attrgetter(path)(model.hf)(batch.base.position_ids)
        return base.streams[0] - placed.to(base.streams[0].device)
