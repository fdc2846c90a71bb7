"""Getting triples ready for a mask: the alternates' activations cached, the originals' prefixes cached, once.

Nothing of this depends on the mask, so every optimisation step afterwards runs only the tokens from the masked position
on: for masks at the last token, one token a prompt. Every process keeps the batches that it has opened.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from patchkit.data import Batch, Triple, positions
from patchkit.methods._mask_layout import Layout
from patchkit.methods._mask_memory import mask_bytes
from patchkit.model import Dims, PatchModel, Site
from patchkit.runtime import Cost, SecondModel
from patchkit.runtime.batch_memory import Shape
from patchkit.tracing import Blend, Prefix, blended_logits, capture, compute_prefix
from patchkit.tracing.prefixes import share_prefixes


@dataclass(frozen=True)
class Masked:
    """A triple and where it is masked: the tokens in both prompts."""

    triple: Triple
    original_at: int
    alternate_at: int
    number: int = field(compare=False)


@dataclass(eq=False)
class Chunk:
    """Some triples, ready: `numbers` are their places in the whole list.

    Attributes:
        owed: token-forwards that were run here and not told yet.
    """

    layout: Layout
    numbers: Int[Tensor, " row"]
    run: Batch | Prefix
    columns: Int[Tensor, " row"]
    alternates: Mapping[Site, Tensor]
    target: Int[Tensor, " row"]
    original_answer: Int[Tensor, " row"]
    rival: Int[Tensor, " row"]
    invariant: Tensor
    base_difference: Float[Tensor, " row"]
    owed: float

    def settle(self) -> Tensor:
        """What is owed; nothing is, after that."""
        owed, self.owed = self.owed, 0.0
        return torch.tensor(owed, dtype=torch.float64)


@dataclass(frozen=True)
class Preparation:
    """Opens batches of triples.

    Attributes:
        reuse: keep the keys and values before the masked position; False runs whole prompts (the slow, plain way).
        donor: the model whose activations on the alternates are put in; None: the model's own.
    """

    layout: Layout
    reuse: bool = True
    donor: SecondModel | None = None

    @property
    def backward(self) -> bool:
        """Whether gradients are taken over whole prompts, and not over a token of each."""
        return not self.reuse

    def tokens(self, item: Masked) -> int:
        return max(len(item.triple.original_ids), len(item.triple.alternate_ids))

    def open(self, model: PatchModel, items: Sequence[Masked]) -> Chunk:
        members = [item.triple for item in items]
        whole = [
            (Batch.from_ids(ids, pad_id=model.pad_id), places)
            for ids, places in (
                ([t.original_ids for t in members], [item.original_at for item in items]),
                ([t.alternate_ids for t in members], [item.alternate_at for item in items]),
            )
        ]
        if self.donor is None:
            reader, cut = model, whole
        else:
            # What the model holds of a prefix is nothing to another model.
            reader, cut = self.donor.open(model), whole[:1]
        left, shared = _behind_prefixes(model, cut)
        (original, columns), (alternate, alternate_columns) = (
            *left,
            *((batch, positions(batch, at)) for batch, at in whole[len(left) :]),
        )
        seen = capture(reader, alternate, self.layout.sites, columns=alternate_columns)
        run = compute_prefix(model, original, int(columns.min())) if self.reuse else original
        with torch.no_grad():
            own = blended_logits(model, run, [], columns).float()
        target = torch.tensor([t.target_id for t in members], device=own.device)
        own_answer = _known([t.original_answer_id for t in members], own.argmax(-1))
        alternate_answer = _known(
            [t.alternate_answer_id for t in members], seen.logits.argmax(-1).to(own.device)
        )
        invariant = target == own_answer
        # What the target competes with: the answer without the patch, or, where that is the target, the alternate's.
        rival = torch.where(invariant, alternate_answer, own_answer)
        return Chunk(
            layout=self.layout,
            numbers=torch.tensor([item.number for item in items]),
            run=run,
            columns=columns,
            alternates=seen.values,
            target=target,
            original_answer=own.argmax(-1),
            rival=rival,
            invariant=invariant,
            base_difference=difference(own, target, rival),
            owed=float(original.attention_mask.sum() + alternate.attention_mask.sum() + shared),
        )

    def cost(self, dims: Dims, items: Sequence[Masked]) -> Cost:
        """Both prompts of every triple; what is kept of them, and the largest pass of opening them and of a step."""
        tokens = sum(len(item.triple.original_ids) + len(item.triple.alternate_ids) for item in items)
        shape = Shape.of([self.tokens(item) for item in items])
        return Cost(float(tokens), *mask_bytes(dims, self.layout, shape, self.rerun(items), self.reuse))

    @staticmethod
    def rerun(items: Sequence[Masked]) -> int:
        """Columns of a batch that every step runs: those from the first masked one on."""
        return max(len(item.triple.original_ids) - item.original_at for item in items)


def _behind_prefixes(
    model: PatchModel, masked: Sequence[tuple[Batch, Sequence[int]]]
) -> tuple[list[tuple[Batch, Tensor]], int]:
    """Of each batch the columns that are left to run, with the masked columns among them; tokens run for prefixes."""
    whole = [batch for batch, _ in masked]
    columns = [positions(batch, places) for batch, places in masked]
    cut, ran = share_prefixes(model, whole)
    before = [batch.width - left.width for batch, left in zip(whole, cut, strict=True)]
    if any(int(each.min()) < start for each, start in zip(columns, before, strict=True)):
        # A mask inside a prefix: that is not the same in all runs then.
        cut, before = whole, [0] * len(whole)
    return [(left, at - start) for left, at, start in zip(cut, columns, before, strict=True)], ran


def _known(given: Sequence[int | None], otherwise: Tensor) -> Tensor:
    """The answers that the data states, and the model's own where it does not."""
    stated = torch.tensor([-1 if answer is None else answer for answer in given], device=otherwise.device)
    return torch.where(stated < 0, otherwise, stated)


def difference(
    logits: Float[Tensor, "row vocab"], target: Int[Tensor, " row"], rival: Int[Tensor, " row"]
) -> Float[Tensor, " row"]:
    """logit[target] - logit[rival], per row."""
    return (logits.gather(1, target[:, None]) - logits.gather(1, rival[:, None])).squeeze(1)


def masked_logits(model: PatchModel, chunk: Chunk, keep: Float[Tensor, " n"]) -> Float[Tensor, "row vocab"]:
    """Last-position logits of a chunk's originals under a mask; differentiable in `keep`."""
    batch = chunk.run.batch if isinstance(chunk.run, Prefix) else chunk.run
    start = chunk.run.start if isinstance(chunk.run, Prefix) else 0
    run_tokens = float(batch.attention_mask[:, start:].sum())
    chunk.owed += run_tokens * (2 if keep.requires_grad else 1)
    blends = [
        Blend(site, values, chunk.alternates[site]) for site, values in chunk.layout.by_site(keep).items()
    ]
    return blended_logits(model, chunk.run, blends, chunk.columns).float()
