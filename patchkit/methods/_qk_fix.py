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

Shapes: queries `[batch, query, head, d]`, keys and values `[batch, key, kv_head, d]`, gradients of z as queries.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from patchkit.tracing.gradients import Attention


def probability_gradient(
    z_gradient: Float[Tensor, "batch query head d"], values: Float[Tensor, "batch key kv_head d"]
) -> Float[Tensor, "batch head query key"]:
    """dJ/dp from dJ/dz, since z = p v; so no attention implementation's own probabilities need be read."""
    return torch.einsum("bihd,bthd->bhit", z_gradient, _per_head(values, z_gradient))


def attention_scores(
    queries: Float[Tensor, "batch query head d"],
    keys: Float[Tensor, "batch key kv_head d"],
    attention: Attention,
) -> Float[Tensor, "batch head query key"]:
    """Scaled and, where the model does so, capped scores; not masked."""
    scores = torch.einsum("bihd,bthd->bhit", queries, _per_head(keys, queries)) * attention.scaling
    return scores if attention.softcap is None else torch.tanh(scores / attention.softcap) * attention.softcap


def query_effects(
    patched: Float[Tensor, "batch query head d"],
    queries: Float[Tensor, "batch query head d"],
    keys: Float[Tensor, "batch key kv_head d"],
    attention: Attention,
    gradient: Float[Tensor, "batch head query key"],
) -> Float[Tensor, "batch query head"]:
    """Effect of putting in the patched query, for each query position and head on its own."""
    before = _softmax(attention_scores(queries, keys, attention), attention)
    after = _softmax(attention_scores(patched, keys, attention), attention)
    return ((after - before) * gradient).sum(-1).transpose(1, 2)


def key_effects(
    patched: Float[Tensor, "batch key kv_head d"],
    queries: Float[Tensor, "batch query head d"],
    keys: Float[Tensor, "batch key kv_head d"],
    attention: Attention,
    gradient: Float[Tensor, "batch head query key"],
) -> Float[Tensor, "batch key kv_head"]:
    """Effect of putting in the patched key, for each key position and KV head on its own; summed over a group's heads.

    A soft-capped score is not linear in the key, so D is the difference of the capped scores themselves.
    """
    scores = attention_scores(queries, keys, attention)
    change = attention_scores(queries, patched, attention) - scores
    effects = _one_score_changed(scores, change, gradient, attention).sum(-2)
    kv_heads = keys.shape[2]
    return effects.unflatten(1, (kv_heads, -1)).sum(2).transpose(1, 2)


def keys_together(
    patched: Float[Tensor, "batch key kv_head d"],
    queries: Float[Tensor, "batch query head d"],
    keys: Float[Tensor, "batch key kv_head d"],
    where: Bool[Tensor, "batch key"],
    attention: Attention,
    gradient: Float[Tensor, "batch head query key"],
) -> Float[Tensor, "batch kv_head"]:
    """Effect of putting in the patched keys at several tokens at once, for each KV head."""
    before = _softmax(attention_scores(queries, keys, attention), attention)
    changed = torch.where(where[..., None, None], patched, keys)
    after = _softmax(attention_scores(queries, changed, attention), attention)
    effects = ((after - before) * gradient).sum((-2, -1))
    return effects.unflatten(1, (keys.shape[2], -1)).sum(-1)


def _one_score_changed(scores: Tensor, change: Tensor, gradient: Tensor, attention: Attention) -> Tensor:
    """sum_j (p'_ij - p_ij) g_ij when score (i, t) alone changes, for every i and t: `[batch, head, query, key]`."""
    allowed = attention.allowed[:, None]
    scores = scores.masked_fill(~allowed, -torch.inf)
    log_p = scores.log_softmax(-1)
    p = log_p.exp()
    mean = (p * gradient).sum(-1, keepdim=True)

    # Of the largest probability, 1 - p and g - r would cancel where the softmax is saturated; they are taken from the
    # scores of the others instead. No other probability exceeds 1/2.
    top = torch.zeros_like(allowed.expand(scores.shape)).scatter(-1, scores.argmax(-1, keepdim=True), True)
    others = scores.masked_fill(top, -torch.inf)
    log_others = others.logsumexp(-1, keepdim=True) - scores.logsumexp(-1, keepdim=True)
    rest = (others.softmax(-1).nan_to_num(0.0) * gradient).sum(-1, keepdim=True)
    log_not_p = torch.where(top, log_others, torch.log1p(-p.masked_fill(top, 0.0)))
    beyond = torch.where(top, gradient - rest, (gradient - mean) / (1 - p.masked_fill(top, 0.0)))

    # A query that sees one key has nothing to move its attention to.
    alone = log_not_p == -torch.inf
    moved = _moved(log_p, log_not_p.masked_fill(alone, 0.0), change, p)
    return (moved * beyond).masked_fill(alone | ~allowed, 0.0)


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


def _per_head(of_kv_heads: Tensor, of_heads: Tensor) -> Tensor:
    return of_kv_heads.repeat_interleave(of_heads.shape[2] // of_kv_heads.shape[2], dim=2)
