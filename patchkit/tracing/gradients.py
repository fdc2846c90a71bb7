"""Gradients layer by layer, reduced where they are: one forward and one backward, or GradDrop's shared backwards.

GradDrop (AtP*, Kramar et al. 2024, arXiv:2403.00745) needs the gradient L times, each time with one block's contribution
to the residual stream held fixed. Dropping block l leaves the gradients of all layers above l as they are and replaces
the one that leaves block l by the one that came in. So the backward goes down once, carrying one cotangent for every
block dropped so far beside the ordinary one: L(L-1)/2 backwards through single layers instead of L through all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Protocol, runtime_checkable

import nnsight
import torch
from jaxtyping import Float
from torch import Tensor

from patchkit.data.batch import Batch
from patchkit.errors import InputError
from patchkit.model import PatchModel, Site, check_site
from patchkit.model.access import canonical, prepare, raw_site
from patchkit.tracing._attention import Attention as Attention
from patchkit.tracing._attention import attention_of
from patchkit.tracing._inputs import forward_inputs

#: Tokens of one backward through a block: cotangents of small batches are stacked up to this many.
BATCHED_BACKWARD = 1024


@dataclass(frozen=True, eq=False)
class LayerGradients:
    """Activations of one layer and the gradients of the metric's sum over rows at them, in canonical shapes.

    Attributes:
        values: by node kind; keys and values as used (`k`, `v`) are of all columns, those that were run before too.
        gradients: by node kind, each with how many drops it stands for; without drops one gradient of weight 1. Drops
            for which the gradient is zero are left out, so the weights are L - 1 in all, or L for the residual stream.
        attention: where it was asked for.
    """

    layer: int
    values: Mapping[str, Tensor]
    gradients: Mapping[str, Sequence[tuple[int, Tensor]]]
    attention: Attention | None


@runtime_checkable
class Reduce(Protocol):
    """Turns a layer's gradients into the tensors to keep; runs inside the trace."""

    def __call__(self, layer: LayerGradients) -> dict[str, Tensor]: ...


@dataclass(frozen=True, eq=False)
class Reduced:
    """What the reduction gave for each layer, the metric of each row, and the layer-backwards that drops took."""

    layers: Mapping[int, dict[str, Tensor]]
    metric: Float[Tensor, " batch"]
    layer_backwards: int


def reduce_gradients(
    model: PatchModel,
    batch: Batch,
    sites: Sequence[Site],
    metric: Callable[[Tensor], Tensor],
    reduce: Reduce,
    *,
    drop_layers: bool = False,
    attention: Sequence[int] = (),
) -> Reduced:
    """Runs the batch once, takes the gradient of the metric at every site, and reduces it layer by layer.

    Args:
        metric: last-position logits `[batch, vocab]` to `[batch]`; row b of a gradient is that of row b's own metric.
        reduce: called once a layer that has sites, inside the trace.
        drop_layers: GradDrop: gradients under the drop of each block in turn.
        attention: layers whose attention call is handed to `reduce` too.

    Raises:
        InputError: a site the model does not have, a metric that is not one number a row or does not depend on the
            logits, GradDrop on a model of one layer.
    """
    ordered = sorted(set(sites))
    for site in ordered:
        check_site(site, model.dims)
    layers = model.dims.n_layers
    if drop_layers and layers < 2:
        raise InputError(
            f"{model.name} has one layer: GradDrop averages over the other layers' drops and needs at least two; use "
            "atp or atp-qk"
        )
    prepare(model, [*ordered, *(Site("q", layer) for layer in attention)])
    inputs = forward_inputs(model, batch)
    wanted = ordered
    if drop_layers and ordered:
        lowest = ordered[0].layer
        edges = [Site(kind, layer) for layer in range(lowest, layers) for kind in ("resid_pre", "resid_post")]
        wanted = sorted({*ordered, *edges})
    with model.frozen(), torch.enable_grad():
        with model.lm.trace(**inputs):
            attrgetter(model.arch.embed)(model.lm).output.requires_grad_(True)
            raw: dict[Site, Tensor] = {}
            calls: dict[int, Attention] = {}
            for site in sorted({*wanted, *(Site("q", layer) for layer in attention)}):
                if site.kind == "q" and site.layer in attention:
                    calls[site.layer] = attention_of(model, site.layer, inputs["attention_mask"])
                if site in wanted:
                    raw[site] = raw_site(model, site)
            score = _scored(metric, model.lm.output.logits[:, -1])
            backward = _Backward(model, ordered, raw, calls, reduce)
            counted = backward.dropped(score) if drop_layers else backward.ordinary(score)
            found = nnsight.save((backward.found, score.detach(), counted))
    return Reduced(*found)


def _scored(metric: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
    score = metric(logits)
    if not score.requires_grad:
        raise InputError(
            "the metric does not depend on the logits in a way that has a gradient; patch exactly instead"
        )
    return score


class _Backward:
    """The backward of one forward that has run: which gradients are taken, in which order, and what they become."""

    def __init__(
        self,
        model: PatchModel,
        sites: Sequence[Site],
        raw: Mapping[Site, Tensor],
        calls: Mapping[int, Attention],
        reduce: Reduce,
    ) -> None:
        self.model, self.sites, self.raw, self.calls, self.reduce = model, sites, raw, calls, reduce
        self.found: dict[int, dict[str, Tensor]] = {}
        # Other attention functions may have backwards of their own making, which cannot be batched.
        self.batched = getattr(model.config, "_attn_implementation", None) in ("eager", "sdpa")

    def ordinary(self, score: Tensor) -> int:
        """All gradients by one backward; no extra layer-backwards."""
        taken = torch.autograd.grad(score.sum(), [self.raw[site] for site in self.sites], allow_unused=True)
        by_layer: dict[int, dict[str, list[tuple[int, Tensor]]]] = {}
        for site, gradient in zip(self.sites, taken, strict=True):
            kept = torch.zeros_like(self.raw[site]) if gradient is None else gradient
            by_layer.setdefault(site.layer, {})[site.kind] = [(1, canonical(self.model, site, kept))]
        for layer, gradients in by_layer.items():
            self._reduce(layer, gradients)
        return 0

    def dropped(self, score: Tensor) -> int:
        """Gradients under every drop, going down layer by layer; returns the extra layer-backwards that it took."""
        if not self.sites:
            return 0
        top, counted = self.model.dims.n_layers - 1, 0
        (ordinary,) = torch.autograd.grad(score.sum(), [self.raw[Site("resid_post", top)]], retain_graph=True)
        #: Cotangents at the current block's output: the ordinary one, then one for each block dropped above it.
        slots = [ordinary]
        lowest = self.sites[0].layer
        for layer in range(top, lowest - 1, -1):
            output = self.raw[Site("resid_post", layer)]
            slots = [slot.to(output.device) for slot in slots]
            gradients: dict[str, list[tuple[int, Tensor]]] = {site.kind: [] for site in self._at(layer)}
            inside = [site for site in self._at(layer) if site.kind not in ("resid_pre", "resid_post")]
            # Nothing below the lowest layer asks for the stream's gradient, and a backward stops where nothing asks.
            through = [Site("resid_pre", layer)] if layer > lowest or "resid_pre" in gradients else []
            # The ordinary gradient belongs to the drops of the blocks below, which are not dropped yet.
            weights = [layer, *[1] * (len(slots) - 1)]
            if "resid_post" in gradients:
                gradients["resid_post"] = [(weights[0] + 1, slots[0]), *((1, slot) for slot in slots[1:])]
            below: list[Tensor] = []
            if through or inside:
                # Below the lowest block of all there is nothing to drop, and no use for the ordinary gradient.
                used = [(weight, slot) for weight, slot in zip(weights, slots, strict=True) if weight]
                taken = self._through_block(output, [*through, *inside], [slot for _, slot in used])
                counted += len(slots) - 1
                if through:
                    below = list(taken[through[0]])
                for site in [*inside, *(through if "resid_pre" in gradients else [])]:
                    gradients[site.kind] = [
                        (weight, canonical(self.model, site, gradient))
                        for (weight, _), gradient in zip(used, taken[site], strict=True)
                    ]
            # Under the drop of its own block the stream keeps its skip path.
            for kind in ("resid_pre", "resid_mid"):
                if kind in gradients:
                    gradients[kind].append((1, slots[0]))
            if gradients:
                self._reduce(layer, gradients)
            slots = [*below, slots[0]]
        return counted

    def _through_block(
        self, output: Tensor, sites: Sequence[Site], cotangents: Sequence[Tensor]
    ) -> dict[Site, list[Tensor]]:
        """Gradients at sites of one block, for each cotangent at its output."""
        raw = [self.raw[site] for site in sites]
        found: dict[Site, list[Tensor]] = {site: [] for site in sites}
        tokens = output.shape[0] * output.shape[1]
        at_once = max(1, BATCHED_BACKWARD // tokens) if self.batched else 1
        for begin in range(0, len(cotangents), at_once):
            part = cotangents[begin : begin + at_once]
            batched = len(part) > 1
            given = torch.stack(list(part)) if batched else part[0]
            taken = torch.autograd.grad(
                output, raw, given, retain_graph=True, allow_unused=True, is_grads_batched=batched
            )
            for site, value, gradient in zip(sites, raw, taken, strict=True):
                if gradient is None:
                    found[site] += [torch.zeros_like(value)] * len(part)
                else:
                    found[site] += list(gradient) if batched else [gradient]
        return found

    def _at(self, layer: int) -> list[Site]:
        return [site for site in self.sites if site.layer == layer]

    def _reduce(self, layer: int, gradients: Mapping[str, Sequence[tuple[int, Tensor]]]) -> None:
        values: dict[str, Any] = {
            site.kind: canonical(self.model, site, self.raw[site]).detach() for site in self._at(layer)
        }
        with torch.no_grad():
            self.found[layer] = self.reduce(LayerGradients(layer, values, gradients, self.calls.get(layer)))
