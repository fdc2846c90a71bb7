"""Sets of nodes as rows of patched runs: where each row may restart, and which rows run together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from patchkit.data import Pair
from patchkit.model import KINDS, NodeGrid, Site
from patchkit.tracing.restart import BEHIND_ATTENTION, LOCAL_AT_THE_END

#: Rows of neighbouring restarts are run together until a forward has this many tokens: below it, opening a trace
#: costs more than the tokens that are run for nothing.
SMALL_FORWARD = 256


@dataclass(frozen=True, eq=False)
class SetItem:
    """Sets of nodes to patch in one pair, each set at once and on its own.

    Attributes:
        number: which pair this is, so that items of one pair share its base run.
        covered: the tokens of each place of the grid.
        nodes: node numbers of all sets, one after the other.
        owner: the set, from 0, that each of `nodes` belongs to.
        sets: how many sets there are; one without nodes patches nothing.
    """

    number: int = field(compare=False)
    pair: Pair
    covered: tuple[tuple[int, ...], ...]
    nodes: Int[Tensor, " n"]
    owner: Int[Tensor, " n"]
    sets: int

    @property
    def tokens(self) -> int:
        return len(self.pair.clean_ids)


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of patched runs and the nodes that each puts in.

    Attributes:
        pair: the pair of each row, in the batch.
        layer: the first layer that the row changes; -1 where it changes nothing.
        behind: whether it leaves that layer's attention as it was.
        start: the first padded column that it changes.
        row, kind, at_layer, place, unit: one entry for each node of each row.
    """

    pair: Int[Tensor, " rows"]
    layer: Int[Tensor, " rows"]
    behind: Bool[Tensor, " rows"]
    start: Int[Tensor, " rows"]
    row: Int[Tensor, " entries"]
    kind: Int[Tensor, " entries"]
    at_layer: Int[Tensor, " entries"]
    place: Int[Tensor, " entries"]
    unit: Int[Tensor, " entries"]


@dataclass(frozen=True)
class Restart:
    """Rows that run together, from one layer and column."""

    rows: Int[Tensor, " n"]
    layer: int
    start: int


def lay_out(
    grid: NodeGrid,
    items: Sequence[SetItem],
    cover: Bool[Tensor, "pairs places width"],
    pair_of: Sequence[int],
    unchanged: Int[Tensor, " pairs"],
) -> Rows:
    """All sets of all items as rows.

    Args:
        cover: padded columns of each place of each pair.
        pair_of: the pair of each item.
        unchanged: in each pair, what is put in equals the run's own before this column; nodes that lie before it
            alone are left out, since patching them changes nothing.
    """
    width = cover.shape[2]
    firsts, offset = [], 0
    for item in items:
        firsts.append(item.owner + offset)
        offset += item.sets
    row = torch.cat(firsts)
    pair = torch.tensor(list(pair_of)).repeat_interleave(torch.tensor([item.sets for item in items]))
    where = grid.locate(torch.cat([item.nodes for item in items]))
    columns = torch.arange(width)
    last = torch.where(cover, columns, -1).amax(-1)[pair[row], where.place]
    first = torch.where(cover, columns, width).amin(-1)[pair[row], where.place]
    first = torch.maximum(first, unchanged[pair[row]])
    # At the end of the last layer a position is read by none but itself, and the last one alone becomes logits.
    local = torch.tensor([kind in LOCAL_AT_THE_END for kind in grid.kinds])[where.kind]
    at_the_end = local & (where.layer == grid.dims.n_layers - 1)
    first = torch.where(at_the_end, first.clamp(min=width - 1), first)
    keep = last >= first
    row, first = row[keep], first[keep]
    kind, at_layer, place, unit = (part[keep] for part in where)
    behind = torch.tensor([kind in BEHIND_ATTENTION for kind in grid.kinds])[kind]
    stage = torch.full((offset,), 2 * grid.dims.n_layers)
    stage = stage.scatter_reduce(0, row, 2 * at_layer + behind, "amin")
    start = torch.full((offset,), width).scatter_reduce(0, row, first, "amin")
    layer = (stage // 2).masked_fill(start == width, -1)
    return Rows(pair, layer, stage % 2 == 1, start, row, kind, at_layer, place, unit)


def restarts(rows: Rows, width: int, max_batch_tokens: int) -> Iterator[Restart]:
    """The rows that change anything, in batches of one layer and of neighbouring columns, within the budget."""
    changing = (rows.layer >= 0).nonzero()[:, 0]
    stage = 2 * rows.layer[changing] + rows.behind[changing]
    by_place = torch.argsort(stage * (width + 1) + rows.start[changing], stable=True)
    order, stages = changing[by_place], stage[by_place].tolist()
    starts = rows.start[order].tolist()
    most = max(1, max_batch_tokens // width)
    begin = 0
    for end in range(1, len(order) + 1):
        if end < len(order):
            held = end - begin
            small = held * (width - starts[begin]) < SMALL_FORWARD
            if held < most and stages[end] == stages[begin] and (starts[end] == starts[begin] or small):
                continue
        yield Restart(order[begin:end], stages[begin] // 2, starts[begin])
        begin = end


def site_masks(
    grid: NodeGrid, rows: Rows, chosen: Int[Tensor, " n"], cover: Bool[Tensor, "pairs places width"]
) -> dict[Site, Bool[Tensor, "n width nodes"]]:
    """For each site that the chosen rows patch: the nodes and padded columns that each row replaces."""
    local = torch.full((len(rows.pair),), -1)
    local[chosen] = torch.arange(len(chosen))
    mine = local[rows.row] >= 0
    row, kind, layer = local[rows.row[mine]], rows.kind[mine], rows.at_layer[mine]
    unit, columns = rows.unit[mine], cover[rows.pair[rows.row[mine]], rows.place[mine]]
    masks: dict[Site, Tensor] = {}
    site_key = kind * grid.dims.n_layers + layer
    for key in site_key.unique().tolist():
        here = site_key == key
        name = grid.kinds[key // grid.dims.n_layers]
        count = KINDS[name].count(grid.dims)
        at, units, where = row[here], unit[here], columns[here]
        if name == "neuron" and grid.group > 1:
            members = units[:, None] * grid.group + torch.arange(grid.group)
            inside = members < count
            at, where = (each.repeat_interleave(inside.sum(1), dim=0) for each in (at, where))
            units = members[inside]
        hits = torch.zeros(len(chosen), count, cover.shape[2], dtype=torch.int16)
        hits.index_put_((at, units), where.to(torch.int16), accumulate=True)
        masks[Site(name, key % grid.dims.n_layers)] = (hits > 0).transpose(1, 2).contiguous()
    return masks
