"""How much a circuit has in common with a reference, and how well scores tell the reference's edges from the others."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from patchkit.errors import InputError
from patchkit.model.edges import EdgeGraph
from patchkit.results.circuit import Circuit
from patchkit.results.evaluation import Overlap
from patchkit.results.query_heads import by_query_graph


def overlap(
    found: Circuit,
    truth: Circuit,
    reference: str,
    importance: Float[Tensor, "senders receivers"] | None = None,
    level: Literal["edge", "node"] = "edge",
) -> Overlap:
    """Precision, recall and Jaccard index of a circuit against a reference, and the AUROC of |importances| against it.

    Of nodes, the input is left out: it is in every circuit that leads anywhere. A node is in a circuit if an edge leaves
    it, and its importance is the largest |importance| of those edges. A circuit of the native graph and one by query head
    are compared by query head.

    Args:
        importance: of the edges of `found.graph`; with edges that have no score there is no AUROC.
        reference: what the reference is called.

    Raises:
        InputError: the two are not circuits of one model, or importances of another shape.
    """
    if importance is not None and importance.shape != found.edges.shape:
        raise InputError(
            f"importances of the circuit's graph: expected shape {list(found.edges.shape)}, found "
            f"{list(importance.shape)}"
        )
    unscored = importance is not None and bool((importance.isnan() & found.graph.real).any())
    if found.graph != truth.graph:
        found, truth = _by_query_head(found, truth, reference)
        # Scores are not split up between the heads of a group.
        unscored = unscored or (importance is not None and importance.shape != found.edges.shape)
    if level == "edge":
        ours, theirs = found.edges[found.graph.real], truth.edges[found.graph.real]
    else:
        ours, theirs = found.nodes[1:], truth.nodes[1:]
    ranked = None
    if importance is not None and not unscored:
        size = importance.abs().where(found.graph.real, -torch.inf)
        ranked = auroc(size[found.graph.real] if level == "edge" else size[1:].amax(1), theirs)
    common, either = int((ours & theirs).sum()), int((ours | theirs).sum())
    return Overlap(
        reference=reference,
        level=level,
        found=int(ours.sum()),
        truth=int(theirs.sum()),
        common=common,
        precision=_share(common, int(ours.sum())),
        recall=_share(common, int(theirs.sum())),
        jaccard=_share(common, either),
        auroc=ranked,
    )


def auroc(scores: Float[Tensor, " items"], truth: Bool[Tensor, " items"]) -> float | None:
    """Area under the ROC curve: how often an item of the truth has a higher score than another, ties counting half.

    By the ranks' sum (Mann and Whitney), so in n log n. None where nothing or everything is true.

    Raises:
        InputError: a score is NaN, or as many scores as truths are not there.
    """
    if scores.shape != truth.shape:
        raise InputError(f"auroc: expected one truth a score, found {len(truth)} of {len(scores)}")
    if bool(scores.isnan().any()):
        raise InputError("auroc: expected a number for every item, found NaN")
    positives = int(truth.sum())
    negatives = len(truth) - positives
    if not positives or not negatives:
        return None
    _, group, sizes = scores.unique(sorted=True, return_inverse=True, return_counts=True)
    # Equal scores share the middle of the ranks that they take up.
    middle = sizes.cumsum(0).double() - (sizes - 1).double() / 2
    above = float(middle[group[truth]].sum()) - positives * (positives + 1) / 2
    return above / (positives * negatives)


def _by_query_head(found: Circuit, truth: Circuit, reference: str) -> tuple[Circuit, Circuit]:
    if by_query_graph(found.graph) != by_query_graph(truth.graph):
        raise InputError(
            f"reference '{reference}' is of another model: expected {_sizes(found.graph)}, found {_sizes(truth.graph)}"
        )
    return found.by_query_head(), truth.by_query_head()


def _sizes(graph: EdgeGraph) -> str:
    blocks = "parallel" if graph.parallel else "sequential"
    return f"{graph.n_layers} {blocks} layers of {graph.n_heads} heads and width {graph.d_model}"


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None
