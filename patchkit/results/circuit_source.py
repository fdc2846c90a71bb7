"""What `--circuit` may name: a directory of a run, a saved circuit, a graph file of the EAP-IG repository, or names."""

from __future__ import annotations

from codecs import BOM_UTF8
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from patchkit.errors import InputError
from patchkit.model.dims import Dims
from patchkit.model.edges import EdgeGraph
from patchkit.reading import exists, is_directory, names_in, read_bytes, read_text
from patchkit.results._circuit_files import CIRCUIT
from patchkit.results._edge_files import EDGES
from patchkit.results.circuit import Circuit
from patchkit.results.convention import Convention, importance_sign
from patchkit.results.edge_scores import EdgeMethod, EdgeScores
from patchkit.results.formats import read_json
from patchkit.results.graph_files import SUFFIXES, GraphFile, read_graph
from patchkit.results.query_heads import sum_groups

#: What stands in the place of a method, a metric and an ablation that a foreign file does not name.
UNKNOWN = "unknown"


@dataclass(frozen=True, eq=False)
class CircuitSource:
    """What was read.

    Attributes:
        source: a circuit alone; or scores to select edges from, with the circuit that was in the file, if one was.
        notes: how it was read, where that is not self-evident.
    """

    source: EdgeScores | Circuit
    notes: tuple[str, ...] = ()


def read_circuit(path: Path | str, dims: Dims) -> CircuitSource:
    """Reads a circuit, or scores to select one from, for a model of these sizes.

    - A directory of `patchkit edges` (it has `edges.json`), or of `Circuit.save` (`circuit.json`).
    - `.json` or `.pt` as the EAP-IG repository has them. Scores of a file that patchkit did not write are taken for
      importances, positive = helps, since the repository is given a loss. They are by query head, and stay so with
      grouped KV heads unless they are known to add up and no group's heads differ in the circuit.
    - A JSON list of edge names, or any other file as text with one name a line, `#` before a comment; keys and values
      are numbered by KV head.

    Raises:
        InputError: it is none of these, is malformed, is of another model, or has scores of single positions.
    """
    path = Path(path)
    native = EdgeGraph.of(dims)
    if is_directory(path):
        return CircuitSource(_of_directory(path, native))
    if path.name == CIRCUIT:
        return CircuitSource(_checked(path, Circuit.load(path.parent), native))
    if path.suffix in SUFFIXES:
        # The first letter tells a list of names from a graph, which may take a minute to parse.
        if path.suffix == ".json" and read_bytes(path).removeprefix(BOM_UTF8).lstrip()[:1] == b"[":
            return CircuitSource(_of_list(path, native))
        return _of_graph_file(path, read_graph(path), native)
    return CircuitSource(_of_text(path, native))


def _of_directory(path: Path, native: EdgeGraph) -> EdgeScores | Circuit:
    if exists(path / EDGES):
        return _checked(path, EdgeScores.load(path), native)
    if exists(path / CIRCUIT):
        return _checked(path, Circuit.load(path), native)
    present = ", ".join(names_in(path)[:8]) or "nothing"
    raise InputError(
        f"{path}: expected the finished run of a command that scores edges ({EDGES}) or a saved circuit ({CIRCUIT}), "
        f"found {present}. Of a folder with graph files name one of them"
    )


def _checked(path: Path, source: EdgeScores | Circuit, native: EdgeGraph) -> EdgeScores | Circuit:
    _check_graph(path, source.graph, native)
    if isinstance(source, EdgeScores) and source.placed:
        raise InputError(
            f"{path}: expected one score an edge, found one a position ({', '.join(source.places[:3])}, ...): edges of a "
            "circuit have no positions. Score the edges again with --positions all"
        )
    return source


def _check_graph(path: Path, found: EdgeGraph, native: EdgeGraph) -> None:
    names = ("n_layers", "n_heads", "parallel", "d_model")
    differing = [name for name in names if getattr(found, name) != getattr(native, name)]
    if found.n_kv_heads not in (native.n_kv_heads, native.n_heads):
        differing.append("n_kv_heads")
    if differing:
        shown = "; ".join(
            f"{name} {getattr(native, name)}, found {getattr(found, name)}" for name in differing
        )
        raise InputError(f"{path}: not of this model: expected {shown}")


def _of_graph_file(path: Path, file: GraphFile, native: EdgeGraph) -> CircuitSource:
    _check_graph(path, file.graph, native)
    circuit, importance = file.circuit, file.importance
    if circuit is None and importance is None:
        raise InputError(
            f"{path}: expected a circuit or scores, found no edge that is in the graph or has a score but 0"
        )
    notes = list(file.notes)
    even = circuit is None or _is_even(circuit, native)
    if not even:
        notes.append("heads of a group differ in the circuit, so it is kept by query head")
    if importance is None:
        assert circuit is not None
        return CircuitSource(circuit.by_kv_head(native.n_kv_heads) if even else circuit, tuple(notes))
    if file.origin is None:
        notes.append("scores are taken as they are for importances: positive = the edge helps")
    elif file.origin.shared == "unscored":
        notes.append(
            "edges into keys and values that heads share have no score in this file; the run's directory has them "
            f"({EDGES})"
        )
    method = EdgeMethod(name=UNKNOWN if file.origin is None else file.origin.method)
    graph = file.graph
    if native != graph and even and method.adds_heads:
        graph, importance = native, sum_groups(native, importance)
        if file.origin is not None and file.origin.shared == "scored":
            notes.append(
                "scores of heads that share a key or value are summed, which is exact for this method"
            )
    elif native != graph:
        notes.append("scores are by query head and stay so: those of a group's heads need not add up")
    if circuit is not None and graph == native:
        circuit = circuit.by_kv_head(native.n_kv_heads)
    convention = _convention(file)
    effect = importance_sign(method.name, convention.direction, convention.metric) * importance
    scores = EdgeScores(
        graph=graph,
        method=method,
        convention=convention,
        pair_ids=(),
        mean=effect,
        # Of a mean alone, that of sizes is not known; this is the least it can be.
        mean_abs=effect.abs(),
        base_metric=torch.empty(0),
        source_metric=torch.empty(0),
        cost=0.0,
        circuit=circuit,
    )
    return CircuitSource(scores, tuple(notes))


def _convention(file: GraphFile) -> Convention:
    if file.origin is not None and file.origin.convention is not None:
        return file.origin.convention
    return Convention(metric=UNKNOWN, direction="noise", ablation=UNKNOWN, positions="all", patching="edge")


def _is_even(circuit: Circuit, native: EdgeGraph) -> bool:
    """Whether the heads of every group agree."""
    try:
        circuit.by_kv_head(native.n_kv_heads)
    except InputError:
        return False
    return True


def _of_list(path: Path, native: EdgeGraph) -> Circuit:
    names = read_json(path)
    return _of_names({f"item {number}": name for number, name in enumerate(names, start=1)}, path, native)


def _of_text(path: Path, native: EdgeGraph) -> Circuit:
    text = read_text(path, "names of edges, one a line")
    lines = {
        f"line {number}": line.partition("#")[0].strip()
        for number, line in enumerate(text.splitlines(), start=1)
    }
    return _of_names({where: name for where, name in lines.items() if name}, path, native)


def _of_names(names: Mapping[str, Any], path: Path, native: EdgeGraph) -> Circuit:
    if not names:
        raise InputError(f"{path}: expected names of edges, such as a0.h1->a2.h3<q>, found none.")
    for where, name in names.items():
        if not isinstance(name, str):
            raise InputError(f"{path}, {where}: expected the name of an edge, found {name!r:.60}.")
        try:
            native.find_edge(name)
        except InputError as error:
            raise InputError(f"{path}, {where}: {' '.join(str(error).split())}") from error
    return Circuit.of_names(native, names.values())
