"""What ACDC runs on a batch of pairs: both ends once, and then circuits, which start at the receiver that is visited."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from patchkit.data import Metric, Pair, read_places, resolve_metric
from patchkit.methods._acdc_order import squared_sizes
from patchkit.methods._circuit_work import SENDERS_A_FORWARD
from patchkit.methods._edge_replacement import EdgeReplacement
from patchkit.methods._edge_row_memory import circuits_bytes
from patchkit.methods._pair_batch import PairBatch
from patchkit.methods.activation_patching import CPU_FORWARD
from patchkit.model import Dims, PatchModel
from patchkit.model.edges import EdgeGraph
from patchkit.runtime import Cost
from patchkit.runtime.batch_memory import Shape, head_widths
from patchkit.tracing.circuit import CutRun, Start, circuit_logits, cut_run, start_at
from patchkit.tracing.senders import Senders, capture_senders


@dataclass(eq=False)
class Opened:
    """A batch of pairs, run once.

    Attributes:
        own, base: senders and last-position logits of the base runs.
        source: last-position logits of the source runs.
        started: the batch of this process, if any, whose `start` is kept.
        start: where its candidates started last.
    """

    graph: EdgeGraph
    metric: Metric
    batch: PairBatch
    own: Senders
    cut: CutRun
    base: Tensor
    source: Tensor
    started: list[Opened]
    start: Start | None = None

    def start_at(self, model: PatchModel, known: int) -> Start:
        """Where circuits that hold every edge below the first `known` senders start."""
        if self.start is None or self.start.known != known:
            # One batch's is kept: a batch is as large as memory allows.
            for before in self.started:
                before.start = None
            self.start = start_at(model, self.own, self.cut.other, self.graph, known)
            self.started[:] = [self]
        return self.start


@dataclass(frozen=True, eq=False)
class Pairs:
    """Opens batches of pairs."""

    graph: EdgeGraph
    metric: str
    direction: str
    replacement: EdgeReplacement
    started: list[Opened] = field(default_factory=list, init=False, repr=False, compare=False)

    @property
    def room(self) -> float:
        """Memory of a circuit's run at one token, in that of a forward there."""
        return 1 + self.graph.n_senders / SENDERS_A_FORWARD

    def tokens(self, item: Pair) -> int:
        return round(len(item.clean_ids) * self.room)

    def open(self, model: PatchModel, items: Sequence[Pair]) -> Opened:
        batch = PairBatch.of(model, items, read_places("all", items).covered, self.direction)
        if self.replacement.causal:
            batch = batch.behind_prefix(model)
        own, base = capture_senders(model, batch.base)
        other, source = self.replacement.senders(model, batch, own)
        cut = cut_run(model, batch.base, own, other)
        metric = resolve_metric(self.metric)
        return Opened(self.graph, metric, batch, own, cut, base, source, self.started)

    def cost(self, dims: Dims, items: Sequence[Pair]) -> Cost:
        """Both runs; senders of the base run, the run in which every edge is cut, and one circuit's run."""
        shape = Shape.of([len(item.clean_ids) for item in items])
        q, _ = head_widths(dims)
        own = shape.tokens * (dims.n_layers * (q + dims.d_model) + dims.d_model) * dims.itemsize
        cut, passes = circuits_bytes(
            dims, self.graph, shape, [[self.graph.n_senders]], copies=1, together=False
        )
        return Cost(2.0 * sum(len(item.clean_ids) for item in items), own + cut, passes)


@dataclass(frozen=True)
class Ends:
    """Step: the metric of the `base` and the `source` run of each pair, and of each sender the square of its size."""

    @property
    def summed(self) -> frozenset[str]:
        return frozenset({"squares"})

    def run(self, model: PatchModel, opened: Opened) -> dict[str, Tensor]:
        score, batch, other = opened.batch.score, opened.batch, opened.cut.other
        return {
            "base": score(opened.metric, opened.base, opened.base),
            "source": score(opened.metric, opened.source, opened.base),
            "squares": squared_sizes(model, opened.graph, opened.own, other, batch.base.attention_mask),
        }


@dataclass(frozen=True)
class Try:
    """Step: the `metric` of circuits, `[pairs, circuits]`.

    Attributes:
        known: every edge below so many senders, from the first, is in all of them.
        circuits: a bit for each sender and receiver, since a large graph has millions.
    """

    known: int
    circuits: tuple[bytes, ...]
    max_batch_tokens: int = field(compare=False)

    def run(self, model: PatchModel, opened: Opened) -> dict[str, Tensor]:
        circuits = [unpack(packed, opened.graph) for packed in self.circuits]
        start = opened.start_at(model, self.known)
        columns = []
        tokens = opened.batch.base.input_ids.numel()
        rows = together(model, opened.graph, tokens, self.max_batch_tokens)
        for first in range(0, len(circuits), rows):
            logits = circuit_logits(model, opened.cut, opened.graph, circuits[first : first + rows], start)
            columns += [opened.batch.score(opened.metric, one, opened.base) for one in logits]
        return {"metric": torch.stack(columns, dim=1)}


def together(model: PatchModel, graph: EdgeGraph, tokens: int, max_batch_tokens: int) -> int:
    """How many circuits are best run at once on a batch of so many padded tokens."""
    on_cpu = model.embed_device.type == "cpu"
    room = 1 + graph.n_senders / SENDERS_A_FORWARD
    most = min(CPU_FORWARD, max_batch_tokens) if on_cpu else max_batch_tokens / room
    return max(1, int(most // tokens))


def pack(edges: Bool[Tensor, "senders receivers"]) -> bytes:
    """A bit for each sender and receiver."""
    return np.packbits(edges.numpy()).tobytes()


def unpack(packed: bytes, graph: EdgeGraph) -> Bool[Tensor, "senders receivers"]:
    """The edges that `pack` was given."""
    bits = np.unpackbits(np.frombuffer(packed, dtype=np.uint8), count=graph.real.numel())
    return torch.from_numpy(bits.view(bool)).reshape(graph.real.shape)
