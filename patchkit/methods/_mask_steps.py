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
    """Step: the model's `answer` to every original under a mask: the argmax over the whole vocabulary."""

    keep: Float[Tensor, " n"]

    @property
    def summed(self) -> frozenset[str]:
        return frozenset({"paid"})

    def run(self, model: PatchModel, opened: Chunk) -> dict[str, Tensor]:
        with torch.no_grad():
            answer = masked_logits(model, opened, self.keep).argmax(-1)
        return {"answer": answer, "paid": opened.settle()}
