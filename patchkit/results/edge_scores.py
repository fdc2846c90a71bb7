"""What a sweep over edges returns: the effect of every edge, with what the numbers mean.

The effect of an edge u -> v is metric(base run in which v reads u's source value) - metric(base run), exact or estimated.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from patchkit.errors import InputError
from patchkit.files import remove
from patchkit.model.edges import EdgeGraph
from patchkit.results import _edge_files as files
from patchkit.results._circuit_files import GraphSizes, read_mask
from patchkit.results._edge_files import EdgeMethod as EdgeMethod
from patchkit.results._edge_graphs import ExportedGraph, export_graph
from patchkit.results.circuit import Circuit
from patchkit.results.convention import Convention, importance_sign
from patchkit.results.formats import load_tensors, write_model
from patchkit.results.graph_files import GraphFile, write_graph
from patchkit.results.query_heads import by_query_graph

if TYPE_CHECKING:
    import pandas as pd

# 13 billion parameters; beyond that the JSON takes gigabytes, and nothing reads it.
_LARGEST_JSON = 5_000_000


@dataclass(frozen=True, eq=False)
class EdgeScores:
    """Effects of edges.

    Attributes:
        graph: native: one key and one value receiver a KV head.
        places: labels of the position axis; without `placed` there is one and no axis.
        mean: over pairs, signed; `[senders, receivers]` or `[places, senders, receivers]`; NaN where there is no edge,
            and where one was not scored.
        mean_abs: over pairs, of |effect| (under GradDrop the mean over drops of |.| inside).
        by_query: with grouped KV heads, `mean` and `mean_abs` of the graph by query head, from gradients (or patches) of
            the repeated keys and values; None where the graph is that one already, or they were not computed.
        per_pair: `[pairs, ...]`, where it was asked for.
        circuit: what ACDC kept.
        cost: in forward-equivalents; 1 = one forward over every base prompt.
    """

    graph: EdgeGraph
    method: EdgeMethod
    convention: Convention
    pair_ids: tuple[str, ...]
    mean: Float[Tensor, "*places senders receivers"]
    mean_abs: Float[Tensor, "*places senders receivers"]
    base_metric: Float[Tensor, " pairs"]
    source_metric: Float[Tensor, " pairs"]
    cost: float
    places: tuple[str, ...] = ("all",)
    placed: bool = False
    by_query: tuple[Tensor, Tensor] | None = None
    per_pair: Float[Tensor, "pairs *places senders receivers"] | None = None
    circuit: Circuit | None = None

    def __post_init__(self) -> None:
        places = (len(self.places),) if self.placed else ()
        wide = by_query_graph(self.graph)
        pairs = (len(self.pair_ids),)
        for name, value, graph, lead in (
            ("mean", self.mean, self.graph, places),
            ("mean_abs", self.mean_abs, self.graph, places),
            ("per_pair", self.per_pair, self.graph, (*pairs, *places)),
            *((f"by_query[{i}]", value, wide, places) for i, value in enumerate(self.by_query or ())),
        ):
            shape = (*lead, graph.n_senders, graph.n_receivers)
            if value is not None and tuple(value.shape) != shape:
                raise InputError(
                    f"{name} of these edges: expected shape {list(shape)}, found {list(value.shape)}"
                )
        for name in ("base_metric", "source_metric"):
            found = tuple(getattr(self, name).shape)
            if found != pairs:
                raise InputError(
                    f"{name} of {pairs[0]} pairs: expected shape {list(pairs)}, found {list(found)}"
                )
        if self.circuit is not None and self.circuit.graph != self.graph:
            raise InputError(
                f"the circuit of these edges: expected one of {self.graph}, found one of {self.circuit.graph}"
            )
        for name in ("per_pair", "base_metric", "source_metric"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else _kept(value))
        for name in ("mean", "mean_abs"):
            object.__setattr__(self, name, _kept(getattr(self, name)).where(self.graph.real, torch.nan))
        if self.by_query is not None:
            kept = tuple(_kept(value).where(wide.real, torch.nan) for value in self.by_query)
            object.__setattr__(self, "by_query", kept)

    @property
    def importance(self) -> Float[Tensor, "*places senders receivers"]:
        """`mean` with the sign turned so that higher = the edge helps: corrupting a helping edge lowers the metric.

        Information-flow routes have no sign and are importances as they are.
        """
        return self._sign * self.mean

    @property
    def pair_importance(self) -> Float[Tensor, "pairs *places senders receivers"]:
        """The same, of every pair.

        Raises:
            InputError: the scores of single pairs were not kept.
        """
        if self.per_pair is None:
            raise InputError(
                "these scores have no numbers of single pairs; score the edges again and keep them (--keep-pairs)"
            )
        return self._sign * self.per_pair

    @property
    def _sign(self) -> int:
        return importance_sign(self.method.name, self.convention.direction, self.convention.metric)

    @property
    def scored(self) -> Bool[Tensor, "*places senders receivers"]:
        """Which edges have a score."""
        return ~self.mean.isnan() & self.graph.real

    def top(self, k: int) -> list[tuple[str, float, float]]:
        """The k edges with the largest mean |effect|: (name, mean, mean |effect|); ties by number."""
        numbers = self._order()[:k]
        values = (self.mean.flatten()[numbers].tolist(), self.mean_abs.flatten()[numbers].tolist())
        return list(zip(map(self.name, numbers.tolist()), *values, strict=True))

    def _order(self) -> Tensor:
        """Numbers of scored edges by descending mean |effect|, ties by number."""
        flat = self.mean_abs.flatten()
        known = (~flat.isnan() & self.scored.flatten()).nonzero()[:, 0]
        return known[torch.sort(flat[known], descending=True, stable=True).indices]

    def name(self, number: int) -> str:
        """The name of an edge from its place in the flattened tensor, e.g. `a0.h1->a2.h3<q>` or with `@5` at a place."""
        rest, receiver = divmod(number, self.graph.n_receivers)
        place, sender = divmod(rest, self.graph.n_senders)
        name = self.graph.edge_name(sender, receiver)
        return f"{name}@{self.places[place]}" if self.placed else name

    def to_pandas(self) -> pd.DataFrame:
        """One row a scored edge, by number: edge, sender, receiver, position (if placed), effect, effect_abs, importance,
        and in_circuit where there is a circuit."""
        import pandas as pd

        numbers = self.scored.flatten().nonzero()[:, 0]
        rest, receiver = numbers // self.graph.n_receivers, numbers % self.graph.n_receivers
        place, sender = rest // self.graph.n_senders, rest % self.graph.n_senders
        senders = np.array(self.graph.senders, dtype=object)[sender.numpy()]
        receivers = np.array(self.graph.receivers, dtype=object)[receiver.numpy()]
        columns = {"edge": senders + "->" + receivers, "sender": senders, "receiver": receivers}
        if self.placed:
            columns["position"] = np.array(self.places, dtype=object)[place.numpy()]
        columns |= {
            "effect": self.mean.flatten()[numbers].numpy(),
            "effect_abs": self.mean_abs.flatten()[numbers].numpy(),
            "importance": self.importance.flatten()[numbers].numpy(),
        }
        if self.circuit is not None:
            columns["in_circuit"] = self.circuit.edges[sender, receiver].numpy()
        return pd.DataFrame(columns, index=pd.Index(numbers.numpy(), name="number"))

    def to_graph_file(self) -> GraphFile:
        """These scores as the EAP-IG repository keeps them: by query head, without positions, the effect's own sign.

        With grouped KV heads the scores are those of `by_query`; where these were not computed, shared keys and values
        have none: they are never split up. Scores of all positions become one where they add up.

        Raises:
            InputError: positions that do not add up.
        """
        exported = export_graph(self)
        if exported.file is None:
            raise InputError("; ".join(exported.notes))
        return exported.file

    def save(self, directory: Path | str) -> None:
        """Writes the files of the contract; `edges.json` comes last, so a directory that has it is complete.

        Raises:
            RunError: the directory cannot be written to.
        """
        directory = Path(directory)
        # What is written over is not complete until it is whole again.
        remove(directory / files.EDGES)
        tensors = {"scores": self.mean, "scores_abs": self.mean_abs}
        if self.by_query is not None:
            tensors |= {"scores_by_query": self.by_query[0], "scores_abs_by_query": self.by_query[1]}
        if self.circuit is not None:
            tensors["in_circuit"] = self.circuit.edges
        files.save_edge_tensors(directory / files.TENSORS, self.graph, tensors)
        files.write_pair_columns(
            directory / files.PAIRS,
            files.PairColumns(self.pair_ids, self.base_metric, self.source_metric, self.per_pair),
        )
        exported = self._save_graphs(directory)
        header = files.EdgeHeader(
            method=self.method,
            convention=self.convention,
            graph=GraphSizes.of(self.graph),
            places=list(self.places),
            placed=self.placed,
            pairs=len(self.pair_ids),
            per_pair=self.per_pair is not None,
            by_query=self.by_query is not None,
            requested=None if self.circuit is None else self.circuit.requested,
            cost=self.cost,
            graph_files=exported.written,
            notes=exported.notes,
        )
        write_model(directory / files.EDGES, header)

    def _save_graphs(self, directory: Path) -> ExportedGraph:
        """Writes `graph.json` and `graph.pt` as far as they can hold these scores; those of other scores go."""
        exported = export_graph(self)
        for name in (files.GRAPH_JSON, files.GRAPH_PT):
            if exported.file is None:
                remove(directory / name)
            elif name == files.GRAPH_JSON and exported.file.graph.n_edges > _LARGEST_JSON:
                remove(directory / name)
                exported.notes.append(
                    f"{name} is left out: {exported.file.graph.n_edges} edges are too many for it; they are in "
                    f"{files.GRAPH_PT}"
                )
            else:
                write_graph(directory / name, exported.file)
                exported.written.append(name)
        return exported

    @staticmethod
    def load(directory: Path | str) -> EdgeScores:
        """Reads what `save` wrote; the graph files are not looked at.

        Raises:
            InputError: a file is missing or malformed, or does not fit `edges.json`.
        """
        directory = Path(directory)
        path = directory / files.TENSORS
        header, graph = files.read_edge_header(directory / files.EDGES)
        tensors = load_tensors(path)
        places = (len(header.places),) if header.placed else ()
        mean, mean_abs = (
            files.read_edge_matrix(path, tensors, name, graph, places) for name in ("scores", "scores_abs")
        )
        files.check_edge_names(path, graph)
        wide = by_query_graph(graph)
        by_query = None
        if header.by_query:
            signed, size = (
                files.read_edge_matrix(path, tensors, name, wide, places)
                for name in ("scores_by_query", "scores_abs_by_query")
            )
            by_query = (signed, size)
        circuit = None
        if "in_circuit" in tensors:
            circuit = Circuit(graph, read_mask(path, tensors, "in_circuit", graph), header.requested)
        pairs = files.read_pair_columns(directory / files.PAIRS, header, graph)
        return EdgeScores(
            graph=graph,
            method=header.method,
            convention=header.convention,
            pair_ids=pairs.ids,
            mean=mean,
            mean_abs=mean_abs,
            base_metric=pairs.base_metric,
            source_metric=pairs.source_metric,
            cost=header.cost,
            places=tuple(header.places),
            placed=header.placed,
            by_query=by_query,
            per_pair=pairs.scores,
            circuit=circuit,
        )


def _kept(values: Tensor) -> Tensor:
    """On the CPU, float64 where the model computes so."""
    return values.detach().to("cpu", torch.float64 if values.dtype == torch.float64 else torch.float32)
