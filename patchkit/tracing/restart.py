"""Restarting: a patched run computes only what its patch can change.

- Below the patched layer every activation is the base run's: the run starts at that layer, from the cached residual
  stream. Where nothing is patched before the heads are added up, it starts behind the layer's attention.
- Before the patched position too: it starts there, from the cached keys and values.
- In the patched layer, behind its attention, only the patched positions differ: the MLP runs on these alone.
- Of the last layer, only the last position is read: there its output projection and MLP run on that alone.

Exact: the same arithmetic on the same numbers. Many patched runs are the rows of one batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import nnsight
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import Cache

from patchkit.data.batch import Batch
from patchkit.errors import InputError
from patchkit.model import KINDS, PatchModel, Site, check_site
from patchkit.model.access import module_at, prepare, raw_site, read_site, write_site
from patchkit.tracing._inputs import forward_inputs
from patchkit.tracing._swap import SharedPrefix
from patchkit.tracing._swap import Swap as Swap
from patchkit.tracing.suffix import kept_cache

#: Kinds of a layer at which a patch leaves its attention as it was, in execution order.
BEHIND_ATTENTION = tuple(KINDS)[tuple(KINDS).index("z") :]
#: Kinds of the last layer at which a patch changes its own position only.
LOCAL_AT_THE_END = ("q_proj", "q", *BEHIND_ATTENTION)


@dataclass(frozen=True, eq=False)
class BaseRun:
    """A run that patched ones restart from.

    Attributes:
        batch: its prompts, `[pairs, width]`.
        streams: the residual stream before each layer, `[pairs, width, d_model]`.
        keys, values: of each layer as attention uses them, `[pairs, kv_head, columns, d_head]`: of the batch's columns,
            and of those before them where these were run before.
        heads: z at the layers that can be restarted behind their attention, `[pairs, width, head, d_head]`.
        logits: at the last position.
        own: activations of the sites that were asked for, canonical shapes.
    """

    batch: Batch
    streams: tuple[Tensor, ...]
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    heads: Mapping[int, Tensor]
    logits: Float[Tensor, "pairs vocab"]
    own: Mapping[Site, Tensor]


def compute_base(
    model: PatchModel, batch: Batch, read: Sequence[Site] = (), *, behind_attention: Sequence[int] = ()
) -> BaseRun:
    """Runs the prompts once and keeps what restarts need, and the activations of the sites in `read`.

    Args:
        behind_attention: layers at which runs may restart behind the attention.

    Raises:
        InputError: the model has no such site.
    """
    layers = range(model.dims.n_layers)
    for site in read:
        check_site(site, model.dims)
    prepare(model, read)
    inputs = forward_inputs(model, batch, use_cache=True)
    inputs["past_key_values"] = kept_cache(batch)
    streams, heads = [Site("resid_pre", layer) for layer in layers], [Site("z", i) for i in behind_attention]
    visited = sorted({*read, *streams, *heads})
    with torch.no_grad():
        with model.lm.trace(**inputs):
            found = {site: read_site(model, site) for site in visited}
            output = model.lm.output
            # In a host's sandbox the cache cannot be reached: runs there start at the first token.
            cached = output.past_key_values.layers if model.reachable else ()
            keys, values = tuple(layer.keys for layer in cached), tuple(layer.values for layer in cached)
            kept = nnsight.save((found, keys, values, output.logits[:, -1]))
    found, keys, values, logits = kept
    return BaseRun(
        batch=batch.to(model.embed_device),
        streams=tuple(found[site] for site in streams),
        keys=keys,
        values=values,
        heads={site.layer: found[site] for site in heads},
        logits=logits,
        own={site: found[site] for site in read},
    )


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
    return run_watched(model, base, pairs, swaps, (), layer=layer, start=start)[0]


def run_watched(
    model: PatchModel,
    base: BaseRun,
    pairs: Int[Tensor, " rows"],
    swaps: Sequence[Swap],
    watched: Sequence[Site],
    *,
    layer: int,
    start: int,
) -> tuple[Float[Tensor, "rows vocab"], dict[Site, Float[Tensor, "rows d_model"]]]:
    """`run_swapped`, and what some vectors of the stream or of modules were at the last position.

    Args:
        watched: sites of kinds that are one vector a position, none below `layer`.
    """
    inputs, rows = _prepared(model, base, pairs, swaps, layer, start)
    rows.watched = frozenset(watched)
    with torch.no_grad():
        with model.lm.trace(**inputs):
            rows.run()
            kept = nnsight.save((model.lm.output.logits[:, -1], rows.seen))
    return kept


def read_heads(
    model: PatchModel,
    base: BaseRun,
    pairs: Int[Tensor, " rows"],
    swaps: Sequence[Swap],
    *,
    layer: int,
    start: int,
) -> Float[Tensor, "rows position head d_head"]:
    """z of one layer of patched runs, from column `start` on: they end there, so that one layer's attention is all that
    is run.

    Args:
        swaps: at sites of that layer up to its attention; see `run_swapped`.

    Raises:
        InputError: as `run_swapped`.
    """
    inputs, rows = _prepared(model, base, pairs, swaps, layer, start)
    with torch.no_grad():
        with model.lm.trace(**inputs) as tracer:
            heads = nnsight.save(rows.reach_heads())
            tracer.stop()
    return heads


def _prepared(
    model: PatchModel,
    base: BaseRun,
    pairs: Int[Tensor, " rows"],
    swaps: Sequence[Swap],
    layer: int,
    start: int,
) -> tuple[dict[str, Any], _Rows]:
    for swap in swaps:
        _check(swap, model, base, len(pairs), layer, start)
    prepare(model, [swap.site for swap in swaps])
    rows = _Rows(model, base, pairs, {swap.site: swap for swap in swaps}, layer, start)
    return _inputs(model, base, pairs, start), rows


class _Rows:
    """Patched rows of one restart; `run` or `reach_heads` is called in the trace's body."""

    def __init__(
        self,
        model: PatchModel,
        base: BaseRun,
        pairs: Int[Tensor, " rows"],
        swaps: Mapping[Site, Swap],
        layer: int,
        start: int,
    ) -> None:
        self.model, self.base, self.pairs, self.swaps = model, base, pairs, swaps
        self.layer, self.start, self.width = layer, start, base.batch.width
        #: Sites that are read at the last position, and what they were.
        self.watched: frozenset[Site] = frozenset()
        self.seen: dict[Site, Tensor] = {}
        here = [swap for swap in swaps.values() if swap.site.layer == layer]
        #: Whether the restart is behind the layer's attention, and then how many columns differ in that layer.
        self.behind = bool(here) and layer in base.heads
        self.behind = self.behind and all(swap.site.kind in BEHIND_ATTENTION for swap in here)
        columns = torch.stack([swap.where.any(2).any(0) for swap in here]).any(0) if here else torch.ones(1)
        self.changed = int(columns.nonzero()[-1]) + 1 - start if self.behind and bool(columns.any()) else 0
        if layer == model.dims.n_layers - 1:
            # There is no later stream to take the other columns from.
            self.changed = self.width - start

    def run(self) -> None:
        self._skip_below()
        for layer in range(self.layer, self.model.dims.n_layers):
            if layer == self.layer and self.behind:
                self._patched_layer(layer)
            else:
                self._layer(layer, last=layer == self.model.dims.n_layers - 1)

    def reach_heads(self) -> Tensor:
        self._skip_below()
        for kind in KINDS:
            if kind == "z":
                break
            self._swap(Site(kind, self.layer))
        return read_site(self.model, Site("z", self.layer))

    def _skip_below(self) -> None:
        if self.layer:
            # Only the last skipped block's output is read, but each must give something of that shape.
            reached = self._of_base(self.base.streams[self.layer], self.start)
            for below in range(self.layer):
                self.model.block(below).skip(reached)

    def _layer(self, layer: int, last: bool) -> None:
        block = self.model.block(layer)
        for kind in KINDS:
            if kind == "z" and last:
                heads = self._put_in(Site("z", layer), read_site(self.model, Site("z", layer)))
                write_site(self.model, Site("z", layer), heads[:, -1:].contiguous())
                continue
            if kind == "neuron" and last:
                mlp = module_at(block, self.model.arch.mlp)
                mlp.input = mlp.input[:, -1:].contiguous()
            self._swap(Site(kind, layer))

    def _patched_layer(self, layer: int) -> None:
        """The first layer, restarted behind its attention: the heads' values are the base run's, some replaced."""
        block, arch, columns = self.model.block(layer), self.model.arch, self.width - self.start
        heads = self._of_base(self.base.heads[layer], self.start)
        added = module_at(block, arch.out_proj)(self._put_in(Site("z", layer), heads).flatten(-2))
        if arch.attn_out is None:
            # The output projection does not run by itself now, so its output is patched before it is handed over.
            added = self._put_in(Site("attn_out", layer), added)
            if Site("attn_out", layer) in self.watched:
                self.seen[Site("attn_out", layer)] = added[:, -1]
        module_at(block, arch.attn).skip((added, None))
        if arch.attn_out is not None:
            self._swap(Site("attn_out", layer))
        self._swap(Site("resid_mid", layer))
        self._swap(Site("mlp_in", layer))
        mlp = module_at(block, arch.mlp)
        if self.changed < columns:
            mlp.input = mlp.input[:, : self.changed].contiguous()
        self._swap(Site("neuron", layer), first=self.start)
        if self.changed < columns:
            # The rest is not read: the block's output there is the base run's.
            output = mlp.output
            rest = output.new_zeros(output.shape[0], columns - self.changed, output.shape[2])
            mlp.output = torch.cat([output, rest], dim=1)
        self._swap(Site("mlp_out", layer))
        if self.changed < columns and layer + 1 < self.model.dims.n_layers:
            after = self._of_base(self.base.streams[layer + 1], self.start + self.changed)
            block.output = torch.cat([block.output[:, : self.changed], after.to(block.output.device)], dim=1)
        self._swap(Site("resid_post", layer))

    def _swap(self, site: Site, first: int | None = None) -> None:
        if site in self.swaps:
            # Nothing read here is kept, so even a site that is written in place needs no copy.
            current = raw_site(self.model, site) if site.kind == "resid_mid" else read_site(self.model, site)
            write_site(self.model, site, self.swaps[site].apply(current, self.pairs, first))
        if site in self.watched:
            self.seen[site] = read_site(self.model, site)[:, -1]

    def _put_in(self, site: Site, activation: Tensor) -> Tensor:
        return self.swaps[site].apply(activation, self.pairs) if site in self.swaps else activation

    def _of_base(self, value: Tensor, start: int) -> Tensor:
        return value[:, start:][self.pairs.to(value.device)]


def _inputs(model: PatchModel, base: BaseRun, pairs: Int[Tensor, " rows"], start: int) -> dict[str, Any]:
    inputs = forward_inputs(model, base.batch.take(pairs))
    if start and not base.keys:
        raise InputError(
            f"{model.name}: keys cannot be read in this host's sandbox; runs start at the first token there"
        )
    before = start + base.keys[0].shape[2] - base.batch.width if base.keys else 0
    if before:
        inputs["input_ids"] = inputs["input_ids"][:, start:]
        inputs["position_ids"] = inputs["position_ids"][:, start:]
        inputs["use_cache"] = True
        inputs["past_key_values"] = Cache(
            layers=[
                SharedPrefix(keys, values, pairs, before)
                for keys, values in zip(base.keys, base.values, strict=True)
            ]
        )
    return inputs


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
    held = base.batch.rows if swap.takes is None else len(swap.values)
    if swap.takes is not None and (
        len(swap.takes) != rows or bool(((swap.takes < 0) | (swap.takes >= held)).any())
    ):
        raise InputError(
            f"swap at {swap.site}: `takes` must name one of {held} values for each of {rows} rows"
        )
    expected = (held, width, *kind.shape(model.dims))
    if tuple(swap.values.shape) != expected:
        raise InputError(
            f"swap at {swap.site}: values of shape {tuple(swap.values.shape)}, expected {expected}"
        )
