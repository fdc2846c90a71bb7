"""Submissions to MIB's circuit track (Mueller et al. 2025, arXiv 2504.13151): a folder a task and model.

A folder `<task>_<model>` holds either one file of importances of edges or nine circuits, of at most 0.1, 0.2, 0.5, 1, 2,
5, 10, 20 and 50 % of the edges, in the EAP-IG repository's formats and counted in its graph, which is by query head. MIB
takes positive scores for edges that help, so importances are written and never effects. Nothing else in the folder may
end in `.json` or `.pt`: what the numbers are is said in the files themselves and in README.md.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from patchkit.errors import InputError
from patchkit.files import atomic_write
from patchkit.model.edges import EdgeGraph
from patchkit.reading import is_directory, names_in
from patchkit.results.circuit import SELECTIONS, Circuit
from patchkit.results.curves import FRACTIONS
from patchkit.results.edge_scores import EdgeScores
from patchkit.results.graph_files import SUFFIXES, GraphFile, Origin, read_graph, write_graph

#: Shares of all edges that the circuits may have at most.
LIMITS = FRACTIONS[:-1]
#: Names that the leaderboard knows; a folder for anything else is of use at home only.
TASKS = ("ioi", "mcqa", "arithmetic-addition", "arithmetic-subtraction", "arc-easy", "arc-challenge")
MODELS = ("interpbench", "gpt2", "qwen2.5", "gemma2", "llama3")
README = "README.md"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]*")


@dataclass(frozen=True, eq=False)
class MibFolder:
    """What a folder holds.

    Attributes:
        importances: the one file, or None.
        circuits: the nine, by size; empty where there are importances.
    """

    task: str
    model: str
    importances: GraphFile | None
    circuits: tuple[GraphFile, ...] = ()


def limits_of(graph: EdgeGraph) -> list[int]:
    """How many edges each of the nine circuits may have at most, in the graph by query head."""
    # The product of a share and a count may come out just below a whole number.
    return [math.floor(limit * graph.n_edges + 1e-6) for limit in LIMITS]


def write_importances(
    root: Path | str,
    task: str,
    model: str,
    scores: EdgeScores,
    *,
    ranking: Literal["signed", "absolute"] = "signed",
    suffix: Literal[".pt", ".json"] = ".pt",
) -> Path:
    """Writes `<root>/<task>_<model>/importances.pt` and returns the folder.

    Args:
        ranking: how edges are meant to be ranked by them; the numbers are signed either way.

    Raises:
        InputError: a name that is none, positions, or edges without a score: MIB would rank these first.
    """
    folder = _folder(root, task, model)
    file = scores.to_graph_file()
    unscored = file.scores.isnan() & file.graph.real
    if bool(unscored.any()):
        edge = file.graph.edge_name(*unscored.nonzero()[0].tolist())
        raise InputError(
            f"{folder}: importances are of all edges; edge {edge} has no score ({int(unscored.sum())} edges have none). "
            "With grouped KV heads score the edges by query head too, or submit circuits"
        )
    importance = file.importance
    if importance is None or file.origin is None:
        raise InputError(f"{folder}: every score is 0, which ranks nothing")
    origin = file.origin.model_copy(update={"scores": "importance", "ranking": ranking})
    nothing = torch.zeros_like(file.in_graph)
    file = replace(file, scores=importance, in_graph=nothing, nodes=nothing[:, 0], origin=origin)
    _write(folder, {f"importances{suffix}": file}, _words(file.graph, origin, scores.method.name))
    return folder


def select_circuits(
    scores: EdgeScores, *, absolute: bool, selection: Literal["top", "greedy"] = "top"
) -> list[Circuit]:
    """The nine circuits by these scores, pruned, in the graph by query head.

    Where scores by query head were not computed edges are selected in the native graph, as many as keep within the limit
    when those into shared keys and values are counted once a head.
    """
    choose = SELECTIONS[selection]
    file = scores.to_graph_file()
    importance = file.importance
    if importance is not None and not bool((importance.isnan() & file.graph.real).any()):
        return [choose(file.graph, importance, n, absolute=absolute).pruned() for n in limits_of(file.graph)]
    # Positions that add up were summed for the file; native scores are summed alike.
    native = scores.importance.sum(0) if scores.placed else scores.importance

    def fitting(limit: int) -> Circuit:
        # Each selection contains those of fewer edges.
        low, high = 0, min(limit, scores.graph.n_edges)
        while low < high:
            middle = (low + high + 1) // 2
            wide = choose(scores.graph, native, middle, absolute=absolute).by_query_head()
            low, high = (middle, high) if wide.n_edges <= limit else (low, middle - 1)
        return choose(scores.graph, native, low, absolute=absolute).by_query_head().pruned()

    return [fitting(limit) for limit in limits_of(file.graph)]


def write_circuits(
    root: Path | str,
    task: str,
    model: str,
    circuits: Sequence[Circuit],
    *,
    method: str,
    ranking: Literal["signed", "absolute"] | None = None,
    suffix: Literal[".pt", ".json"] = ".pt",
) -> Path:
    """Writes nine circuits into `<root>/<task>_<model>` and returns the folder.

    Args:
        circuits: in the order of `LIMITS`; of native graphs or by query head.
        method: how their edges were found, for the files and the README.
        ranking: how edges were ranked, where they were.

    Raises:
        InputError: a name that is none, another number of circuits, or one above its limit.
    """
    folder = _folder(root, task, model)
    if len(circuits) != len(LIMITS):
        raise InputError(f"{folder}: expected {len(LIMITS)} circuits, found {len(circuits)}")
    files = [GraphFile.of_circuit(circuit, method) for circuit in circuits]
    _check_circuits(folder, files)
    origin = Origin(scores="membership", method=method, ranking=ranking)
    named = {
        f"circuit_{100 * limit:g}{suffix}": replace(file, origin=origin)
        for limit, file in zip(LIMITS, files, strict=True)
    }
    _write(folder, named, _words(files[0].graph, origin, method))
    return folder


def read_folder(folder: Path | str) -> MibFolder:
    """Reads a submission's folder for one task and model.

    Raises:
        InputError: it is not named `<task>_<model>`, does not hold one or nine graph files, or these are not what they
            should be.
    """
    folder = Path(folder)
    if not is_directory(folder):
        raise InputError(
            f"{folder}: expected a folder <task>_<model>, found {'a file' if folder.exists() else 'none'}."
        )
    task, _, model = folder.resolve().name.partition("_")
    if not _NAME.fullmatch(task) or not _NAME.fullmatch(model):
        raise InputError(
            f"{folder}: expected a name <task>_<model>, such as ioi_gpt2, found '{folder.resolve().name}'."
        )
    paths = [folder / name for name in names_in(folder) if Path(name).suffix in SUFFIXES]
    if len(paths) not in (1, len(LIMITS)):
        raise InputError(
            f"{folder}: expected one file of importances or {len(LIMITS)} circuits ({' or '.join(SUFFIXES)}), found "
            f"{len(paths)}."
        )
    files = [read_graph(path) for path in paths]
    if len(files) == 1:
        if files[0].importance is None:
            raise InputError(f"{paths[0]}: expected importances of edges, found none that differ from 0.")
        return MibFolder(task, model, files[0])
    for path, file in zip(paths, files, strict=True):
        if file.graph != files[0].graph:
            raise InputError(
                f"{path}: expected a circuit of the same model as {paths[0].name}, found another graph."
            )
    files.sort(key=lambda file: int(file.in_graph.sum()))
    _check_circuits(folder, files)
    return MibFolder(task, model, None, tuple(files))


def _folder(root: Path | str, task: str, model: str) -> Path:
    for what, name in (("task", task), ("model", model)):
        if not _NAME.fullmatch(name):
            known = ", ".join(TASKS if what == "task" else MODELS)
            raise InputError(f"{what} '{name}': expected letters, digits, '.' and '-', such as {known}")
    return Path(root) / f"{task}_{model}"


def _check_circuits(folder: Path, files: Sequence[GraphFile]) -> None:
    for limit, share, file in zip(limits_of(files[0].graph), LIMITS, files, strict=True):
        found = int(file.in_graph.sum())
        if found > limit:
            raise InputError(
                f"{folder}: expected a circuit of at most {limit} edges, {100 * share:g} % of {file.graph.n_edges}, "
                f"found {found}; keys and values are counted by query head."
            )


def _write(folder: Path, files: dict[str, GraphFile], readme: str) -> None:
    if folder.is_dir():
        others = sorted(path.name for path in folder.iterdir() if path.name not in {*files, README})
        if others:
            raise InputError(
                f"{folder}: expected an empty folder or this submission's files, found {', '.join(others)}."
            )
    for name, file in files.items():
        write_graph(folder / name, file)
    atomic_write(folder / README, readme)


def _words(graph: EdgeGraph, origin: Origin, method: str) -> str:
    ranking = {
        "signed": "signed: an edge that hurts comes after all that do nothing",
        "absolute": "absolute: edges that help and edges that hurt alike, by |score|",
        None: "not stated",
    }[origin.ranking]
    if origin.scores == "importance":
        convention = origin.convention
        lines = [
            f"One importance an edge, by {method}. A positive number: the edge helps the behaviour.",
            f"Ranking of edges: {ranking}.",
        ]
        if convention is not None:
            lines.append(f"Metric {convention.metric}, ablation {convention.ablation}.")
    else:
        sizes = ", ".join(f"{100 * limit:g}" for limit in LIMITS)
        lines = [
            f"Nine circuits of at most {sizes} % of {graph.n_edges} edges, by {method}, pruned of dead ends.",
            "The scores in the files are their membership: 1 in the circuit, 0 outside.",
            f"Ranking of edges: {ranking}.",
        ]
    return "\n".join(["# A submission to the circuit track of MIB", "", *lines, ""])
