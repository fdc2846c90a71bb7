"""What exact patching says about an attribution: the nodes that were checked, and a bound on those that were not.

`Verification` is saved as `verification.json`, `Bound` as `bound.json`; the models below are their schemas.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class VerifiedNode(_Frozen):
    """One node, estimated and patched exactly."""

    node: str
    number: int = Field(description="in the grid of the scores")
    estimate: float = Field(description="mean over pairs of the estimated magnitude; nodes are ranked by it")
    signed: float = Field(description="mean over pairs of the estimated effect, signed")
    exact: float = Field(description="mean over pairs of |effect|, by patching")
    exact_signed: float = Field(description="mean over pairs of the effect, by patching, signed")
    group: Literal["top", "sample"] = Field(description="among the top K by estimate, or drawn from the rest")
    stratum: str = Field(description="kind and layer, e.g. q.3")


class Verification(_Frozen):
    """How well an attribution agrees with exact patching on the nodes that were checked."""

    schema_version: int = 1
    k: int = Field(description="how many of the top nodes were checked")
    sampled: int = Field(description="how many of the rest were checked: drawn at random from every stratum")
    unverified: int = Field(description="how many nodes were not checked")
    rank_correlation: dict[str, float | None] = Field(
        description="Spearman's, of estimate and exact |effect|, over 'top', 'sample' and 'all'; None where undefined"
    )
    sign_agreement: dict[str, float | None] = Field(
        description="share of nodes whose signed means agree in sign, of those with an exact effect that is not 0"
    )
    nodes: list[VerifiedNode]
    cost: float = Field(description="forward-equivalents; 1 = one forward over every base prompt")
    missed: list[str] = Field(
        description="sampled nodes whose exact |effect| exceeds the least of the top K: the estimate missed them"
    )


class BoundStratum(_Frozen):
    """Random subsets of the unverified nodes of one kind and layer, patched together."""

    name: str = Field(description="kind and layer, e.g. q.3")
    nodes: int
    draws: int = Field(description="random subsets patched")
    p: float = Field(description="probability of a node to be in a subset")
    bound: float = Field(description="largest upper bound of its nodes, each at level alpha")
    familywise: float = Field(description="the same at level alpha / (all unverified nodes)")


class Bound(_Frozen):
    """Upper bound of |effect| over the nodes that were not verified, from random subsets (Welch, per node).

    It bounds the size of the signed effect of a node, averaged over pairs and on top of random background patches: not
    the effect of the node alone, nor its mean |effect| over pairs that disagree in sign.
    """

    schema_version: int = 1
    alpha: float
    unverified: int
    bound: float = Field(
        description="largest upper bound, each node at level alpha: for one node fixed in advance"
    )
    familywise: float = Field(
        description="largest upper bound at level alpha / unverified: for all nodes at once"
    )
    strata: list[BoundStratum]
    largest: list[tuple[str, float, float]] = Field(
        description="nodes with the largest bounds: name, difference of means with and without it, its bound"
    )
    cost: float = Field(description="forward-equivalents; 1 = one forward over every base prompt")

    @property
    def sentences(self) -> tuple[str, ...]:
        """The two statements, for all nodes at once and for one, and what they do not say."""
        if self.unverified == 0:
            return ("Every node was verified: nothing is left to bound.",)
        sure = f"{100 * (1 - self.alpha):.6g} %"
        return (
            f"No unverified node has |effect| above {self.familywise:.4g} with confidence {sure}, for all "
            f"{self.unverified:,} at once (Bonferroni).",
            f"For one unverified node fixed in advance the bound is {self.bound:.4g} with confidence {sure}.",
            "Both are of the size of a node's average effect over pairs and random background patches, not its effect "
            "alone or on one pair.",
        )

    @property
    def sentence(self) -> str:
        """All of `sentences` in one line."""
        return " ".join(self.sentences)
