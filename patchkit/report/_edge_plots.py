"""Pictures of edges: the circuit of the largest, effects by layer and by position, and how few edges hold most of it."""

from __future__ import annotations

import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from patchkit.model.edges import EdgeGraph
from patchkit.report._canvas import figure_of, log_axis, quiet_axes, style
from patchkit.report._circuit_plot import circuit_figure
from patchkit.report._edge_words import flows, sizes, what
from patchkit.report._html import count
from patchkit.report._largest import largest
from patchkit.report._matrix_plot import Matrix
from patchkit.report._palette import LIGHT
from patchkit.results.circuit import Circuit, greedy
from patchkit.results.edge_scores import EdgeScores

#: Edges of the picture of the largest.
PICTURED = 40
#: Edges whose effect is shown position by position.
PLACED = 15

_POINTS = 400
_KINDS = {"q": "into queries", "k": "into keys", "v": "into values", "m": "into MLPs", "logits": "logits"}


def over_places(scores: EdgeScores, values: Tensor) -> Float[Tensor, "senders receivers"]:
    """One number an edge: its sum over places; NaN where no place has one."""
    if not scores.placed:
        return values
    return values.nansum(0).masked_fill(values.isnan().all(0), torch.nan)


def pictured(scores: EdgeScores) -> Circuit:
    """What the picture shows: what ACDC kept, the routes that end at the logits, or the largest edges as they are."""
    if scores.circuit is not None:
        return scores.circuit
    size = over_places(scores, sizes(scores))
    if flows(scores):
        # A share says how much of one stream is whose: only along a route to the logits does it say what that is for.
        return greedy(scores.graph, over_places(scores, scores.mean_abs), PICTURED, absolute=False)
    found = size.flatten()
    order = largest(found, PICTURED)
    chosen = torch.zeros(found.numel(), dtype=torch.bool)
    chosen[order[found[order] > 0]] = True
    return Circuit(scores.graph, chosen.reshape(size.shape))


def edges_figure(scores: EdgeScores) -> Figure:
    """The picture of `pictured`: widths by mean |effect|, dashes by the sign of the mean."""
    return circuit_figure(
        pictured(scores),
        over_places(scores, scores.importance),
        sizes=over_places(scores, scores.mean_abs),
        signed=not flows(scores),
        what=what(scores),
    )


def layer_maps(scores: EdgeScores) -> tuple[list[Matrix], list[str]]:
    """Sums of mean |effect| over all edges from one layer to another, a map a kind of receiver; and the rows' names."""
    graph = scores.graph
    size = over_places(scores, scores.mean_abs).double().nan_to_num(nan=0.0)
    rows = torch.zeros(graph.n_layers + 1, graph.n_receivers, dtype=torch.float64)
    layers = torch.tensor([graph.layer_of_sender(sender) + 1 for sender in range(graph.n_senders)])
    rows.index_add_(0, layers, size)
    maps = []
    numbers = [str(layer) for layer in range(graph.n_layers)]
    for kind, title in _KINDS.items():
        if kind == "logits":
            maps.append(Matrix(title, rows[:, graph.logits :].float(), [""]))
            continue
        cells = torch.stack([_into(graph, rows, layer, kind) for layer in range(graph.n_layers)], dim=1)
        # Later layers, and a parallel block's own heads, do not feed a receiver.
        above = torch.arange(graph.n_layers + 1)[:, None] - 1 - torch.arange(graph.n_layers)
        last = 0 if kind == "m" and not graph.parallel else -1
        maps.append(
            Matrix(title, cells.masked_fill(above > last, torch.nan).float(), numbers, "layer of receiver")
        )
    return maps, ["input", *numbers]


def _into(graph: EdgeGraph, rows: Tensor, layer: int, kind: str) -> Float[Tensor, " layers"]:
    if kind == "m":
        return rows[:, graph.mlp_receiver(layer)]
    return rows[:, graph.receivers_of(layer, kind)].sum(1)


def place_map(scores: EdgeScores) -> tuple[Matrix, list[str]]:
    """The signed mean effect of the largest edges at each place, and the edges' names."""
    size = over_places(scores, sizes(scores)).flatten()
    order = largest(size, PLACED)
    order = order[size[order] > 0]
    senders, receivers = order // scores.graph.n_receivers, order % scores.graph.n_receivers
    names = [scores.graph.edge_name(*edge) for edge in zip(senders.tolist(), receivers.tolist(), strict=True)]
    return Matrix("", scores.mean[:, senders, receivers].T.float(), scores.places, "position"), names


def shares(scores: EdgeScores) -> Float[Tensor, " edges"]:
    """The part of all mean |effect| that the largest n edges hold, for n = 1, 2, ...; empty when nothing has any."""
    size = sizes(scores).flatten()
    found = size[(size > 0) & size.isfinite()].double().sort(descending=True).values
    return found.cumsum(0) / found.sum() if len(found) else found


def needed(held: Float[Tensor, " edges"], share: float) -> int:
    """How many of the largest edges hold this share."""
    return min(len(held), int((held < share - 1e-12).sum()) + 1) if len(held) else 0


@style()
def concentration_figure(scores: EdgeScores, held: Float[Tensor, " edges"]) -> Figure:
    """The share of all mean |effect| in the largest n edges (`shares`) against n, on a logarithmic axis."""
    figure = figure_of(5.2, 3.3)
    axes = figure.subplots()
    if len(held):
        ranks = torch.logspace(0, torch.tensor(float(len(held))).log10().item(), _POINTS).round().long()
        ranks = ranks.clamp(1, len(held)).unique()
        axes.plot(ranks.tolist(), (100 * held[ranks - 1]).tolist(), color=LIGHT["s0"], lw=2, zorder=3)
        even = ranks.double() / len(held)
        axes.plot(ranks.tolist(), (100 * even).tolist(), color=LIGHT["soft"], lw=1, ls="--")
        middle = int(len(held) ** 0.8)
        axes.annotate("if all were equal", (middle, 100 * middle / len(held)), xytext=(-6, 8), size=8, ha="right",
                      textcoords="offset points", color=LIGHT["soft"])  # fmt: skip
        for share in (0.5, 0.9):
            at = needed(held, share)
            axes.plot(at, 100 * float(held[at - 1]), "o", color=LIGHT["chosen"], ms=6, zorder=4)
            axes.annotate(f"{100 * share:.0f} % in {count(at)}", (at, 100 * float(held[at - 1])), xytext=(-8, 4),
                          textcoords="offset points", ha="right", size=8.5)  # fmt: skip
        log_axis(axes, "x")
        # The label of the first mark needs room on its left.
        axes.set_xlim(0.6, 1.4 * len(held))
    axes.set_ylim(0, 104)
    axes.set_xlabel("largest edges")
    axes.set_ylabel(f"% of all {what(scores)}")
    quiet_axes(axes, "both")
    return figure
