"""Spearman's rank correlation, undefined where one side does not vary."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from torch import Tensor


def rank_correlation(first: Float[Tensor, " n"], second: Float[Tensor, " n"]) -> float | None:
    """Spearman's, over the numbers that both sides have; None with fewer than two of them or with all of a side equal."""
    # Half a second to load, which most commands need not wait for.
    from scipy.stats import rankdata

    both = ~(first.isnan() | second.isnan())
    first, second = first[both].double(), second[both].double()
    if len(first) < 2 or not bool((first != first[0]).any()) or not bool((second != second[0]).any()):
        return None
    return float(np.corrcoef(rankdata(first.numpy()), rankdata(second.numpy()))[0, 1])
