"""What a sweep over edges returns: the effect of every edge, with what the numbers mean.

The effect of an edge u -> v is metric(base run in which v reads u's source value) - metric(base run), exact or estimated.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from patchkit.errors import InputError
from patchkit.model.edges import EdgeGraph
from patchkit.results.circuit import Circuit
from patchkit.results.convention import Convention


class EdgeMethod(BaseModel):
    """How edges were scored."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(
        description="eap, eap-ig-inputs, eap-ig-activations, clean-corrupted, exact, acdc or ifr"
    )
    steps: int | None = Field(default=None, description="of the integral")
    rule: str | None = Field(default=None, description="of the integral: repo or midpoint")
    qk_fix: bool = False
    grad_drop: bool = False
    threshold: float | None = Field(default=None, description="ACDC's tau")
    order: str | None = Field(default=None, description="in which ACDC visits edges")


@dataclass(frozen=True, eq=False)
class EdgeScores:
    """Effects of edges.

    Attributes:
        graph: native: one key and one value receiver a KV head.
        places: labels of the position axis; without `placed` there is one and no axis.
        mean: over pairs, signed; `[senders, receivers]` or `[places, senders, receivers]`; NaN where there is no edge,
            and where one was not scored.
        mean_abs: over pairs, of |effect| (under GradDrop the mean over drops of |.| inside).
        by_query: with grouped KV heads, `mean` and `mean_abs` of the graph by query head, from gradients (or patches) of
            the repeated keys and values; None where the graph is that one already, or they were not computed.
        per_pair: `[pairs, ...]`, where it was asked for.
        circuit: what ACDC kept.
        cost: in forward-equivalents; 1 = one forward over every base prompt.
    """

    graph: EdgeGraph
    method: EdgeMethod
    convention: Convention
    pair_ids: tuple[str, ...]
    mean: Float[Tensor, "*places senders receivers"]
    mean_abs: Float[Tensor, "*places senders receivers"]
    base_metric: Float[Tensor, " pairs"]
    source_metric: Float[Tensor, " pairs"]
    cost: float
    places: tuple[str, ...] = ("all",)
    placed: bool = False
    by_query: tuple[Tensor, Tensor] | None = None
    per_pair: Float[Tensor, "pairs *places senders receivers"] | None = None
    circuit: Circuit | None = None

    def __post_init__(self) -> None:
        places = (len(self.places),) if self.placed else ()
        shape = (*places, self.graph.n_senders, self.graph.n_receivers)
        for name in ("mean", "mean_abs"):
            found = tuple(getattr(self, name).shape)
            if found != shape:
                raise InputError(f"{name} of these edges: expected shape {list(shape)}, found {list(found)}")

    @property
    def importance(self) -> Float[Tensor, "*places senders receivers"]:
        """`mean` with the sign turned so that higher = the edge helps: corrupting a helping edge lowers the metric.

        Information-flow routes have no sign and are importances as they are.
        """
        if self.method.name == "ifr" or self.convention.direction == "denoise":
            return self.mean
        return -self.mean

    def top(self, k: int) -> list[tuple[str, float, float]]:
        """The k edges with the largest mean |effect|: (name, mean, mean |effect|); ties by number."""
        flat = self.mean_abs.flatten()
        known = (~flat.isnan()).nonzero()[:, 0]
        order = known[torch.sort(flat[known], descending=True, stable=True).indices[:k]]
        return [(self.name(i), float(self.mean.flatten()[i]), float(flat[i])) for i in order.tolist()]

    def name(self, number: int) -> str:
        """The name of an edge from its place in the flattened tensor, e.g. `a0.h1->a2.h3<q>` or with `@5` at a place."""
        rest, receiver = divmod(number, self.graph.n_receivers)
        place, sender = divmod(rest, self.graph.n_senders)
        name = self.graph.edge_name(sender, receiver)
        return f"{name}@{self.places[place]}" if self.placed else name
