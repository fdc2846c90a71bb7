"""Some senders computed again from a stream in which others hold another run's values: the step of causal scrubbing.

A row's plain run gives every stream. The members of a row are then computed from the plain stream at each of their
receivers, changed by what replaced senders wrote there:

    x_v = plain x_v + sum over replaced u that v reads of (what u writes now - what u wrote in the plain run)

Nothing else moves. A sender that is neither replaced nor a member keeps its plain value whatever it reads, so no
influence leaves the edges that are named. With a norm between heads and stream, the replaced heads of one layer are put
in together, before that norm; with a norm over the queries of all heads (OLMo 2), the members of one layer are too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import nnsight
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from patchkit.data.batch import Batch
from patchkit.model import EdgeGraph, PatchModel, Site
from patchkit.model.access import canonical, module_at, read_site, write_site
from patchkit.tracing._inputs import forward_inputs
from patchkit.tracing._plain_run import PlainRun as PlainRun
from patchkit.tracing._plain_run import by_layer, is_head
from patchkit.tracing._plain_run import run_plain as run_plain
from patchkit.tracing.senders import heads_sum

_PROJECTIONS = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True, eq=False)
class Replaced:
    """A sender that holds something else than in the plain run.

    Attributes:
        sender: its number in the model's graph.
        columns: the padded columns where it does, of every row.
        values: what it holds there; see `PlainRun.value`.
        readers: the receivers that read it so; the others read the plain value.
    """

    sender: int
    columns: Int[Tensor, "rows tokens"]
    values: Float[Tensor, "rows tokens width"]
    readers: Bool[Tensor, " receivers"]


def recompute(
    model: PatchModel,
    plain: PlainRun,
    replaced: Sequence[Replaced],
    members: Mapping[int, Int[Tensor, "rows tokens"]],
) -> dict[int, Float[Tensor, "rows tokens width"]]:
    """What each member holds at its columns, computed from streams in which `replaced` hold their values.

    Members read one another too: each reads what the earlier ones hold now, at their columns.

    Args:
        plain: with the streams of the members and the values of the members and the replaced.
        members: heads and MLPs by their numbers, and their columns.
    """
    again = _Again(model, plain, replaced, members)
    heads = [layer for layer in again.heads if again.heads[layer]]
    inputs = forward_inputs(model, plain.batch)
    with torch.no_grad():
        if not heads:
            again.run(top=-1)
            return again.found
        with model.lm.trace(**inputs) as tracer:
            again.run(top=max(heads))
            found = nnsight.save(again.found)
            tracer.stop()
    return found


def logits_with(
    model: PatchModel, plain: PlainRun, replaced: Sequence[Replaced]
) -> Float[Tensor, "rows vocab"]:
    """Last-position logits when the final stream holds what `replaced` write; only the norm and the head run."""
    again = _Again(model, plain, replaced, {})
    with torch.no_grad():
        change = again.change(again.reads(again.graph.logits))
        if change is None:
            return plain.logits
        stream = _added(plain.final, change[:, -1:])
    # Every block is skipped, so that the columns before the last need not be there.
    last = Batch(plain.batch.input_ids[:, -1:], torch.ones_like(plain.batch.input_ids[:, -1:]))
    inputs = forward_inputs(model, last)
    with torch.no_grad():
        with model.lm.trace(**inputs):
            for layer in range(model.dims.n_layers):
                model.block(layer).skip(stream)
            logits = model.lm.output.logits[:, -1].save()
    return logits


class _Again:
    """One recomputation; `run` is called in the body of a trace unless all members are MLPs."""

    def __init__(
        self,
        model: PatchModel,
        plain: PlainRun,
        replaced: Sequence[Replaced],
        members: Mapping[int, Int[Tensor, "rows tokens"]],
    ) -> None:
        self.model, self.plain, self.members = model, plain, members
        self.replaced = list(replaced)
        self.graph = EdgeGraph.of(model.dims)
        self.heads, self.mlps = by_layer(self.graph, members)
        self.found: dict[int, Tensor] = {}
        #: What the replaced senders of one layer change, by that layer and their places in `replaced`.
        self._changes: dict[tuple[int, frozenset[int]], Tensor] = {}

    def run(self, top: int) -> None:
        """Computes all members in execution order; `top`: the last layer whose attention runs."""
        for layer in range(self.model.dims.n_layers):
            if self.heads.get(layer):
                self._attention(layer)
            elif layer < top:
                self.model.block(layer).skip(self._next_stream(layer))
            if layer in self.mlps:
                self._mlp(layer)
            if self.heads.get(layer) and layer < top:
                block = self.model.block(layer)
                following = self._next_stream(layer)
                module_at(block, self.model.arch.mlp).skip(torch.zeros_like(following))
                block.output = following

    def _next_stream(self, layer: int) -> Tensor:
        """The plain stream of the next attention that runs: blocks in between are skipped and pass it on."""
        return self.plain.attention[min(above for above in self.heads if above > layer)]

    def _attention(self, layer: int) -> None:
        """The heads of a layer, by the model's own attention; queries, keys and values that read a change are new."""
        model, owned = self.model, self.graph.owner[self.heads[layer]].any(0)
        for kind, module in zip(_PROJECTIONS, self._projections(layer), strict=True):
            receivers = self.graph.receivers_of(layer, kind[0])
            by_change: dict[frozenset[int], list[int]] = {}
            for unit in owned[receivers].nonzero()[:, 0].tolist():
                by_change.setdefault(self.reads(receivers.start + unit), []).append(unit)
            changed = [(reads, units) for reads, units in by_change.items() if reads]
            if not changed:
                continue
            site = Site(kind, layer)
            value = read_site(model, site).clone()
            for reads, units in changed:
                projected = canonical(model, site, module(self._read_by_attention(layer, reads)))
                value[:, :, units] = projected[:, :, units]
            write_site(model, site, value)
        z = read_site(model, Site("z", layer))
        for sender in self.heads[layer]:
            self._keep(sender, z[:, :, sender - self.graph.heads(layer).start])

    def _projections(self, layer: int) -> list[Any]:
        paths, block = self.model.arch.qkv, self.model.block(layer)
        return [module_at(block, paths[min(which, len(paths) - 1)]) for which in range(3)]

    def _read_by_attention(self, layer: int, reads: frozenset[int]) -> Tensor:
        """What the projections are given when the stream is changed."""
        stream, path = self._changed(self.plain.attention[layer], reads), self.model.arch.attn_norm
        return stream if path is None else module_at(self.model.block(layer), path)(stream)

    def _mlp(self, layer: int) -> None:
        """The MLP at its own columns, by the model's own modules, out of their turn."""
        arch, block, sender = self.model.arch, self.model.block(layer), self.graph.mlp_sender(layer)
        stream = self._changed(self.plain.mlp[layer], self.reads(self.graph.mlp_receiver(layer)))
        columns = self.members[sender].to(stream.device)
        stream = stream[torch.arange(len(columns), device=stream.device)[:, None], columns]
        if arch.mlp_norm is not None:
            stream = module_at(block, arch.mlp_norm)(stream)
        added = module_at(block, arch.mlp)(stream)
        if arch.mlp_out is not None:
            added = module_at(block, arch.mlp_out)(added)
        self._keep(sender, added, picked=True)

    def _keep(self, sender: int, held: Tensor, picked: bool = False) -> None:
        """Notes what a member holds; later members read it."""
        columns = self.members[sender]
        if not picked:
            at = columns.to(held.device)
            held = held[torch.arange(len(at), device=held.device)[:, None], at]
        self.found[sender] = held
        everyone = torch.ones(self.graph.n_receivers, dtype=torch.bool)
        self.replaced.append(Replaced(sender, columns, held, everyone))

    def reads(self, receiver: int) -> frozenset[int]:
        """The places in `replaced` of those senders that a receiver reads so."""
        before = int(self.graph.upstream[receiver])
        return frozenset(
            place
            for place, each in enumerate(self.replaced)
            if each.sender < before and bool(each.readers[receiver])
        )

    def _changed(self, stream: Tensor, reads: frozenset[int]) -> Tensor:
        change = self.change(reads)
        return stream if change is None else _added(stream, change)

    def change(self, reads: frozenset[int]) -> Tensor | None:
        """What the stream gains when these replaced senders hold their values; None where there are none."""
        parts: dict[tuple[int, bool], set[int]] = {}
        for place in reads:
            sender = self.replaced[place].sender
            layer = self.graph.layer_of_sender(sender)
            parts.setdefault((layer, is_head(self.graph, sender)), set()).add(place)
        total: Tensor | None = None
        for (layer, of_heads), places in sorted(parts.items()):
            key = (2 * layer + of_heads, frozenset(places))
            if key not in self._changes:
                make = self._of_heads if of_heads else self._of_vectors
                self._changes[key] = make(layer, sorted(places))
            part = self._changes[key]
            total = part if total is None else total + part.to(total.device)
        return total

    def _of_heads(self, layer: int, places: Sequence[int]) -> Tensor:
        own = _precise(self.plain.heads[layer])
        other, rows = own.clone(), torch.arange(len(own), device=own.device)[:, None]
        for place in places:
            each = self.replaced[place]
            head = each.sender - self.graph.heads(layer).start
            other[rows, each.columns.to(own.device), head] = each.values.to(own)
        norm = self.model.attention_post_norm(layer)
        if norm is None:
            return (other - own).flatten(-2) @ self.model.w_o(layer).flatten(0, 1).to(own)
        before, after = heads_sum(self.model, layer, own), heads_sum(self.model, layer, other)
        return norm(after) - norm(before)

    def _of_vectors(self, layer: int, places: Sequence[int]) -> Tensor:
        """Of an MLP or of the input, which add to the stream as they are."""
        held = self.plain.input if layer < 0 else self.plain.mlps[layer]
        assert held is not None
        own = _precise(held)
        other, rows = own.clone(), torch.arange(len(own), device=own.device)[:, None]
        for place in places:
            each = self.replaced[place]
            other[rows, each.columns.to(own.device)] = each.values.to(own)
        return other - own


def _added(stream: Tensor, change: Tensor) -> Tensor:
    """In float32 at least, rounded once: the change is a small difference of large numbers."""
    return (_precise(stream) + change.to(stream.device)).to(stream.dtype)


def _precise(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32))
