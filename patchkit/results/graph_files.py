"""Reading and writing the graph files of the EAP-IG repository, without it and without transformer_lens.

Which edges (and nodes, and columns of their outputs) are in a circuit, and what scores them; keys and values are counted
by query head. `.pt` holds tensors and plain containers and is read as nothing else.
"""

from __future__ import annotations

from pathlib import Path

from patchkit.errors import InputError
from patchkit.results._graph_file import GraphFile as GraphFile
from patchkit.results._graph_file import Origin as Origin
from patchkit.results._graph_file import nodes_between as nodes_between
from patchkit.results._graph_json import read_json_graph, write_json_graph
from patchkit.results._graph_pt import read_pt_graph, write_pt_graph

SUFFIXES = (".json", ".pt")


def read_graph(path: Path | str) -> GraphFile:
    """Reads a graph file, `.json` or `.pt` by its name.

    Raises:
        InputError: in one line, naming the file, what was expected and what was found.
    """
    path = Path(path)
    _check_suffix(path)
    return read_json_graph(path) if path.suffix == ".json" else read_pt_graph(path)


def write_graph(path: Path | str, file: GraphFile) -> None:
    """Writes a graph file, `.json` or `.pt` by its name, whole or not at all.

    Raises:
        InputError: for another name.
        RunError: it cannot be written.
    """
    path = Path(path)
    _check_suffix(path)
    if path.suffix == ".json":
        write_graph_json(path, file)
    else:
        write_graph_pt(path, file)


def write_graph_json(path: Path | str, file: GraphFile, *, strict: bool = False) -> None:
    """Writes a graph as JSON, which the repository's `Graph.from_json` reads.

    Where an edge has no score the file says `NaN`, which Python's JSON reads and the standard does not know; `strict`
    writes null there, which every reader knows except the repository's. A file in which all edges have scores is the same
    either way.
    """
    write_json_graph(Path(path), file, strict=strict)


def write_graph_pt(path: Path | str, file: GraphFile) -> None:
    """Writes a graph as `.pt`, which the repository's `Graph.from_pt` reads. NaN: no score; 0 where there is no edge."""
    write_pt_graph(Path(path), file)


def _check_suffix(path: Path) -> None:
    if path.suffix not in SUFFIXES:
        raise InputError(f"{path}: expected a graph file, {' or '.join(SUFFIXES)}, found '{path.suffix}'.")
