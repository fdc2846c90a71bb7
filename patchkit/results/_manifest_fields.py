"""The fields of manifest.json."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelRef(_Frozen):
    """Which model a run used; of several, what is said of each is joined by commas."""

    id: str = Field(description="embedded name, directory or hub name, as given")
    revision: str | None = Field(default=None, description="hub commit, when the model came from the hub")
    fingerprint: str = Field(description="hash of the weights' metadata: names, shapes, dtypes, sizes")
    content: str | None = Field(
        default=None, description="hash of that and of a sample of every weight's values"
    )


class InputFile(_Frozen):
    """A file that the command read, so that a rerun can tell whether it is still the same."""

    path: str = Field(description="absolute")
    sha256: str


class Failure(_Frozen):
    """One pair that gave no number, and why."""

    id: str
    reason: str


class PairCounts(_Frozen):
    """How many pairs (or triples) there were, how many gave numbers, and what became of the others."""

    total: int = Field(ge=0)
    used: int = Field(ge=0)
    failures: list[Failure] = Field(default_factory=list)


class HostedModel(_Frozen):
    """A model that stayed on its host."""

    host: str = Field(description="URL of the NDIF server")
    key: str = Field(description="by which the host knows the model")
    facts: dict[str, Any] = Field(description="what the host said of it: dtype, attention, device, versions")


class Traffic(_Frozen):
    """What went to hosts and came back, summed over the times that the run was resumed."""

    requests: int = Field(ge=0)
    jobs: int = Field(ge=0)
    sent: int = Field(ge=0, description="bytes of jobs")
    received: int = Field(ge=0, description="bytes of results")


class Manifest(_Frozen):
    """manifest.json: everything that is needed to read a run's numbers, and to get them again."""

    schema_version: int = 1
    command: str = Field(description="name of the command, e.g. mask")
    options: dict[str, Any] = Field(description="every option with its value, defaults included")
    inputs: dict[str, InputFile] = Field(default_factory=dict, description="option -> the file it named")
    directory: str = Field(description="working directory, against which relative paths in options are read")
    started: str = Field(description="UTC, ISO 8601")
    status: Literal["running", "done", "interrupted", "failed"] = "running"
    error: str | None = Field(default=None, description="why it failed")
    versions: dict[str, str]
    model: ModelRef | None = None
    hosted: list[HostedModel] = Field(default_factory=list, description="with --backend ndif")
    traffic: Traffic | None = Field(default=None, description="with --backend ndif")
    seed: int | None = None
    metric: str | None = None
    direction: Literal["denoise", "noise"] | None = None
    sign: str = Field(
        default="effect = metric(base run with the source's activation put in) - metric(base run)",
        description="what a positive number means",
    )
    ablation: str | None = None
    axes: dict[str, list[str]] = Field(default_factory=dict, description="tensor -> names of its axes")
    base_metric: float | None = Field(default=None, description="mean over pairs")
    source_metric: float | None = Field(default=None, description="mean over pairs")
    cost: float | None = Field(default=None, description="paid, in forward-equivalents of the base batch")
    seconds: float = Field(default=0.0, ge=0, description="wall time, summed over the times it was resumed")
    pairs: PairCounts | None = None

    @property
    def complete(self) -> bool:
        """Whether there is nothing left to do: pairs that failed may be tried again."""
        return self.status == "done" and not (self.pairs is not None and self.pairs.failures)
