"""What a comparison of two models is asked."""

from __future__ import annotations

from dataclasses import dataclass, replace

from patchkit.errors import InputError
from patchkit.methods import EdgeOptions, NodeOptions
from patchkit.studies._comparison_groups import KINDS
from patchkit.studies._finding import check_sizes


@dataclass(frozen=True)
class CompareOptions:
    """How two models are compared.

    Attributes:
        sizes: numbers of edges of the circuits, ascending; groups are made of those of the last.
        method: that scores edges: one of `patchkit edges`, but ACDC.
        absolute: rank edges by |score|.
        nodes: node kinds and names that are put across one at a time.
        positions: tokens at which activations are put across: `all`, `last` or a named span.
        edges: what edges carry when they are cut, and the metric.
        random: random groups to compare a group with.
        draws: bootstrap draws of an interval.
        seed: of what is drawn.
    """

    sizes: tuple[int, ...] = (20, 50, 100)
    method: str = "eap-ig-inputs"
    absolute: bool = True
    nodes: tuple[str, ...] = KINDS
    positions: str = "all"
    edges: EdgeOptions = EdgeOptions()
    random: int = 10
    draws: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        check_sizes(self.sizes)
        if self.random < 0:
            raise InputError(f"random must be at least 0, found {self.random}")

    @property
    def across(self) -> NodeOptions:
        """Options of putting nodes across."""
        return NodeOptions(
            nodes=self.nodes,
            positions=self.positions,
            metric=self.edges.metric,
            seed=self.seed,
            max_batch_tokens=self.edges.max_batch_tokens,
        )

    @property
    def grouped(self) -> NodeOptions:
        """The same for groups of heads and MLPs, whatever nodes are asked for one at a time."""
        return replace(self.across, nodes=KINDS)
