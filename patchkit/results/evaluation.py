"""What is known about circuits once they have been run: `evaluation.json`.

Every number carries its protocol: metric, direction, ablation, edge or node patching, signed or absolute selection.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from patchkit.results.convention import Convention
from patchkit.results.formats import read_model, write_model

EVALUATION = "evaluation.json"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class CircuitRun(_Frozen):
    """One circuit, run: edges outside it (or nodes, with node patching) carry the source run's value."""

    requested: int | None = Field(description="edges asked for; None where the circuit was given as it is")
    n_edges: int = Field(description="after pruning")
    n_nodes: int = Field(description="senders with an edge out, the input included")
    circuit_metric: float = Field(description="mean over pairs, the metric's own sign")
    faithfulness: float | None = Field(
        description="(circuit - corrupt) / (clean - corrupt); None where both runs have one metric"
    )
    gap: float = Field(description="|clean - circuit|, in the metric's unit")
    per_pair: list[float]
    absolute: bool = Field(description="edges were ranked by |score|")
    ablation: str
    patching: Literal["edge", "node"]
    selection: str = Field(description="top, greedy, threshold, given, acdc, ...")
    interval: tuple[float, float] | None = Field(
        default=None, description="95 % bootstrap over pairs of the metric; None with one pair"
    )
    faithfulness_interval: tuple[float, float] | None = Field(
        default=None, description="the same, of faithfulness"
    )

    @property
    def empty(self) -> bool:
        """Nothing survived pruning: the number is the corrupt run's own and says nothing about edges."""
        return self.n_edges == 0


class Curve(_Frozen):
    """Faithfulness against size, and the areas of MIB (Mueller et al. 2025).

    CPR is the area under f, CMD that under |1 - f|, both by trapezoid over the fractions from the smallest to 1. Random
    circuits have CPR 0.25 and CMD 0.75 on MIB's fractions: most of the area is at large circuits, so both are given on
    a logarithmic axis too (divided by its length, so that f = 1 everywhere gives 1).
    """

    absolute: bool
    selection: str
    ablation: str
    patching: Literal["edge", "node"]
    fractions: list[float] = Field(description="of all edges, ascending")
    requested: list[int]
    n_edges: list[int] = Field(description="after pruning")
    f: list[float | None]
    cpr: float | None
    cmd: float | None
    cpr_log: float | None
    cmd_log: float | None


class Removal(_Frozen):
    """Nodes K taken away from the circuit C and from the whole model M (completeness, Wang et al. 2022)."""

    nodes: list[str]
    how: Literal["random", "greedy"]
    circuit_metric: float = Field(description="F(C without K)")
    model_metric: float = Field(description="F(M without K)")

    @property
    def gap(self) -> float:
        """|F(C without K) - F(M without K)|: small if the circuit is complete."""
        return abs(self.circuit_metric - self.model_metric)


class Completeness(_Frozen):
    """The circuit lacks nothing that the model uses if no K tells them apart."""

    removals: list[Removal]
    worst: float = Field(description="largest gap")
    worst_share: float | None = Field(description="the same, in units of |clean - corrupt|")


class MinimalNode(_Frozen):
    """Whether a node is needed: |F(C without K and v) - F(C without K)|, for the K that shows it best of those tried."""

    node: str
    change: float
    share: float | None = Field(description="in units of |clean - corrupt|")
    removed: list[str] = Field(description="K")


class Minimality(_Frozen):
    """Nodes of the circuit that nothing shows to be needed are superfluous."""

    limit: float = Field(
        description="share of |clean - corrupt| that a needed node must change (published: 0.01)"
    )
    nodes: list[MinimalNode]

    @property
    def superfluous(self) -> list[str]:
        return [node.node for node in self.nodes if node.share is None or abs(node.share) < self.limit]


class RandomTest(_Frozen):
    """Random circuits of equal size: how often one of them is at least as faithful."""

    count: int
    faithfulness: list[float | None]
    n_edges: list[int] = Field(description="of each, after pruning")
    matched: str = Field(description="what the random circuits have in common with the circuit")
    p_value: float = Field(description="(1 + circuits at least as close to 1) / (1 + count)")


class Overlap(_Frozen):
    """A circuit against a reference: the reference is the truth of precision and recall."""

    reference: str
    level: Literal["edge", "node"]
    found: int
    truth: int
    common: int
    precision: float | None
    recall: float | None
    jaccard: float | None
    auroc: float | None = Field(
        default=None, description="of |importances| against the reference; None without scores"
    )
    requested: int | None = Field(
        default=None, description="edges that the circuit was asked for, as in its CircuitRun"
    )


class Stability(_Frozen):
    """The same selection on bootstraps of the pairs."""

    draws: int
    requested: int
    jaccard: float = Field(description="mean over pairs of draws, after pruning")
    interval: tuple[float, float] = Field(description="2.5 % and 97.5 % of the pairwise Jaccard indices")
    frequency: list[tuple[str, float]] = Field(
        description="edges of the circuit by the share of draws that hold them"
    )


class Repair(_Frozen):
    """What one node does directly to the logits, before and after a group of nodes is knocked out."""

    node: str
    before: float = Field(description="mean over pairs of its direct effect on the metric")
    after: float
    change: float
    interval: tuple[float, float] | None = None


class SelfRepair(_Frozen):
    """A group of nodes knocked out, and the others that make up for it (or lean the other way)."""

    group: list[str]
    clean: float = Field(description="metric of the base run")
    knocked_out: float = Field(description="metric with the group knocked out")
    expected: float = Field(
        description="metric if the others had not moved: the group's direct effects alone are lost"
    )
    repaired: float | None = Field(
        description="share of the direct loss that others made up: (knocked_out - expected) / (clean - expected)"
    )
    nodes: list[Repair] = Field(description="by size of the change")


class Evaluation(_Frozen):
    """Everything `patchkit evaluate` found."""

    schema_version: int = 1
    convention: Convention
    model: str
    source: str = Field(description="where the circuit or the scores came from")
    method: str = Field(description="how edges were scored, or 'given'")
    graph_edges: int
    pair_ids: list[str]
    clean_metric: float = Field(
        description="of the base runs, mean over pairs: the clean prompts' for direction noise"
    )
    corrupt_metric: float = Field(description="of the runs with every edge cut (every node replaced)")
    circuits: list[CircuitRun]
    curves: list[Curve] = Field(default_factory=list)
    completeness: Completeness | None = None
    minimality: Minimality | None = None
    random: RandomTest | None = None
    overlaps: list[Overlap] = Field(default_factory=list)
    stability: Stability | None = None
    repair: SelfRepair | None = None
    tested: int | None = Field(
        default=None,
        description="which of `circuits` completeness, minimality, the random test and stability are about",
    )
    clean_per_pair: list[float] = Field(default_factory=list)
    corrupt_per_pair: list[float] = Field(default_factory=list)
    cost: float = Field(description="forward-equivalents; 1 = one forward over every clean prompt")
    notes: list[str] = Field(
        default_factory=list, description="what a reader must know, e.g. circuits that are empty"
    )

    def save(self, directory: Path | str) -> None:
        """Writes evaluation.json by rename."""
        write_model(Path(directory) / EVALUATION, self)

    @classmethod
    def load(cls, directory: Path | str) -> Evaluation:
        """Reads evaluation.json; InputError if it is missing or malformed."""
        return read_model(Path(directory) / EVALUATION, cls)
