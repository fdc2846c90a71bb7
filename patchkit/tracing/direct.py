"""Direct effects on the logits: a run up to its final stream, and the end of a run with some senders' last edge cut.

The final stream at the last position is the sum of what all senders wrote there. To cut the edges of some of them to the
logits, what they contribute is replaced in that sum and the result goes through the final norm and the unembedding: no
block runs again, so that many cuts are the rows of one short forward.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import nnsight
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from patchkit.data.batch import Batch
from patchkit.model import PatchModel, Site
from patchkit.model.access import read_site, write_site
from patchkit.model.edges import EdgeGraph
from patchkit.tracing._inputs import forward_inputs
from patchkit.tracing._swap import Swap
from patchkit.tracing.senders import Senders, contributions, heads_sum, token_embeddings


@dataclass(frozen=True, eq=False)
class Ended:
    """A run and what it ended with.

    Attributes:
        senders: what every sender held.
        stream: what the final norm reads at the last position.
        logits: at the last position.
    """

    senders: Senders
    stream: Float[Tensor, "batch d_model"]
    logits: Float[Tensor, "batch vocab"]


def run_to_end(
    model: PatchModel,
    batch: Batch,
    knocked_out: Bool[Tensor, " senders"] | None = None,
    put_in: Senders | None = None,
    where: Bool[Tensor, "batch width"] | None = None,
) -> Ended:
    """One forward, in which some heads and MLPs hold other values for all that read them.

    Args:
        knocked_out: which senders; the input is not one of them.
        put_in: what they hold instead, in the shapes of the run.
        where: the padded columns at which they do.
    """
    layers = range(model.dims.n_layers)
    swaps: dict[Site, Swap] = {}
    if knocked_out is not None:
        assert put_in is not None and where is not None
        swaps = _swaps(model, knocked_out, put_in, where)
    rows = torch.arange(batch.rows)
    inputs = forward_inputs(model, batch)
    with torch.no_grad():
        with model.lm.trace(**inputs):
            given = token_embeddings(model)
            held: dict[str, list[Tensor]] = {"z": [], "mlp_out": []}
            for layer in layers:
                for kind, kept in held.items():
                    site = Site(kind, layer)
                    value = read_site(model, site)
                    if site in swaps:
                        value = swaps[site].apply(value, rows)
                        write_site(model, site, value)
                    kept.append(value)
            final = read_site(model, Site("resid_post", model.dims.n_layers - 1))[:, -1]
            found = nnsight.save((given, held["z"], held["mlp_out"], final, model.lm.output.logits[:, -1]))
    given, heads, mlps, final, logits = found
    return Ended(Senders(given, tuple(heads), tuple(mlps)), final, logits)


def _swaps(model: PatchModel, nodes: Tensor, put_in: Senders, where: Tensor) -> dict[Site, Swap]:
    graph = EdgeGraph.of(model.dims)
    swaps: dict[Site, Swap] = {}
    for layer in range(model.dims.n_layers):
        heads, mlp = nodes[graph.heads(layer)], nodes[graph.mlp_sender(layer)]
        for kind, units, values in (("z", heads, put_in.heads), ("mlp_out", mlp[None], put_in.mlps)):
            if bool(units.any()):
                site = Site(kind, layer)
                swaps[site] = Swap(site, where.cpu()[:, :, None] & units.cpu(), values[layer])
    return swaps


def at_the_end(senders: Senders) -> Senders:
    """The senders at the last position alone, `[batch, 1, ...]`."""
    return Senders(
        senders.input[:, -1:],
        tuple(value[:, -1:] for value in senders.heads),
        tuple(value[:, -1:] for value in senders.mlps),
    )


def single_changes(
    model: PatchModel, own: Senders, put_in: Senders
) -> Iterator[tuple[slice, Float[Tensor, "batch senders d_model"]]]:
    """What the final stream gains at the last position when each sender alone is replaced, layer by layer.

    Yields the numbers of a layer's senders (its heads, then its MLP) and their changes.
    """
    graph, own, put_in = EdgeGraph.of(model.dims), at_the_end(own), at_the_end(put_in)
    for layer in range(model.dims.n_layers):
        with torch.no_grad():
            heads = contributions(model, layer, own.heads[layer], put_in.heads[layer])[:, 0]
        mlp = (put_in.mlps[layer] - own.mlps[layer]).to(heads)
        yield slice(graph.heads(layer).start, graph.mlp_sender(layer) + 1), torch.cat([heads, mlp], dim=1)


def joint_change(
    model: PatchModel, own: Senders, put_in: Senders, nodes: Bool[Tensor, " senders"]
) -> Float[Tensor, "batch d_model"]:
    """The same when several heads and MLPs are replaced at once: heads behind a norm of their own do not add up."""
    graph, own, put_in = EdgeGraph.of(model.dims), at_the_end(own), at_the_end(put_in)
    total = torch.zeros_like(own.mlps[0][:, 0])
    for layer in range(model.dims.n_layers):
        heads = nodes[graph.heads(layer)].to(own.heads[layer].device)
        if bool(heads.any()):
            before = own.heads[layer][:, 0]
            after = torch.where(heads[:, None], put_in.heads[layer][:, 0], before)
            norm = model.attention_post_norm(layer)
            with torch.no_grad():
                sums = [heads_sum(model, layer, z) for z in (before, after)]
                sums = sums if norm is None else [norm(each) for each in sums]
            total = total + (sums[1] - sums[0]).to(total)
        if bool(nodes[graph.mlp_sender(layer)]):
            total = total + (put_in.mlps[layer] - own.mlps[layer])[:, 0].to(total)
    return total


def read_out(model: PatchModel, stream: Float[Tensor, "rows d_model"]) -> Float[Tensor, "rows vocab"]:
    """The logits of final streams: the model's own final norm, unembedding, and what else it does behind its blocks."""
    rows = len(stream)
    # Which token it is makes no difference: every block hands on the stream that is given.
    ids = torch.full((rows, 1), model.pad_id, device=model.embed_device)
    inputs = forward_inputs(model, Batch(ids, torch.ones_like(ids)))
    value = stream.to(model.dtype).unsqueeze(1)
    with torch.no_grad():
        with model.lm.trace(**inputs):
            for layer in range(model.dims.n_layers):
                model.block(layer).skip(value)
            logits = model.lm.output.logits[:, -1].save()
    return logits
