"""Patching rows: many patches of many prompts are rows of one batch, written in one trace by index."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import nnsight
import torch
from jaxtyping import Int
from torch import Tensor

from patchkit.data.batch import Batch
from patchkit.errors import InputError
from patchkit.model import KINDS, PatchModel, Site, check_site, in_order
from patchkit.model.access import prepare, read_site, write_site
from patchkit.tracing._inputs import forward_inputs
from patchkit.tracing.capture import Captured


@dataclass(frozen=True)
class Patch:
    """New values for some nodes of one site, n of them.

    Attributes:
        site: where.
        values: `[n, ...]`, each the canonical shape of what is left after row, column and index: with all three
            `[n, d_head]` for heads and `[n]` for neurons; without `columns` a position axis comes after n.
        rows: the batch row of each patch, `[n]`.
        columns: the padded column of each, or None for all positions of the row.
        index: the head or neuron of each, or None for the whole site.
    """

    site: Site
    values: Tensor
    rows: Int[Tensor, " n"]
    columns: Int[Tensor, " n"] | None = None
    index: Int[Tensor, " n"] | None = None

    def apply(self, activation: Tensor) -> Tensor:
        """The activation `[batch, position, ...]` with the new values; the input is left as it is."""
        device = activation.device
        everything = slice(None)
        place = (
            self.rows.to(device),
            everything if self.columns is None else self.columns.to(device),
            *(() if self.index is None else (self.index.to(device),)),
        )
        patched = activation.clone()
        patched[place] = self.values.to(device=device, dtype=activation.dtype)
        return patched


def _check(patch: Patch, model: PatchModel, batch: Batch) -> None:
    check_site(patch.site, model.dims)
    kind = KINDS[patch.site.kind]
    if patch.index is not None and kind.unit == "vector":
        raise InputError(f"patch of {patch.site}: this node kind is one vector a position, it takes no index")
    for name, tensor, limit in (
        ("row", patch.rows, batch.rows),
        ("column", patch.columns, batch.width),
        ("index", patch.index, kind.count(model.dims)),
    ):
        if tensor is None:
            continue
        if tuple(tensor.shape) != (len(patch.rows),):
            raise InputError(
                f"patch of {patch.site}: {name} has shape {tuple(tensor.shape)}, expected one for each of the "
                f"{len(patch.rows)} rows"
            )
        if tensor.numel() and (int(tensor.min()) < 0 or int(tensor.max()) >= limit):
            raise InputError(
                f"patch of {patch.site}: {name} {int(tensor.min())}..{int(tensor.max())} is out of range, "
                f"expected 0 to {limit - 1}"
            )
    positions = () if patch.columns is not None else (batch.width,)
    node = kind.shape(model.dims)[0 if patch.index is None else 1 :]
    expected = (len(patch.rows), *positions, *node)
    if tuple(patch.values.shape) != expected:
        raise InputError(
            f"patch of {patch.site}: values of shape {tuple(patch.values.shape)}, expected {expected}"
        )
    if patch.columns is not None and bool((batch.attention_mask[patch.rows, patch.columns] == 0).any()):
        raise InputError(f"patch of {patch.site}: a column falls on padding; positions count unpadded tokens")


def run_patched(
    model: PatchModel, batch: Batch, patches: Sequence[Patch], read: Iterable[Site] = ()
) -> Captured:
    """One forward with all patches in place; no gradients.

    Args:
        patches: any number, of any sites; those of one site are applied in the order given.
        read: sites to read beside them. A site that is both patched and read is read as patched.

    Returns:
        The sites read, all positions, and the last-position logits.

    Raises:
        InputError: a site, row, column or index that does not exist, values of the wrong shape, or a column on padding.
    """
    for patch in patches:
        _check(patch, model, batch)
    wanted = in_order(read)
    for site in wanted:
        check_site(site, model.dims)
    visited = in_order([*(patch.site for patch in patches), *wanted])
    prepare(model, visited)
    inputs = forward_inputs(model, batch)
    with torch.no_grad():
        with model.lm.trace(**inputs):
            kept = []
            for site in visited:
                activation = read_site(model, site)
                mine = [patch for patch in patches if patch.site == site]
                for patch in mine:
                    activation = patch.apply(activation)
                if mine:
                    write_site(model, site, activation)
                if site in wanted:
                    kept.append(activation)
            kept = nnsight.save(kept)
            logits = model.lm.output.logits[:, -1].save()
    return Captured(dict(zip(wanted, kept, strict=True)), logits)
