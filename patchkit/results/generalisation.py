"""What circuits found on some sets of prompts are worth on the others: a matrix, and what the circuits share.

`Generalisation` is saved as `generalisation.json`; the models below are its schema.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from patchkit.results.convention import Convention
from patchkit.results.evaluation import CircuitRun, Overlap
from patchkit.results.formats import read_model, write_model

GENERALISATION = "generalisation.json"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PromptSet(_Frozen):
    """One set of prompt pairs: half of it to find a circuit on, half held out."""

    name: str
    pairs: int = Field(description="that edges were scored on")
    held_out: list[str] = Field(description="ids of the pairs that circuits were run on")
    clean: float = Field(description="metric of the held-out clean prompts")
    corrupt: float = Field(description="metric with every edge cut")
    accuracy: float = Field(description="share of clean prompts whose most likely next token is the answer")
    defined: bool = Field(
        description="whether clean and corrupt differ by more than chance; where not, a share says nothing"
    )


class CircuitRow(_Frozen):
    """One circuit on every set's held-out half."""

    circuit: str = Field(description="the set that it was found on, or 'all sets'")
    kind: Literal["set", "together"]
    runs: list[CircuitRun] = Field(description="one a set, in the order of `sets`")


class RandomRow(_Frozen):
    """Random circuits of as many edges on every set's held-out half."""

    count: int
    n_edges: int
    faithfulness: list[list[float | None]] = Field(description="[set][circuit]")


class SizeMatrix(_Frozen):
    """All circuits of one size."""

    requested: int
    rows: list[CircuitRow] = Field(description="a set each, in the order of `sets`, then all sets together")
    random: RandomRow | None = None
    overlaps: list[list[Overlap]] = Field(
        description="[row][row], by edge: of a circuit with the reference circuit"
    )
    node_overlaps: list[list[Overlap]] = Field(description="the same by node")


class Generalisation(_Frozen):
    """Everything that `patchkit generalise` found."""

    schema_version: int = 1
    model: str
    task: str = Field(description="that made the sets; empty for files")
    convention: Convention
    method: str
    absolute: bool
    sets: list[PromptSet]
    sizes: list[SizeMatrix]
    rank_correlations: list[list[float | None]] = Field(
        description="[set][set]: Spearman's, of all edges' mean |effect|"
    )
    findings: list[str] = Field(default_factory=list)
    notes: list[str] = Field(default_factory=list)
    cost: float = Field(description="forward-equivalents; 1 = one forward over every held-out prompt")
    command: str = ""
    seconds: float = 0.0

    def save(self, directory: Path | str) -> None:
        """Writes generalisation.json into `directory` by rename."""
        write_model(Path(directory) / GENERALISATION, self)

    @classmethod
    def load(cls, directory: Path | str) -> Generalisation:
        """Reads generalisation.json; InputError if it is missing or malformed."""
        return read_model(Path(directory) / GENERALISATION, cls)
