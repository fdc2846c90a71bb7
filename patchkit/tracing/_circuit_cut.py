"""The run in which every edge is cut: what each receiver reads before a circuit puts any edge back.

    X~_v = stream that v reads if every sender carries the ablated value y~_u

It is a sum of senders, biases and positions, so it needs no forward of its own; where cut edges carry another run's
values, it is that very run. A circuit adds to it, for each edge u -> v that it holds, the sender's current value minus
y~_u.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter

import nnsight
import torch
from jaxtyping import Float
from torch import Tensor

from patchkit.data.batch import Batch
from patchkit.errors import InputError
from patchkit.model import PatchModel, Site
from patchkit.model.access import module_at, read_site, write_site
from patchkit.model.edges import EdgeGraph
from patchkit.tracing._inputs import forward_inputs
from patchkit.tracing.senders import Senders, head_outputs, heads_sum, position_embedding

#: A residual stream of every pair.
Stream = Float[Tensor, "pairs width d_model"]


@dataclass(frozen=True, eq=False)
class CutRun:
    """A batch of base prompts and the streams of the run in which every edge is cut.

    Attributes:
        input: token embeddings of the base prompts.
        other: what senders carry where an edge is cut; of the last MLP perhaps the last position only.
        before: the stream before each layer and, as the last, before the final norm.
        between: the stream that each MLP reads.
        sums: the sum of each layer's heads, where a norm stands behind it; otherwise empty.
        placed: whether these streams hold the embedding of positions, in a model that adds one.
    """

    batch: Batch
    input: Stream
    other: Senders
    before: tuple[Stream, ...]
    between: tuple[Stream, ...]
    sums: tuple[Stream, ...]
    placed: bool


def cut_run(model: PatchModel, batch: Batch, own: Senders, other: Senders) -> CutRun:
    """The run in which every edge is cut, from what senders carry then.

    Args:
        batch: the base prompts.
        own: senders of the base runs.
    """
    with torch.no_grad():
        stream = other.input.to(torch.promote_types(other.input.dtype, torch.float32))
        before, between, sums = [stream], [], []
        for layer in range(model.dims.n_layers):
            added = heads_sum(model, layer, other.heads[layer])
            norm = model.attention_post_norm(layer)
            if norm is not None:
                sums.append(added)
                added = norm(added)
            added = added.to(stream)
            between.append(stream if model.dims.parallel else stream + added)
            stream = stream + added + other.mlps[layer].to(stream)
            before.append(stream)
        batch = batch.to(model.embed_device)
        return CutRun(batch, own.input, other, tuple(before), tuple(between), tuple(sums), placed=False)


def run_both(
    model: PatchModel, base: Batch, source: Batch
) -> tuple[CutRun, Float[Tensor, "pairs vocab"], Float[Tensor, "pairs vocab"]]:
    """Base and source prompts in one forward: the run in which every edge carries the source's value, and the
    last-position logits of the base and the source runs.

    Behind the last layer's attention only the last position is run, since nothing else is read.

    Args:
        base, source: of one width.
    """
    pairs, arch, layers = base.rows, model.arch, range(model.dims.n_layers)
    inputs = forward_inputs(model, base.followed_by(source))
    with torch.no_grad():
        with model.lm.trace(**inputs):
            placed = position_embedding(model)
            before, between, sums, heads, mlps = [], [], [], [], []
            for layer in layers:
                block, last = model.block(layer), layer == layers[-1]
                before.append(block.input)
                z = read_site(model, Site("z", layer))
                heads.append(z[pairs:])
                if last:
                    write_site(model, Site("z", layer), z[:, -1:].contiguous())
                if arch.attn_out is not None:
                    sums.append(module_at(block, arch.out_proj).output[pairs:])
                between.append(module_at(block, arch.mid_input).input[pairs:])
                if last:
                    mlp = module_at(block, arch.mlp)
                    mlp.input = mlp.input[:, -1:].contiguous()
                mlps.append(read_site(model, Site("mlp_out", layer))[pairs:])
            before.append(attrgetter(arch.final_norm)(model.lm).input)
            embedded = before[0] if placed is None else before[0] - placed
            logits = model.lm.output.logits[:, -1]
            before = [stream[pairs:] for stream in before]
            kept = nnsight.save((embedded, before, between, sums, heads, mlps, logits))
    embedded, before, between, sums, heads, mlps, logits = kept
    other = Senders(embedded[pairs:], tuple(heads), (*mlps[:-1], mlps[-1].expand_as(embedded[pairs:])))
    sums = [total.expand_as(between[0]) for total in sums]
    batch = base.to(model.embed_device)
    cut = CutRun(batch, embedded[:pairs], other, tuple(before), tuple(between), tuple(sums), placed=True)
    return cut, logits[:pairs], logits[pairs:]


@dataclass(frozen=True, eq=False)
class Start:
    """Where circuits that hold every edge of the lower layers start: senders below have the base run's values.

    Attributes:
        known: how many senders, from the first, that is: all below a layer, or below its MLP.
        differences: base value minus what a cut edge carries, of each known sender; the row before the first is free for
            the stream. `[pairs * width, 1 + known, d_model]`.
    """

    known: int
    differences: Float[Tensor, "tokens rows d_model"]


def start_at(model: PatchModel, own: Senders, other: Senders, graph: EdgeGraph, known: int) -> Start:
    """A start behind the first `known` senders.

    Args:
        own: senders of the base runs.
        other: what they carry where an edge is cut.

    Raises:
        InputError: a start in the middle of a layer's heads.
    """
    with torch.no_grad():
        starts = [1 + layer * (graph.n_heads + 1) for layer in range(graph.n_layers + 1)]
        if known not in starts and known - graph.n_heads not in starts[:-1]:
            raise InputError(
                f"circuits start at a layer or at its MLP; sender {known} is the first of neither"
            )
        rows = [torch.zeros_like(own.input)[:, :, None], (own.input - other.input)[:, :, None]]
        for layer in range(graph.n_layers):
            if known > graph.heads(layer).start:
                rows.append(head_outputs(model, layer, own.heads[layer] - other.heads[layer]))
            if known > graph.mlp_sender(layer):
                rows.append((own.mlps[layer] - other.mlps[layer])[:, :, None])
        return Start(known, torch.cat([row.to(own.input) for row in rows], dim=2).flatten(0, 1))


def first_receiver(graph: EdgeGraph, known: int) -> int:
    """The first receiver that may have edges cut when the first `known` senders have the base run's values."""
    layer, heads = divmod(known - 1, graph.n_heads + 1)
    return graph.mlp_receiver(layer) if heads else layer * graph.receivers_a_layer
