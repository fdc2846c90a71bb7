"""From a layer's gradients to the scores of its nodes: AtP's dot products, the QK fix, GradDrop's mean over drops."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from patchkit.methods._qk_fix import Effects, key_effects, keys_together, probability_gradient, query_effects
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
        here = [kind for kind in self.grid.kinds if Site(kind, layer.layer) in self.put_in]
        fixed = [kind for kind in here if self.qk_fix and kind in ("q", "k")]
        for kind in here:
            if kind not in fixed:
                scores = ((weight, self._linear(kind, layer, g)) for weight, g in layer.gradients[kind])
                found |= _mean_over_drops(kind, scores)
        if fixed:
            found |= self._fixed(fixed, layer)
        return found

    def _linear(
        self, kind: str, layer: LayerGradients, gradient: Tensor
    ) -> Float[Tensor, "pairs places units"]:
        """(put in - own) . gradient, AtP's estimate."""
        put_in = self.put_in[Site(kind, layer.layer)]
        own, gradient = (_precise(_last(value, put_in.shape[1])) for value in (layer.values[kind], gradient))
        product = (_precise(put_in.to(own.device)) - own) * gradient
        match KINDS[kind].unit:
            case "neuron":
                return self._by_place(kind, product)
            case "vector":
                return self._by_place(kind, product.sum(-1, keepdim=True))
        return self._by_place(kind, product.sum(-1))

    def _fixed(self, kinds: Sequence[str], layer: LayerGradients) -> dict[str, Tensor]:
        """Exact up to the softmax, linear after it; with dropped gradients at z it is AtP*'s combination of both."""
        values = _precise(layer.values["v"])
        effects = {kind: self._effects(kind, layer) for kind in kinds}
        scores: dict[str, list[tuple[int, Tensor]]] = {kind: [] for kind in kinds}
        for weight, z_gradient in layer.gradients["z"]:
            gradient = probability_gradient(_precise(z_gradient), values)
            for kind in kinds:
                scores[kind].append((weight, effects[kind](gradient)))
        found: dict[str, Tensor] = {}
        for kind in kinds:
            found |= _mean_over_drops(kind, scores[kind])
        return found

    def _effects(self, kind: str, layer: LayerGradients) -> Effects:
        """From the gradient at the probabilities to the effects of a kind's nodes, `[pairs, places, units]`."""
        attention = layer.attention
        assert attention is not None
        queries, keys = (_precise(layer.values[name]) for name in ("q", "k"))
        patched = _precise(self.put_in[Site(kind, layer.layer)].to(queries.device))
        if kind == "q":
            of_query = query_effects(patched, queries, keys, attention)
            return lambda gradient: self._by_place(kind, of_query(gradient))
        # Keys of columns that were run before stay as they are.
        before = keys.shape[1] - patched.shape[1]
        patched = torch.cat([keys[:, :before], patched], dim=1)
        cover = torch.nn.functional.pad(self.cover.to(queries.device), (before, 0))
        several = (cover.sum(-1) > 1).any(0)
        together = {
            place: keys_together(patched, queries, keys, cover[:, place], attention)
            for place in several.nonzero()[:, 0].tolist()
        }
        alone = None if bool(several.all()) else key_effects(patched, queries, keys, attention)

        def effects(gradient: Tensor) -> Tensor:
            if alone is None:
                return torch.stack([together[place](gradient) for place in range(cover.shape[1])], dim=1)
            scores = self._by_place(kind, _last(alone(gradient), self.cover.shape[2]))
            for place, of_keys in together.items():
                scores[:, place] = of_keys(gradient)
            return scores

        return effects

    def _by_place(self, kind: str, by_token: Tensor) -> Float[Tensor, "pairs places units"]:
        """Dot products are added up over a place's tokens before any absolute value is taken."""
        if kind == "neuron" and self.grid.group > 1:
            missing = self.grid.units(kind) * self.grid.group - by_token.shape[-1]
            padded = torch.nn.functional.pad(by_token, (0, missing))
            by_token = padded.unflatten(-1, (-1, self.grid.group)).sum(-1)
        # Padding columns belong to no place, but an activation there may be anything, even NaN times zero.
        real = self.cover.any(1).to(by_token.device)[..., None]
        return torch.einsum("bpt,btu->bpu", self.cover.to(by_token), by_token.masked_fill(~real, 0.0))


def _mean_over_drops(kind: str, scores: Iterable[tuple[int, Tensor]]) -> dict[str, Tensor]:
    """`signed` and `magnitude` from the estimates of each gradient and the number of drops that it stands for."""
    terms = [(weight, weight * score) for weight, score in scores]
    drops = sum(weight for weight, _ in terms)
    weighted = torch.stack([term for _, term in terms])
    return {f"signed.{kind}": weighted.sum(0) / drops, f"magnitude.{kind}": weighted.abs().sum(0) / drops}


def _last(value: Tensor, columns: int) -> Tensor:
    """The last columns of `[pairs, columns, ...]`: keys and values are of those that were run before too."""
    return value[:, value.shape[1] - columns :]


def _precise(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32))
