"""Trying circuits during ACDC: all pairs, opened once, on which candidates restart at the receiver that is visited."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from patchkit.data import Metric, Pair, read_places
from patchkit.methods._acdc_order import squared_sizes
from patchkit.methods._circuit_work import SENDERS_A_FORWARD, circuit_work
from patchkit.methods._edge_options import EdgeOptions
from patchkit.methods._edge_replacement import EdgeReplacement
from patchkit.methods._pair_batch import PairBatch
from patchkit.methods.activation_patching import CPU_FORWARD
from patchkit.model import PatchModel
from patchkit.model.edges import EdgeGraph
from patchkit.runtime import length_buckets
from patchkit.tracing.circuit import CutRun, Start, circuit_logits, cut_run, start_at
from patchkit.tracing.senders import Senders, capture_senders


@dataclass(eq=False)
class _Opened:
    """A batch of pairs, run once.

    Attributes:
        numbers: which pairs these are.
        own, base: senders and last-position logits of the base runs.
        start: where candidates started last, if that is kept.
    """

    numbers: list[int]
    batch: PairBatch
    own: Senders
    cut: CutRun
    base: Tensor
    start: Start | None = None


class Trials:
    """Circuits tried on every pair.

    Attributes:
        spent: what has been run, in forward-equivalents.
        base, source: the metric of both runs of each pair.
        sizes: of each sender, the norm of the change when it is replaced.
        at_once: how many circuits are best run together.
    """

    def __init__(
        self,
        model: PatchModel,
        graph: EdgeGraph,
        pairs: Sequence[Pair],
        options: EdgeOptions,
        metric: Metric,
        replacement: EdgeReplacement,
    ) -> None:
        self.model, self.graph, self.metric = model, graph, metric
        self.pairs = len(pairs)
        room = 1 + graph.n_senders / SENDERS_A_FORWARD
        lengths = [round(len(pair.clean_ids) * room) for pair in pairs]
        self.opened: list[_Opened] = []
        found: dict[str, list[Tensor]] = {"base": [], "source": []}
        squares = torch.zeros(graph.n_senders, dtype=torch.float64)
        for numbers in length_buckets(lengths, options.max_batch_tokens):
            chosen = [pairs[number] for number in numbers]
            batch = PairBatch.of(model, chosen, read_places("all", chosen).covered, options.direction)
            own, base = capture_senders(model, batch.base)
            other, source = replacement.senders(model, batch, own)
            cut = cut_run(model, batch.base, own, other)
            self.opened.append(_Opened(numbers, batch, own, cut, base))
            for name, logits in (("base", base), ("source", source)):
                found[name].append(batch.score(metric, logits, base).cpu())
            squares += squared_sizes(model, graph, own, other, batch.base.attention_mask)
        self.base, self.source = (self._in_order(parts) for parts in found.values())
        self.sizes = squares.sqrt()
        self.spent = 2.0
        tokens = max(each.batch.base.input_ids.numel() for each in self.opened)
        on_cpu = model.embed_device.type == "cpu"
        most = min(CPU_FORWARD, options.max_batch_tokens) if on_cpu else options.max_batch_tokens / room
        self.at_once = max(1, int(most // tokens))

    def metrics(
        self, circuits: Sequence[Bool[Tensor, "senders receivers"]], known: int
    ) -> Float[Tensor, "pairs circuits"]:
        """The metric of circuits that hold every edge below the first `known` senders."""
        columns = []
        for each in self.opened:
            if each.start is None or each.start.known != known:
                each.start = start_at(self.model, each.own, each.cut.other, self.graph, known)
            logits = circuit_logits(self.model, each.cut, self.graph, circuits, each.start)
            scores = [each.batch.score(self.metric, one, each.base) for one in logits]
            columns.append(torch.stack(scores, dim=1).cpu())
            if len(self.opened) > 1:
                # A batch is as large as memory allows.
                each.start = None
        self.spent += sum(self.work(edges, known) for edges in circuits)
        return self._in_order(columns)

    def work(self, edges: Bool[Tensor, "senders receivers"], known: int) -> float:
        """Forward-equivalents of one circuit."""
        return circuit_work(self.model.dims, self.graph, edges, known)

    def _in_order(self, parts: Sequence[Tensor]) -> Tensor:
        order = torch.tensor([number for each in self.opened for number in each.numbers])
        return torch.cat(list(parts))[torch.argsort(order)]
