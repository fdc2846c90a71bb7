"""Blending runs through a mask: at one position a row, `keep * original + (1 - keep) * alternate`, with gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from patchkit.data.batch import Batch
from patchkit.errors import InputError
from patchkit.model import KINDS, PatchModel, Site, check_site
from patchkit.model.access import prepare, read_site, write_site
from patchkit.tracing._inputs import check_columns, forward_inputs
from patchkit.tracing.reuse import Prefix


@dataclass(frozen=True)
class Blend:
    """The mask of one site and the alternate run's activations there.

    Attributes:
        keep: `[nodes]` or one mask a row `[batch, nodes]`; 1 keeps the original run, 0 puts in the alternate's. The
            whole site has one node unless it is divided into heads or neurons.
        alternate: `[batch, head, d_head]`, `[batch, neuron]` or `[batch, d_model]`.
    """

    site: Site
    keep: Tensor
    alternate: Tensor

    def apply(self, own: Tensor) -> Tensor:
        """Blends the run's own activation at the position, `[batch, ...]` as `alternate`."""
        # In float32 at least: a mask's gradient is a sum that half precision would round away.
        precise = torch.promote_types(own.dtype, torch.float32)
        keep = self.keep.to(device=own.device, dtype=precise)
        alternate = self.alternate.to(device=own.device, dtype=precise)
        if KINDS[self.site.kind].unit in ("head", "kv_head"):
            keep = keep.unsqueeze(-1)
        return torch.lerp(alternate, own.to(precise), keep.expand_as(own)).to(own.dtype)


def blended_logits(
    model: PatchModel, run: Batch | Prefix, blends: Sequence[Blend], columns: Int[Tensor, " batch"]
) -> Float[Tensor, "batch vocab"]:
    """Last-position logits of the original run with every site blended at `columns`.

    Differentiable in each `keep`. Given a `Prefix`, only its rest is run.

    Args:
        run: the original prompts, whole or with their prefix computed.
        columns: the padded column of the whole batch at which row b is blended.

    Raises:
        InputError: a site the model does not have or that comes twice, a mask or alternate of the wrong shape, a column
            on padding or before the prefix's end.
    """
    batch, start = (run.batch, run.start) if isinstance(run, Prefix) else (run, 0)
    check_columns(columns, batch)
    if int(columns.min()) < start:
        raise InputError(
            f"a mask at column {int(columns.min())} lies in the prefix, which ends at column {start}"
        )
    ordered = sorted(blends, key=lambda blend: blend.site)
    for blend in ordered:
        _check(blend, model, batch)
    doubled = [str(a.site) for a, b in zip(ordered, ordered[1:], strict=False) if a.site == b.site]
    if doubled:
        raise InputError(f"two masks of one site: {', '.join(doubled)}; give one mask a site")
    prepare(model, [blend.site for blend in ordered])
    inputs = run.inputs() if isinstance(run, Prefix) else forward_inputs(model, run)
    # Counted from the end: the keys and values of a run with a prefix include those of the prefix.
    rows, places = torch.arange(batch.rows), columns.to("cpu") - batch.width
    with model.frozen():
        with model.lm.trace(**inputs):
            for blend in ordered:
                activation = read_site(model, blend.site)
                if activation.shape[1] == 1:
                    blended = blend.apply(activation[:, 0])[:, None]
                else:
                    here = (rows.to(activation.device), places.to(activation.device))
                    blended = activation.index_put(here, blend.apply(activation[here]))
                write_site(model, blend.site, blended)
            logits = model.lm.output.logits[:, -1].save()
    return logits


def _check(blend: Blend, model: PatchModel, batch: Batch) -> None:
    check_site(blend.site, model.dims)
    kind = KINDS[blend.site.kind]
    nodes = kind.count(model.dims)
    if tuple(blend.keep.shape) not in ((nodes,), (batch.rows, nodes)):
        raise InputError(
            f"mask of {blend.site}: shape {tuple(blend.keep.shape)}, expected ({nodes},) or ({batch.rows}, {nodes})"
        )
    expected = (batch.rows, *kind.shape(model.dims))
    if tuple(blend.alternate.shape) != expected:
        raise InputError(
            f"mask of {blend.site}: alternate activations of shape {tuple(blend.alternate.shape)}, expected {expected}"
        )
