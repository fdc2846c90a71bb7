"""The files a circuit is kept in: names of its edges as JSON, or a mask beside it where there are many."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from patchkit.errors import InputError
from patchkit.files import remove
from patchkit.model.edges import EdgeGraph
from patchkit.results.formats import load_tensors, read_model, save_tensors, write_model

CIRCUIT, MASK = "circuit.json", "circuit.safetensors"
# Beyond these nobody reads the names.
_NAMED = 20_000
# Places of a matrix of edges: 25 times those of a model of 70 billion parameters.
_LARGEST = 1 << 31


class GraphSizes(BaseModel):
    """The sizes a graph of edges follows from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    n_layers: int = Field(ge=1)
    n_heads: int = Field(ge=1)
    n_kv_heads: int = Field(ge=1)
    parallel: bool
    d_model: int = Field(ge=1)

    @classmethod
    def of(cls, graph: EdgeGraph) -> GraphSizes:
        return cls(**asdict(graph))

    def graph(self, path: Path) -> EdgeGraph:
        """The graph.

        Raises:
            InputError: naming the file, where the sizes are those of no model.
        """
        if self.n_heads % self.n_kv_heads:
            raise InputError(
                f"{path}: graph: expected n_heads to be a multiple of n_kv_heads, found {self.n_heads} and "
                f"{self.n_kv_heads}."
            )
        graph = EdgeGraph(**dict(self))
        # Everything that is built from here on is of that size, whatever the file holds.
        if graph.n_senders * graph.n_receivers > _LARGEST:
            raise InputError(
                f"{path}: graph: expected the sizes of a model, found {self.n_layers} layers of {self.n_heads} heads."
            )
        return graph


class CircuitHeader(BaseModel):
    """`circuit.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int = 1
    graph: GraphSizes
    requested: int | None = Field(default=None, ge=0, description="edges asked for before pruning")
    n_edges: int = Field(ge=0)
    edges: list[str] | None = Field(description="names; None where they are the mask of circuit.safetensors")


def save_circuit(directory: Path, graph: EdgeGraph, edges: Tensor, requested: int | None) -> None:
    """Writes the files of a circuit; `circuit.json` comes last, so a directory that has it is complete."""
    count = int(edges.sum())
    names = None
    if count <= _NAMED:
        names = [graph.edge_name(*edge) for edge in edges.nonzero().tolist()]
        remove(directory / MASK)
    else:
        save_tensors(directory / MASK, {"in_circuit": edges})
    header = CircuitHeader(graph=GraphSizes.of(graph), requested=requested, n_edges=count, edges=names)
    write_model(directory / CIRCUIT, header)


def load_circuit(directory: Path) -> tuple[EdgeGraph, Tensor, int | None]:
    """Reads what `save_circuit` wrote: (graph, mask, edges asked for).

    Raises:
        InputError: a file is missing or malformed, or they contradict each other.
    """
    path = directory / CIRCUIT
    header = read_model(path, CircuitHeader)
    graph = header.graph.graph(path)
    try:
        if header.edges is None:
            edges = read_mask(directory / MASK, load_tensors(directory / MASK), "in_circuit", graph)
        else:
            edges = graph.find_edges(header.edges)
    except InputError as error:
        # A name that is none of the graph's is refused by the graph, which does not know the file.
        raise error if str(directory) in str(error) else InputError(f"{path}: {error}") from error
    if int(edges.sum()) != header.n_edges:
        raise InputError(
            f"{path}: n_edges: expected {int(edges.sum())}, as many as are named, found {header.n_edges}."
        )
    return graph, edges, header.requested


def read_mask(path: Path, tensors: Mapping[str, Tensor], name: str, graph: EdgeGraph) -> Tensor:
    """A mask of edges among the tensors of a file.

    Raises:
        InputError: it is not there, not a mask of this graph, or marks an edge that the graph does not have.
    """
    if name not in tensors:
        raise InputError(f"{path}: no tensor '{name}', found {', '.join(sorted(tensors)) or 'none'}.")
    mask, shape = tensors[name], (graph.n_senders, graph.n_receivers)
    if mask.dtype != torch.bool or tuple(mask.shape) != shape:
        raise InputError(
            f"{path}: tensor '{name}': expected booleans of shape {list(shape)} (senders, receivers), found "
            f"{mask.dtype} of shape {list(mask.shape)}."
        )
    unreal = mask & ~graph.real
    if bool(unreal.any()):
        sender, receiver = unreal.nonzero()[0].tolist()
        raise InputError(f"{path}: tensor '{name}': there is no edge {graph.edge_name(sender, receiver)}.")
    return mask
