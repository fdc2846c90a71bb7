"""The QK fix of AtP*: finite changes of attention probabilities, exact, and linear only after the softmax.

A patched query or key first meets a softmax. Where that is saturated its gradient is almost zero, and AtP gives about 0
to a patch that in truth moves the whole pattern. So the change of the probabilities is computed and only then
multiplied with g, the metric's gradient at the probabilities (Kramar et al. 2024, arXiv:2403.00745, section 3.1):

    queries   I(t) = sum_j (p'_tj - p_tj) g_tj,                p'_t = softmax of the patched query's scores
    keys      I(t) = sum_i sum_j (p'_ij - p_ij) g_ij,          only score (i, t) of each query i changes

For keys the inner sum has a closed form, so that all of them together cost O(T^2) instead of O(T^3). With D the change
of score (i, t), and p'_it the probability that it leads to, the other probabilities shrink in proportion, and

    sum_j (p'_ij - p_ij) g_ij = (p'_it - p_it) (g_it - r_it),  r_it = sum over j != t of p_ij g_ij / (1 - p_it)

A key node that covers several tokens is patched at all of them at once, which is no longer a sum over tokens: moving
all keys alike moves no attention at all. There the whole pattern is recomputed.

What does not depend on g is computed once: each function here gives one of g, which GradDrop calls for every drop.

Shapes: queries `[batch, query, head, d]`, keys and values `[batch, key, kv_head, d]`, gradients of z as queries.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from patchkit.tracing._attention import Attention, attention_scores, per_head

#: From the gradient at the probabilities, `[batch, head, query, key]`, to effects.
Effects = Callable[[Tensor], Tensor]


def probability_gradient(
    z_gradient: Float[Tensor, "batch query head d"], values: Float[Tensor, "batch key kv_head d"]
) -> Float[Tensor, "batch head query key"]:
    """dJ/dp from dJ/dz, since z = p v; so no attention implementation's own probabilities need be read."""
    return torch.einsum("bihd,bthd->bhit", z_gradient, per_head(values, z_gradient))


def query_effects(
    patched: Float[Tensor, "batch query head d"],
    queries: Float[Tensor, "batch query head d"],
    keys: Float[Tensor, "batch key kv_head d"],
    attention: Attention,
) -> Effects:
    """Effect of putting in the patched query, for each query position and head on its own: `[batch, query, head]`."""
    before = _softmax(attention_scores(queries, keys, attention), attention)
    change = _softmax(attention_scores(patched, keys, attention), attention) - before
    return lambda gradient: (change * gradient).sum(-1).transpose(1, 2)


def key_effects(
    patched: Float[Tensor, "batch key kv_head d"],
    queries: Float[Tensor, "batch query head d"],
    keys: Float[Tensor, "batch key kv_head d"],
    attention: Attention,
) -> Effects:
    """Effect of putting in the patched key, for each key position on its own, summed over the heads that share it:
    `[batch, key, kv_head]`.

    A soft-capped score is not linear in the key, so D is the difference of the capped scores themselves.
    """
    scores = attention_scores(queries, keys, attention)
    change = attention_scores(queries, patched, attention) - scores
    allowed = attention.allowed[:, None]
    scores = scores.masked_fill(~allowed, -torch.inf)
    log_p = scores.log_softmax(-1)
    p = log_p.exp()

    # Of the largest probability, 1 - p and g - r would cancel where the softmax is saturated; they are taken from the
    # scores of the others instead. No other probability exceeds 1/2.
    top = torch.zeros_like(allowed.expand(scores.shape)).scatter(-1, scores.argmax(-1, keepdim=True), True)
    others = scores.masked_fill(top, -torch.inf)
    log_others = others.logsumexp(-1, keepdim=True) - scores.logsumexp(-1, keepdim=True)
    rest = others.softmax(-1).nan_to_num(0.0)
    not_p = 1 - p.masked_fill(top, 0.0)
    log_not_p = torch.where(top, log_others, torch.log(not_p))

    # A query that sees one key has nothing to move its attention to.
    still = (log_not_p == -torch.inf) | ~allowed
    moved = _moved(log_p, log_not_p.masked_fill(still, 0.0), change, p).masked_fill(still, 0.0)
    # Of the others g - r is (g - mean) / (1 - p); of the top it is taken as it is, and its not_p is 1.
    moved = moved / not_p
    kv_heads = keys.shape[2]

    def effects(gradient: Tensor) -> Tensor:
        mean, beside = ((weight * gradient).sum(-1, keepdim=True) for weight in (p, rest))
        at_key = (moved * (gradient - torch.where(top, beside, mean))).sum(-2)
        return at_key.unflatten(1, (kv_heads, -1)).sum(2).transpose(1, 2)

    return effects


def keys_together(
    patched: Float[Tensor, "batch key kv_head d"],
    queries: Float[Tensor, "batch query head d"],
    keys: Float[Tensor, "batch key kv_head d"],
    where: Bool[Tensor, "batch key"],
    attention: Attention,
) -> Effects:
    """Effect of putting in the patched keys at several tokens at once: `[batch, kv_head]`."""
    before = _softmax(attention_scores(queries, keys, attention), attention)
    changed = torch.where(where[..., None, None], patched, keys)
    change = _softmax(attention_scores(queries, changed, attention), attention) - before
    kv_heads = keys.shape[2]
    return lambda gradient: (change * gradient).sum((-2, -1)).unflatten(1, (kv_heads, -1)).sum(-1)


def _moved(log_p: Tensor, log_not_p: Tensor, change: Tensor, p: Tensor) -> Tensor:
    """p' - p when the score changes by D: logit(p') = logit(p) + D."""
    odds = log_p - log_not_p
    small = change.clamp(-1, 1)
    near = (log_p + log_not_p).exp() * torch.expm1(small) / (1 + p * torch.expm1(small))
    # A difference of sigmoids, of the two ways to write it the one whose terms are small.
    far = torch.where(
        odds > 0,
        torch.sigmoid(-odds) - torch.sigmoid(-(odds + change)),
        torch.sigmoid(odds + change) - torch.sigmoid(odds),
    )
    return torch.where(change.abs() < 1, near, far)


def _softmax(scores: Tensor, attention: Attention) -> Tensor:
    return scores.masked_fill(~attention.allowed[:, None], -torch.inf).softmax(-1)
