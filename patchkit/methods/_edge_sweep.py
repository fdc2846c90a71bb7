"""The Program of exact edge patching: every edge alone, restarted behind what reads it.

An edge u -> v is patched by giving the receiver v alone the stream x_v + d_u, where d_u is what the stream gains when u
is replaced. What a receiver makes of it is computed first, for all receivers of a layer at once:

- query, key, value inputs: z of a head depends on its own query, key and value alone. So one run of the layer's
  attention, in which all heads' queries (or keys, or values) read x + d_u, gives what each of them would give alone.
  Where queries and keys are normed over all heads at once (OLMo 2) it does not: there each head is a row of its own;
- an MLP: its input is the norm of x + d_u;
- the logits: the stream itself at the last position.

Then each edge is a patched row that takes z of one head, or the MLP's input, or the final stream, and runs the rest of
the model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool
from torch import Tensor

from patchkit.data import resolve_metric
from patchkit.methods._edge_base import EdgeBase, pad_front
from patchkit.methods._edge_items import EdgeItem, RowEffects, batch_of, by_item
from patchkit.methods._edge_replacement import EdgeReplacement
from patchkit.methods._edge_row_memory import edge_base_numbers, edge_rows_bytes
from patchkit.methods._edge_rows import (
    LETTERS,
    LOGITS,
    MLP,
    EdgeRows,
    columns_from,
    lay_out,
    receiver_parts,
    sorted_by,
    together,
)
from patchkit.methods._pair_batch import first_difference
from patchkit.methods.activation_patching import CPU_FORWARD
from patchkit.model import Dims, PatchModel, Site
from patchkit.model.edges import EdgeGraph
from patchkit.runtime import Cost
from patchkit.runtime.batch_memory import Shape, forward_tokens
from patchkit.tracing.receivers import PROJECTIONS, read_by_attention, read_by_mlp
from patchkit.tracing.restart import Swap, read_heads, run_swapped


@dataclass(frozen=True, eq=False)
class PatchEdges:
    """Each edge of each item, patched on its own at each place.

    `run` gives for each item `effect` (`[items, most]`, edges by places, NaN beyond an item's own), the metric of the
    `base` and `source` runs, and the `work` paid, in token-forwards.

    Attributes:
        joint: queries and keys are normed over all heads at once.
    """

    graph: EdgeGraph
    metric: str
    direction: str
    replacement: EdgeReplacement
    joint: bool
    most: int
    max_batch_tokens: int = field(compare=False)

    def tokens(self, item: EdgeItem) -> int:
        """Counts the patched rows too, though only a part of them is in memory at once."""
        return len(item.pair.clean_ids) * max(1, item.rows // 4)

    def run(self, model: PatchModel, items: Sequence[EdgeItem]) -> dict[str, Tensor]:
        batch, pair_of = batch_of(model, items, self.direction)
        if self.replacement.causal:
            batch = batch.behind_prefix(model)
        sweep = _Rows(self, model, EdgeBase.of(model, self.graph, batch, self.replacement))
        rows = lay_out(sweep.run, items, pair_of)
        for layer in range(self.graph.n_layers):
            here = rows.layer == layer
            sweep.attention(layer, rows.take(here & (rows.letter < MLP)))
            sweep.mlp(layer, rows.take(here & (rows.letter == MLP)))
        sweep.logits(rows.take(rows.letter == LOGITS))
        source = batch.score(sweep.metric, sweep.run.source_logits, sweep.run.base.logits).cpu()
        return by_item(items, batch, pair_of, self.most, sweep.found, sweep.base_metric, source)

    def cost(self, dims: Dims, items: Sequence[EdgeItem]) -> Cost:
        """Token-forwards, from the layers and tokens that each edge changes."""
        unique = {item.number: item for item in items}
        pairs = Shape.of([len(item.pair.clean_ids) for item in unique.values()])
        forwards = 2.0 * sum(len(item.pair.clean_ids) for item in unique.values())
        shared = 2 * attention_share(dims) / dims.n_layers / dims.n_heads
        # By (layer, tokens that a row runs).
        reads: Counter[tuple[int, int]] = Counter()
        into_heads: Counter[tuple[int, int]] = Counter()
        others: Counter[tuple[int, int]] = Counter()
        for item in items:
            tokens = len(item.pair.clean_ids)
            first = first_difference(item.pair) if self.replacement.causal else 0
            layer, letter, _ = receiver_parts(self.graph, item.edges[:, 1])
            ending = layer >= dims.n_layers - 1
            above = (1 - layer.double() / dims.n_layers).clamp(min=0.0)
            heads = letter < MLP
            read = torch.stack([layer, letter, item.edges[:, 0]], dim=1)[heads]
            read = read if self.joint else read.unique(dim=0)
            for place in item.covered:
                if max(place) < first:
                    continue
                width = tokens - max(min(place), first)
                forwards += float((above * torch.where(ending, 1.0, float(width))).sum())
                # One run of attention and one of projections for all heads of a layer.
                forwards += shared * width * int(heads.sum())
                ends = ((into_heads, layer[heads]), (others, layer[~heads]), (reads, read[:, 0]))
                for counts, layers in ends:
                    for number, count in zip(*layers.unique(return_counts=True), strict=True):
                        # Of the last layer nothing but the last position is run; keys and values are read at all.
                        at_end = counts is not reads and int(number) >= dims.n_layers - 1
                        counts[int(number), 1 if at_end else width] += int(count)
        kept = pairs.tokens * edge_base_numbers(dims) * dims.itemsize
        passes = edge_rows_bytes(
            dims,
            pairs,
            _counted(reads),
            _counted(into_heads),
            _counted(others),
            forward_tokens(dims, self.max_batch_tokens),
        )
        return Cost(forwards, kept, passes)


def _counted(counts: Counter[tuple[int, int]]) -> list[tuple[int, int]]:
    """(how many, tokens that each runs), from counts by layer and tokens."""
    return [(count, width) for (_, width), count in counts.items()]


def attention_share(dims: Dims) -> float:
    """Which part of a layer's weights its attention's are, an MLP being counted with three matrices."""
    attention = 2 * dims.d_model * (dims.n_heads + dims.n_kv_heads) * dims.d_head
    return attention / (attention + 3 * dims.d_model * dims.d_mlp) if dims.d_mlp else 0.5


def tokens_at_once(model: PatchModel, max_batch_tokens: int) -> int:
    """Tokens of one patched forward."""
    return min(max_batch_tokens, CPU_FORWARD) if model.embed_device.type == "cpu" else max_batch_tokens


class _Rows:
    """Patched rows of one batch; what they gave is collected in `found`."""

    def __init__(self, program: PatchEdges, model: PatchModel, run: EdgeBase) -> None:
        self.program, self.model, self.run = program, model, run
        self.width, self.layers = run.batch.base.width, program.graph.n_layers
        self.metric = resolve_metric(program.metric)
        self.base_metric = run.batch.score(self.metric, run.base.logits, run.base.logits).cpu()
        self.found: list[RowEffects] = []
        self.at_once = tokens_at_once(model, program.max_batch_tokens)

    def attention(self, layer: int, rows: EdgeRows) -> None:
        """Rows whose receivers are queries, keys and values of one layer."""
        if not len(rows):
            return
        # With a joint norm a head's query or key alone is patched in a run of its own; -1: all heads' together.
        alone = self.program.joint & (rows.letter < LETTERS.index("v"))
        copies = self.program.graph.n_kv_heads // self.model.dims.n_kv_heads
        own = torch.where(rows.letter == LETTERS.index("k"), rows.head // copies, rows.head)
        member = torch.where(alone, own, -1)
        keys = torch.stack([rows.reads, rows.sender, rows.place, rows.pair, rows.letter, member], dim=1)
        reads, read_of = keys.unique(dim=0, return_inverse=True)
        for part, start in together(reads[:, 0], self.width, self.at_once):
            heads, paid = self._heads(layer, reads[part, 1:], start)
            mine = ((read_of >= part.start) & (read_of < part.stop)).nonzero()[:, 0]
            order = mine[sorted_by([rows.start[mine], read_of[mine]])]
            edges, takes = rows.take(order), read_of[order] - part.start
            share = paid / len(order)
            for some, begin in together(edges.start, self.width, self.at_once):
                chosen = edges.take(some)
                where = self._columns(chosen)[..., None] & self._read_by(chosen)[:, None, :]
                swap = Swap(Site("z", layer), where, heads, takes[some])
                self._finish(chosen, swap, layer, begin, share)

    def mlp(self, layer: int, rows: EdgeRows) -> None:
        """Rows whose receiver is the MLP of one layer."""
        rows = rows.take(sorted_by([rows.start, rows.sender, rows.place, rows.pair]))
        for some, start in together(rows.start, self.width, self.at_once):
            chosen = rows.take(some)
            stream = self._changed(self.run.read_by_mlp(layer), chosen, start)
            read = pad_front(read_by_mlp(self.model, layer, stream), self.width)
            self._finish(chosen, self._own(Site("mlp_in", layer), chosen, read), layer, start)

    def logits(self, rows: EdgeRows) -> None:
        """Rows whose receiver is the logits, which read the last position alone."""
        site = Site("resid_post", self.layers - 1)
        rows = rows.take(sorted_by([rows.sender, rows.place, rows.pair]))
        for some, start in together(rows.start, self.width, self.at_once):
            chosen = rows.take(some)
            stream = pad_front(self._changed(self.run.final, chosen, start), self.width)
            self._finish(chosen, self._own(site, chosen, stream), site.layer, start)

    def _heads(self, layer: int, reads: Tensor, start: int) -> tuple[Tensor, float]:
        """(z of all heads in each run, `[reads, width, head, d_head]`; the token-forwards that it took).

        Args:
            reads: (sender, place, pair, letter, head or -1) of each.
        """
        changes, takes = reads[:, :3].unique(dim=0, return_inverse=True)
        sender, place, pair = changes.T
        gained = self.run.changes(pair, place, sender, start)
        stream = self.run.read_by_attention(layer)
        made = read_by_attention(
            self.model, layer, stream[pair.to(stream.device), start:] + gained.to(stream.device)
        )
        columns = self.run.columns(pair, place, sender)[takes]
        columns = columns & (torch.arange(self.width) >= start)
        swaps = []
        for number, letter in enumerate(LETTERS):
            if bool((reads[:, 3] == number).any()):
                value = pad_front(made[letter], self.width)
                heads = torch.arange(value.shape[2])
                patched = (reads[:, 3:4] == number) & ((reads[:, 4:5] < 0) | (reads[:, 4:5] == heads))
                where = columns[..., None] & patched[:, None, :]
                swaps.append(Swap(Site(PROJECTIONS[letter], layer), where, value, takes))
        heads = read_heads(self.model, self.run.base, reads[:, 2], swaps, layer=layer, start=start)
        share = attention_share(self.model.dims) / self.layers
        paid = (len(reads) + len(changes)) * (self.width - start) * share
        return pad_front(heads, self.width), paid

    def _columns(self, rows: EdgeRows) -> Bool[Tensor, "rows width"]:
        """Padded columns that what each row patches differs in."""
        columns = self.run.columns(rows.pair, rows.place, rows.sender)
        after = (rows.letter == LETTERS.index("k")) | (rows.letter == LETTERS.index("v"))
        return columns_from(columns, rows.start, after)

    def _read_by(self, rows: EdgeRows) -> Bool[Tensor, "rows head"]:
        """The query heads whose z each row patches: those that read what changed."""
        graph, heads = self.program.graph, torch.arange(self.program.graph.n_heads)
        query = rows.letter == LETTERS.index("q")
        group = graph.n_heads // graph.n_kv_heads
        own = torch.where(query[:, None], heads, heads // group) == rows.head[:, None]
        if not self.program.joint:
            return own
        # The norm over all heads carries a head's query to the others, and a KV head's key; but in a graph by query head
        # a key is one head's own copy.
        spread = query if graph.n_kv_heads > self.model.dims.n_kv_heads else rows.letter < LETTERS.index("v")
        return own | spread[:, None]

    def _changed(self, stream: Tensor, rows: EdgeRows, start: int) -> Tensor:
        gained = self.run.changes(rows.pair, rows.place, rows.sender, start)
        return stream[rows.pair.to(stream.device), start:] + gained.to(stream.device)

    def _own(self, site: Site, rows: EdgeRows, values: Tensor) -> Swap:
        """A swap in which every row brings its own values."""
        return Swap(site, self._columns(rows)[..., None], values, torch.arange(len(rows)))

    def _finish(self, rows: EdgeRows, swap: Swap, layer: int, start: int, paid: float = 0.0) -> None:
        """Runs the rest of the model and scores it."""
        logits = run_swapped(self.model, self.run.base, rows.pair, [swap], layer=layer, start=start)
        scored = self.run.batch.score(self.metric, logits, self.run.base.logits, rows.pair).cpu()
        work = paid + (self.width - start) * (1 - layer / self.layers)
        self.found.append(RowEffects(rows.slot, scored - self.base_metric[rows.pair], work))
