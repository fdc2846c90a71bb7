"""Graph files of the EAP-IG repository as `.pt`: matrices of all edges, in a dict of tensors and plain containers."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patchkit.errors import InputError
from patchkit.files import atomic_write
from patchkit.reading import read_bytes
from patchkit.results._graph_file import (
    ORIGIN,
    GraphFile,
    Origin,
    listed,
    make,
    read_sizes,
    shown,
    write_sizes,
)
from patchkit.results.formats import validated


def write_pt_graph(path: Path, file: GraphFile) -> None:
    """Writes the file: NaN where an edge has no score, 0 where there is no edge, as the repository does."""
    content: dict[str, Any] = {
        "cfg": write_sizes(file.graph),
        "src_nodes": list(file.graph.senders),
        "dst_nodes": list(file.graph.receivers),
        "edges_scores": file.scores.where(file.graph.real, 0.0),
        "edges_in_graph": file.in_graph,
        "nodes_in_graph": file.nodes,
        "nodes_scores": file.node_scores,
        "neurons_in_graph": file.neurons,
        "neurons_scores": file.neuron_scores,
    }
    kept = {name: value for name, value in content.items() if value is not None}
    if file.origin is not None:
        kept[ORIGIN] = file.origin.model_dump(mode="json", exclude_none=True)
    # A view would be saved with all that it is a view of.
    kept = {name: value.clone() if isinstance(value, Tensor) else value for name, value in kept.items()}
    buffer = io.BytesIO()
    torch.save(kept, buffer)
    atomic_write(path, buffer.getvalue())


def read_pt_graph(path: Path) -> GraphFile:
    """Reads what the repository or `write_pt_graph` wrote, running none of its code.

    Raises:
        InputError: naming the file and what in it is malformed, missing or not of the graph.
    """
    content = _load(path)
    required = ("cfg", "src_nodes", "dst_nodes", "edges_scores", "edges_in_graph", "nodes_in_graph")
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a dict with {', '.join(required)}, found {shown(content)}.")
    for name in required:
        if content.get(name) is None:
            raise InputError(f"{path}: no '{name}', found {listed(content)}.")
    graph = read_sizes(path, content["cfg"])
    for name, count in (("src_nodes", graph.n_senders), ("dst_nodes", graph.n_receivers)):
        names = content[name]
        # Counted before anything of the size that cfg claims is made.
        if not isinstance(names, (list, tuple)) or len(names) != count:
            found = f"{len(names)}" if isinstance(names, (list, tuple)) else shown(names)
            raise InputError(f"{path}: {name}: expected {count} names, as cfg says, found {found}.")
    for name, expected in (("src_nodes", graph.senders), ("dst_nodes", graph.receivers)):
        for found, right in zip(content[name], expected, strict=True):
            if found != right:
                raise InputError(f"{path}: {name}: expected '{right}', as cfg says, found {shown(found)}.")
    edges = (graph.n_senders, graph.n_receivers)
    columns = (graph.n_senders, graph.d_model)
    nodes = _mask(path, content, "nodes_in_graph", edges[:1])
    in_graph = _mask(path, content, "edges_in_graph", edges)
    assert nodes is not None and in_graph is not None
    return make(
        path,
        graph,
        in_graph,
        nodes,
        scores=_scores(path, content, "edges_scores", edges),
        node_scores=_scores(path, content, "nodes_scores", edges[:1]),
        neurons=_mask(path, content, "neurons_in_graph", columns),
        neuron_scores=_scores(path, content, "neurons_scores", columns),
        origin=validated(path, Origin, content[ORIGIN]) if ORIGIN in content else None,
    )


def _load(path: Path) -> Any:
    payload = read_bytes(path)
    try:
        # Of files in older layouts torch warns before it refuses them.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except Exception as error:  # What a damaged archive makes torch raise is not to be listed.
        reason = " ".join(str(error).split("\n")[0].split())[:120]
        raise InputError(
            f"{path}: expected tensors and plain containers saved by torch, found something else "
            f"({type(error).__name__}: {reason}). Write it again."
        ) from error


def _tensor(path: Path, content: dict[str, Any], name: str, shape: tuple[int, ...]) -> Tensor | None:
    value = content.get(name)
    if value is None:
        return None
    plain = isinstance(value, Tensor) and value.layout == torch.strided and not value.is_nested
    if not plain or value.is_meta or value.is_quantized:
        raise InputError(f"{path}: {name}: expected a tensor of shape {list(shape)}, found {shown(value)}.")
    if tuple(value.shape) != shape:
        raise InputError(
            f"{path}: {name}: expected shape {list(shape)}, as cfg says, found {list(value.shape)}."
        )
    return value.detach()


def _scores(path: Path, content: dict[str, Any], name: str, shape: tuple[int, ...]) -> Tensor | None:
    value = _tensor(path, content, name, shape)
    if value is not None and not value.is_floating_point():
        raise InputError(f"{path}: {name}: expected floating-point numbers, found {value.dtype}.")
    return None if value is None else value.float()


def _mask(path: Path, content: dict[str, Any], name: str, shape: tuple[int, ...]) -> Tensor | None:
    value = _tensor(path, content, name, shape)
    if value is not None and value.dtype != torch.bool:
        raise InputError(f"{path}: {name}: expected booleans, found {value.dtype}.")
    return value
