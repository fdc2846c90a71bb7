"""Graph files whose numbers are known by formula, and a small reader of them that shares nothing with patchkit's.

`python -m tests.results.graph_cases DIRECTORY` writes the files `ours_*` that `scripts/run_eap_ig_graphs.py` lets the
EAP-IG repository read.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patchkit.model import EdgeGraph
from patchkit.results.convention import Convention
from patchkit.results.graph_files import GraphFile, Origin, write_graph

GRAPHS = {
    "sequential": EdgeGraph(3, 2, 2, False, 3),
    "parallel": EdgeGraph(3, 2, 2, True, 3),
}
CONVENTION = Convention(
    metric="logit-diff", direction="noise", ablation="resample", positions="all", patching="edge"
)


def number(row: int, column: int) -> float:
    """A number that float32 holds exactly."""
    return ((row * 37 + column * 23) % 97 - 48) / 64


def filled(graph: EdgeGraph, *, nodes: bool = False, origin: bool = False) -> GraphFile:
    """What `fill` of the script fills its graphs with."""
    rows, columns = torch.arange(graph.n_senders)[:, None], torch.arange(graph.n_receivers)
    scores = torch.tensor([[number(r, c) for c in range(graph.n_receivers)] for r in range(graph.n_senders)])
    scores[(rows + columns) % 11 == 10] = torch.nan
    width = torch.arange(graph.d_model)
    node_scores = torch.tensor([number(row, 100) if row % 4 else torch.nan for row in range(graph.n_senders)])
    neuron_scores = torch.tensor(
        [
            [number(row, 200 + c) if row % 5 else torch.nan for c in range(graph.d_model)]
            for row in range(graph.n_senders)
        ]
    )
    return GraphFile(
        graph,
        scores,
        ((rows + columns) % 4 == 0) & graph.real,
        torch.arange(graph.n_senders) % 3 != 1,
        node_scores if nodes else None,
        (rows + width) % 2 == 0 if nodes else None,
        neuron_scores if nodes else None,
        Origin(scores="effect", method="eap", convention=CONVENTION) if origin else None,
    )


def write_ours(directory: Path) -> None:
    """Every kind of file, for the repository to read."""
    for name, graph in GRAPHS.items():
        for suffix in ("json", "pt"):
            write_graph(directory / f"ours_{name}.{suffix}", filled(graph, origin=True))
            write_graph(directory / f"ours_{name}_nodes.{suffix}", filled(graph, nodes=True, origin=True))


def loaded(path: Path) -> dict[str, Any]:
    """What a file says, by plain loops over names: edges by name, everything else as lists with None for NaN."""
    if path.suffix == ".json":
        data = json.loads(path.read_text(encoding="utf-8"))
        names = [name for name in data["nodes"] if name != "logits"]
        nodes = [data["nodes"][name] for name in names]
        width = data["cfg"]["d_model"]
        scored = any("score" in node for node in nodes)
        neurons = any("neurons" in node for node in nodes)
        neuron_scores = any("neurons_scores" in node for node in nodes)
        return {
            "edges": {name: [known(edge["score"]), edge["in_graph"]] for name, edge in data["edges"].items()},
            "nodes": bits([node["in_graph"] for node in nodes]),
            "node_scores": [known(node.get("score")) for node in nodes] if scored else None,
            "neurons": bits([flag for node in nodes for flag in node["neurons"]]) if neurons else None,
            "neuron_scores": [
                [known(n) for n in node.get("neurons_scores", [None] * width)] for node in nodes
            ]
            if neuron_scores
            else None,
        }
    data = torch.load(path, weights_only=True)
    scores, flags = data["edges_scores"].tolist(), data["edges_in_graph"].tolist()
    edges = {}
    for row, sender in enumerate(data["src_nodes"]):
        for column, receiver in enumerate(data["dst_nodes"]):
            if exists(sender, receiver, data["cfg"]["parallel_attn_mlp"]):
                edges[f"{sender}->{receiver}"] = [known(scores[row][column]), flags[row][column]]
    return {
        "edges": edges,
        "nodes": bits(data["nodes_in_graph"].tolist()),
        "node_scores": lists(data.get("nodes_scores")),
        "neurons": None
        if "neurons_in_graph" not in data
        else bits(data["neurons_in_graph"].flatten().tolist()),
        "neuron_scores": lists(data.get("neurons_scores")),
    }


def exists(sender: str, receiver: str, parallel: bool) -> bool:
    """Whether something reads something, from their names alone."""
    if sender == "input" or receiver == "logits":
        return True
    layer, reader = int(sender[1:].split(".")[0]), int(receiver[1:].split(".")[0])
    same_block = sender[0] == "a" and receiver[0] == "m" and not parallel
    return layer < reader or (layer == reader and same_block)


def known(value: float | None) -> float | None:
    return None if value is None or value != value else value


def lists(value: Tensor | None) -> Any:
    if value is None:
        return None
    return [lists(row) if row.ndim else known(row.item()) for row in value]


def bits(flags: list[bool]) -> str:
    return "".join("1" if flag else "0" for flag in flags)


if __name__ == "__main__":
    write_ours(Path(sys.argv[1]))
