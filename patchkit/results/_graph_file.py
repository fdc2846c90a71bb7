"""What a graph file of the EAP-IG repository holds: scores and membership of edges by query head, maybe of nodes too.

Hanna et al. 2024 (arXiv 2403.17806). Its files come as JSON and as `.pt`; one class here stands for both.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from patchkit.errors import InputError
from patchkit.model.edges import EdgeGraph
from patchkit.results.circuit import Circuit
from patchkit.results.convention import Convention, importance_sign

#: The key under which a file says what its numbers are; the repository's own readers pass over it.
ORIGIN = "patchkit"


class Origin(BaseModel):
    """What the numbers of a file are that patchkit wrote."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    scores: Literal["effect", "importance", "membership"] = Field(
        description="effect: metric(source's value read) - metric(base); importance: higher = helps; membership: 1 "
        "in the circuit and 0 outside, which ranks nothing"
    )
    method: str = Field(description="how edges were scored, or 'given'")
    convention: Convention | None = Field(
        default=None, description="of effects, and of importances made from them"
    )
    shared: Literal["none", "scored", "unscored"] = Field(
        default="none",
        description="edges into keys and values that several query heads share: there are none; scored head by head; "
        "unscored, because only the heads' sum is known",
    )
    ranking: Literal["signed", "absolute"] | None = Field(
        default=None, description="how edges are, or were, ranked by these numbers, where that was said"
    )

    @model_validator(mode="after")
    def _effects_have_a_sign(self) -> Origin:
        if self.scores == "effect" and self.convention is None:
            raise ValueError("effects need their convention, found none")
        return self


@dataclass(frozen=True, eq=False)
class GraphFile:
    """The content of a graph file.

    Attributes:
        graph: by query head.
        scores: NaN where there is no edge, and where one has no score.
        in_graph: the circuit; all False in a file of scores alone.
        nodes: senders that are in the graph, as the file says; it need not follow from the edges.
        node_scores: NaN where a node has none.
        neurons: the columns of each sender's output that are in the graph.
        neuron_scores: of the same.
        origin: what patchkit says of a file it wrote; None for a foreign one.
        notes: what a reader should know of how the file was read.

    Raises:
        InputError: a tensor does not have the graph's shape, a score is infinite, or an edge in the graph does not exist.
    """

    graph: EdgeGraph
    scores: Float[Tensor, "senders receivers"]
    in_graph: Bool[Tensor, "senders receivers"]
    nodes: Bool[Tensor, " senders"]
    node_scores: Float[Tensor, " senders"] | None = None
    neurons: Bool[Tensor, "senders d_model"] | None = None
    neuron_scores: Float[Tensor, "senders d_model"] | None = None
    origin: Origin | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.graph.by_query_head:
            raise InputError(
                f"a graph file counts keys and values by query head: expected a graph with {self.graph.n_heads} of them "
                f"a layer, found {self.graph.n_kv_heads}"
            )
        edges = (self.graph.n_senders, self.graph.n_receivers)
        columns = (self.graph.n_senders, self.graph.d_model)
        for name, shape in {
            "scores": edges,
            "in_graph": edges,
            "nodes": edges[:1],
            "node_scores": edges[:1],
            "neurons": columns,
            "neuron_scores": columns,
        }.items():
            value = getattr(self, name)
            if value is None:
                continue
            if tuple(value.shape) != shape:
                raise InputError(f"{name}: expected shape {list(shape)}, found {list(value.shape)}")
            if value.dtype != torch.bool:
                value = value.detach().to("cpu", torch.float32)
                if name == "scores":
                    value = value.where(self.graph.real, torch.nan)
                if bool(value.isinf().any()):
                    raise InputError(
                        f"{name}: expected finite numbers, or NaN for no score, found an infinite one"
                    )
            object.__setattr__(self, name, value.detach().cpu())
        unreal = (self.in_graph & ~self.graph.real).nonzero()
        if len(unreal):
            name = self.graph.edge_name(*unreal[0].tolist())
            raise InputError(
                f"in_graph: there is no edge {name}, found it marked ({len(unreal)} such places)"
            )

    @property
    def circuit(self) -> Circuit | None:
        """The edges that are in the graph; None in a file of scores alone, in which none is."""
        return Circuit(self.graph, self.in_graph) if bool(self.in_graph.any()) else None

    @property
    def importance(self) -> Float[Tensor, "senders receivers"] | None:
        """Scores with the sign turned so that higher = helps; None where there is nothing to rank edges by.

        A foreign file's scores are importances as they are: the repository is given a loss, whose score of a helping edge
        is positive.
        """
        scored = self.scores[~self.scores.isnan()]
        if (self.origin is not None and self.origin.scores == "membership") or not bool((scored != 0).any()):
            return None
        if self.origin is None or self.origin.convention is None or self.origin.scores == "importance":
            return self.scores
        convention = self.origin.convention
        return importance_sign(self.origin.method, convention.direction, convention.metric) * self.scores

    @classmethod
    def of_circuit(cls, circuit: Circuit, method: str = "given") -> GraphFile:
        """The file of a circuit without scores: membership stands in their place, 1 and 0."""
        wide = circuit.by_query_head()
        return cls(
            wide.graph,
            wide.edges.float(),
            wide.edges,
            nodes_between(wide.graph, wide.edges),
            origin=Origin(scores="membership", method=method),
        )


def nodes_between(graph: EdgeGraph, edges: Bool[Tensor, "senders receivers"]) -> Bool[Tensor, " senders"]:
    """Senders with an edge in and an edge out, the input without one in: what the repository calls nodes in a graph."""
    inward = (graph.owner & edges.any(0)).any(1)
    inward[0] = True
    return inward & edges.any(1)


def read_sizes(path: Path, cfg: Any) -> EdgeGraph:
    """The graph of a file's `cfg`; other keys in it are passed over.

    Raises:
        InputError: a size is missing or is none.
    """
    if not isinstance(cfg, Mapping):
        raise InputError(
            f"{path}: cfg: expected n_layers, n_heads, parallel_attn_mlp and d_model, found {shown(cfg)}."
        )
    for name in ("n_layers", "n_heads", "d_model", "parallel_attn_mlp"):
        if name not in cfg:
            raise InputError(f"{path}: cfg: no '{name}', found {listed(cfg)}.")
        value = cfg[name]
        if name == "parallel_attn_mlp":
            if not isinstance(value, bool):
                raise InputError(f"{path}: cfg.{name}: expected true or false, found {shown(value)}.")
        elif isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"{path}: cfg.{name}: expected a whole number from 1, found {shown(value)}.")
    heads = cfg["n_heads"]
    return EdgeGraph(cfg["n_layers"], heads, heads, cfg["parallel_attn_mlp"], cfg["d_model"])


def write_sizes(graph: EdgeGraph) -> dict[str, int | bool]:
    """The `cfg` of a file."""
    return {
        "n_layers": graph.n_layers,
        "n_heads": graph.n_heads,
        "parallel_attn_mlp": graph.parallel,
        "d_model": graph.d_model,
    }


def make(path: Path, graph: EdgeGraph, in_graph: Tensor, nodes: Tensor, **rest: Any) -> GraphFile:
    """A `GraphFile` of what was read from `path`; InputError names the file.

    The repository's selections of nodes and neurons mark whole rows of the matrix, edges or not. Such marks are left out
    and noted; marks in the row of a node that is not in the graph come from nowhere and are refused.
    """
    notes = rest.pop("notes", ())
    unreal = in_graph & ~graph.real
    if bool(unreal.any()) and not bool((unreal & ~nodes[:, None]).any()):
        in_graph = in_graph & graph.real
        notes += (
            f"{int(unreal.sum())} marks where there is no edge, as a selection of nodes makes them, were left out",
        )
    try:
        return GraphFile(graph, in_graph=in_graph, nodes=nodes, notes=notes, **rest)
    except InputError as error:
        raise InputError(f"{path}: {error}.") from error


def shown(value: Any) -> str:
    """A value in a message, in one short line."""
    if isinstance(value, Tensor):
        # A nested tensor has no shape, and says so by an error.
        return "a nested tensor" if value.is_nested else f"a tensor of shape {list(value.shape)}"
    text = repr(value)
    text = " ".join(text.split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def listed(names: Iterable[Any]) -> str:
    """Names in a message, as many as a line takes."""
    text = " ".join(", ".join(map(str, names)).split()) or "nothing"
    return text if len(text) <= 100 else f"{text[:97]}..."
