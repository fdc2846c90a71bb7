"""The few largest of very many numbers, without sorting them all: models have millions of edges."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def largest(values: Float[Tensor, " n"], k: int) -> Int[Tensor, " found"]:
    """Places of the k largest values, largest first; NaN is left out, and equal values come by place."""
    known = values.nan_to_num(nan=-torch.inf, neginf=-torch.inf)
    k = min(k, int((known > -torch.inf).sum()))
    if k == 0:
        return torch.zeros(0, dtype=torch.long)
    least = known.topk(k, sorted=True).values[-1]
    places = (known >= least).nonzero()[:, 0]
    return places[torch.sort(known[places], descending=True, stable=True).indices[:k]]
