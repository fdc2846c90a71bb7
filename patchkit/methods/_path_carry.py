"""The second pass of path patching: what the stream gains when a sender is replaced and all other heads are held.

Held heads write what they wrote, so no attention is run: the change passes from the sender through MLPs, position by
position, and what it has become wherever a receiver reads the stream is what that receiver is given.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from patchkit.methods._edge_base import EdgeBase, Numbers, pad_front
from patchkit.methods._edge_rows import LETTERS, LOGITS, MLP, receiver_parts
from patchkit.model import Site
from patchkit.model.edges import EdgeGraph
from patchkit.tracing.receivers import PROJECTIONS, read_by_attention, read_by_mlp, written_by_mlp
from patchkit.tracing.restart import Swap


@dataclass(frozen=True, eq=False)
class Receivers:
    """Receivers whose inputs are put in together.

    Attributes:
        numbers: of the native graph, ascending.
        layer, letter, head: of each; see `EdgeRows`.
    """

    graph: EdgeGraph
    numbers: Int[Tensor, " receivers"]
    layer: Int[Tensor, " receivers"]
    letter: Int[Tensor, " receivers"]
    head: Int[Tensor, " receivers"]

    @classmethod
    def of(cls, graph: EdgeGraph, numbers: Int[Tensor, " receivers"]) -> Receivers:
        return cls(graph, numbers, *receiver_parts(graph, numbers))

    @property
    def logits(self) -> bool:
        """Whether the logits are one of them."""
        return bool((self.letter == LOGITS).any())

    @property
    def several_stages(self) -> bool:
        """Whether what one of them, the logits aside, is given could change what another one reads."""
        inside = self.letter != LOGITS
        return len((2 * self.layer + (self.letter == MLP))[inside].unique()) > 1

    def heads(self, layer: int, letter: str) -> list[int]:
        """Heads of the layer whose query, key or value is one of them."""
        return self.head[(self.layer == layer) & (self.letter == LETTERS.index(letter))].tolist()

    def has_mlp(self, layer: int) -> bool:
        return bool(((self.layer == layer) & (self.letter == MLP)).any())


@dataclass(frozen=True, eq=False)
class Carried:
    """What the change of each row has become.

    Attributes:
        swaps: what the receivers in heads and MLPs are given, by row.
        final: what the last position of the final stream gains.
        mlps: what it gains there by MLPs that are receivers, by layer.
        mlp_rows: rows of MLPs that were run, one for each token and layer.
    """

    swaps: list[Swap]
    final: Float[Tensor, "rows d_model"]
    mlps: dict[int, Float[Tensor, "rows d_model"]] = field(default_factory=dict)
    mlp_rows: int = 0


def carry(
    run: EdgeBase,
    receivers: Receivers,
    pair: Numbers,
    sender: Numbers,
    start: int,
    *,
    recompute: bool,
    top: int,
    heads: Mapping[int, Float[Tensor, "rows position d_model"]] | None = None,
    held: Mapping[int, Float[Tensor, "rows d_model"]] | None = None,
) -> Carried:
    """Follows the change of each row's sender up the stream.

    Args:
        start: the first padded column that is followed.
        recompute: whether MLPs that read a changed stream pass the change on.
        top: the last layer that is followed.
        heads: what else the stream gains by the heads of a layer.
        held: what MLPs add at the last position, whatever they read.
    """
    graph, device = run.graph, run.own.input.device
    gained = run.changes(pair, torch.zeros_like(pair), sender, start)
    nothing = torch.zeros_like(gained)

    def of(module: slice) -> Tensor:
        mine = ((sender >= module.start) & (sender < module.stop)).to(gained.device)
        return torch.where(mine[:, None, None], gained, nothing)

    change = of(slice(0, 1))
    swaps: list[Swap] = []
    mlps: dict[int, Tensor] = {}
    counted = 0
    lowest = max(0, int(graph.layer_of_sender(int(sender.min()))))
    for layer in range(lowest, top + 1):
        swaps += _given_to_heads(run, receivers, layer, pair, sender, change, start)
        by_heads = of(graph.heads(layer))
        if heads is not None and layer in heads:
            by_heads = by_heads + heads[layer].to(device)
        if not graph.parallel:
            change = change + by_heads
        swaps += _given_to_mlp(run, receivers, layer, pair, sender, change, start)
        written = nothing
        if held is not None and layer in held:
            written = held[layer][:, None].to(device)
        elif recompute:
            written, rows = _passed_on(run, layer, pair, change, start)
            counted += rows
        if receivers.has_mlp(layer):
            mlps[layer] = written[:, -1]
        change = change + written
        if graph.parallel:
            change = change + by_heads
        number = graph.mlp_sender(layer)
        change = change + of(slice(number, number + 1))
    return Carried(swaps, change[:, -1], mlps, counted)


def _passed_on(
    run: EdgeBase, layer: int, pair: Numbers, change: Float[Tensor, "rows position d_model"], start: int
) -> tuple[Float[Tensor, "rows position d_model"], int]:
    """(what the stream gains by an MLP that reads it changed, tokens it was run on); nothing where it is not changed."""
    written = torch.zeros_like(change)
    moved = (change != 0).any(-1)
    rows = moved.any(1).nonzero()[:, 0]
    if not len(rows):
        return written, 0
    own = run.own.mlps[layer]
    stream = _changed(run.read_by_mlp(layer), pair[rows.cpu()], change[rows], start)
    made = written_by_mlp(run.model, layer, stream)
    gained = made - own[pair[rows.cpu()].to(own.device), start:].to(made.device)
    written[rows] = gained.to(change.device).masked_fill(~moved[rows][..., None], 0.0)
    return written, len(rows) * change.shape[1]


def _given_to_heads(
    run: EdgeBase,
    receivers: Receivers,
    layer: int,
    pair: Numbers,
    sender: Numbers,
    change: Float[Tensor, "rows position d_model"],
    start: int,
) -> list[Swap]:
    """What the receivers among a layer's queries, keys and values are given."""
    wanted = {letter: receivers.heads(layer, letter) for letter in LETTERS}
    reached = sender < run.graph.upstream[run.graph.attention_receivers(layer).start]
    if not any(wanted.values()) or not bool(reached.any()):
        return []
    made = read_by_attention(run.model, layer, _changed(run.read_by_attention(layer), pair, change, start))
    columns = _columns(run, receivers, reached, change, start)
    swaps = []
    for letter, heads in wanted.items():
        if heads:
            value = pad_front(made[letter], run.batch.base.width)
            patched = torch.zeros(value.shape[2], dtype=torch.bool)
            patched[heads] = True
            where = columns[..., None] & patched
            swaps.append(Swap(Site(PROJECTIONS[letter], layer), where, value, torch.arange(len(pair))))
    return swaps


def _given_to_mlp(
    run: EdgeBase,
    receivers: Receivers,
    layer: int,
    pair: Numbers,
    sender: Numbers,
    change: Float[Tensor, "rows position d_model"],
    start: int,
) -> list[Swap]:
    """What a layer's MLP, if it is a receiver, is given."""
    reached = sender < run.graph.upstream[run.graph.mlp_receiver(layer)]
    if not receivers.has_mlp(layer) or not bool(reached.any()):
        return []
    read = read_by_mlp(run.model, layer, _changed(run.read_by_mlp(layer), pair, change, start))
    where = _columns(run, receivers, reached, change, start)[..., None]
    value = pad_front(read, run.batch.base.width)
    return [Swap(Site("mlp_in", layer), where, value, torch.arange(len(pair)))]


def _changed(stream: Tensor, pair: Numbers, change: Tensor, start: int) -> Tensor:
    return stream[pair.to(stream.device), start:] + change.to(stream.device)


def _columns(
    run: EdgeBase,
    receivers: Receivers,
    reached: Bool[Tensor, " rows"],
    change: Float[Tensor, "rows position d_model"],
    start: int,
) -> Bool[Tensor, "rows width"]:
    """Padded columns in which a receiver is given what it read in pass 2.

    Those that changed; but above another receiver all of them, for there the run of pass 3 has moved everywhere.
    """
    given = (change != 0).any(-1).cpu() | receivers.several_stages
    given = given & reached[:, None]
    return torch.cat([given.new_zeros(len(given), start), given], dim=1)
