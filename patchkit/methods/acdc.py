"""ACDC: cut every edge that the metric does not miss, from the logits back to the input (Conmy et al. 2023,
arXiv:2304.14997, algorithm 1).

    for each receiver v, from the logits back:
        for each edge u -> v:
            new = metric of the circuit without the edge
            if damage(current -> new) < tau: leave the edge out; current = new

An edge that is cut carries the ablated value, and everything behind it is recomputed. The damage is how much the metric
moves the way that it moves when what helps is cut: for KL, its rise (the reference is the base run); for a metric of the
behaviour, its fall under `noise` and its rise under `denoise`; or, `absolute`, the size of its change. The means over all
pairs decide. A receiver whose head or MLP has no edge out any more is not tried: its edges are cut without a forward.

A candidate restarts at the receiver that is visited, since all below still holds every edge. Edges are tried in groups,
each as if those before it in the group were decided as the last one was; whatever comes after one that was not is thrown
away and tried anew, so that the decisions are those of one edge at a time. All that is run is counted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Bool
from torch import Tensor

from patchkit.data import Pair, kl, read_places
from patchkit.errors import InputError
from patchkit.methods._acdc_order import ACDC_ORDERS as ACDC_ORDERS
from patchkit.methods._acdc_order import known_at, receivers_in_order, senders_in_order
from patchkit.methods._acdc_trials import Trials
from patchkit.methods._edge_options import EdgeOptions
from patchkit.methods._edge_replacement import edge_journal_key, edge_replacement
from patchkit.methods.circuits import check_circuit_options
from patchkit.model import PatchModel
from patchkit.model.edges import EdgeGraph
from patchkit.results.circuit import Circuit
from patchkit.results.edge_scores import EdgeMethod, EdgeScores
from patchkit.runtime import Journal, Progress


def acdc(
    model: PatchModel,
    pairs: Sequence[Pair],
    options: EdgeOptions | None = None,
    *,
    tau: float,
    order: str = "reverse",
    absolute: bool = False,
    max_forwards: float | None = None,
    reference: Sequence[Pair] | None = None,
    checkpoint: Path | None = None,
    progress: Progress | None = None,
) -> EdgeScores:
    """Finds a circuit by cutting edges one at a time; see the module's docstring.

    Args:
        tau: an edge is cut if the damage is less than this, in the metric's unit.
        order: in which edges are tried (`_acdc_order.py`).
        absolute: an edge is kept too if cutting it moves the metric the other way by tau or more.
        max_forwards: a budget in forward-equivalents (1 = one forward over every base prompt, which the base and the
            source run take already); edges that it does not reach stay in the circuit.
        reference: prompt pairs whose source prompts the means are taken over; by default the pairs themselves.
        checkpoint: a directory for finished receivers, from which an interrupted run goes on.

    Returns:
        `EdgeScores` of method `acdc` whose `circuit` is what is kept, without dead ends. `mean` is the effect that each
        edge had when it was tried, metric(new) - metric(current); NaN where it never was. `method.untried` counts the
        edges that the budget did not reach.

    Raises:
        InputError: no pairs, tau that is no number, an unknown order, a budget below the two runs that everything
            starts from, positions other than `all`, a metric that does not exist or is not finite.
    """
    options = options or EdgeOptions()
    metric = check_circuit_options(options)
    if math.isnan(tau):
        raise InputError("tau is NaN; expected a number in the metric's unit, such as 0.01")
    if order not in ACDC_ORDERS:
        raise InputError(f"order '{order}' is not known; expected one of: {', '.join(ACDC_ORDERS)}")
    if max_forwards is not None and not max_forwards >= 2:
        raise InputError(
            f"max_forwards is {max_forwards}: the base and the source run alone take 2 forward-equivalents; give more"
        )
    places = read_places("all", pairs)
    replacement = edge_replacement(model, pairs, options, reference)
    graph = EdgeGraph.of(model.dims)
    trials = Trials(model, graph, pairs, options, metric, replacement)
    if replacement.means is not None:
        prompts = pairs if reference is None else reference
        trials.spent += sum(len(pair.clean_ids) for pair in prompts) / sum(
            len(pair.clean_ids) for pair in pairs
        )
    journal = None
    if checkpoint is not None:
        key = edge_journal_key(f"acdc {tau} {order} {absolute}", model, pairs, places, options, replacement)
        journal = Journal(checkpoint, key)
    turned = 1.0 if metric.function is kl or options.direction == "denoise" else -1.0
    search = _Search(graph, trials, tau, turned, absolute, max_forwards)
    untried = 0
    for visit, receiver in enumerate(receivers_in_order(graph)):
        if untried or not search.resume(journal, visit, receiver):
            sizes = trials.sizes if order == "by-size" else None
            untried += search.visit(receiver, senders_in_order(graph, receiver, sizes))
            if journal is not None and not untried:
                search.note(journal, visit, receiver)
        if progress is not None:
            progress("acdc", visit + 1, graph.n_receivers)
    return EdgeScores(
        graph=graph,
        method=EdgeMethod(name="acdc", threshold=tau, order=order, absolute=absolute, untried=untried),
        convention=options.convention,
        pair_ids=tuple(pair.id for pair in pairs),
        mean=search.mean,
        mean_abs=search.mean_abs,
        base_metric=trials.base,
        source_metric=trials.source,
        cost=trials.spent,
        circuit=Circuit(graph, search.edges).pruned(),
    )


class _Search:
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
        #: What it took to open the pairs, in this process.
        self.opening = trials.spent
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

    # Going on where an interrupted run was.

    def note(self, journal: Journal, visit: int, receiver: int) -> None:
        """Writes down what visiting a receiver gave."""
        column = {name: getattr(self, name)[:, receiver] for name in ("edges", "mean", "mean_abs")}
        spent = torch.tensor(self.trials.spent, dtype=torch.float64)
        journal.write([visit], column | {"current": self.current, "spent": spent})

    def resume(self, journal: Journal | None, visit: int, receiver: int) -> bool:
        """Takes up what was written down, if it was."""
        noted = None if journal is None else journal.read([visit])
        if noted is None:
            return False
        for name in ("edges", "mean", "mean_abs"):
            getattr(self, name)[:, receiver] = noted[name]
        self.current, self.trials.spent = noted["current"], self.opening + float(noted["spent"])
        return True
