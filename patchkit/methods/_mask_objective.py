"""What a mask is trained to do, and what it pays for every component it patches.

Throughout, w = 1 keeps the original run's activation and w = 0 puts in the alternate's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from patchkit.errors import InputError
from patchkit.methods._mask_prepare import Chunk, difference

Loss = Literal["published", "cross-entropy"]
Sparsity = Literal["l0.5", "l1", "hard-concrete"]

# Hard concrete gate (Louizos et al. 2018): stretch (gamma, zeta) and temperature beta.
_BETA, _GAMMA, _ZETA = 2 / 3, -0.1, 1.1
#: Weight of the logit-difference gain in the published loss.
GAIN = 5.0


def row_losses(loss: str, logits: Float[Tensor, "row vocab"], chunk: Chunk) -> Float[Tensor, " row"]:
    """The loss of each triple under a mask.

    `published` (arXiv 2307.03637, the authors' code): with d = logit[target] - logit[rival] and d0 the same without
    patch, a dependence costs 5 (d0 - d) and an invariance (d - d0)^2. `cross-entropy`: -log p(target) for both.
    """
    if loss == "cross-entropy":
        return functional.cross_entropy(logits, chunk.target, reduction="none")
    moved = difference(logits, chunk.target, chunk.rival) - chunk.base_difference
    return torch.where(chunk.invariant, moved.square(), -GAIN * moved)


class DirectMask:
    """The mask values themselves are the parameters, clamped to [0, 1] before each use (the published way).

    Args:
        start: initial values `[n]`.
        sparsity: `l0.5`: lambda * sum((1.001 - w)^0.5), whose slope is steepest at w = 1, so it frees components one
            by one; `l1`: lambda * sum(1 - w).
    """

    def __init__(self, start: Float[Tensor, " n"], sparsity: str, lam: float) -> None:
        self.values = start.clone().requires_grad_(True)
        self.sparsity = sparsity
        self.lam = lam

    @property
    def parameters(self) -> list[Tensor]:
        return [self.values]

    def before_step(self) -> None:
        with torch.no_grad():
            self.values.clamp_(0.0, 1.0)

    def sample(self) -> Float[Tensor, " n"]:
        return self.values

    def penalty(self) -> Tensor:
        if self.sparsity == "l1":
            return self.lam * (1 - self.values).sum()
        return self.lam * (1.001 - self.values).sqrt().sum()

    def after_backward(self) -> None:
        """Nothing to turn round: the penalty has no multipliers of its own."""

    def final(self) -> Float[Tensor, " n"]:
        return self.values.detach().clamp(0.0, 1.0)

    def state(self) -> dict[str, Tensor]:
        return {"values": self.values.detach().clone()}

    def restore(self, state: dict[str, Tensor]) -> None:
        with torch.no_grad():
            self.values.copy_(state["values"])


class HardConcreteMask:
    """Each component is patched with a learned probability; `lam` is the fraction of components that may be patched.

    w = 1 - gate with the hard concrete gate of methods handbooks: u uniform, s = sigmoid((log u - log(1-u) + alpha) /
    beta), gate = clip(s (zeta - gamma) + gamma, 0, 1), P(gate > 0) = sigmoid(alpha - beta log(-gamma / zeta)). The
    penalty l1 (p - t) + l2 (p - t)^2, p the mean of these probabilities and t the target, has multipliers that climb.
    """

    def __init__(self, start: Float[Tensor, " n"], lam: float, seed: int) -> None:
        check_fraction(lam)
        # A start of w patches with probability about 1 - w; the ends would have no gradient.
        self.alpha = torch.logit((1 - start).clamp(0.05, 0.95)).clone().requires_grad_(True)
        self.multipliers = torch.zeros(2, requires_grad=True)
        self.target = lam
        self._generator = torch.Generator().manual_seed(seed)

    @property
    def parameters(self) -> list[Tensor]:
        return [self.alpha, self.multipliers]

    def before_step(self) -> None:
        """Nothing to clamp: the parameters are free."""

    def sample(self) -> Float[Tensor, " n"]:
        u = torch.empty(self.alpha.shape).uniform_(1e-6, 1 - 1e-6, generator=self._generator)
        s = torch.sigmoid((u.log() - (1 - u).log() + self.alpha) / _BETA)
        return 1 - (s * (_ZETA - _GAMMA) + _GAMMA).clamp(0.0, 1.0)

    def penalty(self) -> Tensor:
        patched = torch.sigmoid(self.alpha - _BETA * math.log(-_GAMMA / _ZETA)).mean()
        excess = patched - self.target
        return self.multipliers[0] * excess + self.multipliers[1] * excess.square()

    def after_backward(self) -> None:
        """The multipliers climb while the target is missed: their gradient is turned round."""
        if self.multipliers.grad is not None:
            self.multipliers.grad.neg_()

    def final(self) -> Float[Tensor, " n"]:
        gate = (torch.sigmoid(self.alpha.detach()) * (_ZETA - _GAMMA) + _GAMMA).clamp(0.0, 1.0)
        return 1 - gate

    def state(self) -> dict[str, Tensor]:
        return {
            "alpha": self.alpha.detach().clone(),
            "multipliers": self.multipliers.detach().clone(),
            "generator": self._generator.get_state(),
        }

    def restore(self, state: dict[str, Tensor]) -> None:
        with torch.no_grad():
            self.alpha.copy_(state["alpha"])
            self.multipliers.copy_(state["multipliers"])
        self._generator.set_state(state["generator"])


def check_fraction(lam: float) -> None:
    """Raises InputError unless a hard-concrete mask can aim at this: more than no component and fewer than all."""
    if not 0 < lam < 1:
        raise InputError(f"hard-concrete takes a target fraction between 0 and 1 as lambda, found {lam:g}")


@dataclass(frozen=True)
class Objective:
    """How a mask is trained: its loss, its price, and the price's weights from light to heavy."""

    loss: str = "cross-entropy"
    sparsity: str = "l0.5"

    def __post_init__(self) -> None:
        for what, value, known in (("loss", self.loss, Loss), ("sparsity", self.sparsity, Sparsity)):
            if value not in get_args(known):
                raise InputError(
                    f"{what} '{value}' is not known; expected one of: {', '.join(get_args(known))}"
                )

    def make(self, start: Float[Tensor, " n"], lam: float, seed: int) -> DirectMask | HardConcreteMask:
        """Trainable mask at one lambda, from a starting point."""
        if self.sparsity == "hard-concrete":
            return HardConcreteMask(start, lam, seed)
        return DirectMask(start, self.sparsity, lam)

    @property
    def is_direct(self) -> bool:
        """Whether lambda is the price of a component, and not how many there are to be."""
        return self.sparsity != "hard-concrete"

    @property
    def alternates_steps(self) -> bool:
        """The published code steps on one desideratum after the other; cross-entropy steps on all together."""
        return self.loss == "published"
