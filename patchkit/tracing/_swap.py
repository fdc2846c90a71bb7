"""What patched rows put in, and the keys and values that they share with the run they restart from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from patchkit.model import KINDS, Site


@dataclass(frozen=True, eq=False)
class Swap:
    """What the rows of a patched run put in at one site.

    Attributes:
        where: the nodes and padded columns that row r replaces, `[rows, width, nodes]` (nodes: heads, neurons, or 1).
        values: what every pair has there, `[pairs, width, ...]` in canonical shape; row r takes its pair's.
        takes: where there are not values of pairs but of anything else: which of them each row takes.
    """

    site: Site
    where: Bool[Tensor, "rows width nodes"]
    values: Tensor
    takes: Int[Tensor, " rows"] | None = None

    def apply(self, activation: Tensor, pairs: Int[Tensor, " rows"], first: int | None = None) -> Tensor:
        """The activation `[rows, position, ...]` with its values put in.

        Args:
            first: the padded column of the activation's first position; by default it ends at the last column.
        """
        seen, device = activation.shape[1], activation.device
        first = self.where.shape[1] - seen if first is None else first
        where = self.where[:, first : first + seen].to(device)
        values = self.values[:, first : first + seen]
        taken = pairs if self.takes is None else self.takes
        values = values[taken.to(values.device)].to(device=device, dtype=activation.dtype)
        if KINDS[self.site.kind].unit in ("head", "kv_head"):
            where = where.unsqueeze(-1)
        # Modules that view their input need it in one piece, whatever the memory layout of the mask.
        return torch.where(where, values, activation).contiguous()


class SharedPrefix(DynamicLayer):
    """One layer's keys and values before a restart, one row for each patched run.

    They are copied when the layer runs and not kept: an ordinary cache would hold a copy for every row and layer.
    """

    def __init__(self, keys: Tensor, values: Tensor, pairs: Int[Tensor, " rows"], start: int) -> None:
        DynamicLayer.__init__(self)
        self.keys, self.values = keys[:, :, :start], values[:, :, :start]
        self.pairs = pairs.to(keys.device)
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of all columns: the base run's, then those that are computed now."""
        assert self.keys is not None and self.values is not None
        return (
            torch.cat([self.keys[self.pairs], key_states], dim=-2),
            torch.cat([self.values[self.pairs], value_states], dim=-2),
        )
