"""From a layer's gradients to the scores of its nodes: AtP's dot products, the QK fix, GradDrop's mean over drops."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from patchkit.methods._qk_fix import key_effects, keys_together, probability_gradient, query_effects
from patchkit.model import KINDS, NodeGrid, Site
from patchkit.tracing.gradients import LayerGradients


@dataclass(frozen=True, eq=False)
class NodeReduction:
    """What the attribution program does with each layer's gradients, inside the trace.

    Gives for each kind `signed` and `magnitude`, `[pairs, places, units]`: the mean over drops of the estimate and of
    its absolute value (without drops: the estimate and its absolute value).

    Attributes:
        put_in: what is put in at each site, `[pairs, width, ...]`.
        cover: padded columns of each place.
        qk_fix: whether `q` and `k` nodes get the QK fix; it also needs the sites q, k, v and z.
    """

    grid: NodeGrid
    put_in: Mapping[Site, Tensor]
    cover: Bool[Tensor, "pairs places width"]
    qk_fix: bool

    def __call__(self, layer: LayerGradients) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for kind in self.grid.kinds:
            if Site(kind, layer.layer) not in self.put_in:
                continue
            fixed = self.qk_fix and kind in ("q", "k")
            gradients = layer.gradients["z" if fixed else kind]
            signed: Tensor | None = None
            magnitude: Tensor | None = None
            drops = 0
            for weight, gradient in gradients:
                score = self._fixed(kind, layer, gradient) if fixed else self._linear(kind, layer, gradient)
                signed = weight * score if signed is None else signed + weight * score
                size = weight * score.abs()
                magnitude = size if magnitude is None else magnitude + size
                drops += weight
            assert signed is not None and magnitude is not None
            found[f"signed.{kind}"], found[f"magnitude.{kind}"] = signed / drops, magnitude / drops
        return found

    def _linear(
        self, kind: str, layer: LayerGradients, gradient: Tensor
    ) -> Float[Tensor, "pairs places units"]:
        """(put in - own) . gradient, AtP's estimate."""
        own = _precise(layer.values[kind])
        difference = _precise(self.put_in[Site(kind, layer.layer)].to(own.device)) - own
        product = difference * _precise(gradient)
        match KINDS[kind].unit:
            case "neuron":
                return self._by_place(kind, product)
            case "vector":
                return self._by_place(kind, product.sum(-1, keepdim=True))
        return self._by_place(kind, product.sum(-1))

    def _fixed(
        self, kind: str, layer: LayerGradients, z_gradient: Tensor
    ) -> Float[Tensor, "pairs places units"]:
        """Exact up to the softmax, linear after it; with a dropped gradient at z it is AtP*'s combination of both."""
        attention = layer.attention
        assert attention is not None
        queries, keys, values = (_precise(layer.values[name]) for name in ("q", "k", "v"))
        gradient = probability_gradient(_precise(z_gradient), values)
        patched = _precise(self.put_in[Site(kind, layer.layer)].to(queries.device))
        if kind == "q":
            return self._by_place(kind, query_effects(patched, queries, keys, attention, gradient))
        cover = self.cover.to(queries.device)
        several = (cover.sum(-1) > 1).any(0)
        if bool(several.all()):
            places = [
                keys_together(patched, queries, keys, cover[:, place], attention, gradient)
                for place in range(cover.shape[1])
            ]
            return torch.stack(places, dim=1)
        scores = self._by_place(kind, key_effects(patched, queries, keys, attention, gradient))
        for place in several.nonzero()[:, 0].tolist():
            scores[:, place] = keys_together(patched, queries, keys, cover[:, place], attention, gradient)
        return scores

    def _by_place(self, kind: str, by_token: Tensor) -> Float[Tensor, "pairs places units"]:
        """Dot products are added up over a place's tokens before any absolute value is taken."""
        if kind == "neuron" and self.grid.group > 1:
            missing = self.grid.units(kind) * self.grid.group - by_token.shape[-1]
            padded = torch.nn.functional.pad(by_token, (0, missing))
            by_token = padded.unflatten(-1, (-1, self.grid.group)).sum(-1)
        # Padding columns belong to no place, but an activation there may be anything, even NaN times zero.
        real = self.cover.any(1).to(by_token.device)[..., None]
        return torch.einsum("bpt,btu->bpu", self.cover.to(by_token), by_token.masked_fill(~real, 0.0))


def _precise(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32))
