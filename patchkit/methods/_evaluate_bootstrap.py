"""Faithfulness, and what the sample of pairs lets be said about it: percentile bootstraps over pairs.

    f = (circuit - corrupt) / (clean - corrupt)        of means over pairs (Hanna et al. 2024)

A draw is one sample of pairs, with replacement, for all three means: they go up and down together, and the interval of
the ratio is narrower for it. Means of ratios are not used: a pair whose two prompts hardly differ would rule them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

#: Two metrics closer than this share of the larger are one: what is left is rounding.
SAME = 1e-6
LEVEL = 0.95

Interval = tuple[float, float]


def same_metric(clean: float, corrupt: float) -> bool:
    """Whether two runs have one metric, so that no share of their difference can be given."""
    return abs(clean - corrupt) <= SAME * max(abs(clean), abs(corrupt))


def faithfulness(circuit: float, clean: float, corrupt: float) -> float | None:
    """f of means over pairs; None where clean and corrupt are one."""
    return None if same_metric(clean, corrupt) else (circuit - corrupt) / (clean - corrupt)


def share(change: float, clean: float, corrupt: float) -> float | None:
    """A change of the metric in units of |clean - corrupt|; None where that is nothing."""
    return None if same_metric(clean, corrupt) else change / abs(clean - corrupt)


def percentiles(values: Float[Tensor, " draws"], level: float = LEVEL) -> Interval:
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.quantile(values.double(), tails).tolist()
    return low, high


class PairBootstrap:
    """Bootstrap means of a fixed set of pairs; every quantity sees the same draws.

    Args:
        pairs: how many there are; of one pair no interval can be given.
    """

    def __init__(self, pairs: int, draws: int, seed: int) -> None:
        self.pairs = pairs
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randint(pairs, (draws, pairs), generator=generator)
        self._weights = torch.zeros(draws, pairs, dtype=torch.float64)
        self._weights.scatter_add_(1, drawn, torch.full(drawn.shape, 1 / pairs, dtype=torch.float64))

    def means(self, values: Float[Tensor, " pairs"]) -> Float[Tensor, " draws"]:
        return self._weights @ values.double().cpu()

    def interval(self, values: Float[Tensor, " pairs"]) -> Interval | None:
        """95 % interval of the mean; None with one pair."""
        return None if self.pairs == 1 else percentiles(self.means(values))

    def faithfulness_interval(
        self,
        circuit: Float[Tensor, " pairs"],
        clean: Float[Tensor, " pairs"],
        corrupt: Float[Tensor, " pairs"],
    ) -> Interval | None:
        """The same of the ratio of means; None with one pair, and where some draw has no difference to divide by."""
        if self.pairs == 1:
            return None
        whole, cut, kept = self.means(clean), self.means(corrupt), self.means(circuit)
        pairs: Sequence[tuple[float, float]] = list(zip(whole.tolist(), cut.tolist(), strict=True))
        if any(same_metric(*each) for each in pairs):
            return None
        return percentiles((kept - cut) / (whole - cut))

    def changes_sign(self, clean: Float[Tensor, " pairs"], corrupt: Float[Tensor, " pairs"]) -> bool:
        """Whether clean - corrupt may as well be 0 or of the other sign: its interval holds 0."""
        found = self.interval(clean - corrupt)
        return found is not None and found[0] <= 0 <= found[1]
