"""What the study of circuits returns: every method of scoring edges, beside exact patching, on one model and task.

`CircuitStudy` is saved as `circuits.json`; the models below are its schema.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from patchkit.results.convention import Convention
from patchkit.results.evaluation import CircuitRun, Curve, Overlap
from patchkit.results.formats import read_model, write_model

CIRCUITS = "circuits.json"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class MethodRow(_Frozen):
    """One method: the circuits that its scores give, how faithful they are, and what they share with the exact one."""

    method: str = Field(description="eap, eap-ig-inputs, exact, ...; 'random' for random scores")
    cost: float = Field(
        description="of the scores, in forward-equivalents; 1 = one forward over every base prompt"
    )
    runs: list[CircuitRun] = Field(description="one a size, ascending")
    curves: list[Curve] = Field(
        default_factory=list, description="signed and absolute selection, where both were run"
    )
    overlap: list[Overlap] = Field(
        default_factory=list,
        description="with the circuit that the exact effects give at each size; empty for exact itself",
    )
    rank_correlation: float | None = Field(
        default=None, description="Spearman's, of |effect| of all edges, with exact; None where undefined"
    )


class CircuitStudy(_Frozen):
    """Everything that `patchkit study circuits` found."""

    schema_version: int = 1
    question: str
    model: str
    task: str
    pairs: int
    convention: Convention
    exact_size: int = Field(
        description="edges asked for at which methods are compared in words and in the table"
    )
    methods: list[MethodRow]
    findings: list[str] = Field(default_factory=list)
    command: str = Field(description="the command that makes this again")
    seconds: float

    def save(self, directory: Path | str) -> None:
        """Writes circuits.json into `directory` by rename."""
        write_model(Path(directory) / CIRCUITS, self)

    @classmethod
    def load(cls, directory: Path | str) -> CircuitStudy:
        """Reads circuits.json; InputError if it is missing or malformed."""
        return read_model(Path(directory) / CIRCUITS, cls)
