"""A batch of pairs as the edge methods see it, and the sums over pairs that its scores go into."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from patchkit.data import Metric
from patchkit.errors import InputError
from patchkit.methods._edge_replacement import EdgeReplacement
from patchkit.methods._pair_batch import PairBatch
from patchkit.model import EdgeGraph, PatchModel
from patchkit.results.query_heads import sum_groups
from patchkit.tracing.suffix import whole_mask


@dataclass(frozen=True, eq=False)
class EdgeBatch:
    """What every gradient method of edges is given.

    Attributes:
        graph: that scores are made in: native, or by query head.
        real: columns that are no padding.
        real_keys: the same of all columns that attention sees, those too that were run before.
    """

    model: PatchModel
    graph: EdgeGraph
    pairs: PairBatch
    metric: Metric
    replacement: EdgeReplacement

    @property
    def real(self) -> Bool[Tensor, "pairs width"]:
        return self.pairs.base.attention_mask.bool()

    @property
    def real_keys(self) -> Bool[Tensor, "pairs keys"]:
        return whole_mask(self.pairs.base).bool()

    @property
    def by_query(self) -> bool:
        """Whether keys and values have gradients for every query head."""
        return self.graph.n_kv_heads != self.model.dims.n_kv_heads

    def scorer(
        self, reference: Float[Tensor, "pairs vocab"] | None = None, copies: int = 1
    ) -> Callable[[Tensor], Tensor]:
        """The metric of a run's logits; `reference`: the base run's, by default the logits themselves.

        Args:
            copies: how many times the batch is repeated, whole batch after whole batch.
        """
        rows = torch.arange(len(self.pairs.pairs)).repeat(copies)

        def score(logits: Tensor) -> Tensor:
            against = logits.detach() if reference is None else reference
            return self.pairs.score(self.metric, logits, against, rows)

        return score


@dataclass(eq=False)
class EdgeSums:
    """Sums over pairs of scores and of their sizes, native and, where scores are by query head, by query head.

    Attributes:
        native: the graph that results have.
        graph: that scores come in.
        keep: whether every pair's scores are kept too.
    """

    native: EdgeGraph
    graph: EdgeGraph
    keep: bool = False
    found: dict[str, Tensor] = field(default_factory=dict)
    kept: list[Tensor] = field(default_factory=list)

    def add(
        self,
        signed: Float[Tensor, "pairs places senders receivers"],
        magnitude: Float[Tensor, "pairs places senders receivers"] | None = None,
    ) -> None:
        """Adds the scores of some pairs; `magnitude` where it is not |signed|."""
        if self.graph != self.native:
            self._sum("by_query", signed, signed.abs())
            # A shared key or value is read by all heads of its group: its score is the sum of theirs, before any size.
            signed = sum_groups(self.native, signed)
        self._sum("native", signed, signed.abs() if magnitude is None else magnitude)
        if self.keep:
            self.kept.append(signed.cpu())

    def _sum(self, name: str, signed: Tensor, magnitude: Tensor) -> None:
        for what, value in (("signed", signed), ("magnitude", magnitude)):
            # Where they are made: on a GPU, moving every block's scores takes longer than making them.
            # Apple's GPUs have no double precision.
            value = value.cpu() if value.device.type == "mps" else value
            added = value.sum(0, dtype=torch.float64)
            key = f"{what}.{name}"
            if key in self.found:
                self.found[key] += added
            else:
                self.found[key] = added

    def tensors(self) -> dict[str, Tensor]:
        """The sums, and the scores of pairs in the order in which they were added."""
        return self.found | ({"pairs": torch.cat(self.kept)} if self.keep else {})


def refuse_infinite(scores: Tensor, pairs: PairBatch, first: int, graph: EdgeGraph, metric: str) -> None:
    """Raises InputError, naming the pair and the edge, where a score is not a finite number."""
    wrong = (~scores.isfinite()).nonzero()
    if len(wrong):
        row, _, sender, receiver = wrong[0].tolist()
        raise InputError(
            f"the gradient of metric '{metric}' is not finite at edge '{graph.edge_name(sender, receiver)}' of pair "
            f"{pairs.pairs[first + row].id!r}; check the metric at the base run, or give another dtype"
        )
