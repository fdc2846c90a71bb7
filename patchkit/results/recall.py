"""What the attribution-recall study returns: what every way to find the important nodes cost, setting by setting.

`RecallStudy` is saved as `recall.json`; the models below are its schema. All costs are counted, in forwards per pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from patchkit.results.convention import Convention
from patchkit.results.formats import read_model, write_model

#: Points of a curve in the file: enough for a smooth line on logarithmic axes.
CURVE_POINTS = 200

Material = Literal["ioi", "variable-binding", "random-text"]
Evidence = Literal["pair", "distribution"]
NodeClass = Literal["attention nodes", "neuron nodes"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class MethodRecall(_Frozen):
    """What one method pays until the true top nodes are verified; the oracle pays `rank`, a relative cost of 1."""

    name: str = Field(description="atp, atp-star, subsampling, ...")
    parameters: str = Field(
        default="",
        description="of a search with several: those that served it best here, chosen in hindsight",
    )
    preparation: float = Field(
        description="forwards per pair before the first node is verified; 0 where search and verification are one"
    )
    aggregate: float = Field(
        description="inverse-rank-weighted geometric mean of cost / rank, at least 1; over pairs the geometric mean"
    )
    unprepared: float = Field(
        description="the same without the preparation: how good the order is, whatever it cost"
    )
    per_pair: list[float] = Field(
        description="the aggregate of every pair; of a distribution, its one aggregate"
    )
    ranks: list[int] = Field(description="ascending, thinned evenly on a logarithmic axis; the first is 1")
    cost: list[float] = Field(
        description="forwards per pair until the true top `rank` nodes are verified; over pairs the geometric mean"
    )

    @model_validator(mode="after")
    def _curve_fits(self) -> MethodRecall:
        if len(self.ranks) != len(self.cost):
            raise ValueError(f"{self.name}: {len(self.ranks)} ranks for {len(self.cost)} costs")
        if self.ranks != sorted(set(self.ranks)):
            raise ValueError(f"{self.name}: ranks must ascend")
        return self

    @property
    def relative(self) -> list[float]:
        """cost / rank, point by point."""
        return [cost / rank for rank, cost in zip(self.ranks, self.cost, strict=True)]


class RecallSetting(_Frozen):
    """One model, material, kind of evidence and class of nodes, with every method that was run on it."""

    model: str
    material: Material
    evidence: Evidence = Field(
        description="pair: the effects of one pair at every position; distribution: mean |effect| over pairs, "
        "positions patched together"
    )
    node_class: NodeClass
    kinds: list[str] = Field(description="node kinds, e.g. q, k, v, z")
    convention: Convention
    nodes: int = Field(description="nodes that a method must order")
    recalled: list[int] = Field(
        description="length of the curve of every pair (of a distribution: one): nodes whose true effect is above "
        "rounding error; nodes without effect are equal, and none is asked for"
    )
    pairs: int
    silent: list[str] = Field(
        default_factory=list, description="ids of pairs left out: no node has an effect in them"
    )
    methods: list[MethodRecall]

    @property
    def name(self) -> str:
        """e.g. `ioi-gpt2, ioi, pair, attention nodes`."""
        return f"{self.model}, {self.material}, {self.evidence}, {self.node_class}"

    def method(self, name: str) -> MethodRecall:
        """One method by its name; KeyError where it was not run."""
        return {each.name: each for each in self.methods}[name]

    def aggregate(self, method: str) -> float:
        """The aggregate of a method; KeyError where it was not run."""
        return self.method(method).aggregate

    def ranking(self) -> list[MethodRecall]:
        """The methods, cheapest first."""
        return sorted(self.methods, key=lambda method: (method.aggregate, method.name))


class RecallStudy(_Frozen):
    """Everything that `patchkit study attribution-recall` found."""

    schema_version: int = 1
    settings: list[RecallSetting]
    seeds: dict[str, int] = Field(description="what was drawn -> its seed")
    parameters: dict[str, str] = Field(
        default_factory=dict, description="label -> value: the searches' parameters, printed as they stand"
    )
    left_out: list[str] = Field(default_factory=list, description="what was not run or not counted, and why")
    findings: list[str] = Field(
        default_factory=list, description="sentences, where AtP beats AtP* among them"
    )
    command: str = Field(description="the command that makes this again")
    seconds: float

    def cheaper(self, method: str, than: str) -> list[RecallSetting]:
        """The settings in which `method` has a smaller aggregate than the other, where both were run."""
        both = [s for s in self.settings if {method, than} <= {each.name for each in s.methods}]
        return [s for s in both if s.aggregate(method) < s.aggregate(than)]

    def save(self, directory: Path | str) -> None:
        """Writes recall.json into `directory` by rename."""
        write_model(Path(directory) / "recall.json", self)

    @classmethod
    def load(cls, directory: Path | str) -> RecallStudy:
        """Reads recall.json; InputError if it is missing or malformed."""
        return read_model(Path(directory) / "recall.json", cls)


def log_spaced(length: int, points: int = CURVE_POINTS) -> list[int]:
    """At most `points` ranks of 1..length, evenly spaced on a logarithmic axis, with the first and the last."""
    if length <= points:
        return list(range(1, length + 1))
    steps = points - 1
    return sorted({max(1, round(length ** (step / steps))) for step in range(points)})


def thin(cost: Sequence[float], points: int = CURVE_POINTS) -> tuple[list[int], list[float]]:
    """(ranks, cost) of a curve whose entry x - 1 is the cost of rank x, at log-spaced ranks."""
    ranks = log_spaced(len(cost), points)
    return ranks, [float(cost[rank - 1]) for rank in ranks]
