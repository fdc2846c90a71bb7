"""AtP* for edges: GradDrop at every receiver, and the QK fix at queries and keys.

GradDrop (Kramar et al. 2024, arXiv:2403.00745): the gradient at a receiver is taken once for every block whose
contribution to the stream is held fixed, and |score| is averaged over them; a receiver in a block is dropped with its
own block, and that term is zero, so its mean over L drops is multiplied by L / (L - 1). The logits are in no block.

QK fix: replacing sender u changes the stream that a query (or key) reads, and so the query itself, finitely: it is
computed through norm, projection and rotary. The change of the attention's probabilities that it makes is computed too,
and only that is multiplied with a gradient, at the probabilities.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from patchkit.methods._edge_batch import EdgeBatch
from patchkit.methods._edge_products import SenderChanges, layer_products
from patchkit.methods._edge_receivers import LayerVectors, clean
from patchkit.methods._qk_fix import Effects, key_effects, keys_together, probability_gradient, query_effects
from patchkit.model import EdgeGraph, Site
from patchkit.tracing.attended import Attended, attended
from patchkit.tracing.edge_gradients import Reads
from patchkit.tracing.gradients import LayerGradients, reduce_gradients
from patchkit.tracing.senders import capture_senders

#: Tokens of the rows in which changed queries and keys are computed at once.
ATTENDED_TOKENS = 1 << 11


@dataclass(frozen=True, eq=False)
class Corrected:
    """Signed scores and their sizes, metric of the base and source runs."""

    signed: Float[Tensor, "pairs places senders receivers"]
    magnitude: Float[Tensor, "pairs places senders receivers"]
    base: Tensor
    source: Tensor


def corrected(batch: EdgeBatch, qk_fix: bool, grad_drop: bool) -> Corrected:
    """EAP with either correction or both."""
    model, graph, pairs = batch.model, batch.graph, batch.pairs
    own, base_logits = capture_senders(model, pairs.base)
    other, source_logits = batch.replacement.senders(model, pairs, own)
    changes = SenderChanges(model, graph, own, other, batch.real)
    layers = range(graph.n_layers)
    middle = () if graph.parallel else ("resid_mid",)
    kinds = ["resid_pre", "q_proj", "k_proj", "v_proj", *middle, "mlp_in"]
    kinds += ["v", "z"] if qk_fix else []
    sites = [Site(kind, layer) for kind in kinds for layer in layers]
    sites.append(Site("resid_post", graph.n_layers - 1))
    found = reduce_gradients(
        model,
        pairs.base,
        sorted(sites),
        batch.scorer(),
        EdgeReduction(batch, changes, qk_fix),
        drop_layers=grad_drop,
    )
    shape = (len(pairs.pairs), pairs.cover.shape[1], graph.n_senders, graph.n_receivers)
    made = {
        name: torch.zeros(shape, dtype=found.layers[0]["signed"].dtype) for name in ("signed", "magnitude")
    }
    for layer, parts in found.layers.items():
        if qk_fix:
            fixed = _fixed(batch, changes, layer, parts)
            whole = {
                name: torch.cat([fixed[name].to(parts[name].device), parts[name]], dim=-1) for name in fixed
            }
            parts = {**parts, **whole}
        first = graph.attention_receivers(layer).start
        for name, total in made.items():
            part = parts[name].cpu()
            total[..., : part.shape[2], first : first + part.shape[3]] = part
            if layer == graph.n_layers - 1:
                total[..., graph.logits] = parts[f"{name}.logits"].cpu()[..., 0]
    for total in made.values():
        total.masked_fill_(~graph.real, 0.0)
    score = batch.scorer(base_logits)
    return Corrected(made["signed"], made["magnitude"], found.metric, score(source_logits))


@dataclass(frozen=True, eq=False)
class EdgeReduction:
    """What is done with each layer's gradients, inside the trace: the mean over drops of scores and of their sizes.

    With the QK fix those of queries and keys are left out, and what it needs is kept: the gradients at z under each drop,
    and the values.
    """

    batch: EdgeBatch
    changes: SenderChanges
    qk_fix: bool

    def __call__(self, layer: LayerGradients) -> dict[str, Tensor]:
        batch, number = self.batch, layer.layer
        kinds = ("q_proj", "k_proj", "v_proj", "mlp_in")
        slots = list(zip(*(layer.gradients[kind] for kind in kinds), strict=True))
        middle = "resid_pre" if batch.graph.parallel else "resid_mid"
        receivers = []
        for slot in slots:
            (_, queries), (_, keys), (_, values), (_, mlp) = slot
            vectors = LayerVectors(batch.model, batch.graph, number, batch.real)
            reads = Reads(
                stream=layer.values["resid_pre"],
                mid=layer.values[middle],
                projected=(layer.values["q_proj"], layer.values["k_proj"], layer.values["v_proj"]),
                gradients=(queries, keys, values),
                mlp_in=layer.values["mlp_in"],
                mlp_gradient=mlp,
            )
            vectors.add(reads, 1.0)
            receivers.append(vectors.vectors)
        weights = [slot[0][0] for slot in slots]
        found = self._means(number, receivers, weights)
        if self.qk_fix:
            skipped = batch.graph.n_heads + batch.graph.n_kv_heads
            found = {name: value[..., skipped:] for name, value in found.items()}
            found |= {
                "z": torch.stack([gradient for _, gradient in layer.gradients["z"]]),
                "weights": torch.tensor([weight for weight, _ in layer.gradients["z"]]),
                "stream": layer.values["resid_pre"],
                "v": layer.values["v"],
            }
        if "resid_post" in layer.gradients:
            weighted = layer.gradients["resid_post"]
            at_end = [self._final(gradient) for _, gradient in weighted]
            ended = self._means(number, at_end, [weight for weight, _ in weighted])
            found |= {f"{name}.logits": value for name, value in ended.items()}
        return found

    def _final(self, gradient: Tensor) -> Callable[[slice], Tensor]:
        return lambda rows: clean(gradient, self.batch.real)[None, rows]

    def _means(
        self, layer: int, receivers: Sequence[Callable[[slice], Tensor]], weights: list[int]
    ) -> dict[str, Tensor]:
        signed, magnitude = [], []
        for _, scores in layer_products(self.changes, layer, receivers, self.batch.pairs.cover):
            mean, size = mean_over_drops(scores, weights)
            signed.append(mean)
            magnitude.append(size)
        return {"signed": torch.cat(signed), "magnitude": torch.cat(magnitude)}


def mean_over_drops(scores: list[Tensor], weights: list[int]) -> tuple[Tensor, Tensor]:
    """Mean of scores and of their sizes over drops, each of which stands for `weight` of them."""
    drops = sum(weights)
    signed = sum(score * (weight / drops) for score, weight in zip(scores, weights, strict=True))
    magnitude = sum(score.abs() * (weight / drops) for score, weight in zip(scores, weights, strict=True))
    assert isinstance(signed, Tensor) and isinstance(magnitude, Tensor)
    return signed, magnitude


def _fixed(
    batch: EdgeBatch, changes: SenderChanges, layer: int, kept: Mapping[str, Tensor]
) -> dict[str, Float[Tensor, "pairs places senders receivers"]]:
    """Scores of a layer's queries and keys, in this order, for the senders that `kept` has scores of."""
    model, graph, base = batch.model, batch.graph, batch.pairs.base
    pairs, _, width = batch.pairs.cover.shape
    stream, weights = kept["stream"], kept["weights"].tolist()
    plain = attended(model, base, layer, stream)
    values = clean(kept["v"], batch.real_keys)
    gradients = [probability_gradient(clean(z, batch.real), values) for z in kept["z"]]
    upstream = int(graph.upstream[graph.attention_receivers(layer).start])
    shape = (pairs, batch.pairs.cover.shape[1], kept["signed"].shape[2], graph.n_heads + graph.n_kv_heads)
    found = {
        name: torch.zeros(shape, dtype=values.dtype, device=values.device) for name in ("signed", "magnitude")
    }
    at_once = max(1, ATTENDED_TOKENS // (pairs * width))
    for numbers in torch.arange(upstream).split(at_once):
        moved = _moved_streams(changes, numbers, stream)
        made = attended(model, base.repeat(len(numbers)), layer, moved.flatten(0, 1))
        for row, number in enumerate(numbers.tolist()):
            mine = slice(row * pairs, (row + 1) * pairs)
            effects = _effects(batch, plain, made.queries[mine], made.keys[mine])
            scores = [effects(gradient) for gradient in gradients]
            found["signed"][:, :, number], found["magnitude"][:, :, number] = mean_over_drops(scores, weights)
    return found


def _moved_streams(
    changes: SenderChanges, numbers: Tensor, stream: Tensor
) -> Float[Tensor, "n pairs position d"]:
    """The stream with each of some senders replaced."""
    graph: EdgeGraph = changes.graph
    layers = sorted({max(0, graph.layer_of_sender(number)) for number in numbers.tolist()})
    block = changes.block(layers[0], layers[-1], slice(None))
    first = 0 if layers[0] == 0 else graph.heads(layers[0]).start
    return (stream + block[numbers - first].to(stream.device)).to(stream.dtype)


def _effects(batch: EdgeBatch, plain: Attended, queries: Tensor, keys: Tensor) -> Effects:
    """From the gradient at the probabilities to the effects of one sender's edges, `[pairs, places, receivers]`."""
    cover = batch.pairs.cover.to(queries.device)
    own_queries, queries = (clean(value, batch.real) for value in (plain.queries, queries))
    own_keys, keys = (clean(value, batch.real_keys) for value in (plain.keys, keys))
    attention = plain.attention
    of_query = query_effects(queries, own_queries, own_keys, attention)
    several = (cover.sum(-1) > 1).any(0)
    # No place has keys of columns that were run before.
    at_keys = torch.nn.functional.pad(cover, (keys.shape[1] - queries.shape[1], 0))
    together = {
        place: keys_together(keys, own_queries, own_keys, at_keys[:, place], attention)
        for place in several.nonzero()[:, 0].tolist()
    }
    alone = None if bool(several.all()) else key_effects(keys, own_queries, own_keys, attention)

    def effects(gradient: Tensor) -> Tensor:
        by_query = torch.einsum("bpt,bth->bph", cover.to(gradient), of_query(gradient))
        if alone is None:
            by_key = torch.stack([together[place](gradient) for place in range(cover.shape[1])], dim=1)
        else:
            by_key = torch.einsum("bpt,bth->bph", at_keys.to(gradient), alone(gradient))
            for place, of_keys in together.items():
                by_key[:, place] = of_keys(gradient)
        return torch.cat([by_query, by_key], dim=-1)

    return effects
