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

A candidate restarts at the receiver that is visited, since all below still holds every edge.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from patchkit.data import Pair, kl, read_places
from patchkit.errors import InputError
from patchkit.methods._acdc_order import ACDC_ORDERS as ACDC_ORDERS
from patchkit.methods._acdc_order import receivers_in_order, senders_in_order
from patchkit.methods._acdc_runs import Pairs
from patchkit.methods._acdc_search import Search
from patchkit.methods._acdc_trials import Trials
from patchkit.methods._edge_options import EdgeOptions
from patchkit.methods._edge_replacement import edge_replacement
from patchkit.methods.circuits import check_circuit_options
from patchkit.model import PatchModel
from patchkit.model.edges import EdgeGraph
from patchkit.results.circuit import Circuit
from patchkit.results.edge_scores import EdgeMethod, EdgeScores
from patchkit.runtime import Journal, Progress, Session


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
        checkpoint: a directory for what was tried, from which an interrupted run goes on.

    Returns:
        `EdgeScores` of method `acdc` whose `circuit` is what is kept, without dead ends. (Under another ablation than
        `resample`, a head or MLP with no edge in does not hold its own ablated value, so that leaving it out may move
        the metric.) `mean` is the effect that each edge had when it was tried, metric(new) - metric(current); NaN where
        it never was. `method.untried` counts the edges that the budget did not reach.

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
    # Refuses a run without pairs.
    read_places("all", pairs)
    replacement = edge_replacement(model, pairs, options, reference)
    graph = EdgeGraph.of(model.dims)
    turned = 1.0 if metric.function is kl or options.direction == "denoise" else -1.0
    journal = None if checkpoint is None else Journal(checkpoint)
    untried = 0
    opener = Pairs(graph, options.metric, options.direction, replacement)
    with Session(opener, model, pairs, max_batch_tokens=options.max_batch_tokens, label="acdc") as session:
        trials = Trials(session, graph, options.max_batch_tokens, journal)
        if replacement.means is not None:
            prompts = pairs if reference is None else reference
            trials.spent += sum(len(pair.clean_ids) for pair in prompts) / sum(
                len(pair.clean_ids) for pair in pairs
            )
        search = Search(graph, trials, tau, turned, absolute, max_forwards)
        for visit, receiver in enumerate(receivers_in_order(graph)):
            sizes = trials.sizes if order == "by-size" else None
            untried += search.visit(receiver, senders_in_order(graph, receiver, sizes))
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
