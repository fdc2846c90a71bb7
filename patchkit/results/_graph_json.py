"""Graph files of the EAP-IG repository as JSON: one object a node, one object an edge.

Its own writer fails on graphs whose nodes have scores, because it looks up one for the logits, which have none; its
reader takes such a file as long as the logits come without. Of columns (`neurons`) that reader gives every head of a
layer those of the last: they are written head by head all the same, and `.pt` is the file it reads them from.

JSON has no NaN. Python writes and reads it all the same, and the repository's reader takes nothing else for an edge
without a score; for other readers null can be written.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patchkit.errors import InputError
from patchkit.files import atomic_write
from patchkit.model.edges import EdgeGraph
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
from patchkit.results.formats import read_json, validated

_BOOLEANS = {True: "true", False: "false"}


def write_json_graph(path: Path, file: GraphFile, *, strict: bool) -> None:
    """Writes the file. Where an edge has no score: `NaN`, or with `strict` null."""
    unscored = "null" if strict else "NaN"
    parts = [f'{{"cfg": {json.dumps(write_sizes(file.graph))}, ']
    if file.origin is not None:
        parts.append(f'"{ORIGIN}": {file.origin.model_dump_json(exclude_none=True)}, ')
    parts += [
        '"nodes": {',
        ", ".join(_nodes(file, unscored)),
        '}, "edges": {',
        ", ".join(_edges(file, unscored)),
        "}}",
    ]
    atomic_write(path, "".join(parts))


def read_json_graph(path: Path) -> GraphFile:
    """Reads what the repository or `write_json_graph` wrote.

    An edge that is not named is not in the graph and has no score (the repository's reader gives it 0); neither has one
    without the key `score`, as in MIB's circuits.

    Raises:
        InputError: naming the file and what in it is malformed, missing or not of the graph.
    """
    data = read_json(path)
    if not isinstance(data, dict):
        raise InputError(f"{path}: expected an object with cfg, nodes and edges, found {shown(data)}.")
    for name in ("cfg", "nodes", "edges"):
        if not isinstance(data.get(name), dict):
            found = shown(data[name]) if name in data else listed(data)
            raise InputError(f"{path}: expected an object '{name}', found {found}.")
    graph = read_sizes(path, data["cfg"])
    names = data["nodes"].keys() - {"logits"}
    # Counted before anything of the size that cfg claims is made.
    if len(names) != graph.n_senders:
        raise InputError(
            f"{path}: nodes: expected {graph.n_senders} and the logits, as cfg says, found {len(names)}; cfg and nodes "
            "are not of one graph."
        )
    for name in graph.senders:
        if name not in names:
            raise InputError(f"{path}: nodes: no '{name}', found {listed(sorted(names))}.")
    nodes = [data["nodes"][name] for name in graph.senders]
    flags = [_flag(path, f"nodes.{name}", node) for name, node in zip(graph.senders, nodes, strict=True)]
    if "logits" in data["nodes"]:
        _flag(path, "nodes.logits", data["nodes"]["logits"])
    scores, in_graph = _read_edges(path, graph, data["edges"])
    missing = graph.n_edges - len(data["edges"])
    notes = (f"{missing} edges that the file does not name have no score",) if missing else ()
    origin = validated(path, Origin, data[ORIGIN]) if ORIGIN in data else None
    return make(
        path,
        graph,
        in_graph,
        torch.tensor(flags),
        scores=scores,
        notes=notes,
        origin=origin,
        **_read_columns(path, graph, nodes),
    )


# Writing.


def _nodes(file: GraphFile, unscored: str) -> Iterator[str]:
    """`"a0.h1": {"in_graph": true, ...}` of every node; what a node does not have is left out, as its reader wants it."""
    for sender, name in enumerate(file.graph.senders):
        parts = [f'"in_graph": {_BOOLEANS[bool(file.nodes[sender])]}']
        if file.node_scores is not None and not bool(file.node_scores[sender].isnan()):
            parts.append(f'"score": {float(file.node_scores[sender])!r}')
        if file.neurons is not None:
            parts.append(
                f'"neurons": [{", ".join(_BOOLEANS[flag] for flag in file.neurons[sender].tolist())}]'
            )
        if file.neuron_scores is not None and not bool(file.neuron_scores[sender].isnan().all()):
            parts.append(f'"neurons_scores": [{", ".join(_numbers(file.neuron_scores[sender], unscored))}]')
        yield f'"{name}": {{{", ".join(parts)}}}'
    yield '"logits": {"in_graph": true}'


def _edges(file: GraphFile, unscored: str) -> Iterator[str]:
    """All edges in the repository's order, the edges of one sender into one layer at a time."""
    graph = file.graph
    for senders, receivers in _blocks(graph):
        heads = [f"->{graph.receiver_name(receiver)}" + '": {"score": ' for receiver in receivers]
        for sender in senders:
            start = f'"{graph.sender_name(sender)}'
            scores = _numbers(file.scores[sender, receivers], unscored)
            ends = file.in_graph[sender, receivers].tolist()
            yield ", ".join(
                f'{start}{head}{score}, "in_graph": {_BOOLEANS[end]}}}'
                for head, score, end in zip(heads, scores, ends, strict=True)
            )


def _blocks(graph: EdgeGraph) -> Iterator[tuple[range, list[int]]]:
    """(senders, receivers) of the repository's loops: q, k and v of one head after those of another, then the MLP."""
    for layer in range(graph.n_layers):
        by_letter = [range(graph.n_receivers)[graph.receivers_of(layer, letter)] for letter in "qkv"]
        attention = list(chain.from_iterable(zip(*by_letter, strict=True)))
        mlp = [graph.mlp_receiver(layer)]
        before = range(int(graph.upstream[attention[0]]))
        if graph.parallel:
            yield before, attention + mlp
        else:
            yield before, attention
            yield range(int(graph.upstream[mlp[0]])), mlp
    yield range(graph.n_senders), [graph.logits]


def _numbers(values: Tensor, unscored: str) -> list[str]:
    return [repr(value) if value == value else unscored for value in values.tolist()]


# Reading.


def _read_edges(path: Path, graph: EdgeGraph, edges: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    senders = {name: number for number, name in enumerate(graph.senders)}
    receivers = {name: number for number, name in enumerate(graph.receivers)}
    upstream = graph.upstream.tolist()
    places: list[int] = []
    scores: list[float] = []
    flags: list[bool] = []
    for name, edge in edges.items():
        start, _, end = name.partition("->")
        sender, receiver = senders.get(start), receivers.get(end)
        if sender is None or receiver is None or sender >= upstream[receiver]:
            raise InputError(
                f"{path}: edges: there is no edge {shown(name)} in the graph that cfg describes."
            )
        flag, score = (edge.get("in_graph"), edge.get("score")) if isinstance(edge, dict) else (None, None)
        if type(flag) is not bool or type(score) is not float:
            # Whatever is not the usual case is looked at closely; 40 million edges of the usual case are not.
            flag, score = (
                _flag(path, f"edges.{name}", edge),
                _number(path, f"edges.{name}.score", edge.get("score")),
            )
        places.append(sender * graph.n_receivers + receiver)
        flags.append(flag)
        scores.append(score)
    matrix = torch.full((graph.n_senders * graph.n_receivers,), torch.nan)
    mask = torch.zeros(matrix.shape, dtype=torch.bool)
    matrix[places], mask[places] = _floats(scores), torch.tensor(flags, dtype=torch.bool)
    shape = (graph.n_senders, graph.n_receivers)
    return matrix.reshape(shape), mask.reshape(shape)


def _read_columns(path: Path, graph: EdgeGraph, nodes: list[dict[str, Any]]) -> dict[str, Tensor | None]:
    """`node_scores`, `neurons` and `neuron_scores`, each None where no node has any."""
    places = [f"nodes.{name}" for name in graph.senders]
    scores = [
        _number(path, f"{place}.score", node.get("score")) for place, node in zip(places, nodes, strict=True)
    ]
    flags = torch.zeros(graph.n_senders, graph.d_model, dtype=torch.bool)
    columns = torch.full((graph.n_senders, graph.d_model), torch.nan)
    for sender, (place, node) in enumerate(zip(places, nodes, strict=True)):
        for key, matrix in (("neurons", flags), ("neurons_scores", columns)):
            if key not in node:
                continue
            row, where = node[key], f"{place}.{key}"
            if not isinstance(row, list) or len(row) != graph.d_model:
                found = f"{len(row)} of them" if isinstance(row, list) else shown(row)
                raise InputError(
                    f"{path}: {where}: expected a list of {graph.d_model}, as cfg says, found {found}."
                )
            if key == "neurons":
                matrix[sender] = torch.tensor([_boolean_of(path, where, item) for item in row])
            else:
                matrix[sender] = _floats([_number(path, where, item) for item in row])
    there = {key: any(key in node for node in nodes) for key in ("score", "neurons", "neurons_scores")}
    return {
        "node_scores": _floats(scores) if there["score"] else None,
        "neurons": flags if there["neurons"] else None,
        "neuron_scores": columns if there["neurons_scores"] else None,
    }


def _flag(path: Path, where: str, item: Any) -> bool:
    if not isinstance(item, dict) or "in_graph" not in item:
        raise InputError(f"{path}: {where}: expected an object with in_graph, found {shown(item)}.")
    return _boolean_of(path, f"{where}.in_graph", item["in_graph"])


def _boolean_of(path: Path, where: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise InputError(f"{path}: {where}: expected true or false, found {shown(value)}.")
    return value


def _number(path: Path, where: str, value: Any) -> float:
    """NaN for null and for nothing at all."""
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InputError(f"{path}: {where}: expected a number, found {shown(value)}.")
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _floats(values: list[float]) -> Tensor:
    # By way of float64: what float32 cannot hold becomes infinite instead of an error of torch's.
    return torch.tensor(values, dtype=torch.float64).float()
