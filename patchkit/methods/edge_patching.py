"""Exact edge patching: one edge at a time carries what the other run holds, and the metric says what that did.

    effect(u -> v) = metric(base run in which the receiver v alone reads u's replaced value) - metric(base run)

This is what every estimate of edges estimates. Edges are the rows of batches that restart at what reads them
(`_edge_sweep.py`); the numbers are those of one whole forward an edge.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from patchkit.data import Pair, Places, read_places, resolve_metric
from patchkit.errors import InputError
from patchkit.methods._edge_items import EdgeItem
from patchkit.methods._edge_options import EdgeOptions
from patchkit.methods._edge_replacement import EdgeReplacement, edge_replacement
from patchkit.methods._edge_rows import sorted_by
from patchkit.methods._edge_sweep import PatchEdges
from patchkit.model import PatchModel
from patchkit.model.edges import EdgeGraph
from patchkit.results.circuit import Circuit
from patchkit.results.edge_scores import EdgeMethod, EdgeScores
from patchkit.results.query_heads import spread_groups
from patchkit.runtime import Journal, Progress, run_program

#: Patched rows of one pair between two base runs: enough that the base runs are a small part of the work.
ROWS_AN_ITEM = 512


def patch_edges(
    model: PatchModel,
    pairs: Sequence[Pair],
    options: EdgeOptions | None = None,
    *,
    edges: Bool[Tensor, "senders receivers"] | None = None,
    by_query: bool = False,
    reference: Sequence[Pair] | None = None,
    keep_pairs: bool = False,
    checkpoint: Path | None = None,
    progress: Progress | None = None,
) -> EdgeScores:
    """The exact effect of every edge, or of some.

    Args:
        edges: which edges of the native graph are patched; by default all. The others have NaN.
        by_query: with grouped KV heads, also patch what each query head alone reads of its group's keys and values
            (`EdgeScores.by_query`); as many runs more as those edges.
        reference: prompt pairs whose source prompts the two means are taken over; default: the pairs themselves.
        keep_pairs: keep every pair's effects: as many numbers as edges, for each pair.
        checkpoint: a directory for finished batches, from which an interrupted run goes on.

    Returns:
        `EdgeScores` of method `exact`; positive effects raise the metric.

    Raises:
        InputError: options that contradict the pairs, a mask of another graph, of edges that do not exist or of none.
    """
    options = options or EdgeOptions()
    graph = EdgeGraph.of(model.dims)
    asked = Circuit.full(graph) if edges is None else Circuit(graph, edges)
    if asked.is_empty:
        raise InputError("edges: the mask is empty, so there is nothing to patch; expected at least one edge")
    resolve_metric(options.metric)
    places = read_places(options.positions, pairs)
    made = edge_replacement(model, pairs, options, reference)
    sweep = Sweep(model, tuple(pairs), places, options, made, checkpoint, progress)
    found = sweep.patch(graph, asked.edges, "patching edges")
    cost, wide = found.cost, None
    if by_query and model.dims.group > 1:
        copies = asked.by_query_head()
        shared = torch.tensor([name.endswith(("<k>", "<v>")) for name in copies.graph.receivers])
        # Queries, MLPs and logits are the same receivers in both graphs.
        mean, mean_abs = (spread_groups(graph, native) for native in sweep.means(found))
        if bool((copies.edges & shared).any()):
            added = sweep.patch(copies.graph, copies.edges & shared, "patching edges by query head")
            cost += added.cost
            mean, mean_abs = (
                torch.where(shared, by_head, native)
                for by_head, native in zip(sweep.means(added), (mean, mean_abs), strict=True)
            )
        wide = mean, mean_abs
    mean, mean_abs = sweep.means(found)
    return EdgeScores(
        graph=graph,
        method=EdgeMethod(name="exact"),
        convention=options.convention,
        pair_ids=tuple(pair.id for pair in pairs),
        mean=mean,
        mean_abs=mean_abs,
        base_metric=found.base,
        source_metric=found.source,
        cost=cost,
        places=places.labels,
        placed=places.placed,
        by_query=wide,
        per_pair=sweep.shaped(found.effects) if keep_pairs else None,
    )


@dataclass(frozen=True, eq=False)
class _Found:
    """Effects, NaN where an edge was not patched; metrics of both runs; forward-equivalents."""

    effects: Float[Tensor, "pairs places senders receivers"]
    base: Float[Tensor, " pairs"]
    source: Float[Tensor, " pairs"]
    cost: float


@dataclass(frozen=True, eq=False)
class Sweep:
    """What all edges are patched with."""

    model: PatchModel
    pairs: tuple[Pair, ...]
    places: Places
    options: EdgeOptions
    made: EdgeReplacement
    checkpoint: Path | None
    progress: Progress | None

    def patch(self, graph: EdgeGraph, edges: Bool[Tensor, "senders receivers"], label: str) -> _Found:
        """Patches each of these edges in every pair, at every place."""
        pairs, places = len(self.pairs), len(self.places.labels)
        program, items, slices = self.work(graph, edges)
        found = run_program(
            program,
            self.model,
            items,
            max_batch_tokens=self.options.max_batch_tokens,
            progress=self.progress,
            label=label,
            journal=None if self.checkpoint is None else Journal(self.checkpoint),
        )
        effects = torch.full(
            (pairs, places, graph.n_senders, graph.n_receivers), torch.nan, dtype=found["effect"].dtype
        )
        by_slice = found["effect"].reshape(len(slices), pairs, -1)
        for part, values in zip(slices, by_slice, strict=True):
            rows = values[:, : len(part) * places].reshape(pairs, len(part), places)
            effects[:, :, part[:, 0], part[:, 1]] = rows.transpose(1, 2)
        tokens = sum(len(pair.clean_ids) for pair in self.pairs)
        cost = float(found["work"].double().sum()) / tokens
        return _Found(effects, found["base"][:pairs], found["source"][:pairs], cost)

    def work(
        self, graph: EdgeGraph, edges: Bool[Tensor, "senders receivers"]
    ) -> tuple[PatchEdges, list[EdgeItem], tuple[Tensor, ...]]:
        """The Program of these edges, its items, and the edges of each slice: slice by slice, pair by pair."""
        places = len(self.places.labels)
        # By receiver's layer and then by sender, so that one run of attention serves all heads; in slices of one size, so
        # that those of all pairs come into one batch.
        numbers = edges.nonzero()
        stage = numbers[:, 1] // graph.receivers_a_layer
        numbers = numbers[sorted_by([stage, numbers[:, 0], numbers[:, 1]])]
        slices = numbers.tensor_split(-(-len(numbers) * places // ROWS_AN_ITEM))
        items = [
            EdgeItem(number, pair, self.places.covered[number], part)
            for part in slices
            for number, pair in enumerate(self.pairs)
        ]
        program = PatchEdges(
            graph,
            self.options.metric,
            self.options.direction,
            self.made,
            self.model.arch.joint_qk_norm,
            max(item.rows for item in items),
            self.options.max_batch_tokens,
        )
        return program, items, slices

    def means(self, found: _Found) -> tuple[Tensor, Tensor]:
        """Means over pairs of effects and of their sizes."""
        effects = found.effects.double()
        return tuple(self.shaped(value.mean(0)).to(found.effects.dtype) for value in (effects, effects.abs()))  # pyright: ignore[reportReturnType]

    def shaped(self, value: Float[Tensor, "*pairs places senders receivers"]) -> Tensor:
        """Without the axis of places where results have none."""
        return value if self.places.placed else value.squeeze(-3)
