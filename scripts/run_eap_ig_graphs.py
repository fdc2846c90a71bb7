"""Let the EAP-IG repository write, read and select graphs, and keep what it did as a fixture of the tests.

    git clone https://github.com/hannamw/EAP-IG && git -C EAP-IG checkout 795f560
    pip install transformer-lens==3.9.0 matplotlib        # in an environment of its own
    python scripts/run_eap_ig_graphs.py --repo EAP-IG --out tests/fixtures/graph_files

- `peer_*`: files that the repository wrote, of numbers that the tests know (see `score`). Its JSON of scored nodes cannot
  be written.
- `selections.json`: circuits that it selected and pruned, as hexadecimal numbers whose bits are the flattened
  matrix of edges.
- `read_*.json`: what its readers found in the files `ours_*` of the same folder, which `tests/results/graph_cases.py`
  writes.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SIZES = {
    "sequential": {"n_layers": 3, "n_heads": 2, "parallel_attn_mlp": False, "d_model": 3},
    "parallel": {"n_layers": 3, "n_heads": 2, "parallel_attn_mlp": True, "d_model": 3},
}


def score(row: int, column: int) -> float:
    """A number that float32 holds exactly."""
    return ((row * 37 + column * 23) % 97 - 48) / 64


def fill(graph: Any) -> None:
    """Scores and membership by formula; every 11th place has no score."""
    for row in range(graph.n_forward):
        graph.nodes_in_graph[row] = row % 3 != 1
        for column in range(graph.n_backward):
            if graph.real_edge_mask[row, column]:
                unscored = (row + column) % 11 == 10
                graph.scores[row, column] = torch.nan if unscored else score(row, column)
                graph.in_graph[row, column] = (row + column) % 4 == 0
        if graph.nodes_scores is not None and row % 4:
            graph.nodes_scores[row] = score(row, 100)
        if graph.neurons_in_graph is not None:
            for column in range(graph.cfg["d_model"]):
                graph.neurons_in_graph[row, column] = (row + column) % 2 == 0
                if row % 5:
                    graph.neurons_scores[row, column] = score(row, 200 + column)


def bits(mask: Tensor) -> str:
    return "".join("1" if value else "0" for value in mask.flatten().tolist())


def packed(mask: Tensor) -> str:
    """The same as one hexadecimal number."""
    return f"{int(bits(mask), 2):x}"


def plain(value: Tensor | None) -> Any:
    """A tensor as lists, with null for NaN."""
    if value is None:
        return None
    if value.ndim:
        return [plain(row) for row in value]
    number = value.item()
    return None if number != number else number


def selections(Graph: Any) -> list[dict[str, Any]]:
    """What the repository selects by numbers of which no two are alike in size."""
    found = []
    for name, sizes in SIZES.items():
        graph = Graph.from_model(sizes, node_scores=True)
        order = torch.randperm(graph.scores.numel(), generator=torch.Generator().manual_seed(5))
        sign = torch.where(torch.arange(len(order)) % 3 == 0, -1, 1)
        ranks = ((order + 1) * sign).reshape(graph.scores.shape)
        graph.scores[:] = ranks / 1024
        nodes = torch.arange(1.0, graph.n_forward + 1).roll(3) * torch.where(
            torch.arange(graph.n_forward) % 4 == 0, -1, 1
        )
        graph.nodes_scores[:] = nodes
        graph.nodes_scores[0] = torch.nan
        count = len(graph.edges)
        asked: list[tuple[str, Any]] = [
            (how, n) for n in (0, 1, 5, 12, 30, 60, count) for how in ("topn", "greedy")
        ]
        asked += [("threshold", limit) for limit in (-0.1, 0.05, 0.2)] + [("nodes", n) for n in (0, 2, 4, 7)]
        for (how, amount), absolute in ((each, absolute) for each in asked for absolute in (False, True)):
            for prune in (False, True):
                options = {"absolute": absolute, "prune": prune}
                if how == "nodes":
                    graph.apply_topn(amount, level="node", **options)
                else:
                    getattr(graph, f"apply_{how}")(amount, **options)
                found.append(
                    {
                        "graph": name,
                        "how": how,
                        "amount": amount,
                        "absolute": absolute,
                        "pruned": prune,
                        "edges": packed(graph.in_graph),
                        "nodes": packed(graph.nodes_in_graph),
                    }
                )
        found.append(
            {"graph": name, "how": "scores", "edges": ranks.tolist(), "nodes": plain(graph.nodes_scores)}
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repo", type=Path, required=True, help="a clone of hannamw/EAP-IG at 795f560")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    sys.path.insert(0, str(given.repo / "src"))
    Graph = importlib.import_module("eap.graph").Graph
    given.out.mkdir(parents=True, exist_ok=True)
    for name, sizes in SIZES.items():
        edges_only = Graph.from_model(sizes)
        fill(edges_only)
        edges_only.to_json(given.out / f"peer_{name}.json")
        edges_only.to_pt(given.out / f"peer_{name}.pt")
        everything = Graph.from_model(sizes, neuron_level=True, node_scores=True)
        fill(everything)
        everything.to_pt(given.out / f"peer_{name}_nodes.pt")
    chosen = Graph.from_model(SIZES["sequential"], node_scores=True)
    fill(chosen)
    chosen.apply_topn(4, level="node", absolute=True, prune=False)
    chosen.to_pt(given.out / "peer_selected_nodes.pt")
    (given.out / "selections.json").write_text(json.dumps(selections(Graph)), encoding="utf-8")
    for path in sorted(given.out.glob("ours_*")):
        read = Graph.from_json(path) if path.suffix == ".json" else Graph.from_pt(path)
        content = {
            "edges": {edge.name: [plain(edge.score), bool(edge.in_graph)] for edge in read.edges.values()},
            "nodes": bits(read.nodes_in_graph),
            "node_scores": plain(read.nodes_scores),
            "neurons": None if read.neurons_in_graph is None else bits(read.neurons_in_graph),
            "neuron_scores": plain(read.neurons_scores),
        }
        target = given.out / f"read_{path.name.replace('.', '_')}.json"
        target.write_text(json.dumps(content), encoding="utf-8")


if __name__ == "__main__":
    main()
