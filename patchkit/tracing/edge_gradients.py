"""One forward and one backward that hold all that edges need: what receivers read, and the gradient there.

The residual stream is never split. A receiver's gradient is taken where its own path begins: at the outputs of the
query, key and value projections (per head), at the MLP's input, and at the stream before the final norm. Going back from
there to the stream is arithmetic (`patchkit.model.norms`), done layer by layer by whoever needs it.

With grouped KV heads the gradient at a shared key or value is the sum over the query heads of its group. `by_query` gives
the parts: those at the repeated keys and values, one for each query head, carried back to the projections.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import nnsight
import torch
from jaxtyping import Float
from torch import Tensor

from patchkit.data.batch import Batch
from patchkit.errors import InputError
from patchkit.model import PatchModel, Site
from patchkit.model.access import canonical, prepare, raw_site, write_site
from patchkit.tracing._attention import Attention, attention_of, attention_scores, per_head
from patchkit.tracing._inputs import forward_inputs
from patchkit.tracing.senders import Senders, position_embedding

_LETTERS = ("q", "k", "v")


@dataclass(frozen=True, eq=False)
class Reads:
    """What one layer's receivers read in a run, and the gradient of the metric's sum over rows there.

    Attributes:
        stream: that the attention reads, before its norm, `[batch, position, d_model]`.
        mid: that the MLP reads, before its norm; the same in a parallel block.
        projected: outputs of the query, key and value projections, `[batch, position, head, d_head]`.
        gradients: at these; by query head the last two have one entry a query head.
        mlp_in: what the MLP reads behind its norm, and
        mlp_gradient: the gradient there, through the MLP alone.
    """

    stream: Tensor
    mid: Tensor
    projected: tuple[Tensor, Tensor, Tensor]
    gradients: tuple[Tensor, Tensor, Tensor]
    mlp_in: Tensor
    mlp_gradient: Tensor


@dataclass(frozen=True, eq=False)
class EdgeRun:
    """One forward and backward.

    Attributes:
        senders: of the run; of the layers that were run.
        reads: by layer.
        final: gradient at the stream before the final norm, `[batch, position, d_model]`.
        metric: of each row; row b of a gradient is that of row b's own metric.
    """

    senders: Senders
    reads: Mapping[int, Reads]
    final: Tensor
    metric: Float[Tensor, " batch"]
    logits: Float[Tensor, "batch vocab"]


def edge_run(
    model: PatchModel,
    batch: Batch,
    metric: Callable[[Tensor], Tensor],
    *,
    start: Float[Tensor, "batch position d_model"] | None = None,
    first: int = 0,
    pinned: Mapping[Site, Tensor] | None = None,
    added: Mapping[Site, Tensor] | None = None,
    by_query: bool = False,
) -> EdgeRun:
    """Runs a batch and takes the gradient of the metric at every receiver; parameters frozen.

    Args:
        metric: last-position logits `[batch, vocab]` to `[batch]`.
        start: what the first layer that is run gets: at layer 0 token embeddings (`Senders.input`), to which positions
            are added; at others the residual stream. By default the batch's own embeddings.
        first: that layer; those below are skipped, and have no reads. One above 0 needs a `start`.
        pinned: contributions to the stream (sites `attn_out`, `mlp_out`) that are held at these values, so that no
            gradient enters the module behind them.
        added: what is added to such contributions.
        by_query: gradients at keys and values for every query head.

    Raises:
        InputError: the metric does not depend on the logits in a way that has a gradient.
    """
    layers = range(first, model.dims.n_layers)
    pinned, added = pinned or {}, added or {}
    by_query = by_query and model.dims.group > 1
    prepare(model, [Site("q", layer) for layer in layers] if by_query else [])
    inputs = forward_inputs(model, batch)
    with model.frozen(), torch.enable_grad():
        with model.lm.trace(**inputs):
            given, leaf = _begin(model, start, first)
            raw: dict[Site, Tensor] = {}
            calls: dict[int, Attention] = {}
            for layer in layers:
                for kind in _visited(model, by_query):
                    site = Site(kind, layer)
                    if kind == "q":
                        calls[layer] = attention_of(model, layer, inputs["attention_mask"])
                    raw[site] = leaf if site == Site("resid_pre", first) else raw_site(model, site)
                    if site in pinned:
                        write_site(model, site, pinned[site].detach().to(raw[site]))
                    if site in added:
                        write_site(model, site, raw[site] + added[site].detach().to(raw[site]))
            last = raw_site(model, Site("resid_post", layers[-1]))
            logits = model.lm.output.logits[:, -1]
            score = metric(logits)
            if not score.requires_grad:
                raise InputError(
                    "the metric does not depend on the logits in a way that has a gradient (an argmax or a comparison "
                    "has none); use one that changes smoothly with the logits, or score edges exactly"
                )
            found = _Backward(model, layers, raw, calls).take(score, last)
            kept = nnsight.save((given, *found, score.detach(), logits.detach()))
    given, heads, mlps, reads, final, score, logits = kept
    return EdgeRun(Senders(given, tuple(heads), tuple(mlps)), reads, final, score, logits)


def _begin(model: PatchModel, start: Tensor | None, first: int) -> tuple[Tensor, Tensor]:
    """(token embeddings or given stream, the leaf that the first layer that is run gets); in the trace's body.

    Frozen parameters leave no graph: what enters the first block is the leaf.
    """
    placed = position_embedding(model) if first == 0 else None
    if start is None:
        stream = model.block(0).input
        given = stream if placed is None else stream - placed
    else:
        given = start
    given = given.detach()
    for below in range(first):
        # Only the last skipped block's output is read, but each must give something of that shape.
        model.block(below).skip(given)
    leaf = (given if placed is None else given + placed.detach()).clone().requires_grad_(True)
    model.block(first).input = leaf
    return given, leaf


def _visited(model: PatchModel, by_query: bool) -> list[str]:
    used = _LETTERS if by_query else ()
    middle = () if model.dims.parallel else ("resid_mid",)
    return ["resid_pre", "q_proj", "k_proj", "v_proj", *used, "z", "attn_out", *middle, "mlp_in", "mlp_out"]


class _Backward:
    """The gradients of a forward that has run; used in the trace's body."""

    def __init__(
        self,
        model: PatchModel,
        layers: range,
        raw: Mapping[Site, Tensor],
        calls: Mapping[int, Attention],
    ) -> None:
        self.model, self.layers, self.raw, self.calls = model, layers, raw, calls

    def take(
        self, score: Tensor, last: Tensor
    ) -> tuple[list[Tensor], list[Tensor], dict[int, Reads], Tensor]:
        """(z of each layer, MLP contributions, reads, gradient at the last stream)."""
        layers = self.layers
        kinds = ("q_proj", "k_proj", "v_proj", "mlp_in", *(("z",) if self.calls else ()))
        sites = [Site(kind, layer) for layer in layers for kind in kinds]
        wanted = [*(self.raw[site] for site in sites), last]
        taken = torch.autograd.grad(score.sum(), wanted, allow_unused=True, retain_graph=bool(self.calls))
        gradients = {
            site: canonical(self.model, site, torch.zeros_like(self.raw[site]) if g is None else g)
            for site, g in zip(sites, taken[:-1], strict=True)
        }
        reads = {layer: self._reads(layer, gradients) for layer in layers}
        heads = [self._value("z", layer) for layer in layers]
        mlps = [self._value("mlp_out", layer) for layer in layers]
        final = torch.zeros_like(last) if taken[-1] is None else taken[-1]
        return heads, mlps, reads, final

    def _value(self, kind: str, layer: int) -> Tensor:
        site = Site(kind, layer)
        return canonical(self.model, site, self.raw[site]).detach()

    def _reads(self, layer: int, gradients: Mapping[Site, Tensor]) -> Reads:
        stream = self._value("resid_pre", layer)
        queries, keys, values = (gradients[Site(f"{letter}_proj", layer)] for letter in _LETTERS)
        if layer in self.calls:
            keys, values = self._by_query_head(layer, gradients[Site("z", layer)])
        return Reads(
            stream=stream,
            mid=stream if self.model.dims.parallel else self._value("resid_mid", layer),
            projected=(
                self._value("q_proj", layer),
                self._value("k_proj", layer),
                self._value("v_proj", layer),
            ),
            gradients=(queries, keys, values),
            mlp_in=self._value("mlp_in", layer),
            mlp_gradient=gradients[Site("mlp_in", layer)],
        )

    def _by_query_head(self, layer: int, z_gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients at every query head's own key and value projection, `[batch, position, head, d_head]`."""
        attention = self.calls[layer]
        queries, keys, values = (self._value(letter, layer) for letter in _LETTERS)
        exact = torch.promote_types(queries.dtype, torch.float32)
        queries, keys, values, dz = (each.to(exact) for each in (queries, keys, values, z_gradient))
        scores = attention_scores(queries, keys, attention)
        pattern = scores.masked_fill(~attention.allowed[:, None], -torch.inf).softmax(-1)
        at_pattern = torch.einsum("bihd,bthd->bhit", dz, per_head(values, dz))
        at_scores = pattern * (at_pattern - (pattern * at_pattern).sum(-1, keepdim=True))
        if attention.softcap is not None:
            at_scores = at_scores * (1 - (scores / attention.softcap).square())
        at_keys = torch.einsum("bhit,bihd->bthd", at_scores * attention.scaling, queries)
        at_values = torch.einsum("bhit,bihd->bthd", pattern, dz)
        return self._to_projection("k", layer, at_keys), self._to_projection("v", layer, at_values)

    def _to_projection(self, letter: str, layer: int, cotangent: Tensor) -> Tensor:
        """From keys or values as used, one copy a query head, back through rotary and norms to the projection."""
        used, projected = self.raw[Site(letter, layer)], self.raw[Site(f"{letter}_proj", layer)]
        group = self.model.dims.group
        copies = cotangent.unflatten(2, (-1, group))
        found = []
        for member in range(group):
            at_used = copies[:, :, :, member].transpose(1, 2).to(used.dtype)
            (back,) = torch.autograd.grad(used, [projected], at_used, retain_graph=True)
            found.append(canonical(self.model, Site(f"{letter}_proj", layer), back))
        return torch.stack(found, dim=3).flatten(2, 3)
