"""AtP and AtP* the slow way: one pair at a time, plain autograd, detached forwards and triple loops, no padding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from patchkit.data import Pair
from patchkit.model import NodeGrid
from tests import oracles
from tests.node_oracle import prompts

Gradients = dict[tuple[str, int], Tensor]

STREAM = ("resid_pre", "resid_mid", "resid_post")


def gradients_at(hf: PreTrainedModel, pair: Pair, direction: str, dropped: int | None = None) -> Gradients:
    """Gradient of the logit difference at every activation of the base run; `dropped`: a block held fixed."""
    base, _ = prompts(pair, direction)
    edits = {}
    if dropped is not None:
        # No gradient enters the block: what it adds to the residual stream is a constant. The skip path is left.
        edits = {(kind, dropped): torch.Tensor.detach for kind in ("attn_out", "mlp_out")}
    kept: dict[tuple[str, int], Tensor] = {}

    def keep(place: tuple[str, int]):
        def edit(value: Tensor) -> Tensor:
            value = value.requires_grad_(True) if not value.requires_grad else value
            kept[place] = value
            return value if place not in edits else edits[place](value)

        return edit

    places = [place for place in oracles.read(hf, base)[0]]
    found = oracles.run(hf, base, {place: keep(place) for place in places}, grad=True)
    score = found.logits[pair.answer_id] - found.logits[pair.wrong_id]
    taken = torch.autograd.grad(score, [kept[place] for place in places], allow_unused=True)
    return {
        place: torch.zeros_like(kept[place]).detach() if gradient is None else gradient.detach()
        for place, gradient in zip(places, taken, strict=True)
    }


def linear(kind: str, own: Tensor, other: Tensor, gradient: Tensor) -> Tensor:
    """(other - own) . gradient by token and unit: `[position, unit]`."""
    product = (other - own) * gradient
    if kind == "neuron":
        return product
    return product.sum(-1) if product.ndim == 3 else product.sum(-1, keepdim=True)


def _softmax_of(scores: Sequence[Tensor]) -> list[Tensor]:
    top = max(float(score) for score in scores)
    raised = [torch.exp(score - top) for score in scores]
    total = sum(raised)
    return [value / total for value in raised]


def probabilities(hf: PreTrainedModel, layer: int, query: Tensor, keys: Tensor, position: int) -> Tensor:
    """One head's attention from one position over all keys, by a loop over the keys it sees."""
    config = hf.config
    scale = getattr(config, "query_pre_attn_scalar", query.shape[-1]) ** -0.5
    cap = getattr(config, "attn_logit_softcapping", None)
    far = oracles.window_of(config, layer) or len(keys)
    seen = [t for t in range(len(keys)) if 0 <= position - t < far]
    scores = [query @ keys[t] * scale for t in seen]
    if cap is not None:
        scores = [cap * torch.tanh(score / cap) for score in scores]
    pattern = torch.zeros(len(keys), dtype=keys.dtype)
    for t, value in zip(seen, _softmax_of(scores), strict=True):
        pattern[t] = value
    return pattern


def qk_fixed(
    hf: PreTrainedModel, kind: str, layer: int, own: Gradients, other: Gradients, z_gradient: Tensor
) -> Tensor:
    """`[position, unit]`: the triple loop over heads, patched positions and queries; finite change, then linear."""
    queries, keys, values = (own[name, layer] for name in ("q", "k", "v"))
    length, heads, kv_heads = len(queries), queries.shape[1], keys.shape[1]
    group = heads // kv_heads
    effects = torch.zeros(length, heads if kind == "q" else kv_heads, dtype=queries.dtype)
    for head in range(heads):
        shared = head // group
        for patched in range(length):
            for query in range(length):
                if kind == "q" and query != patched:
                    continue
                new_query = other["q", layer][patched, head] if kind == "q" else queries[query, head]
                new_keys = keys[:, shared].clone()
                if kind == "k":
                    new_keys[patched] = other["k", layer][patched, shared]
                before = probabilities(hf, layer, queries[query, head], keys[:, shared], query)
                after = probabilities(hf, layer, new_query, new_keys, query)
                # dJ/dp_it = dJ/dz_i . v_t
                at_p = values[:, shared] @ z_gradient[query, head]
                effects[patched, head if kind == "q" else shared] += (after - before) @ at_p
    return effects


def keys_fixed_together(
    hf: PreTrainedModel,
    layer: int,
    own: Gradients,
    other: Gradients,
    z_gradient: Tensor,
    tokens: Sequence[int],
) -> Tensor:
    """`[kv_head]`: the keys of several tokens patched at once; every pattern recomputed."""
    queries, keys, values = (own[name, layer] for name in ("q", "k", "v"))
    group = queries.shape[1] // keys.shape[1]
    new_keys = keys.clone()
    for token in tokens:
        new_keys[token] = other["k", layer][token]
    effects = torch.zeros(keys.shape[1], dtype=queries.dtype)
    for head in range(queries.shape[1]):
        shared = head // group
        for query in range(len(queries)):
            before = probabilities(hf, layer, queries[query, head], keys[:, shared], query)
            after = probabilities(hf, layer, queries[query, head], new_keys[:, shared], query)
            effects[shared] += (after - before) @ (values[:, shared] @ z_gradient[query, head])
    return effects


def estimates(
    hf: PreTrainedModel,
    pair: Pair,
    covered: Sequence[Sequence[int]],
    grid: NodeGrid,
    direction: str,
    method: str,
) -> tuple[Tensor, Tensor]:
    """(signed, magnitude) of every node of the grid: `atp`, `atp-qk`, `atp-graddrop` or `atp-star`."""
    layers = grid.dims.n_layers
    base, source = prompts(pair, direction)
    own, other = oracles.read(hf, base)[0], oracles.read(hf, source)[0]
    drops: list[int | None] = list(range(layers)) if method in ("atp-graddrop", "atp-star") else [None]
    runs = [gradients_at(hf, pair, direction, dropped) for dropped in drops]
    signed, magnitude = [], []
    for kind in grid.kinds:
        for layer in range(layers):
            scores = []
            for gradients in runs:
                if kind in ("q", "k") and method in ("atp-qk", "atp-star"):
                    by_token = qk_fixed(hf, kind, layer, own, other, gradients["z", layer])
                else:
                    by_token = linear(kind, own[kind, layer], other[kind, layer], gradients[kind, layer])
                if kind == "neuron" and grid.group > 1:
                    by_token = torch.stack(
                        [part.sum(-1) for part in by_token.split(grid.group, dim=-1)], dim=-1
                    )
                by_place = [sum(by_token[t] for t in tokens) for tokens in covered]
                if kind == "k" and method in ("atp-qk", "atp-star"):
                    for place, tokens in enumerate(covered):
                        if len(tokens) > 1:
                            by_place[place] = keys_fixed_together(
                                hf, layer, own, other, gradients["z", layer], tokens
                            )
                scores.append(torch.stack(by_place))
            stacked = torch.stack(scores)
            factor = layers / (layers - 1) if len(drops) > 1 and kind not in STREAM else 1.0
            signed.append((stacked.mean(0) * factor).flatten())
            magnitude.append((stacked.abs().mean(0) * factor).flatten())
    return torch.cat(signed), torch.cat(magnitude)
