"""A batch of prompt pairs on the model's device: the run that is patched, the run that is put in, and what is scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from patchkit.data import Batch, Metric, Pair, covering
from patchkit.model import PatchModel
from patchkit.tracing.prefixes import share_prefixes


@dataclass(frozen=True, eq=False)
class PairBatch:
    """Pairs padded on the left to one width.

    Attributes:
        base: the runs that are patched: the clean prompts for direction `noise`, the corrupt ones for `denoise`.
        source: the others.
        cover: the padded columns of each place of each pair.
        answer, wrong: what the metric compares; those of the clean prompt in both directions.
        shared: tokens that were run for prefixes of these prompts.
    """

    pairs: tuple[Pair, ...]
    base: Batch
    source: Batch
    cover: Bool[Tensor, "pairs places width"]
    answer: Int[Tensor, " pairs"]
    wrong: Int[Tensor, " pairs"]
    shared: int = 0

    @classmethod
    def of(
        cls,
        model: PatchModel,
        pairs: Sequence[Pair],
        covered: Sequence[Sequence[Sequence[int]]],
        direction: str,
    ) -> PairBatch:
        clean = [pair.clean_ids for pair in pairs]
        corrupt = [pair.corrupt_ids for pair in pairs]
        base, source = (clean, corrupt) if direction == "noise" else (corrupt, clean)
        device = model.embed_device
        batch = Batch.from_ids(base, model.pad_id).to(device)
        return cls(
            pairs=tuple(pairs),
            base=batch,
            source=Batch.from_ids(source, model.pad_id).to(device),
            cover=covering(covered, [len(ids) for ids in base], batch.width),
            answer=torch.tensor([pair.answer_id for pair in pairs], device=device),
            wrong=torch.tensor([pair.wrong_id for pair in pairs], device=device),
        )

    def behind_prefix(self, model: PatchModel) -> PairBatch:
        """The same pairs without the columns that all prompts have in common, where those need not be run again.

        For runs that hold at these columns what any prompt holds there: both prompts' own runs, and patched ones that put
        in the other prompt's activations, which are the same there. Nothing at these columns has an effect then.
        """
        (base, source), ran = share_prefixes(model, [self.base, self.source], alike=True)
        cover = self.cover[..., self.base.width - base.width :]
        return replace(self, base=base, source=source, cover=cover, shared=ran)

    def ends(self) -> Float[Tensor, " pairs"]:
        """Token-forwards of both runs of each pair, with its part of what was run for prefixes."""
        return 2.0 * self.base.lengths.cpu() + self.shared / len(self.pairs)

    def score(
        self,
        metric: Metric,
        logits: Float[Tensor, "rows vocab"],
        reference: Float[Tensor, "pairs vocab"],
        rows: Int[Tensor, " rows"] | None = None,
    ) -> Float[Tensor, " rows"]:
        """The metric of runs; row r belongs to pair `rows[r]` (default: row r to pair r). `reference`: the base runs'."""
        rows = torch.arange(len(self.pairs)) if rows is None else rows
        return metric(
            logits,
            answer=self.answer[rows.to(self.answer.device)],
            wrong=self.wrong[rows.to(self.wrong.device)],
            reference=reference[rows.to(reference.device)].to(logits.device),
        )

    def first_difference(self) -> Int[Tensor, " pairs"]:
        """The first padded column in which the two prompts of a pair differ; the width where they never do.

        In a causal model all activations before it are the same in both runs.
        """
        differs = (self.base.input_ids != self.source.input_ids).cpu()
        return torch.where(differs.any(1), differs.int().argmax(1), torch.tensor(self.base.width))


def first_difference(pair: Pair) -> int:
    """The first token in which the two prompts of a pair differ; their length where they never do."""
    same = [a == b for a, b in zip(pair.clean_ids, pair.corrupt_ids, strict=True)]
    return same.index(False) if False in same else len(same)
