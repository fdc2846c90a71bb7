"""What is put in where a node is patched: the pair's other run, another model's run of the same prompt, a mean over a
reference set, zeros, or noise."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from patchkit.data import Batch, Pair
from patchkit.errors import InputError
from patchkit.methods._node_options import NodeOptions
from patchkit.methods._pair_batch import PairBatch
from patchkit.model import KINDS, Dims, PatchModel, Site
from patchkit.runtime import Cost, SecondModel, run_program
from patchkit.tracing import capture

#: The ablation of `methods/cross_model.py`: another model's activations on the same prompt.
CROSS_MODEL = "cross-model"


@dataclass(frozen=True, eq=False)
class Replacement:
    """How values for patched nodes are made; see `NodeOptions.ablation`.

    Attributes:
        donor: the model whose activations are put in, of the ablation `cross-model`.
    """

    ablation: str
    noise_scale: float = 1.0
    seed: int = 0
    means: Mapping[Site, Tensor] | None = None
    donor: SecondModel | None = None

    @property
    def needs_own(self) -> bool:
        """Whether the base run's own activations at the sites are needed."""
        return self.ablation == "noise"

    @property
    def causal(self) -> bool:
        """Whether what is put in equals the base run's own before the first token that differs."""
        return self.ablation == "resample"

    def values(
        self, model: PatchModel, batch: PairBatch, sites: Sequence[Site], own: Mapping[Site, Tensor]
    ) -> tuple[dict[Site, Tensor], Tensor]:
        """(`[pairs, width, ...]` to put in at each site, the source runs' last-position logits).

        Under `cross-model` the source runs are those of the donor on the base prompts.

        Args:
            own: the base runs' activations, when `needs_own`.
        """
        if self.donor is not None:
            given = capture(self.donor.open(model), batch.base, sites)
            return dict(given.values), given.logits
        run = capture(model, batch.source, sites if self.ablation == "resample" else ())
        if self.ablation == "resample":
            return dict(run.values), run.logits
        pairs, width = len(batch.pairs), batch.base.width
        made: dict[Site, Tensor] = {}
        for site in sites:
            shape = (pairs, width, *KINDS[site.kind].shape(model.dims))
            if self.ablation == "zero":
                made[site] = torch.zeros(shape, dtype=model.dtype, device=model.embed_device)
            elif self.ablation == "mean":
                assert self.means is not None
                made[site] = self.means[site].to(model.embed_device).expand(shape)
            else:
                made[site] = self._noised(site, own[site], batch)
        return made, run.logits

    def _noised(self, site: Site, own: Tensor, batch: PairBatch) -> Tensor:
        noised = own.clone()
        for row, (pair, offset) in enumerate(zip(batch.pairs, batch.base.offset.tolist(), strict=True)):
            real = own[row, offset:].float()
            # Seeded by the pair and the site, so that a pair's numbers do not depend on its batch.
            text = f"{self.seed} {pair.id} {site}".encode()
            generator = torch.Generator().manual_seed(
                int.from_bytes(hashlib.sha256(text).digest()[:7], "big")
            )
            drawn = torch.randn(real.shape, generator=generator).to(real)
            noised[row, offset:] += (self.noise_scale * real.std(correction=0) * drawn).to(own.dtype)
        return noised


def replacement(
    model: PatchModel,
    pairs: Sequence[Pair],
    options: NodeOptions,
    sites: Sequence[Site],
    reference: Sequence[Pair] | None,
) -> Replacement:
    """The replacement that options ask for; the mean runs the source prompts of the reference set once.

    Raises:
        InputError: mean ablation without a reference set, or with one whose lengths differ from the pairs'; a
            reference set for another ablation.
    """
    if options.ablation != "mean":
        if reference is not None:
            raise InputError(f"a reference set is for the ablation 'mean'; found '{options.ablation}'")
        return Replacement(options.ablation, options.noise_scale, options.seed)
    if not reference:
        raise InputError(
            "the ablation 'mean' needs a reference set to take the mean over; give prompt pairs "
            "(reference=..., or --reference FILE), or another ablation: resample, zero, noise"
        )
    lengths = {len(pair.clean_ids): pair.id for pair in reversed([*pairs, *reference])}
    if len(lengths) > 1:
        found = ", ".join(f"{length} ({name!r})" for length, name in sorted(lengths.items())[:4])
        raise InputError(
            "the ablation 'mean' takes the mean position by position, so the pairs and the reference set must all "
            f"have one length; found lengths {found}. Keep one length, or use the ablation resample or zero"
        )
    return Replacement("mean", means=_means(model, reference, options, sites))


def _means(
    model: PatchModel, reference: Sequence[Pair], options: NodeOptions, sites: Sequence[Site]
) -> dict[Site, Tensor]:
    program = SourceSums(tuple(sites), options.direction)
    found = run_program(
        program,
        model,
        reference,
        max_batch_tokens=options.max_batch_tokens,
        label="means of the reference set",
    )
    return {site: (found[str(site)] / len(reference)).to(model.dtype) for site in sites}


@dataclass(frozen=True, eq=False)
class SourceSums:
    """The Program of means: what each site holds in the source runs, added up position by position."""

    sites: tuple[Site, ...]
    direction: str

    @property
    def summed(self) -> frozenset[str]:
        return frozenset(map(str, self.sites))

    def tokens(self, item: Pair) -> int:
        return len(item.clean_ids)

    def run(self, model: PatchModel, items: Sequence[Pair]) -> dict[str, Tensor]:
        prompts = [pair.corrupt_ids if self.direction == "noise" else pair.clean_ids for pair in items]
        run = capture(model, Batch.from_ids(prompts, model.pad_id), self.sites)
        # In float64, so that the order of the prompts cannot be seen in the result; Apple's GPUs have none.
        return {
            str(site): (value.cpu() if value.device.type == "mps" else value).sum(0, dtype=torch.float64)
            for site, value in run.values.items()
        }

    def cost(self, dims: Dims, items: Sequence[Pair]) -> Cost:
        """A forward over every source prompt."""
        width = max(len(item.clean_ids) for item in items)
        numbers = sum(math.prod(KINDS[site.kind].shape(dims)) for site in self.sites)
        return Cost(
            float(sum(len(item.clean_ids) for item in items)),
            width * numbers * (len(items) * dims.itemsize + 8),
        )
