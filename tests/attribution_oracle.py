"""AtP and AtP* the slow way: one pair at a time, plain autograd, detached forwards and triple loops, no padding.

`check_estimates` is the comparison that the tests of attribution must pass, and those of mutations must make fail.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from patchkit.data import Pair, read_places
from patchkit.methods._node_options import NodeOptions
from patchkit.methods.attribution import Method, attribute
from patchkit.model import NodeGrid
from patchkit.results.scores import Scores
from tests import oracles
from tests.comparisons import agree, pair
from tests.node_oracle import GROUP, kinds_of, prompts

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


def probabilities(hf: PreTrainedModel, layer: int, query: Tensor, keys: Tensor, position: int) -> Tensor:
    """One head's attention from one position over all keys."""
    config = hf.config
    scale = getattr(config, "query_pre_attn_scalar", query.shape[-1]) ** -0.5
    cap = getattr(config, "attn_logit_softcapping", None)
    far = oracles.window_of(config, layer) or len(keys)
    first = max(0, position - far + 1)
    scores = keys[first : position + 1] @ query * scale
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    raised = torch.exp(scores - scores.max())
    pattern = torch.zeros(len(keys), dtype=keys.dtype)
    pattern[first : position + 1] = raised / raised.sum()
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
                fixed = kind in ("q", "k") and method in ("atp-qk", "atp-star")
                together = [fixed and kind == "k" and len(tokens) > 1 for tokens in covered]
                if fixed and not all(together):
                    by_token = qk_fixed(hf, kind, layer, own, other, gradients["z", layer])
                else:
                    by_token = linear(kind, own[kind, layer], other[kind, layer], gradients[kind, layer])
                if kind == "neuron" and grid.group > 1:
                    by_token = torch.stack(
                        [part.sum(-1) for part in by_token.split(grid.group, dim=-1)], dim=-1
                    )
                by_place = [sum(by_token[t] for t in tokens) for tokens in covered]
                for place, tokens in enumerate(covered):
                    if together[place]:
                        # Several keys are patched at once: their effects are no sum over tokens.
                        z_gradient = gradients["z", layer]
                        by_place[place] = keys_fixed_together(hf, layer, own, other, z_gradient, tokens)
                scores.append(torch.stack(by_place))
            stacked = torch.stack(scores)
            factor = layers / (layers - 1) if len(drops) > 1 and kind not in STREAM else 1.0
            signed.append((stacked.mean(0) * factor).flatten())
            magnitude.append((stacked.abs().mean(0) * factor).flatten())
    return torch.cat(signed), torch.cat(magnitude)


def check_estimates(
    family: str,
    pairs: Sequence[Pair],
    method: Method,
    dtype: torch.dtype = torch.float64,
    kinds: Sequence[str] = (),
    tolerance: float | None = None,
    **options: object,
) -> Scores:
    """Signed estimates and magnitudes of every node of a family, pair by pair, against the oracle."""
    model, twin = pair(family, dtype)
    kinds = tuple(kinds) or kinds_of(model)
    asked = NodeOptions(nodes=kinds, group=GROUP if "neuron" in kinds else 1, **options)  # type: ignore[arg-type]
    scores = attribute(model, pairs, asked, method)
    tolerance = tolerance or (1e-12 if dtype == torch.float64 else 1e-5)
    covered = read_places(asked.positions, pairs).covered
    sizes = []
    for row, each in enumerate(pairs):
        expected = estimates(twin, each, covered[row], scores.grid, asked.direction, method)
        for name, found, wanted in zip(
            ("estimate", "magnitude"), (scores.effects, scores.magnitudes), expected, strict=True
        ):
            for kind, part in scores.grid.split(found[row]).items():
                what = f"{method} {name} of {kind} in pair {each.id}"
                agree(part, scores.grid.split(wanted)[kind], what, tolerance)
        sizes.append(expected[1])
    agree(scores.mean_abs(), torch.stack(sizes).mean(0), f"{method} mean magnitude over pairs", tolerance)
    return scores
