"""What comparing two models of one architecture returns: behaviour, circuits, activations put across, desiderata.

`Comparison` is saved as `comparison.json`; the models below are its schema. The two models are `first` and `second`
throughout; the scores that their circuits were selected from are in directories of these names.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from patchkit.results.convention import Convention
from patchkit.results.edge_scores import EdgeScores
from patchkit.results.evaluation import CircuitRun, Overlap
from patchkit.results.formats import read_model, write_model

COMPARISON = "comparison.json"
Which = Literal["first", "second"]
WHICH: tuple[Which, Which] = ("first", "second")


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)


class Behaviour(_Frozen):
    """What one model does on the held-out pairs, with nothing patched."""

    model: str
    clean: float = Field(description="metric on clean prompts, mean over pairs")
    corrupt: float = Field(description="the same on corrupt ones, with the clean prompts' answers")
    accuracy: float = Field(description="share of clean prompts whose most likely next token is the answer")
    clean_interval: tuple[float, float] | None = Field(default=None, description="95 % bootstrap over pairs")


class FoundCircuit(_Frozen):
    """A circuit of one model, run in one of the two on the held-out pairs."""

    found_in: Which
    run_in: Which
    run: CircuitRun


class NodeShift(_Frozen):
    """One node that holds what it holds in the donor on the same prompt."""

    node: str
    kind: str
    layer: int
    unit: int
    effect: float = Field(description="metric(with the donor's activation) - metric, mean over pairs")
    effect_abs: float = Field(description="mean over pairs of |effect|")
    share: float | None = Field(
        description="of the donor's metric less the model's; None where there is no gap"
    )


class GroupShift(_Frozen):
    """The same of a group of nodes at once, beside random groups of as many heads and MLPs."""

    group: str
    nodes: list[str]
    effect: float
    interval: tuple[float, float] | None
    share: float | None
    share_interval: tuple[float, float] | None
    random: list[float | None] = Field(description="shares of random groups")


class Across(_Frozen):
    """Activations of `donor` put into `model`."""

    model: Which
    donor: Which
    model_metric: float
    donor_metric: float
    nodes: list[NodeShift]
    groups: list[GroupShift]


class GroupScores(_Frozen):
    """Held-out desiderata when a group is patched at one token: the share of triples whose answer is the target."""

    group: str
    model: Which = Field(description="which runs the originals")
    donor: Which = Field(description="which runs the alternates; another one than `model`: cross-model")
    scores: dict[str, float]


class Comparison(_Frozen):
    """Everything that `patchkit compare` found."""

    schema_version: int = 1
    task: str
    convention: Convention = Field(description="of the circuits")
    method: str = Field(description="that scored edges")
    absolute: bool = Field(description="edges were ranked by |score|")
    positions: str = Field(description="tokens at which activations are put across")
    pairs: int = Field(description="that edges were scored on")
    held_out: list[str] = Field(description="ids of the pairs that everything else is measured on")
    models: list[Behaviour] = Field(description="first, second")
    circuits: list[FoundCircuit]
    overlaps: list[Overlap] = Field(description="the first model's circuits against the second's")
    rank_correlation: float | None = Field(description="Spearman's, of all edges' importances")
    rank_correlation_abs: float | None = Field(description="the same of mean |effect|")
    across: list[Across] = Field(description="the second's activations in the first, then the reverse")
    desiderata: list[GroupScores] = Field(default_factory=list)
    triples: dict[str, int] = Field(default_factory=dict, description="held-out triples a desideratum")
    findings: list[str] = Field(default_factory=list)
    notes: list[str] = Field(default_factory=list)
    cost: float = Field(
        description="forward-equivalents, without the desiderata; 1 = one forward over every held-out prompt"
    )
    command: str = ""
    seconds: float = 0.0
    scores: tuple[EdgeScores, EdgeScores] | None = Field(
        default=None, exclude=True, description="of both models; not read back"
    )

    def into(self, model: Which) -> Across:
        """What the other model's activations do in this one."""
        return next(each for each in self.across if each.model == model)

    def save(self, directory: Path | str) -> None:
        """Writes the scores into `first` and `second`, and comparison.json last, by rename."""
        directory = Path(directory)
        for which, scores in zip(WHICH, self.scores or (), strict=False):
            (directory / which).mkdir(parents=True, exist_ok=True)
            scores.save(directory / which)
        write_model(directory / COMPARISON, self)

    @classmethod
    def load(cls, directory: Path | str) -> Comparison:
        """Reads comparison.json; InputError if it is missing or malformed."""
        return read_model(Path(directory) / COMPARISON, cls)
