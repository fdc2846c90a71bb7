"""What is run on triples that are ready, wherever they are: the gradient of a mask, and the answers under one.

Every step gives `paid` beside its numbers: the token-forwards that its batch took, opening it included.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from patchkit.methods._mask_objective import row_losses
from patchkit.methods._mask_prepare import Chunk, masked_logits
from patchkit.model import PatchModel
from patchkit.runtime.hosted import check_gradients


@dataclass(frozen=True)
class Facts:
    """Step: each triple's `target`, the model's `original_answer`, and whether the target is the known answer."""

    @property
    def summed(self) -> frozenset[str]:
        return frozenset({"paid"})

    def run(self, model: PatchModel, opened: Chunk) -> dict[str, Tensor]:
        return {
            "target": opened.target,
            "original_answer": opened.original_answer,
            "invariant": opened.invariant,
            "paid": opened.settle(),
        }


@dataclass(frozen=True, eq=False)
class Gradient:
    """Step: the weighted `loss` under a mask, and its `gradient`, as sums over the triples.

    Attributes:
        loss: see `row_losses`.
        keep: the mask.
        weights: of every triple, wherever it is.
    """

    loss: str
    keep: Float[Tensor, " n"]
    weights: Float[Tensor, " triple"]

    @property
    def differentiates(self) -> bool:
        return True

    @property
    def summed(self) -> frozenset[str]:
        return frozenset({"loss", "gradient", "paid"})

    def run(self, model: PatchModel, opened: Chunk) -> dict[str, Tensor]:
        leaf = self.keep.detach().requires_grad_(True)
        losses = row_losses(self.loss, masked_logits(model, opened, leaf), opened)
        loss = (losses * self.weights[opened.numbers].to(losses.device)).sum()
        (gradient,) = torch.autograd.grad(loss, leaf)
        return {"loss": loss.detach(), "gradient": gradient, "paid": opened.settle()}


@dataclass(frozen=True, eq=False)
class Answers:
    """Step: the model's `answer` to every original under each of some masks: the argmax over the whole vocabulary.

    One mask after the other, on the rows of one: what is answered does not depend on how many masks go together.
    """

    keeps: Float[Tensor, "mask n"]

    @property
    def summed(self) -> frozenset[str]:
        return frozenset({"paid"})

    def run(self, model: PatchModel, opened: Chunk) -> dict[str, Tensor]:
        with torch.no_grad():
            answers = [masked_logits(model, opened, keep).argmax(-1) for keep in self.keeps]
        return {"answer": torch.stack(answers, 1), "paid": opened.settle()}


def check_host(model: PatchModel) -> None:
    """Raises InputError where a mask is to be trained on a host that cannot differentiate."""
    check_gradients(model, None, Gradient("", torch.ones(0), torch.ones(0)))
