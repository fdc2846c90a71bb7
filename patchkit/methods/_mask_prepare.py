"""Getting triples ready for a mask: the alternates' activations cached, the originals' prefixes cached, once.

Nothing of this depends on the mask, so every optimisation step afterwards runs only the tokens from the masked position
on: for masks at the last token, one token a prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from patchkit.data import Batch, Triple, positions, span_positions
from patchkit.errors import InputError
from patchkit.methods._mask_layout import Layout
from patchkit.model import Dims, PatchModel, Site
from patchkit.runtime import MAX_BATCH_TOKENS, Cost, length_buckets
from patchkit.tracing import Blend, Prefix, blended_logits, capture, compute_prefix


@dataclass
class Tally:
    """What was really paid, in token-forwards (see `patchkit.runtime.Cost`)."""

    token_forwards: float = 0.0


@dataclass(frozen=True)
class Chunk:
    """Some triples, ready: `rows` are their places in the whole list; every masked run is added to `tally`."""

    rows: Int[Tensor, " row"]
    run: Batch | Prefix
    columns: Int[Tensor, " row"]
    alternates: Mapping[Site, Tensor]
    group: Int[Tensor, " row"]
    target: Int[Tensor, " row"]
    original_answer: Int[Tensor, " row"]
    rival: Int[Tensor, " row"]
    invariant: Tensor
    base_difference: Float[Tensor, " row"]
    tally: Tally


@dataclass(frozen=True)
class Prepared:
    """All triples of some desiderata, ready for masked runs.

    Attributes:
        names: the desiderata; `Chunk.group` counts them.
        sizes: triples in each.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    kinds: tuple[str, ...]
    chunks: tuple[Chunk, ...]


def prepare(
    model: PatchModel,
    layout: Layout,
    triples: Mapping[str, Sequence[Triple]],
    *,
    position: str = "last",
    reuse: bool = True,
    max_batch_tokens: int = MAX_BATCH_TOKENS,
    tally: Tally | None = None,
) -> Prepared:
    """Caches everything about the triples that no mask changes.

    Args:
        triples: by desideratum.
        position: `last`, or the name of a one-token span that every triple has.
        reuse: keep the keys and values before the masked position; False runs whole prompts (the slow, plain way).
        tally: where the cost is counted.

    Raises:
        InputError: a triple without the span, an empty desideratum.
    """
    flat = [(group, triple) for group, members in enumerate(triples.values()) for triple in members]
    for name, members in triples.items():
        if not members:
            raise InputError(f"desideratum '{name}' has no triples")
    members = [triple for _, triple in flat]
    original_at, alternate_at = span_positions(members, position)
    tally = tally or Tally()
    longest = [max(len(triple.original_ids), len(triple.alternate_ids)) for triple in members]
    chunks = [
        _prepare_chunk(model, layout, flat, torch.tensor(rows), original_at, alternate_at, reuse, tally)
        for rows in length_buckets(longest, max_batch_tokens)
    ]
    invariant = torch.cat([chunk.invariant for chunk in chunks])
    group = torch.cat([chunk.group for chunk in chunks])
    shares = [float(invariant[group == g].float().mean()) for g in range(len(triples))]
    kinds = tuple("invariance" if s == 1 else "dependence" if s == 0 else "mixed" for s in shares)
    return Prepared(tuple(triples), tuple(len(t) for t in triples.values()), kinds, tuple(chunks))


def pool(parts: Sequence[Prepared]) -> Prepared:
    """All triples of several preparations as one, desiderata of one name together; nothing is run again."""
    names = tuple(dict.fromkeys(name for part in parts for name in part.names))
    sizes, kinds = dict.fromkeys(names, 0), {}
    chunks: list[Chunk] = []
    offset = 0
    for part in parts:
        for name, size, kind in zip(part.names, part.sizes, part.kinds, strict=True):
            sizes[name] += size
            kinds[name] = kind if kinds.get(name, kind) == kind else "mixed"
        places = torch.tensor([names.index(name) for name in part.names])
        for chunk in part.chunks:
            group = places.to(chunk.group.device)[chunk.group]
            chunks.append(replace(chunk, rows=chunk.rows + offset, group=group))
        offset += sum(part.sizes)
    return Prepared(names, tuple(sizes.values()), tuple(kinds[name] for name in names), tuple(chunks))


def _prepare_chunk(
    model: PatchModel,
    layout: Layout,
    flat: Sequence[tuple[int, Triple]],
    rows: Tensor,
    original_at: Sequence[int],
    alternate_at: Sequence[int],
    reuse: bool,
    tally: Tally,
) -> Chunk:
    members = [flat[i][1] for i in rows.tolist()]
    original = Batch.from_ids([t.original_ids for t in members], pad_id=model.pad_id)
    alternate = Batch.from_ids([t.alternate_ids for t in members], pad_id=model.pad_id)
    alternate_columns = positions(alternate, [alternate_at[i] for i in rows.tolist()])
    seen = capture(model, alternate, layout.sites, columns=alternate_columns)
    columns = positions(original, [original_at[i] for i in rows.tolist()])
    run = compute_prefix(model, original, int(columns.min())) if reuse else original
    with torch.no_grad():
        own = blended_logits(model, run, [], columns).float()
    tally.token_forwards += float(original.lengths.sum() + alternate.lengths.sum())
    target = torch.tensor([t.target_id for t in members], device=own.device)
    own_answer = _known([t.original_answer_id for t in members], own.argmax(-1))
    alternate_answer = _known([t.alternate_answer_id for t in members], seen.logits.argmax(-1).to(own.device))
    invariant = target == own_answer
    # What the target competes with: the answer without the patch, or, where that is the target, the alternate's.
    rival = torch.where(invariant, alternate_answer, own_answer)
    return Chunk(
        rows=rows,
        run=run,
        columns=columns,
        alternates=seen.values,
        group=torch.tensor([flat[i][0] for i in rows.tolist()], device=own.device),
        target=target,
        original_answer=own.argmax(-1),
        rival=rival,
        invariant=invariant,
        base_difference=difference(own, target, rival),
        tally=tally,
    )


def _known(given: Sequence[int | None], otherwise: Tensor) -> Tensor:
    """The answers that the data states, and the model's own where it does not."""
    stated = torch.tensor([-1 if answer is None else answer for answer in given], device=otherwise.device)
    return torch.where(stated < 0, otherwise, stated)


def difference(
    logits: Float[Tensor, "row vocab"], target: Int[Tensor, " row"], rival: Int[Tensor, " row"]
) -> Float[Tensor, " row"]:
    """logit[target] - logit[rival], per row."""
    return (logits.gather(1, target[:, None]) - logits.gather(1, rival[:, None])).squeeze(1)


def masked_logits(
    model: PatchModel, layout: Layout, chunk: Chunk, keep: Float[Tensor, " n"]
) -> Float[Tensor, "row vocab"]:
    """Last-position logits of a chunk's originals under a mask; differentiable in `keep`."""
    batch = chunk.run.batch if isinstance(chunk.run, Prefix) else chunk.run
    start = chunk.run.start if isinstance(chunk.run, Prefix) else 0
    run_tokens = float(batch.attention_mask[:, start:].sum())
    chunk.tally.token_forwards += run_tokens * (2 if keep.requires_grad else 1)
    blends = [Blend(site, values, chunk.alternates[site]) for site, values in layout.by_site(keep).items()]
    return blended_logits(model, chunk.run, blends, chunk.columns).float()


def mask_cost(dims: Dims, layout: Layout, triples: Sequence[Triple], steps: int, evaluations: int) -> Cost:
    """What preparing these triples and training a mask at the last token takes.

    Preparation: a forward over every original and alternate. Each step: one token forward and backward a triple. Memory:
    keys and values of the originals, the alternates' activations at one position, and the graph of one token a row.
    """
    tokens = sum(len(t.original_ids) + len(t.alternate_ids) for t in triples)
    forwards = tokens + len(triples) * (2 * steps + evaluations)
    keys = 2 * dims.n_layers * dims.n_kv_heads * dims.d_head * sum(len(t.original_ids) for t in triples)
    activations = len(triples) * dims.n_layers * (dims.d_model * 16 + 3 * dims.d_mlp)
    return Cost(forwards=float(forwards), bytes=4 * (keys + activations + layout.size * 4))
