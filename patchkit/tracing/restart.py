"""Restarting: a patched run computes only what its patch can change.

Below the patched layer every activation is the base run's, so the run starts at that layer from the cached residual
stream; before the patched position too, so it starts there from the cached keys and values. Exact: the same arithmetic
on the same numbers. Many patched runs are the rows of one batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import nnsight
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from patchkit.data.batch import Batch
from patchkit.errors import InputError
from patchkit.model import KINDS, PatchModel, Site, check_site
from patchkit.model.access import prepare, raw_site, read_site, write_site
from patchkit.tracing._inputs import forward_inputs


@dataclass(frozen=True, eq=False)
class BaseRun:
    """A run that patched ones restart from.

    Attributes:
        batch: its prompts, `[pairs, width]`.
        streams: the residual stream before each layer, `[pairs, width, d_model]`.
        keys, values: of each layer as attention uses them, `[pairs, kv_head, width, d_head]`.
        logits: at the last position.
        own: activations of the sites that were asked for, canonical shapes.
    """

    batch: Batch
    streams: tuple[Tensor, ...]
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    logits: Float[Tensor, "pairs vocab"]
    own: Mapping[Site, Tensor]


@dataclass(frozen=True, eq=False)
class Swap:
    """What the rows of a patched run put in at one site.

    Attributes:
        where: the nodes and padded columns that row r replaces, `[rows, width, nodes]` (nodes: heads, neurons, or 1).
        values: what every pair has there, `[pairs, width, ...]` in canonical shape; row r takes its pair's.
    """

    site: Site
    where: Bool[Tensor, "rows width nodes"]
    values: Tensor

    def apply(self, activation: Tensor, pairs: Int[Tensor, " rows"]) -> Tensor:
        """The activation `[rows, position, ...]`, which ends at the last column, with its values put in."""
        seen = activation.shape[1]
        device = activation.device
        where = self.where[:, self.where.shape[1] - seen :].to(device)
        values = self.values[:, self.values.shape[1] - seen :]
        values = values[pairs.to(values.device)].to(device=device, dtype=activation.dtype)
        if KINDS[self.site.kind].unit in ("head", "kv_head"):
            where = where.unsqueeze(-1)
        # Modules that view their input need it in one piece, whatever the memory layout of the mask.
        return torch.where(where, values, activation).contiguous()


def compute_base(model: PatchModel, batch: Batch, read: Sequence[Site] = ()) -> BaseRun:
    """Runs the prompts once and keeps what restarts need, and the activations of the sites in `read`.

    Raises:
        InputError: the model has no such site.
    """
    ordered = sorted(set(read))
    for site in ordered:
        check_site(site, model.dims)
    prepare(model, ordered)
    inputs = forward_inputs(model, batch, use_cache=True)
    # Not the model's own kind of cache: that of a layer with a sliding window forgets what is out of sight at the end.
    inputs["past_key_values"] = DynamicCache()
    visited = sorted({*ordered, *(Site("resid_pre", layer) for layer in range(model.dims.n_layers))})
    with torch.no_grad():
        with model.lm.trace(**inputs):
            found = {site: read_site(model, site) for site in visited}
            output = model.lm.output
            logits = output.logits[:, -1].save()
            cache = output.past_key_values
            keys = tuple(layer.keys for layer in cache.layers)
            values = tuple(layer.values for layer in cache.layers)
            streams = tuple(found[Site("resid_pre", layer)] for layer in range(model.dims.n_layers))
            kept = nnsight.save((streams, keys, values, {site: found[site] for site in ordered}))
    streams, keys, values, own = kept
    return BaseRun(batch.to(model.embed_device), streams, keys, values, logits, own)


def run_swapped(
    model: PatchModel,
    base: BaseRun,
    pairs: Int[Tensor, " rows"],
    swaps: Sequence[Swap],
    *,
    layer: int,
    start: int,
) -> Float[Tensor, "rows vocab"]:
    """Last-position logits of patched runs, restarted at a layer and a padded column.

    Args:
        pairs: the row of `base` that each patched run is a copy of.
        swaps: at most one a site; none below `layer`, and none before column `start`.

    Raises:
        InputError: a swap that a restart there would miss, or of another shape than its site.
    """
    ordered = sorted(swaps, key=lambda swap: swap.site)
    for swap in ordered:
        _check(swap, model, base, len(pairs), layer, start)
    prepare(model, [swap.site for swap in ordered])
    inputs = _inputs(model, base, pairs, start)
    stream = base.streams[layer][:, start:]
    with torch.no_grad():
        with model.lm.trace(**inputs):
            if layer:
                # Only the last skipped block's output is read, but each must give something of that shape.
                reached = stream[pairs.to(stream.device)]
                for below in range(layer):
                    model.block(below).skip(reached)
            for swap in ordered:
                write_site(model, swap.site, swap.apply(_current(model, swap.site), pairs))
            logits = model.lm.output.logits[:, -1].save()
    return logits


def _current(model: PatchModel, site: Site) -> Tensor:
    # What is put in is computed into a new tensor, so no copy is needed even where a site is written in place.
    return raw_site(model, site) if site.kind == "resid_mid" else read_site(model, site)


def _inputs(model: PatchModel, base: BaseRun, pairs: Int[Tensor, " rows"], start: int) -> dict[str, Any]:
    rows = pairs.to(base.batch.input_ids.device)
    batch = Batch(base.batch.input_ids[rows], base.batch.attention_mask[rows])
    inputs = forward_inputs(model, batch)
    if start:
        inputs["input_ids"] = inputs["input_ids"][:, start:]
        inputs["position_ids"] = inputs["position_ids"][:, start:]
        inputs["use_cache"] = True
        inputs["past_key_values"] = Cache(
            layers=[
                _BeforeStart(keys, values, pairs, start)
                for keys, values in zip(base.keys, base.values, strict=True)
            ]
        )
    return inputs


class _BeforeStart(DynamicLayer):
    """The base run's keys and values before the restart, one row for each patched run.

    They are copied a layer at a time and never kept: an ordinary cache would hold a copy for every row and layer.
    """

    def __init__(self, keys: Tensor, values: Tensor, pairs: Int[Tensor, " rows"], start: int) -> None:
        DynamicLayer.__init__(self)
        self.keys, self.values = keys[:, :, :start], values[:, :, :start]
        self.pairs = pairs.to(keys.device)
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of all columns: the base run's, then those that are computed now."""
        assert self.keys is not None and self.values is not None
        return (
            torch.cat([self.keys[self.pairs], key_states], dim=-2),
            torch.cat([self.values[self.pairs], value_states], dim=-2),
        )


def _check(swap: Swap, model: PatchModel, base: BaseRun, rows: int, layer: int, start: int) -> None:
    check_site(swap.site, model.dims)
    if swap.site.layer < layer:
        raise InputError(f"swap at {swap.site}: the run restarts at layer {layer} and would miss it")
    kind, width = KINDS[swap.site.kind], base.batch.width
    expected = (rows, width, kind.count(model.dims))
    if tuple(swap.where.shape) != expected:
        raise InputError(
            f"swap at {swap.site}: `where` of shape {tuple(swap.where.shape)}, expected {expected}"
        )
    if bool(swap.where[:, :start].any()):
        raise InputError(
            f"swap at {swap.site}: the run restarts at column {start} and would miss columns before it"
        )
    expected = (base.batch.rows, width, *kind.shape(model.dims))
    if tuple(swap.values.shape) != expected:
        raise InputError(
            f"swap at {swap.site}: values of shape {tuple(swap.values.shape)}, expected {expected}"
        )
