"""Running circuits for an evaluation: each different circuit once, a bounded number of edge masks at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from patchkit.data import Pair
from patchkit.methods import circuits as running
from patchkit.methods._edge_options import EdgeOptions
from patchkit.model import PatchModel
from patchkit.model.edges import EdgeGraph
from patchkit.results.circuit import Circuit
from patchkit.runtime import Progress

#: Bytes of edge masks that are in memory at once.
_AT_ONCE = 1 << 27


@dataclass(eq=False)
class CircuitRunner:
    """Metrics of circuits on one set of pairs under one protocol.

    A circuit that was run before is not run again: sets of nodes that are taken away overlap a great deal.

    Attributes:
        patching: `edge` or `node`; with `node` a circuit is known by its nodes alone.
        cost: paid so far, in forward-equivalents.
    """

    model: PatchModel
    pairs: Sequence[Pair]
    options: EdgeOptions
    patching: Literal["edge", "node"]
    reference: Sequence[Pair] | None = None
    checkpoint: Path | None = None
    progress: Progress | None = None
    cost: float = 0.0
    _known: dict[str, Tensor] = field(default_factory=dict)
    _ends: tuple[Tensor, Tensor] | None = None

    @property
    def clean(self) -> Float[Tensor, " pairs"]:
        """The base runs' metric; known once something was run."""
        assert self._ends is not None
        return self._ends[0]

    @property
    def corrupt(self) -> Float[Tensor, " pairs"]:
        """The metric with every edge cut."""
        assert self._ends is not None
        return self._ends[1]

    @property
    def ends(self) -> tuple[float, float]:
        """Means over pairs of `clean` and `corrupt`."""
        return float(self.clean.mean()), float(self.corrupt.mean())

    def run(self, circuits: Iterable[Circuit], label: str) -> Float[Tensor, "pairs circuits"]:
        """The metric of each circuit on each pair.

        Args:
            circuits: taken one after the other; at least one.
            label: of the progress.
        """
        columns: list[Tensor] = []
        graph = EdgeGraph.of(self.model.dims, by_query_head=True)
        at_once = max(1, _AT_ONCE // (graph.n_senders * graph.n_receivers))
        stream = iter(circuits)
        while part := list(islice(stream, at_once)):
            keys = [self._key(circuit) for circuit in part]
            new = {key: circuit for key, circuit in zip(keys, part, strict=True) if key not in self._known}
            if new:
                self._run_new(new, label)
            columns += [self._known[key] for key in keys]
        return torch.stack(columns, dim=1)

    def means(self, circuits: Iterable[Circuit], label: str) -> list[float]:
        """The metric of each circuit, mean over pairs."""
        return self.run(circuits, label).mean(0).tolist()

    def without(self, circuit: Circuit, nodes: Bool[Tensor, " senders"]) -> Circuit:
        """The circuit with some of its nodes taken away, under this kind of patching.

        Not pruned: a node whose inputs were all taken away still computes what it makes of what is put in.
        """
        if self.patching == "edge":
            return circuit.without(nodes)
        return Circuit.of_nodes(circuit.graph, circuit.nodes & ~nodes)

    def _run_new(self, circuits: dict[str, Circuit], label: str) -> None:
        progress = self.progress

        def relabelled(_: str, done: int, total: int) -> None:
            if progress is not None:
                progress(label, done, total)

        found = running.run_circuits(
            self.model,
            self.pairs,
            list(circuits.values()),
            self.options,
            patching=self.patching,
            reference=self.reference,
            checkpoint=self.checkpoint,
            progress=relabelled,
        )
        self.cost += found.cost
        self._ends = (found.clean.double().cpu(), found.corrupt.double().cpu())
        for column, key in enumerate(circuits):
            self._known[key] = found.metric[:, column].double().cpu()

    def _key(self, circuit: Circuit) -> str:
        known_by = circuit.edges if self.patching == "edge" else circuit.nodes
        return hashlib.sha256(known_by.numpy().tobytes()).hexdigest()
