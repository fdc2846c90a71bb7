"""How long and how fast a mask is trained."""

from __future__ import annotations

import math
from dataclasses import dataclass

from patchkit.errors import InputError


@dataclass(frozen=True)
class Schedule:
    """How long and how fast.

    Attributes:
        lambdas: the path, in the order in which they are tried; each starts from the mask before it.
        steps: Adam steps at the first lambda.
        steps_after: at each later one.
        lr: Adam's.
        check_every: steps between looks at the validation score.
        patience: looks without a change of the rounded set after which a lambda is done; 0: take every step.
        warm: start each lambda from the mask before it; False starts each one afresh, as published.
    """

    lambdas: tuple[float, ...] = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32)
    steps: int = 160
    steps_after: int = 60
    lr: float = 0.02
    check_every: int = 10
    patience: int = 4
    warm: bool = True

    @property
    def total_steps(self) -> int:
        """Steps of the whole path, if no lambda is done early."""
        return self.steps + (self.steps_after if self.warm else self.steps) * (len(self.lambdas) - 1)

    def __post_init__(self) -> None:
        if not self.lambdas or not all(math.isfinite(lam) and lam >= 0 for lam in self.lambdas):
            raise InputError(
                f"lambdas is {list(self.lambdas)}; expected at least one number, none of them negative"
            )
        for name, least in (("steps", 1), ("steps_after", 1), ("check_every", 1), ("patience", 0)):
            if getattr(self, name) < least:
                raise InputError(f"{name} is {getattr(self, name)}; expected at least {least}")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise InputError(f"lr is {self.lr}; expected a positive learning rate")
