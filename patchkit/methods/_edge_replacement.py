"""What senders hold where an edge is cut: the pair's other run, a mean over a reference set, or nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from patchkit.data import Batch, Pair
from patchkit.errors import InputError
from patchkit.methods._edge_options import EdgeOptions
from patchkit.methods._pair_batch import PairBatch
from patchkit.model import Dims, PatchModel
from patchkit.runtime import Cost, run_program
from patchkit.tracing.senders import Senders, capture_senders


@dataclass(frozen=True, eq=False)
class EdgeReplacement:
    """How values of cut edges are made; see `EdgeOptions.ablation`.

    Attributes:
        means: of the senders, `[1, 1 or position, ...]`, for the two kinds of mean.
    """

    ablation: str
    means: Senders | None = None

    @property
    def causal(self) -> bool:
        """Whether a cut edge carries the base run's own value before the first token that differs."""
        return self.ablation == "resample"

    def senders(
        self, model: PatchModel, batch: PairBatch, own: Senders
    ) -> tuple[Senders, Float[Tensor, "pairs vocab"]]:
        """(what cut edges carry, in the shapes of `own`; the source runs' last-position logits)."""
        source, logits = capture_senders(model, batch.source)
        if self.ablation == "resample":
            return source, logits

        def make(value: Tensor, mean: Tensor | None) -> Tensor:
            return torch.zeros_like(value) if mean is None else mean.to(value).expand_as(value)

        means = self.means
        nothing = (None,) * len(own.heads)
        return (
            Senders(
                make(own.input, None if means is None else means.input),
                tuple(map(make, own.heads, nothing if means is None else means.heads)),
                tuple(map(make, own.mlps, nothing if means is None else means.mlps)),
            ),
            logits,
        )


def edge_replacement(
    model: PatchModel, pairs: Sequence[Pair], options: EdgeOptions, reference: Sequence[Pair] | None = None
) -> EdgeReplacement:
    """The replacement that options ask for; means run the source prompts of the reference set (the pairs, by default).

    Raises:
        InputError: `mean-positional` over prompts of several lengths, or a reference set for another ablation.
    """
    if options.ablation not in ("mean", "mean-positional"):
        if reference is not None:
            raise InputError(
                f"a reference set is for the ablations mean and mean-positional; found '{options.ablation}'"
            )
        return EdgeReplacement(options.ablation)
    reference = pairs if reference is None else reference
    if not reference:
        raise InputError("the reference set is empty; expected prompt pairs to take the mean over")
    positional = options.ablation == "mean-positional"
    lengths = {len(pair.clean_ids): pair.id for pair in reversed([*pairs, *reference])}
    if positional and len(lengths) > 1:
        found = ", ".join(f"{length} ({name!r})" for length, name in sorted(lengths.items())[:4])
        raise InputError(
            "the ablation 'mean-positional' takes the mean position by position, so the pairs and the reference set "
            f"must all have one length; found lengths {found}. Keep one length, or use mean, resample or zero"
        )
    return EdgeReplacement(options.ablation, _means(model, reference, options, positional))


def _means(model: PatchModel, reference: Sequence[Pair], options: EdgeOptions, positional: bool) -> Senders:
    program = SenderSums(options.direction, positional)
    found = run_program(
        program,
        model,
        reference,
        max_batch_tokens=options.max_batch_tokens,
        label="means of the reference set",
    )
    counted = len(reference) if positional else sum(len(pair.clean_ids) for pair in reference)
    mean = {name: (total / counted).to(model.dtype) for name, total in found.items()}
    return Senders(mean["input"], tuple(mean["heads"].unbind()), tuple(mean["mlps"].unbind()))


@dataclass(frozen=True, eq=False)
class SenderSums:
    """The Program of means: what senders hold in the source runs, added up over prompts, `[(layer,) 1, positions, ...]`.

    Attributes:
        positional: keep positions apart; else add up over all tokens too.
    """

    direction: str
    positional: bool

    @property
    def summed(self) -> frozenset[str]:
        return frozenset({"input", "heads", "mlps"})

    def tokens(self, item: Pair) -> int:
        return len(item.clean_ids)

    def run(self, model: PatchModel, items: Sequence[Pair]) -> dict[str, Tensor]:
        prompts = [pair.corrupt_ids if self.direction == "noise" else pair.clean_ids for pair in items]
        batch = Batch.from_ids(prompts, model.pad_id)
        run, _ = capture_senders(model, batch)
        return {
            "input": self._sum(run.input, batch),
            "heads": torch.stack([self._sum(value, batch) for value in run.heads]),
            "mlps": torch.stack([self._sum(value, batch) for value in run.mlps]),
        }

    def cost(self, dims: Dims, items: Sequence[Pair]) -> Cost:
        """A forward over every source prompt, whose senders are kept, and one of them in double precision."""
        tokens = len(items) * max(len(item.clean_ids) for item in items)
        heads = dims.n_heads * dims.d_head
        kept = dims.d_model + dims.n_layers * (heads + dims.d_model)
        held = kept * dims.itemsize + 16 * max(heads, dims.d_model)
        return Cost(float(sum(len(item.clean_ids) for item in items)), tokens * held)

    def _sum(
        self, value: Float[Tensor, "pairs position ..."], batch: Batch
    ) -> Float[Tensor, "1 positions ..."]:
        # Apple's GPUs have no double precision.
        value = value.cpu() if value.device.type == "mps" else value
        real = batch.attention_mask.to(value.device).bool()
        # In float64, so that the order of the prompts cannot be seen in the result; padding may hold anything.
        kept = value.double().masked_fill(~real.reshape(*real.shape, *[1] * (value.ndim - 2)), 0.0)
        return (kept.sum(0, keepdim=True) if self.positional else kept.sum((0, 1), keepdim=True)).cpu()
