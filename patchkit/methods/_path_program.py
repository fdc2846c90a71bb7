"""The Program of path patching (Wang et al. 2022, arXiv:2211.00593; Goldowsky-Dill et al. 2023, arXiv:2304.05969).

    pass 1  the base and the source run
    pass 2  the base run with the sender replaced, all other heads held at the base run's values, and MLPs recomputed (or
            held too); what every receiver reads is kept (`_path_carry.py`)
    pass 3  the base run in which each receiver is given what it read in pass 2, and everything else is recomputed

Where the logits are the only receiver, pass 2 ends in them. Where they are one of several, they read the run in which the
sender is replaced and heads (and held MLPs, and MLPs that are receivers) are held at what they wrote in pass 3: the
paths from the sender to the logits and those through the other receivers carry the source together, and no others do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from patchkit.data import resolve_metric
from patchkit.methods._edge_base import EdgeBase, pad_front
from patchkit.methods._edge_items import PathItem, RowEffects, batch_of, by_item
from patchkit.methods._edge_replacement import EdgeReplacement
from patchkit.methods._edge_row_memory import edge_base_numbers, path_numbers, path_rows_bytes
from patchkit.methods._edge_rows import LETTERS, LOGITS, MLP, sorted_by, together
from patchkit.methods._edge_sweep import attention_share, tokens_at_once
from patchkit.methods._path_carry import Carried, Receivers, carry
from patchkit.model import Dims, PatchModel, Site
from patchkit.model.edges import EdgeGraph
from patchkit.runtime import Cost
from patchkit.runtime.batch_memory import Shape, forward_tokens
from patchkit.tracing.restart import Swap, run_swapped, run_watched

Mlps = Literal["recomputed", "frozen"]


@dataclass(frozen=True, eq=False)
class PatchPaths:
    """Each sender of each item, patched along its paths to all receivers.

    `run` gives for each item `effect` (`[items, most]`, exactly 0 for a sender upstream of no receiver, NaN beyond an
    item's own), the metric of the `base` and `source` runs, and the `work` paid, in token-forwards.
    """

    graph: EdgeGraph
    receivers: tuple[int, ...]
    mlps: Mlps
    metric: str
    direction: str
    replacement: EdgeReplacement
    most: int
    max_batch_tokens: int = field(compare=False)

    def tokens(self, item: PathItem) -> int:
        """Counts the patched rows too, though only a part of them is in memory at once."""
        return len(item.pair.clean_ids) * max(1, item.rows // 4)

    def run(self, model: PatchModel, items: Sequence[PathItem]) -> dict[str, Tensor]:
        batch, pair_of = batch_of(model, items, self.direction)
        if self.replacement.causal:
            batch = batch.behind_prefix(model)
        # The logits among others read heads of pass 3, which are compared with the base run's.
        several = self.graph.logits in self.receivers and len(self.receivers) > 1
        run = EdgeBase.of(model, self.graph, batch, self.replacement, attention=several)
        rows = _Rows(self, model, run)
        pair = torch.tensor(pair_of).repeat_interleave(torch.tensor([item.rows for item in items]))
        rows.patch(pair, torch.cat([item.senders for item in items]))
        source = batch.score(rows.metric, rows.run.source_logits, rows.run.base.logits).cpu()
        return by_item(items, batch, pair_of, self.most, rows.found, rows.base_metric, source)

    def cost(self, dims: Dims, items: Sequence[PathItem]) -> Cost:
        """Token-forwards: MLPs from each sender to the receivers, and the layers from the lowest receiver on."""
        receivers = Receivers.of(self.graph, torch.tensor(self.receivers))
        inside = receivers.layer[receivers.letter != LOGITS]
        top = int(inside.max()) if len(inside) else dims.n_layers
        mlp = (1 - attention_share(dims)) / dims.n_layers * (self.mlps == "recomputed")
        forwards = 0.0
        # Rows of one lowest layer that run so many tokens.
        counts: dict[tuple[int, int], int] = {}
        for item in items:
            tokens = len(item.pair.clean_ids)
            # Rows whose prompts differ late start later, but share their runs with others that start before them.
            width = tokens - min(item.covered[0])
            own = (item.senders - 1) // (dims.n_heads + 1)
            reached = item.senders[:, None] < self.graph.upstream[receivers.numbers]
            lowest = torch.where(reached, receivers.layer, dims.n_layers).amin(1)
            inner = lowest < dims.n_layers
            forwards += 2 * tokens
            forwards += width * float(((1 - lowest / dims.n_layers) + mlp * (top - own))[inner].sum())
            if receivers.logits:
                # The logits read the last position alone.
                forwards += mlp * float((dims.n_layers - own).sum())
            for layer, count in zip(*lowest[reached.any(1)].unique(return_counts=True), strict=True):
                run = 1 if int(layer) >= dims.n_layers - 1 else width
                counts[int(layer), run] = counts.get((int(layer), run), 0) + int(count)
        pairs = Shape.of(
            [len(item.pair.clean_ids) for item in {item.number: item for item in items}.values()]
        )
        several = receivers.logits and len(self.receivers) > 1
        kept = pairs.tokens * edge_base_numbers(dims, attention=several) * dims.itemsize
        rows = [(count, width) for (_, width), count in counts.items()]
        given = path_numbers(dims, receivers.layer.tolist(), receivers.letter.tolist())
        at_once = forward_tokens(dims, self.max_batch_tokens)
        return Cost(forwards, kept, path_rows_bytes(dims, pairs, rows, given, at_once))


class _Rows:
    """Rows of one batch, a sender in a pair each; what they gave is collected in `found`."""

    def __init__(self, program: PatchPaths, model: PatchModel, run: EdgeBase) -> None:
        self.program, self.model, self.run = program, model, run
        self.receivers = Receivers.of(program.graph, torch.tensor(program.receivers))
        self.width, self.layers = run.batch.base.width, program.graph.n_layers
        self.recompute = program.mlps == "recomputed"
        self.metric = resolve_metric(program.metric)
        self.base_metric = run.batch.score(self.metric, run.base.logits, run.base.logits).cpu()
        self.found: list[RowEffects] = []

    def patch(self, pair: Int[Tensor, " rows"], sender: Int[Tensor, " rows"]) -> None:
        """Runs the rows that change anything."""
        graph, receivers = self.program.graph, self.receivers
        reached = sender[:, None] < graph.upstream[receivers.numbers]
        columns = self.run.columns(pair, torch.zeros_like(pair), sender)
        # Of what the last layer does at a position only the last one is read, and nothing there changes any other.
        own_position = (receivers.letter == LETTERS.index("q")) | (receivers.letter >= MLP)
        at_the_end = (receivers.layer >= self.layers - 1) & own_position
        last_alone = (~reached | at_the_end).all(1)
        keep = reached.any(1) & torch.where(last_alone, columns[:, -1], columns.any(1))
        start = torch.where(last_alone, self.width - 1, columns.int().argmax(1))
        layer = torch.where(reached, receivers.layer, self.layers).amin(1)
        chosen = keep.nonzero()[:, 0]
        chosen = chosen[sorted_by([layer[chosen], start[chosen], sender[chosen], pair[chosen]])]
        at_once = tokens_at_once(self.model, self.program.max_batch_tokens)
        for lowest in layer[chosen].unique().tolist():
            here = chosen[layer[chosen] == lowest]
            for part, begin in together(start[here], self.width, at_once):
                slots = here[part]
                logits, work = self._run(lowest, pair[slots], sender[slots], begin)
                scored = self.run.batch.score(self.metric, logits, self.run.base.logits, pair[slots]).cpu()
                self.found.append(RowEffects(slots, scored - self.base_metric[pair[slots]], work))

    def _run(
        self, lowest: int, pair: Tensor, sender: Tensor, start: int
    ) -> tuple[Float[Tensor, "rows vocab"], float]:
        """(last-position logits, token-forwards a row) of rows whose lowest receiver is in one layer."""
        inside = self.receivers.letter != LOGITS
        top = int(self.receivers.layer[inside].max()) if lowest < self.layers else self.layers - 1
        carried = carry(self.run, self.receivers, pair, sender, start, recompute=self.recompute, top=top)
        share = (1 - attention_share(self.model.dims)) / self.layers
        work = carried.mlp_rows / len(pair) * share
        if lowest == self.layers:
            return self._end(pair, carried.final), work
        work += (self.width - start) * (1 - lowest / self.layers)
        if not carried.swaps:
            return self.run.base.logits[pair.to(self.run.base.logits.device)], work
        if not self.receivers.logits:
            logits = run_swapped(self.model, self.run.base, pair, carried.swaps, layer=lowest, start=start)
            return logits, work
        logits, added = self._with_logits(lowest, pair, sender, start, carried)
        return logits, work + added * share

    def _with_logits(
        self, lowest: int, pair: Tensor, sender: Tensor, start: int, carried: Carried
    ) -> tuple[Float[Tensor, "rows vocab"], float]:
        """Pass 3, and the stream that the logits read besides: see the module's docstring."""
        end = Site("resid_post", self.layers - 1)
        above = range(lowest, self.layers)
        watched = [Site("attn_out", layer) for layer in above] if self.recompute else [end]
        _, seen = run_watched(
            self.model, self.run.base, pair, carried.swaps, watched, layer=lowest, start=start
        )
        last = self.width - 1
        if not self.recompute:
            gained = seen[end] - self.run.final[pair.to(self.run.final.device), -1]
            own = self.run.changes(pair, torch.zeros_like(pair), sender, last)[:, -1]
            return self._end(pair, gained + own.to(gained.device)), 0.0
        heads = {}
        for layer in above:
            after = seen[Site("attn_out", layer)]
            heads[layer] = (after - self.run.attention(layer)[pair.to(after.device), -1])[:, None]
        both = carry(
            self.run,
            Receivers.of(self.program.graph, torch.tensor([self.program.graph.logits])),
            pair,
            sender,
            last,
            recompute=True,
            top=self.layers - 1,
            heads=heads,
            held=carried.mlps,
        )
        return self._end(pair, both.final), both.mlp_rows / len(pair)

    def _end(self, pair: Tensor, gained: Float[Tensor, "rows d_model"]) -> Float[Tensor, "rows vocab"]:
        """Logits of the final stream with something added at its last position."""
        final = self.run.final
        stream = (final[pair.to(final.device), -1] + gained.to(final.device))[:, None]
        site = Site("resid_post", self.layers - 1)
        where = torch.zeros(len(pair), self.width, 1, dtype=torch.bool)
        where[:, -1] = True
        swap = Swap(site, where, pad_front(stream, self.width), torch.arange(len(pair)))
        return run_swapped(self.model, self.run.base, pair, [swap], layer=site.layer, start=self.width - 1)
