"""Ordinary runs, and what is kept of them for others to be built from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import nnsight
import torch
from jaxtyping import Float, Int
from torch import Tensor

from patchkit.data.batch import Batch
from patchkit.model import EdgeGraph, PatchModel, Site
from patchkit.model.access import read_site
from patchkit.tracing._inputs import forward_inputs
from patchkit.tracing.senders import token_embeddings


@dataclass(frozen=True, eq=False)
class PlainRun:
    """What ordinary runs leave for others to be built from.

    Attributes:
        batch: its prompts.
        attention: the stream that the attention of a layer reads, before any norm, of the layers that were asked for.
        mlp: the same of MLPs.
        final: the stream behind the last layer, at the last column.
        input: token embeddings as they enter the stream, or None.
        heads: z of layers.
        mlps: what MLPs add to the stream, of layers.
        logits: at the last column.
    """

    batch: Batch
    attention: Mapping[int, Float[Tensor, "rows width d_model"]]
    mlp: Mapping[int, Float[Tensor, "rows width d_model"]]
    final: Float[Tensor, "rows 1 d_model"]
    input: Float[Tensor, "rows width d_model"] | None
    heads: Mapping[int, Float[Tensor, "rows width head d_head"]]
    mlps: Mapping[int, Float[Tensor, "rows width d_model"]]
    logits: Float[Tensor, "rows vocab"]

    def rows(self, index: Int[Tensor, " chosen"]) -> PlainRun:
        """The same of some rows, in any order and as often as they are named."""

        def take(value: Tensor) -> Tensor:
            return value[index.to(value.device)]

        def each(values: Mapping[int, Tensor]) -> dict[int, Tensor]:
            return {layer: take(value) for layer, value in values.items()}

        return PlainRun(
            batch=self.batch.take(index),
            attention=each(self.attention),
            mlp=each(self.mlp),
            final=take(self.final),
            input=None if self.input is None else take(self.input),
            heads=each(self.heads),
            mlps=each(self.mlps),
            logits=take(self.logits),
        )

    def value(
        self, graph: EdgeGraph, sender: int, columns: Int[Tensor, "rows tokens"]
    ) -> Float[Tensor, "rows tokens width"]:
        """What a sender holds at some columns of every row: z of a head, what an MLP or the input adds to the stream."""
        held = self._held(graph, sender)
        at = columns.to(held.device)
        return held[torch.arange(len(at), device=held.device)[:, None], at]

    def _held(self, graph: EdgeGraph, sender: int) -> Tensor:
        if sender == 0:
            assert self.input is not None
            return self.input
        layer = graph.layer_of_sender(sender)
        if sender == graph.mlp_sender(layer):
            return self.mlps[layer]
        return self.heads[layer][:, :, sender - graph.heads(layer).start]


def run_plain(
    model: PatchModel, batch: Batch, held: Iterable[int], recomputed: Iterable[int] = ()
) -> PlainRun:
    """Runs prompts once, without gradients.

    Args:
        held: senders whose values are asked for later, or that are replaced.
        recomputed: senders that are computed again from changed streams.
    """
    graph = EdgeGraph.of(model.dims)
    heads, mlps = by_layer(graph, held)
    attention, mlp = by_layer(graph, recomputed)
    before_mlp = "resid_pre" if model.dims.parallel else "resid_mid"
    sites = {
        **{("attention", layer): Site("resid_pre", layer) for layer in attention},
        **{("mlp", layer): Site(before_mlp, layer) for layer in mlp},
        **{("heads", layer): Site("z", layer) for layer in heads},
        **{("mlps", layer): Site("mlp_out", layer) for layer in mlps},
    }
    last = Site("resid_post", model.dims.n_layers - 1)
    inputs = forward_inputs(model, batch)
    with torch.no_grad():
        with model.lm.trace(**inputs):
            given = token_embeddings(model)
            found = {site: read_site(model, site) for site in sorted({*sites.values(), last})}
            kept = nnsight.save((given, found, model.lm.output.logits[:, -1]))
    given, found, logits = kept

    def of(what: str) -> dict[int, Tensor]:
        return {layer: found[site] for (kind, layer), site in sites.items() if kind == what}

    return PlainRun(
        batch=batch.to(model.embed_device),
        attention=of("attention"),
        mlp=of("mlp"),
        final=found[last][:, -1:].clone(),
        input=given if 0 in set(held) else None,
        heads=of("heads"),
        mlps=of("mlps"),
        logits=logits,
    )


def is_head(graph: EdgeGraph, sender: int) -> bool:
    """Whether a sender is a head."""
    return sender > 0 and sender != graph.mlp_sender(graph.layer_of_sender(sender))


def by_layer(graph: EdgeGraph, senders: Iterable[int]) -> tuple[dict[int, list[int]], dict[int, list[int]]]:
    """Heads by layer and MLPs by layer; the input has none."""
    heads: dict[int, list[int]] = {}
    mlps: dict[int, list[int]] = {}
    for sender in sorted(set(senders) - {0}):
        of = heads if is_head(graph, sender) else mlps
        of.setdefault(graph.layer_of_sender(sender), []).append(sender)
    return heads, mlps
