"""Reading activations, gradients and attention patterns: one forward, or one forward and one backward."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter

import nnsight
import torch
from jaxtyping import Float, Int
from torch import Tensor

from patchkit.data.batch import Batch
from patchkit.errors import InputError
from patchkit.model import PatchModel, Site, check_site, in_order
from patchkit.model.access import attention_arguments, canonical, prepare, raw_site, read_site
from patchkit.tracing._attention import attention_of, attention_scores
from patchkit.tracing._inputs import check_columns, forward_inputs, pick_columns

#: Last-position logits `[batch, vocab]` to one number per row.
Metric = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Captured:
    """Activations by site in canonical shape, and the logits at the last position."""

    values: Mapping[Site, Tensor]
    logits: Float[Tensor, "batch vocab"]


@dataclass(frozen=True)
class Gradients:
    """Activations, the gradient of the metric's sum over rows at each of them, and the metric per row."""

    values: Mapping[Site, Tensor]
    gradients: Mapping[Site, Tensor]
    metric: Float[Tensor, " batch"]


def _checked(model: PatchModel, sites: Iterable[Site]) -> list[Site]:
    ordered = in_order(sites)
    for site in ordered:
        check_site(site, model.dims)
    prepare(model, ordered)
    return ordered


def capture(
    model: PatchModel, batch: Batch, sites: Iterable[Site], *, columns: Int[Tensor, " batch"] | None = None
) -> Captured:
    """Reads sites in one forward, without gradients.

    Args:
        sites: in any order; they are visited in execution order.
        columns: one padded column a row (see `patchkit.data.positions`); values are then `[batch, ...]`, else
            `[batch, position, ...]`.

    Raises:
        InputError: the model has no such site, or a column falls on padding or outside the batch.
    """
    if columns is not None:
        check_columns(columns, batch)
    ordered = _checked(model, sites)
    inputs = forward_inputs(model, batch)
    with torch.no_grad():
        with model.lm.trace(**inputs):
            values = nnsight.save([pick_columns(read_site(model, site), columns) for site in ordered])
            logits = model.lm.output.logits[:, -1].save()
    return Captured(dict(zip(ordered, values, strict=True)), logits)


def capture_gradients(model: PatchModel, batch: Batch, sites: Iterable[Site], metric: Metric) -> Gradients:
    """Reads sites and the gradient of a metric at them: one forward, one backward, parameters frozen.

    Rows are independent, so row b of a gradient is the gradient of row b's own metric.

    Args:
        metric: last-position logits `[batch, vocab]` to `[batch]`.

    Raises:
        InputError: the model has no such site, or the metric does not give one number per row.
    """
    ordered = _checked(model, sites)
    inputs = forward_inputs(model, batch)
    rows = inputs["input_ids"].shape[0]
    with model.frozen(), torch.enable_grad():
        with model.lm.trace(**inputs):
            # Frozen parameters (always so on a hosted model) leave no graph: the embedding's output is the leaf.
            attrgetter(model.arch.embed)(model.lm).output.requires_grad_(True)
            raw = [raw_site(model, site) for site in ordered]
            score = metric(model.lm.output.logits[:, -1])
            if tuple(score.shape) != (rows,):
                raise InputError(
                    f"the metric gave shape {tuple(score.shape)}, expected one number per row: ({rows},)"
                )
            found = torch.autograd.grad(score.sum(), raw, allow_unused=True)
            gradients = nnsight.save(
                [
                    canonical(model, site, torch.zeros_like(r) if g is None else g)
                    for site, r, g in zip(ordered, raw, found, strict=True)
                ]
            )
            values = nnsight.save(
                [canonical(model, site, r).detach() for site, r in zip(ordered, raw, strict=True)]
            )
            score = nnsight.save(score.detach())
    return Gradients(
        dict(zip(ordered, values, strict=True)), dict(zip(ordered, gradients, strict=True)), score
    )


def attention_from(
    model: PatchModel, batch: Batch, layers: Sequence[int], columns: Int[Tensor, " batch"]
) -> dict[int, Float[Tensor, "batch head width"]]:
    """Attention probabilities from one token of each row, recomputed from the queries and keys as used.

    Works under any attention implementation, since no implementation's own probabilities are read. Scaling, soft-cap
    and sliding window are those of the layer's own call.

    Args:
        columns: the padded column that attends, one a row.

    Raises:
        InputError: the model has no such layer, or a column falls on padding or outside the batch.
    """
    check_columns(columns, batch)
    ordered = sorted(set(layers))
    _checked(model, [Site("q", layer) for layer in ordered])
    inputs = forward_inputs(model, batch)
    mask = inputs["attention_mask"]
    rows = torch.arange(len(columns), device=mask.device)
    with torch.no_grad():
        with model.lm.trace(**inputs):
            patterns = []
            for layer in ordered:
                queries, keys, _ = attention_arguments(model, layer)
                attention = attention_of(model, layer, mask)
                exact = torch.promote_types(queries.dtype, torch.float32)
                query = pick_columns(queries, columns).to(exact)
                scores = attention_scores(query[:, None], keys.to(exact), attention)[:, :, 0]
                allowed = attention.allowed[rows.to(scores.device), columns.to(scores.device)]
                patterns.append(scores.masked_fill(~allowed[:, None], -torch.inf).softmax(-1))
            patterns = nnsight.save(patterns)
    return dict(zip(ordered, patterns, strict=True))
