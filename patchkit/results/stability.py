"""Whether a selection of edges hangs on the pairs: the same selection on bootstraps of them."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from patchkit.errors import InputError
from patchkit.model.edges import EdgeGraph
from patchkit.results.circuit import SELECTIONS
from patchkit.results.evaluation import Stability

# Means of resampled pairs that are in memory at once: draws x edges.
_AT_ONCE = 1 << 24


def stability(
    per_pair: Float[Tensor, "pairs senders receivers"],
    graph: EdgeGraph,
    n: int,
    *,
    selection: Literal["top", "greedy"] = "top",
    absolute: bool = False,
    draws: int = 100,
    seed: int = 0,
) -> Stability:
    """Draws pairs with replacement, selects n edges by their mean importance, prunes, and compares the circuits.

    Args:
        per_pair: importances (higher = helps), as `EdgeScores.pair_importance`.
        absolute: edges are ranked by |mean importance|.
        draws: how many bootstraps; each has as many pairs as there are.

    Returns:
        The Jaccard index over all pairs of draws (1 for two circuits that are both empty), and how often each edge of
        the circuit that all pairs together give is in a draw's.

    Raises:
        InputError: fewer than two pairs or draws, an edge without a score, an unknown selection, or a circuit of which
            pruning leaves nothing.
    """
    if selection not in SELECTIONS:
        raise InputError(f"selection '{selection}' is not known; expected one of: {', '.join(SELECTIONS)}")
    if len(per_pair) < 2 or draws < 2:
        raise InputError(
            f"a bootstrap over pairs: expected at least 2 pairs and 2 draws, found {len(per_pair)} and {draws}"
        )
    if tuple(per_pair.shape[1:]) != (graph.n_senders, graph.n_receivers):
        raise InputError(
            f"importances of single pairs: expected shape {[len(per_pair), graph.n_senders, graph.n_receivers]}, found "
            f"{list(per_pair.shape)}"
        )
    values = per_pair[:, graph.real]

    def select(means: Float[Tensor, " edges"]) -> Bool[Tensor, " edges"]:
        importance = torch.full(graph.real.shape, torch.nan, dtype=means.dtype)
        importance[graph.real] = means
        chosen = SELECTIONS[selection](graph, importance, n, absolute=absolute)
        return chosen.pruned().edges[graph.real]

    circuit = select(values.mean(0, dtype=torch.float64))
    if not bool(circuit.any()):
        raise InputError(
            f"{n} edges by selection '{selection}' leave nothing after pruning, so there is no circuit whose stability "
            "could be told; ask for more edges"
        )
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(values), (draws, len(values)), generator=generator)
    weights = torch.zeros(draws, len(values), dtype=torch.float64)
    weights.scatter_add_(1, drawn, torch.full(drawn.shape, 1 / len(values), dtype=torch.float64))
    held = torch.empty(draws, len(circuit), dtype=torch.bool)
    for rows in torch.arange(draws).split(max(1, _AT_ONCE // len(circuit))):
        for row, means in zip(rows.tolist(), _means(weights[rows], values), strict=True):
            held[row] = select(means)
    overlaps = _pairwise_jaccard(held)
    quantiles = torch.quantile(overlaps, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    shares = held[:, circuit].double().mean(0).tolist()
    edges = graph.real.nonzero()[circuit].tolist()
    return Stability(
        draws=draws,
        requested=n,
        jaccard=float(overlaps.mean()),
        interval=(quantiles[0], quantiles[1]),
        frequency=[(graph.edge_name(*edge), share) for edge, share in zip(edges, shares, strict=True)],
    )


def _means(
    weights: Float[Tensor, "draws pairs"], values: Float[Tensor, "pairs edges"]
) -> Float[Tensor, "draws edges"]:
    """Weighted means, summed pair by pair: a product with all values in float64 would hold a copy of them."""
    means = torch.zeros(len(weights), values.shape[1], dtype=torch.float64)
    for column, row in zip(weights.T, values, strict=True):
        means.addr_(column, row.double())
    return means


def _pairwise_jaccard(held: Bool[Tensor, "draws edges"]) -> Float[Tensor, " combinations"]:
    """Of each two draws."""
    held = held[:, held.any(0)]
    common = torch.zeros(len(held), len(held), dtype=torch.float64)
    for part in held.split(max(1, _AT_ONCE // len(held)), dim=1):
        common += (part.float() @ part.float().T).double()
    sizes = held.sum(1, dtype=torch.float64)
    either = sizes[:, None] + sizes - common
    index = torch.where(either > 0, common / either.clamp(min=1), 1.0)
    first, second = torch.triu_indices(len(held), len(held), offset=1)
    return index[first, second]
