"""The files that scores of edges are kept in, and what of them fits into graph files of the EAP-IG repository."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from patchkit.errors import InputError
from patchkit.model.edges import EdgeGraph
from patchkit.reading import parse_json
from patchkit.results._circuit_files import GraphSizes
from patchkit.results._scores_files import lists, matrix, read_ids, read_table, write_table
from patchkit.results.convention import Convention
from patchkit.results.formats import load_metadata, read_model, save_tensors

EDGES, TENSORS, PAIRS = "edges.json", "edges.safetensors", "pairs.parquet"
GRAPH_JSON, GRAPH_PT = "graph.json", "graph.pt"
#: The column of every pair's scores: a list of [places x] senders x receivers numbers.
PAIR_SCORES = "effect.edges"


class EdgeMethod(BaseModel):
    """How edges were scored."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(
        description="eap, eap-ig-inputs, eap-ig-activations, clean-corrupted, exact, acdc or ifr"
    )
    steps: int | None = Field(default=None, description="of the integral")
    rule: str | None = Field(default=None, description="of the integral: repo or midpoint")
    qk_fix: bool = False
    grad_drop: bool = False
    threshold: float | None = Field(default=None, description="ACDC's tau")
    order: str | None = Field(default=None, description="in which ACDC visits edges")
    absolute: bool = Field(default=False, description="ACDC compares the size of the change with tau")
    untried: int = Field(
        default=0, description="edges that ACDC's budget did not reach; they stay in its circuit"
    )

    @property
    def adds_heads(self) -> bool:
        """Whether signed scores by query head add up over heads that share a key or value: all that use a gradient."""
        return self.name in ("eap", "eap-ig-inputs", "eap-ig-activations", "clean-corrupted")

    @property
    def adds_positions(self) -> bool:
        """Whether signed scores add up over positions.

        Not where the path of the integral depends on which positions are cut, nor under the QK fix, where keys of two
        positions share one softmax.
        """
        return self.name in ("eap", "eap-ig-inputs", "clean-corrupted") and not self.qk_fix


class EdgeHeader(BaseModel):
    """`edges.json`: what the numbers are, and the graph they are laid out in."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int = 1
    method: EdgeMethod
    convention: Convention
    graph: GraphSizes
    places: list[str] = Field(min_length=1)
    placed: bool
    pairs: int = Field(ge=0)
    per_pair: bool = Field(description="whether pairs.parquet has the scores of every pair")
    by_query: bool = Field(description="whether scores by query head are there")
    requested: int | None = Field(
        default=None, ge=0, description="edges that the circuit in the scores was asked for"
    )
    cost: float = Field(ge=0)
    graph_files: list[str] = Field(description="which of graph.json and graph.pt were written")
    notes: list[str] = Field(default_factory=list, description="what those cannot say")


class PairColumns(NamedTuple):
    """The content of `pairs.parquet`."""

    ids: tuple[str, ...]
    base_metric: Float[Tensor, " pairs"]
    source_metric: Float[Tensor, " pairs"]
    scores: Tensor | None


def read_edge_header(path: Path) -> tuple[EdgeHeader, EdgeGraph]:
    """Reads `edges.json`. InputError names the file and the field, also where the sizes make no graph."""
    header = read_model(path, EdgeHeader)
    if not header.placed and len(header.places) > 1:
        raise InputError(
            f"{path}: places: expected one where edges have no position, found {len(header.places)}."
        )
    return header, header.graph.graph(path)


def save_edge_tensors(path: Path, graph: EdgeGraph, tensors: Mapping[str, Tensor]) -> None:
    """Writes matrices of edges, with the names of their rows and columns in the header."""
    names = {"senders": json.dumps(graph.senders), "receivers": json.dumps(graph.receivers)}
    save_tensors(path, tensors, names)


def check_edge_names(path: Path, graph: EdgeGraph) -> None:
    """Checks the names of rows and columns.

    Raises:
        InputError: they are missing, or are not those of the graph in its order.
    """
    metadata = load_metadata(path)
    for key, names in (("senders", graph.senders), ("receivers", graph.receivers)):
        try:
            found = parse_json(metadata.get(key, "null"))
        except ValueError:
            found = None
        if not isinstance(found, list):
            raise InputError(
                f"{path}: expected a JSON list of names in the header metadata '{key}', found none."
            )
        if found != list(names):
            same = (left == right for left, right in zip(found, names, strict=False))
            wrong = next((number for number, equal in enumerate(same) if not equal), len(names))
            raise InputError(
                f"{path}: {key} in the header metadata: expected the {len(names)} of {EDGES}, found {len(found)}, other "
                f"names from number {wrong} on."
            )


def read_edge_matrix(
    path: Path, tensors: Mapping[str, Tensor], name: str, graph: EdgeGraph, places: tuple[int, ...]
) -> Tensor:
    """A matrix of scores among the tensors of a file.

    Raises:
        InputError: it is not there, has another shape or type, a number where there is no edge, or an infinite one.
    """
    if name not in tensors:
        raise InputError(f"{path}: no tensor '{name}', found {', '.join(sorted(tensors)) or 'none'}.")
    values, shape = tensors[name], (*places, graph.n_senders, graph.n_receivers)
    if tuple(values.shape) != shape or values.dtype != torch.float32:
        raise InputError(
            f"{path}: tensor '{name}': expected float32 of shape {list(shape)} as {EDGES} says, found "
            f"{str(values.dtype).removeprefix('torch.')} of shape {list(values.shape)}."
        )
    if "_abs" in name and bool((values < 0).any()):
        raise InputError(
            f"{path}: tensor '{name}': expected means of |effect|, found {float(values.nan_to_num().min())}."
        )
    wrong = (values.isinf() | (~values.isnan() & ~graph.real)).nonzero()
    if len(wrong):
        *_, sender, receiver = wrong[0].tolist()
        edge = graph.edge_name(sender, receiver)
        what = (
            f"a finite score of edge {edge}"
            if graph.real[sender, receiver]
            else f"NaN at {edge}, which is no edge"
        )
        raise InputError(f"{path}: tensor '{name}': expected {what}, found {float(values[tuple(wrong[0])])}.")
    return values


def write_pair_columns(path: Path, columns: PairColumns) -> None:
    """Writes one row a pair, with its scores as one flat list where they were kept."""
    import pyarrow as pa

    table: dict[str, pa.Array | pa.ChunkedArray] = {
        "id": pa.array(columns.ids, pa.string()),
        "base_metric": pa.array(columns.base_metric.float().numpy()),
        "source_metric": pa.array(columns.source_metric.float().numpy()),
    }
    if columns.scores is not None:
        table[PAIR_SCORES] = lists(columns.scores.flatten(1))
    write_table(path, table)


def read_pair_columns(path: Path, header: EdgeHeader, graph: EdgeGraph) -> PairColumns:
    """Reads what `write_pair_columns` wrote.

    Raises:
        InputError: the file is missing or malformed, or does not fit `edges.json`.
    """
    table = read_table(path)
    if table.num_rows != header.pairs:
        raise InputError(
            f"{path}: expected {header.pairs} pairs as {EDGES} says, found {table.num_rows} rows."
        )
    wanted = ["id", "base_metric", "source_metric"] + [PAIR_SCORES] * header.per_pair
    missing = [name for name in wanted if name not in table.column_names]
    if missing:
        raise InputError(f"{path}: no column '{missing[0]}', found {', '.join(table.column_names)}.")
    shape = (graph.n_senders, graph.n_receivers)
    if header.placed:
        shape = (len(header.places), *shape)
    scores = None
    if header.per_pair:
        scores = matrix(path, table, PAIR_SCORES, torch.Size(shape).numel()).reshape(header.pairs, *shape)
    return PairColumns(
        read_ids(path, table),
        matrix(path, table, "base_metric", 1)[:, 0],
        matrix(path, table, "source_metric", 1)[:, 0],
        scores,
    )
