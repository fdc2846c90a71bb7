"""Gradients at receivers, carried back to the residual stream: one vector a token and receiver, a layer at a time.

A receiver reads the stream x through its norm and, in attention, a head's projection W_h. With g the gradient at the
projection's output, s the norm's scale at x and u its unit (`patchkit.model.norms`), the gradient at the stream is

    J^T W_h^T g = (w W_h^T g - mean(...) - u c) / s,        c = mean(w u W_h^T g) = g . (W_h (w u)) / d_model

Several runs are averaged (integrated gradients), each at its own x. Since W_h and w are the same in all of them, the
g / s are added up first and go through W_h once; of each run only u and the numbers c are kept.

Layout: receivers first, `[receiver, batch, position, d_model]`, so that a pair's receivers are the rows of a matrix.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from patchkit.model import EdgeGraph, Norm, PatchModel
from patchkit.tracing.edge_gradients import EdgeRun, Reads


@dataclass(eq=False)
class _Reader:
    """What the receivers behind one norm have added up: g / s by projection, and of each run u, c and the means."""

    norm: Norm | None
    totals: list[Tensor] = field(default_factory=list)
    units: list[Tensor] = field(default_factory=list)
    alongs: list[Tensor] = field(default_factory=list)
    means: list[Tensor] = field(default_factory=list)

    def add(self, gradients: list[Tensor]) -> None:
        self.totals = (
            [a + b for a, b in zip(self.totals, gradients, strict=True)] if self.totals else gradients
        )

    def correct(self, vectors: Tensor, rows: slice) -> None:
        """The norm's weight, and what of the gradient the norm does not let through, in place."""
        if self.norm is None:
            return
        vectors.mul_(self.norm.weight.to(vectors))
        for unit, along in zip(self.units, self.alongs, strict=True):
            vectors.addcmul_(along[:, rows, :, None], unit[None, rows], value=-1.0)
        for mean in self.means:
            vectors.sub_(mean[:, rows, :, None])


class LayerVectors:
    """Adds up one layer's weighted reads; gives the gradient at the stream of each of its receivers.

    Args:
        graph: native, or by query head when the reads are.
        real: which columns are no padding, `[batch, position]`; there the vectors are zero, whatever activations hold.
    """

    def __init__(
        self, model: PatchModel, graph: EdgeGraph, layer: int, real: Bool[Tensor, "batch position"]
    ) -> None:
        self.real = real
        #: Native: heads of a group share theirs, whose copies for a whole model would take more than the gradients.
        self.maps = model.projections(layer)
        self.attention = _Reader(model.attention_norm(layer))
        self.mlp = _Reader(model.mlp_norm(layer))

    def add(self, reads: Reads, weight: float) -> None:
        """Adds the gradients of a run, with a weight."""
        gradients = [clean(gradient, self.real).permute(2, 0, 1, 3) for gradient in reads.gradients]
        norm = self.attention.norm
        if norm is None:
            self.attention.add([gradient * weight for gradient in gradients])
        else:
            self._add_normed(norm, gradients, reads, weight)
        self._add_mlp(clean(reads.mlp_gradient, self.real)[None], reads.mid, weight)

    def vectors(self, rows: slice) -> Float[Tensor, "receiver batch position d_model"]:
        """In the graph's order: queries, keys, values, the MLP; for some rows of the batch."""
        parts = []
        for total, (weight, _) in zip(self.attention.totals, self.maps, strict=True):
            given = total[:, rows]
            heads, pairs, width, _ = given.shape
            # The heads of a group are rows of one product.
            shared = given.reshape(len(weight), -1, given.shape[-1])
            back = torch.bmm(shared, weight.to(given).transpose(1, 2))
            parts.append(back.reshape(heads, pairs, width, -1))
        attention = torch.cat(parts)
        self.attention.correct(attention, rows)
        mlp = self.mlp.totals[0][:, rows].clone()
        self.mlp.correct(mlp, rows)
        return torch.cat([attention, mlp.to(attention.device)])

    def _add_normed(self, norm: Norm, gradients: list[Tensor], reads: Reads, weight: float) -> None:
        stream = clean(reads.stream, self.real)
        inverse = weight / norm.scale(stream)[..., 0]
        along, mean = [], []
        for gradient, value, (matrix, bias) in zip(gradients, reads.projected, self.maps, strict=True):
            # W_h (w u) is the projection's output without what its bias and the norm's bias put in.
            shift = gradient.new_zeros(len(matrix), 1) if bias is None else bias.to(gradient)
            if norm.bias is not None:
                shift = shift + norm.bias.to(gradient) @ matrix.to(gradient)
            own = clean(value, self.real).permute(2, 0, 1, 3) - shift[:, None, None]
            along.append((gradient * repeated(own, len(gradient))).sum(-1))
            if norm.centred:
                through = repeated(norm.weight.to(gradient) @ matrix.to(gradient), len(gradient))
                mean.append((gradient * through[:, None, None]).sum(-1))
        self.attention.add([gradient * inverse[..., None] for gradient in gradients])
        self.attention.units.append(norm.unit(stream))
        self.attention.alongs.append(torch.cat(along) * inverse / stream.shape[-1])
        if norm.centred:
            self.attention.means.append(torch.cat(mean) * inverse / stream.shape[-1])

    def _add_mlp(self, gradient: Tensor, stream: Tensor, weight: float) -> None:
        norm = self.mlp.norm
        if norm is None:
            self.mlp.add([gradient * weight])
            return
        stream = clean(stream, self.real)
        inverse, unit = weight / norm.scale(stream), norm.unit(stream)
        weighted = gradient * norm.weight.to(gradient)
        self.mlp.add([gradient * inverse])
        self.mlp.units.append(unit)
        self.mlp.alongs.append((weighted * unit).mean(-1) * inverse[..., 0])
        if norm.centred:
            self.mlp.means.append(weighted.mean(-1) * inverse[..., 0])


class ReceiverVectors:
    """`LayerVectors` of every layer, and the logits' vector."""

    def __init__(self, model: PatchModel, graph: EdgeGraph, real: Bool[Tensor, "batch position"]) -> None:
        self.real = real
        self.layers = [LayerVectors(model, graph, layer, real) for layer in range(graph.n_layers)]
        self._final: Tensor | None = None

    def add(self, run: EdgeRun, weight: float = 1.0) -> None:
        """Adds a run's gradients with a weight."""
        for layer, reads in run.reads.items():
            self.layers[layer].add(reads, weight)
        final = clean(run.final, self.real) * weight
        self._final = final if self._final is None else self._final + final

    def logits(self, rows: slice) -> Float[Tensor, "1 batch position d_model"]:
        """The gradient at the stream before the final norm, of which the logits are the only reader."""
        assert self._final is not None
        return self._final[None, rows]


def clean(value: Tensor, real: Bool[Tensor, "batch position"]) -> Tensor:
    """`[batch, position, ...]` in float32 at least, zero on padding, where an activation may be anything."""
    precise = value.to(torch.promote_types(value.dtype, torch.float32))
    if bool(real.all()):
        return precise
    mask = real.to(value.device)
    return precise.masked_fill(~mask.reshape(*mask.shape, *[1] * (value.ndim - 2)), 0.0)


def repeated(by_head: Tensor, count: int) -> Tensor:
    """One entry a receiver from one a KV head."""
    return by_head if len(by_head) == count else by_head.repeat_interleave(count // len(by_head), dim=0)
