"""What graph files of the EAP-IG repository can say of scores of edges: no positions, keys and values by query head."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from patchkit.results.graph_files import GraphFile, Origin, nodes_between
from patchkit.results.query_heads import by_query_graph, spread_groups

if TYPE_CHECKING:
    from patchkit.results.edge_scores import EdgeScores


@dataclass
class ExportedGraph:
    """A graph file, or why there is none.

    Attributes:
        notes: what the file does not say.
        written: names of the files it was written to.
    """

    file: GraphFile | None
    notes: list[str] = field(default_factory=list)
    written: list[str] = field(default_factory=list)


def export_graph(scores: EdgeScores) -> ExportedGraph:
    """The scores as a graph file, as far as it can hold them."""
    notes: list[str] = []
    wide = by_query_graph(scores.graph)
    shared = "none"
    if scores.by_query is not None:
        shared, values = "scored", scores.by_query[0]
    elif wide == scores.graph:
        values = scores.mean
    else:
        shared, values = "unscored", spread_groups(scores.graph, scores.mean)
        notes.append(
            "graph files have no score for edges into keys and values that query heads share (NaN): scores by query head "
            "were not computed, and those of a group are not split up"
        )
    if scores.placed:
        if not scores.method.adds_positions or scores.convention.positions != "each":
            return ExportedGraph(
                None,
                [
                    f"there are no graph files: their format has no positions, and scores of method "
                    f"'{scores.method.name}' at positions '{scores.convention.positions}' do not add up to one an edge"
                ],
            )
        values = values.sum(0, dtype=torch.float64)
        notes.append("scores in graph files are sums over positions")
    if scores.circuit is None:
        in_graph = torch.zeros_like(wide.real)
    else:
        in_graph = scores.circuit.by_query_head().edges
    origin = Origin(scores="effect", method=scores.method.name, convention=scores.convention, shared=shared)
    return ExportedGraph(
        GraphFile(wide, values.float(), in_graph, nodes_between(wide, in_graph), origin=origin), notes
    )
