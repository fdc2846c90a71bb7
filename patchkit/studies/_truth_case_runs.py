"""One case of the ground-truth study, from model to finished row."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from patchkit.data import Pair
from patchkit.model import EdgeGraph, PatchModel
from patchkit.results.circuit import Circuit
from patchkit.results.overlap import auroc
from patchkit.results.scoreboard import Case, MethodOnCase
from patchkit.studies._truth_cases import KnownCase, Truth, truth_of
from patchkit.studies._truth_circuits import CircuitResult, CircuitRuns, choose, result, want
from patchkit.studies._truth_measures import floored, ranking
from patchkit.studies._truth_methods import MethodSettings, Scorer
from patchkit.studies._truth_scores import MethodScores


def measure_case(
    case: KnownCase,
    model: PatchModel,
    pairs: Sequence[Pair],
    test: Sequence[Pair],
    settings: MethodSettings,
    draws: int,
) -> Case:
    """Every method on one case.

    Args:
        pairs: that methods score on; `test`: held-out ones, that circuits are run on.
        draws: bootstraps of the pairs.

    Raises:
        InputError: see `truth_of`.
    """
    started = time.monotonic()
    scorer = Scorer(model, pairs, test, settings)
    graph = scorer.graph
    nodes, edges = scorer.exact_nodes(), scorer.exact_edges()
    truth = truth_of(case, graph, nodes, edges)
    true_nodes, true_edges = truth.nodes.true, truth.edge_mask(graph)
    n_nodes, n_edges = int(true_nodes.sum()), int(true_edges.sum())
    runs = CircuitRuns(model, test)
    own = Circuit(graph, true_edges)
    runs.want(own, "edge")
    scored = [make() for make in scorer.makers(nodes, edges).values()]
    chosen = [choose(found, graph, n_nodes, n_edges) for found in scored]
    for each in chosen:
        want(runs, each)
    runs.run()
    weights = _bootstraps(len(pairs), draws, settings.seeds[0])
    rows = [
        _row(case, found, truth, graph, result(runs, each, true_nodes, true_edges), weights)
        for found, each in zip(scored, chosen, strict=True)
    ]
    dims = model.dims
    return Case(
        name=case.name,
        family=case.family,
        title=case.title,
        model=model.name,
        architecture=model.arch.family,
        task=case.task,
        shows=case.shows,
        layers=dims.n_layers,
        heads=dims.n_heads,
        kv_heads=dims.n_kv_heads,
        pairs=len(pairs),
        test_pairs=len(test),
        n_nodes=graph.n_senders - 1,
        n_edges=graph.n_edges,
        true_nodes=n_nodes,
        true_edges=n_edges,
        silent=list(truth.silent),
        unlabelled_edges=int((~truth.edges.known).sum()),
        base_metric=float(edges.base_metric.double().mean()),
        source_metric=float(edges.source_metric.double().mean()),
        truth_faithfulness=_rounded(runs.faithfulness(own, "edge")),
        truth_rule=case.rule,
        methods=rows,
        seconds=round(time.monotonic() - started, 1),
    )


def _bootstraps(pairs: int, draws: int, seed: int) -> Tensor:
    """Shares of the pairs in each bootstrap, `[draws, pairs]`."""
    drawn = torch.randint(pairs, (draws, pairs), generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.one_hot(drawn, pairs).double().mean(1)


def _row(
    case: KnownCase, found: MethodScores, truth: Truth, graph: EdgeGraph, run: CircuitResult, weights: Tensor
) -> MethodOnCase:
    real = graph.real
    drawn = found.drawn(graph, weights)
    drawn_nodes, drawn_inputs, drawn_edges = (None, None, None) if drawn is None else drawn
    pair_edges = None if found.pair_edges is None else found.pair_edges[:, real]
    seeds = [auroc(floored(nodes, found.scale), truth.nodes.true) for nodes in found.by_seed]
    line = run.curve
    # Where exact patching is the truth it is not measured against itself.
    truth_itself = case.known is None
    own_nodes, own_edges = (truth_itself and found.method == name for name in ("exact", "exact edges"))
    notes = ["nothing is left of its circuit after pruning"] if run.empty else []
    notes += ["it is the truth here"] if own_nodes or own_edges else []
    return MethodOnCase(
        method=found.method,
        cost=round(found.cost, 3),
        nodes=None
        if own_nodes
        else ranking(truth.nodes, found.nodes, found.scale, found.pair_nodes, drawn_nodes),
        inputs=None
        if found.inputs is None or own_nodes
        else ranking(truth.inputs, found.inputs, found.scale, found.pair_inputs, drawn_inputs),
        edges=None
        if own_edges
        else ranking(
            truth.edges,
            found.edges[real],
            found.scale,
            pair_edges,
            None if drawn_edges is None else drawn_edges[:, real],
        ),
        faithfulness=_rounded(run.faithfulness),
        n_edges=run.n_edges,
        overlap=_rounded(run.overlap),
        cpr=None if line is None else _rounded(line.cpr),
        cmd=None if line is None else _rounded(line.cmd),
        curve=[] if line is None else [_rounded(value) for value in line.f],
        seeds=[round(value, 4) for value in seeds if value is not None],
        note="; ".join(notes),
    )


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
