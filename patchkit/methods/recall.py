"""Cost of verified recall: what a search pays until the true top nodes are all verified, against an oracle.

AtP* paper (arXiv 2403.00745), evaluation: cost(x) = everything paid when the last of the true top x is verified;
relative cost(x) = cost(x) / x, where an oracle that knows the order and pays nothing for it has 1 exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from patchkit.errors import InputError
from patchkit.methods.search import Search


@dataclass(frozen=True, eq=False)
class Recall:
    """The curve of one search.

    Attributes:
        preparation: forwards per pair before the first verification.
        cost: entry x - 1 is the cost of the true top x, in forwards per pair.
    """

    name: str
    preparation: float
    cost: Float[Tensor, " ranks"]

    @property
    def relative(self) -> Float[Tensor, " ranks"]:
        """cost(x) / x, at least 1."""
        return self.cost / torch.arange(1.0, len(self.cost) + 1, dtype=self.cost.dtype)

    @property
    def aggregate(self) -> float:
        """Geometric mean of the relative costs with weights 1/x: the area above the diagonal on log-log axes."""
        weights = 1 / torch.arange(1.0, len(self.cost) + 1, dtype=torch.float64)
        return float(torch.exp((weights * self.relative.log()).sum() / weights.sum()))

    def unprepared(self) -> Recall:
        """The same order at no cost of preparation: how good it is, whatever it cost."""
        return Recall(self.name, 0.0, self.cost - self.preparation)


def cost_curve(truth: Float[Tensor, " nodes"], search: Search, floor: float = 0.0) -> Recall:
    """The cost of verified recall of a search, on the exact magnitudes of all nodes.

    Nodes whose magnitude is `floor` or less are not asked for: they have no effect beyond rounding, are all equal, and
    the order that rounding gives them is nobody's to find. Every search still pays for those that it verifies on its
    way. Among nodes that tie, any is as good as another, so each search is given the order in which it comes to them.

    Args:
        truth: c(n), not negative.
        floor: the accuracy of `truth`.

    Raises:
        InputError: no node has an effect above the floor, or truth and search speak of different nodes.
    """
    if len(truth) != len(search.cost_at):
        raise InputError(
            f"{search.name} orders {len(search.cost_at)} nodes, but {len(truth)} nodes have a true effect"
        )
    if bool(truth.isnan().any()):
        raise InputError(f"node {int(truth.isnan().nonzero()[0])} has no true effect (NaN); patch every node")
    asked = (truth > floor).nonzero()[:, 0]
    if not len(asked):
        raise InputError(f"no node has an effect above {floor:g}, so there is nothing to recall")
    paid = search.cost_at[asked]
    by_cost = torch.sort(paid, stable=True).indices
    by_truth = torch.sort(truth[asked][by_cost], descending=True, stable=True).indices
    return Recall(search.name, search.preparation, paid[by_cost][by_truth].cummax(0).values)


def mean_recall(recalls: Sequence[Recall]) -> Recall:
    """The geometric mean over pairs of one search's curves, as far as the shortest goes."""
    if len(recalls) == 1:
        return recalls[0]
    length = min(len(each.cost) for each in recalls)
    cost = torch.stack([each.cost[:length] for each in recalls]).log().mean(0).exp()
    # Logarithms round: not below the oracle for that.
    cost = torch.maximum(cost, torch.arange(1.0, length + 1, dtype=cost.dtype))
    preparation = sum(each.preparation for each in recalls) / len(recalls)
    return Recall(recalls[0].name, preparation, cost)
