"""Exact activation patching: run the base prompt with a node's activation replaced, and see what the metric does.

    effect(n) = metric(base run with n := what is put in) - metric(base run)

Every patched run restarts at the layer and the token of its patch, and many of them are the rows of one batch
(`patchkit.tracing.restart`); the numbers are those of one whole forward a patch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from patchkit.data import Pair, covering, resolve_metric
from patchkit.errors import InputError
from patchkit.methods._node_memory import patching_bytes
from patchkit.methods._node_options import Asked, NodeOptions, ask
from patchkit.methods._pair_batch import PairBatch, first_difference
from patchkit.methods._replacements import Replacement, replacement
from patchkit.methods._set_rows import SetItem, lay_out, restarts, site_masks
from patchkit.model import Dims, NodeGrid, PatchModel
from patchkit.results.scores import Scores
from patchkit.runtime import Cost, Journal, Progress, run_program
from patchkit.runtime.batch_memory import CPU_FORWARD as CPU_FORWARD
from patchkit.runtime.batch_memory import Shape, forward_tokens
from patchkit.tracing.restart import BEHIND_ATTENTION, Swap, compute_base, run_swapped

#: Nodes of one pair that are patched between two base runs: enough that the base runs are a small part of the work.
NODES_AN_ITEM = 128


@dataclass(frozen=True, eq=False)
class PatchSets:
    """The Program of exact patching: each set of nodes of each item, patched at once.

    `run` gives for each item `effect` (`[items, most]`, NaN beyond an item's own sets), the metric of the `base` and
    `source` runs, and the `work` paid, in token-forwards.
    """

    grid: NodeGrid
    metric: str
    direction: str
    replacement: Replacement
    most: int
    max_batch_tokens: int = field(compare=False)

    def tokens(self, item: SetItem) -> int:
        """Counts the patched rows too, though only a part of them is in memory at once."""
        return item.tokens * max(1, item.sets // 4)

    def run(self, model: PatchModel, items: Sequence[SetItem]) -> dict[str, Tensor]:
        batch, pair_of = _batch_of(model, items, self.direction)
        if self.replacement.causal:
            batch = batch.behind_prefix(model)
        metric = resolve_metric(self.metric)
        sites = self.grid.sites(torch.cat([item.nodes for item in items]))
        behind = sorted({site.layer for site in sites if site.kind in BEHIND_ATTENTION})
        own = sites if self.replacement.needs_own else ()
        base = compute_base(model, batch.base, own, behind_attention=behind)
        values, source_logits = self.replacement.values(model, batch, sites, base.own)
        base_metric = batch.score(metric, base.logits, base.logits).cpu()
        source_metric = batch.score(metric, source_logits, base.logits).cpu()

        unchanged = (
            batch.first_difference() if self.replacement.causal else torch.zeros(len(batch.pairs)).long()
        )
        rows = lay_out(self.grid, items, batch.cover, pair_of, unchanged)
        effects = torch.zeros(len(rows.pair), dtype=base_metric.dtype)
        work = torch.zeros(len(rows.pair))
        on_cpu = model.embed_device.type == "cpu"
        at_once = min(self.max_batch_tokens, CPU_FORWARD) if on_cpu else self.max_batch_tokens
        for restart in restarts(rows, batch.base.width, at_once):
            pairs = rows.pair[restart.rows]
            masks = site_masks(self.grid, rows, restart.rows, batch.cover)
            # Columns before the restart hold the base run's own values, which a row may be said to put in.
            for mask in masks.values():
                mask[:, : restart.start] = False
            swaps = [Swap(site, mask, values[site]) for site, mask in masks.items()]
            # Without keys to restart from, whole prompts are run.
            start = restart.start if base.keys else 0
            logits = run_swapped(model, base, pairs, swaps, layer=restart.layer, start=start)
            effects[restart.rows] = batch.score(metric, logits, base.logits, pairs).cpu() - base_metric[pairs]
            above = 1 - restart.layer / self.grid.dims.n_layers
            work[restart.rows] = (batch.base.width - start) * above
        return self._by_item(items, pair_of, effects, work, base_metric, source_metric, batch)

    def cost(self, dims: Dims, items: Sequence[SetItem]) -> Cost:
        """Token-forwards from the layers and tokens that each set changes, and the memory of rows that run together."""
        unique, pair_of = _unique(items)
        lengths = [item.tokens for item in unique]
        shape = Shape.of(lengths)
        cover = covering([item.covered for item in unique], lengths, shape.width)
        unchanged = torch.zeros(len(unique)).long()
        if self.replacement.causal:
            first = [first_difference(item.pair) for item in unique]
            unchanged = torch.tensor(first) + shape.width - torch.tensor(lengths)
        rows = lay_out(self.grid, items, cover, pair_of, unchanged)
        changing = rows.layer >= 0
        above = 1 - rows.layer[changing] / dims.n_layers
        work = float((above * (shape.width - rows.start[changing])).sum())
        kept, passes = patching_bytes(
            dims,
            shape,
            self.grid.sites(torch.cat([item.nodes for item in items])),
            self.replacement.ablation,
            restarts(rows, shape.width, forward_tokens(dims, self.max_batch_tokens)),
            rows,
        )
        return Cost(2 * sum(lengths) + work, kept, passes)

    def _by_item(
        self,
        items: Sequence[SetItem],
        pair_of: Sequence[int],
        effects: Tensor,
        work: Tensor,
        base: Tensor,
        source: Tensor,
        batch: PairBatch,
    ) -> dict[str, Tensor]:
        found = torch.full((len(items), self.most), torch.nan, dtype=effects.dtype)
        paid = torch.zeros(len(items))
        sizes = [item.sets for item in items]
        of = torch.tensor(pair_of)
        ends = (batch.ends() / torch.bincount(of))[of]
        for place, (each, cost) in enumerate(zip(effects.split(sizes), work.split(sizes), strict=True)):
            found[place, : len(each)] = each
            paid[place] = cost.sum() + ends[place]
        return {"effect": found, "base": base[of], "source": source[of], "work": paid}


def _unique(items: Sequence[SetItem]) -> tuple[list[SetItem], list[int]]:
    """The items' pairs, each once, and for each item where its pair is."""
    first: dict[int, SetItem] = {}
    for item in items:
        first.setdefault(item.number, item)
    place = {number: index for index, number in enumerate(first)}
    return list(first.values()), [place[item.number] for item in items]


def _batch_of(model: PatchModel, items: Sequence[SetItem], direction: str) -> tuple[PairBatch, list[int]]:
    unique, pair_of = _unique(items)
    batch = PairBatch.of(model, [i.pair for i in unique], [i.covered for i in unique], direction)
    return batch, pair_of


def patch_nodes(
    model: PatchModel,
    pairs: Sequence[Pair],
    options: NodeOptions | None = None,
    *,
    reference: Sequence[Pair] | None = None,
    checkpoint: Path | None = None,
    progress: Progress | None = None,
) -> Scores:
    """The exact effect of every node that is asked for, one patch at a time (Vig et al. 2020; Meng et al. 2022).

    Args:
        reference: prompt pairs whose source prompts the ablation `mean` is taken over.
        checkpoint: a directory for finished batches, from which an interrupted run goes on.

    Returns:
        `Scores` of method `exact`; positive effects raise the metric.

    Raises:
        InputError: a node, position or metric that does not exist, pairs that do not align.
    """
    asked = ask(model, pairs, options or NodeOptions())
    made = replacement(model, pairs, asked.options, asked.grid.sites(asked.ids), reference)
    return exact_scores(model, asked, made, asked.ids, checkpoint, progress)


def exact_items(asked: Asked, ids: Int[Tensor, " n"]) -> list[SetItem]:
    """Every node alone, slice by slice of the nodes and pair by pair."""
    return [
        SetItem(number, pair, asked.places.covered[number], part, torch.arange(len(part)), len(part))
        for part in _slices(ids)
        for number, pair in enumerate(asked.pairs)
    ]


def _slices(ids: Int[Tensor, " n"]) -> tuple[Tensor, ...]:
    """Of one size, so that slices of a pair come into one batch and share its base run."""
    return ids.tensor_split(-(-len(ids) // NODES_AN_ITEM))


def exact_scores(
    model: PatchModel,
    asked: Asked,
    made: Replacement,
    ids: Int[Tensor, " n"],
    checkpoint: Path | None = None,
    progress: Progress | None = None,
) -> Scores:
    """`patch_nodes` for some of the nodes, with the replacement made."""
    slices = _slices(ids)
    items = exact_items(asked, ids)
    found = _run(model, asked, made, items, checkpoint, progress, "patching")
    pairs = len(asked.pairs)
    effects = torch.full((pairs, len(asked.grid)), torch.nan, dtype=found["effect"].dtype)
    by_slice = found["effect"].reshape(len(slices), pairs, -1)
    for part, values in zip(slices, by_slice, strict=True):
        effects[:, part] = values[:, : len(part)]
    return Scores(
        grid=asked.grid,
        method="exact",
        convention=asked.options.convention,
        pair_ids=tuple(pair.id for pair in asked.pairs),
        effects=effects,
        magnitudes=effects.abs(),
        base_metric=found["base"][:pairs],
        source_metric=found["source"][:pairs],
        cost=_forward_equivalents(asked, found),
    )


@dataclass(frozen=True, eq=False)
class SetEffects:
    """Effects of sets: `effects[r]` of set r in the pair it was asked for, and what they cost in forward-equivalents
    (1 = one forward over every base prompt)."""

    effects: Float[Tensor, " rows"]
    cost: float


def patch_sets(
    model: PatchModel,
    pairs: Sequence[Pair],
    sets: Sequence[Int[Tensor, " _"]],
    pair_numbers: Sequence[int],
    options: NodeOptions | None = None,
    *,
    reference: Sequence[Pair] | None = None,
    progress: Progress | None = None,
) -> SetEffects:
    """The exact effect of patching whole sets of nodes at once.

    Args:
        sets: node numbers of the grid that `options` span over `pairs` (see `Scores.grid`); one set a row.
        pair_numbers: the pair that each set is patched in.

    Raises:
        InputError: a set and pair that do not belong together, or a number outside the grid.
    """
    asked = ask(model, pairs, options or NodeOptions())
    made = replacement(model, pairs, asked.options, asked.grid.sites(asked.ids), reference)
    return set_effects(model, asked, made, sets, pair_numbers, progress)


def set_effects(
    model: PatchModel,
    asked: Asked,
    made: Replacement,
    sets: Sequence[Int[Tensor, " _"]],
    pair_numbers: Sequence[int],
    progress: Progress | None = None,
    checkpoint: Path | None = None,
) -> SetEffects:
    """`patch_sets` with the replacement made, and what is finished of it kept in `checkpoint`."""
    if len(sets) != len(pair_numbers):
        raise InputError(f"{len(sets)} sets of nodes for {len(pair_numbers)} pair numbers; expected one each")
    for nodes in sets:
        if nodes.numel() and not (0 <= int(nodes.min()) and int(nodes.max()) < len(asked.grid)):
            raise InputError(
                f"a set holds node {int(nodes.max())}, outside the grid of {len(asked.grid)} nodes"
            )
    for number in pair_numbers:
        if not 0 <= number < len(asked.pairs):
            raise InputError(f"pair number {number}: there are {len(asked.pairs)} pairs, numbered from 0")
    items, order = set_items(asked, sets, pair_numbers)
    found = _run(model, asked, made, items, checkpoint, progress, "patching sets")
    effects = torch.empty(len(sets), dtype=found["effect"].dtype)
    for part, values in zip(order, found["effect"], strict=True):
        effects[torch.tensor(part)] = values[: len(part)]
    return SetEffects(effects, _forward_equivalents(asked, found))


def set_items(
    asked: Asked, sets: Sequence[Int[Tensor, " _"]], pair_numbers: Sequence[int]
) -> tuple[list[SetItem], list[list[int]]]:
    """Sets by the pair that each is patched in, and the numbers of each item's sets."""
    mine: dict[int, list[int]] = {}
    for row, number in enumerate(pair_numbers):
        mine.setdefault(number, []).append(row)
    items, order = [], []
    for number, rows in mine.items():
        for begin in range(0, len(rows), NODES_AN_ITEM):
            part = rows[begin : begin + NODES_AN_ITEM]
            order.append(part)
            items.append(
                SetItem(
                    number,
                    asked.pairs[number],
                    asked.places.covered[number],
                    torch.cat([sets[row] for row in part]),
                    torch.arange(len(part)).repeat_interleave(torch.tensor([len(sets[row]) for row in part])),
                    len(part),
                )
            )
    return items, order


def sets_program(asked: Asked, made: Replacement, items: Sequence[SetItem]) -> PatchSets:
    """The Program of these items."""
    options = asked.options
    return PatchSets(
        asked.grid,
        options.metric,
        options.direction,
        made,
        max(item.sets for item in items),
        options.max_batch_tokens,
    )


def _run(
    model: PatchModel,
    asked: Asked,
    made: Replacement,
    items: Sequence[SetItem],
    checkpoint: Path | None,
    progress: Progress | None,
    label: str,
) -> dict[str, Tensor]:
    return run_program(
        sets_program(asked, made, items),
        model,
        items,
        max_batch_tokens=asked.options.max_batch_tokens,
        progress=progress,
        label=label,
        journal=None if checkpoint is None else Journal(checkpoint),
    )


def _forward_equivalents(asked: Asked, found: dict[str, Tensor]) -> float:
    return float(found["work"].double().sum()) / sum(len(pair.clean_ids) for pair in asked.pairs)
