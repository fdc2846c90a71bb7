"""The decisions of ACDC, receiver by receiver.

Edges are tried in groups, each as if those before it in the group were decided as the last one was; whatever comes after
one that was not is thrown away and tried anew, so that the decisions are those of one edge at a time. All that is run is
counted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool
from torch import Tensor

from patchkit.methods._acdc_order import known_at
from patchkit.methods._acdc_trials import Trials
from patchkit.model.edges import EdgeGraph


class Search:
    """The circuit as it stands.

    Attributes:
        edges: what is left of the graph.
        current: its metric on each pair.
        mean, mean_abs: effects of the edges that were tried.
    """

    def __init__(
        self,
        graph: EdgeGraph,
        trials: Trials,
        tau: float,
        turned: float,
        absolute: bool,
        max_forwards: float | None,
    ) -> None:
        self.graph, self.trials = graph, trials
        self.tau, self.turned, self.absolute = tau, turned, absolute
        self.budget = math.inf if max_forwards is None else max_forwards
        self.edges = graph.real.clone()
        self.current = trials.base
        self.mean = torch.full(graph.real.shape, torch.nan)
        self.mean_abs = self.mean.clone()
        #: What is expected of the next edges, and how many are tried on that.
        self.expected, self.at_once = True, 1

    def visit(self, receiver: int, senders: Sequence[int]) -> int:
        """Tries the edges into a receiver; returns how many the budget did not reach."""
        owners = self.graph.owner[:, receiver]
        if receiver != self.graph.logits and not bool(self.edges[owners].any()):
            self.edges[:, receiver] = False
            return 0
        left = list(senders)
        while left:
            group = self._candidates(receiver, left)
            if not group:
                # What comes later may be cheaper, but the search is over.
                self.budget = -math.inf
                return len(left)
            tried = self._decide(receiver, left[: len(group)], group)
            left = left[tried:]
        return 0

    def _candidates(self, receiver: int, left: Sequence[int]) -> list[Bool[Tensor, "senders receivers"]]:
        """Circuits without the next edges, as many as are tried at once and the budget reaches."""
        known, spent = known_at(self.graph, receiver), self.trials.spent
        group: list[Tensor] = []
        for sender in left[: min(self.at_once, self.trials.at_once)]:
            edges = (group[-1] if group and self.expected else self.edges).clone()
            edges[sender, receiver] = False
            spent += self.trials.work(edges, known)
            if spent > self.budget:
                break
            group.append(edges)
        return group

    def _decide(self, receiver: int, senders: Sequence[int], group: Sequence[Tensor]) -> int:
        """Takes one decision after the other while they are as expected; returns how many were taken."""
        metrics = self.trials.metrics(group, known_at(self.graph, receiver))
        for place, sender in enumerate(senders):
            effect = (metrics[:, place] - self.current).double()
            damage = float(effect.mean()) * self.turned
            cut = (abs(damage) if self.absolute else damage) < self.tau
            self.mean[sender, receiver] = effect.mean()
            self.mean_abs[sender, receiver] = effect.abs().mean()
            if cut:
                self.edges[sender, receiver] = False
                self.current = metrics[:, place]
            if cut != self.expected:
                self.expected, self.at_once = cut, max(1, place)
                return place + 1
        self.at_once = 2 * len(group)
        return len(group)
