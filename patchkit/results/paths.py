"""What path patching found: effects of senders along paths to receivers, and circuits found stage by stage."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from patchkit.errors import InputError
from patchkit.model.edges import EdgeGraph
from patchkit.results.circuit import Circuit
from patchkit.results.convention import Convention
from patchkit.results.formats import read_model, write_model

PATHS = "paths.json"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PathEffect(_Frozen):
    """One sender, patched along its paths to the receivers of its stage."""

    sender: str
    effect: float = Field(description="mean over pairs: metric(patched) - metric(base)")
    effect_abs: float = Field(description="mean over pairs of |effect|")
    share: float | None = Field(
        description="effect / (base metric - source metric): -1 breaks all of the behaviour"
    )
    interval: tuple[float, float] | None = Field(default=None, description="95 % bootstrap of the mean")
    per_pair: list[float]


class Stage(_Frozen):
    """One receiver set and every sender upstream of it."""

    name: str = Field(
        description="what the group found here is called, e.g. 'stage 1' or a name the user gave"
    )
    receivers: list[str]
    effects: list[PathEffect] = Field(description="by sender number")
    chosen: list[str] = Field(description="senders that become the next stage's group; empty for a plain run")


class PathResult(_Frozen):
    """Everything `patchkit paths` found; stages run from the logits backwards."""

    schema_version: int = 1
    convention: Convention
    model: str
    mlps: Literal["recomputed", "frozen"]
    positions: str = Field(description="tokens at which senders are patched")
    pair_ids: list[str]
    base_metric: float
    source_metric: float
    iterative: bool
    stages: list[Stage]
    cost: float = Field(description="forward-equivalents; 1 = one forward over every base prompt")
    notes: list[str] = Field(default_factory=list)

    def edges(self) -> list[tuple[str, str]]:
        """(sender, receiver) of every path that was chosen."""
        return [
            (sender, receiver)
            for stage in self.stages
            for sender in stage.chosen
            for receiver in stage.receivers
        ]

    def save(self, directory: Path | str) -> None:
        """Writes paths.json by rename."""
        write_model(Path(directory) / PATHS, self)

    @classmethod
    def load(cls, directory: Path | str) -> PathResult:
        """Reads paths.json; InputError if it is missing or malformed."""
        return read_model(Path(directory) / PATHS, cls)


def as_circuit(result: PathResult, graph: EdgeGraph) -> Circuit:
    """The edges of a staged result: from every sender chosen in a stage to those of the stage's receivers that it is
    upstream of, and nothing else.

    A path through recomputed MLPs is here the one edge between its ends; the MLPs on the way are not added.

    Args:
        graph: native, of the model that the paths are of.

    Raises:
        InputError: nothing was chosen, as in a plain run, or a node is not the graph's.
    """
    pairs = [(graph.find_sender(start), graph.find_receiver(end)) for start, end in result.edges()]
    if not pairs:
        raise InputError(
            "no stage of this result has chosen a sender, so it has no circuit; iterative path patching chooses"
        )
    edges = graph.real.new_zeros(graph.real.shape)
    for sender, receiver in pairs:
        edges[sender, receiver] = graph.real[sender, receiver]
    return Circuit(graph, edges)
