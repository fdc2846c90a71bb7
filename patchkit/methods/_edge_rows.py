"""Edges as rows of patched runs: what each row changes first, and which rows run together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from patchkit.methods._edge_base import EdgeBase
from patchkit.methods._edge_items import EdgeItem
from patchkit.methods._set_rows import SMALL_FORWARD
from patchkit.model.edges import EdgeGraph

#: Letters by number; what else reads the stream comes after them.
LETTERS = "qkv"
MLP, LOGITS = 3, 4


@dataclass(frozen=True, eq=False)
class EdgeRows:
    """Rows that change anything; one edge of one pair at one place each.

    Attributes:
        slot: the row's number among all that the items ask for.
        pair: in the batch.
        layer: of the receiver; the number of layers for the logits.
        letter: which input of a head, or `MLP` or `LOGITS`.
        head: of the receiver, as its graph counts; 0 where there is none.
        reads: the first padded column whose reading changes.
        start: the first padded column that the row's run must compute.
    """

    slot: Int[Tensor, " rows"]
    pair: Int[Tensor, " rows"]
    place: Int[Tensor, " rows"]
    sender: Int[Tensor, " rows"]
    layer: Int[Tensor, " rows"]
    letter: Int[Tensor, " rows"]
    head: Int[Tensor, " rows"]
    reads: Int[Tensor, " rows"]
    start: Int[Tensor, " rows"]

    def __len__(self) -> int:
        return len(self.slot)

    def take(self, which: Tensor | slice) -> EdgeRows:
        """Some of the rows."""
        return EdgeRows(*(getattr(self, field.name)[which] for field in fields(self)))


def receiver_parts(
    graph: EdgeGraph, receivers: Int[Tensor, " n"]
) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"], Int[Tensor, " n"]]:
    """(layer, letter, head) of receivers; see `EdgeRows`."""
    layer, place = receivers // graph.receivers_a_layer, receivers % graph.receivers_a_layer
    ends = torch.tensor([graph.n_heads, graph.n_kv_heads, graph.n_kv_heads, 1]).cumsum(0)
    letter = torch.bucketize(place, ends, right=True)
    head = place - torch.cat([torch.zeros(1, dtype=torch.long), ends])[letter]
    logits = receivers == graph.logits
    return layer, letter.masked_fill(logits, LOGITS), head.masked_fill(logits, 0)


def lay_out(run: EdgeBase, items: Sequence[EdgeItem], pair_of: Sequence[int]) -> EdgeRows:
    """All edges of all items at all their places; those that cannot change the metric are left out."""
    graph, width = run.graph, run.batch.base.width
    parts: list[Tensor] = []
    offset = 0
    for item, pair in zip(items, pair_of, strict=True):
        places = len(item.covered)
        edges = item.edges.repeat_interleave(places, dim=0)
        slot = torch.arange(item.rows)
        parts.append(
            torch.stack([slot + offset, torch.full_like(slot, pair), slot % places, *edges.T], dim=1)
        )
        offset += item.rows
    slot, pair, place, sender, receiver = torch.cat(parts).T.contiguous()
    layer, letter, head = receiver_parts(graph, receiver)
    columns = run.columns(pair, place, sender)
    first = columns.int().argmax(1)
    # A query and an MLP change their own position only, and of the last layer the last position alone is read; keys and
    # values change what every later position sees.
    ending = layer >= graph.n_layers - 1
    own_position = (letter == LETTERS.index("q")) | (letter >= MLP)
    keep = torch.where(ending & own_position, columns[:, -1], columns.any(1))
    last = torch.full_like(first, width - 1)
    rows = EdgeRows(
        slot,
        pair,
        place,
        sender,
        layer,
        letter,
        head,
        reads=torch.where(ending & own_position, last, first),
        start=torch.where(ending, last, first),
    )
    return rows.take(keep)


def together(starts: Int[Tensor, " rows"], width: int, max_tokens: int) -> Iterator[tuple[slice, int]]:
    """(rows, column they start at) of runs within a budget of tokens, for rows sorted by where they start.

    Rows of neighbouring columns share a run while it is small: opening a trace costs more than a few tokens.
    """
    begin, listed = 0, starts.tolist()
    for end in range(1, len(listed) + 1):
        length = width - listed[begin]
        if end < len(listed) and (end - begin + 1) * length <= max_tokens:
            if listed[end] == listed[begin] or (end - begin) * length < SMALL_FORWARD:
                continue
        yield slice(begin, end), listed[begin]
        begin = end


def sorted_by(keys: Sequence[Int[Tensor, " rows"]]) -> Int[Tensor, " rows"]:
    """The order of rows by the first key, within it by the second, and so on."""
    order = torch.arange(len(keys[0]))
    for key in reversed(keys):
        order = order[torch.argsort(key[order], stable=True)]
    return order


def columns_from(
    columns: Bool[Tensor, "rows width"], start: Int[Tensor, " rows"], after: Bool[Tensor, " rows"]
) -> Bool[Tensor, "rows width"]:
    """Which columns each row replaces, from its start on: those that change, or (`after`) all from the first such on."""
    seen = torch.where(after[:, None], columns.int().cummax(1).values.bool(), columns)
    return seen & (torch.arange(columns.shape[1]) >= start[:, None])
