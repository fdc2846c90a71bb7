"""Whether to believe a circuit: how faithful it is at each size, what it lacks, what in it is idle, and against chance.

Edges outside the circuit are cut (or, under node patching, nodes outside it are replaced for all that read them), and the
rest of the model is as it is. Every number carries its protocol, since the same circuit may score from below 0 to above
100 % under another (Miller et al. 2024):

    faithfulness   (circuit - corrupt) / (clean - corrupt), `corrupt` with every edge cut       `_evaluate_bootstrap`
    curve          the same at MIB's ten sizes, and its areas (Mueller et al. 2025)             `_evaluate_sizes`
    completeness   |F(C without K) - F(M without K)|                                            `_evaluate_completeness`
    minimality     |F(C without K and v) - F(C without K)|                                      `_evaluate_minimality`
    random         random circuits of equal size                                                `_evaluate_random`
    stability      the same selection on bootstraps of the pairs
    knockout       nodes that change their direct effect when others are gone                   `_evaluate_repair`
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch

from patchkit.data import Pair
from patchkit.errors import InputError
from patchkit.methods._edge_options import EdgeOptions
from patchkit.methods._evaluate_bootstrap import PairBootstrap
from patchkit.methods._evaluate_completeness import completeness
from patchkit.methods._evaluate_minimality import minimality
from patchkit.methods._evaluate_notes import notes_of
from patchkit.methods._evaluate_options import EvaluateOptions as EvaluateOptions
from patchkit.methods._evaluate_random import random_test
from patchkit.methods._evaluate_repair import find_group, self_repair
from patchkit.methods._evaluate_runs import CircuitRunner
from patchkit.methods._evaluate_sizes import (
    Chosen,
    check_graph,
    choose,
    circuit_run,
    curve_circuits,
    curve_of,
    select,
)
from patchkit.methods.circuits import check_circuit_options
from patchkit.model import PatchModel
from patchkit.results.circuit import Circuit
from patchkit.results.edge_scores import EdgeScores
from patchkit.results.evaluation import Evaluation, Overlap, Stability
from patchkit.results.overlap import overlap
from patchkit.results.stability import stability
from patchkit.runtime import Progress

LEVELS: tuple[Literal["edge", "node"], ...] = ("edge", "node")


def evaluate(
    model: PatchModel,
    pairs: Sequence[Pair],
    source: EdgeScores | Circuit,
    options: EdgeOptions | None = None,
    evaluation: EvaluateOptions | None = None,
    *,
    reference: Sequence[Pair] | None = None,
    truth: EdgeScores | Circuit | None = None,
    truth_name: str = "reference",
    origin: str = "in memory",
    checkpoint: Path | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Runs the circuits that `evaluation` selects from `source` and what it asks about them.

    Args:
        pairs: best not those that the edges were scored on.
        source: scores to select edges from, or a circuit as it is.
        options: what a cut edge carries, and the metric; positions must be `all`.
        reference: prompt pairs whose source prompts the ablations `mean` and `mean-positional` are taken over.
        truth: what to compare edges and nodes with: a circuit, or scores from which as many edges are selected alike.
        truth_name: what the report calls it.
        origin: where `source` came from, for the report.
        checkpoint: a directory for finished parts, from which an interrupted run goes on.

    Raises:
        InputError: scores or a circuit of another model, sizes beyond the graph, nothing to select by, a test that needs
            what the scores did not keep, nodes to knock out that do not exist.
    """
    options, evaluation = options or EdgeOptions(), evaluation or EvaluateOptions()
    graph = source.graph
    _check(model, pairs, source, truth, options, evaluation, truth_name)
    chosen = choose(source, evaluation)
    group = find_group(graph, evaluation.knockout) if evaluation.knockout else None
    if evaluation.asks_about_one and not chosen:
        raise InputError(
            f"{', '.join(evaluation.asks_about_one)}: a curve has no one circuit to test; say its number of edges (sizes)"
        )
    overlaps = _overlaps(source, chosen, truth, truth_name, evaluation)
    stable = _stability(source, chosen[-1] if chosen else None, evaluation)
    runner = CircuitRunner(model, pairs, options, evaluation.patching, reference, checkpoint, progress)
    bootstrap = PairBootstrap(len(pairs), evaluation.draws, evaluation.seed)

    curves: list[list[Chosen]] = []
    if evaluation.curve and isinstance(source, EdgeScores):
        curves = [curve_circuits(source, evaluation.selection, absolute) for absolute in (False, True)]
    every = [*chosen, *(each for line in curves for each in line)]
    metric = runner.run([each.circuit for each in every], "circuits")
    runs = [
        circuit_run(each, metric[:, column], runner, bootstrap, options) for column, each in enumerate(chosen)
    ]
    parts = metric[:, len(chosen) :].split(len(curves[0]), dim=1) if curves else ()

    tested = chosen[-1] if chosen else None
    testable = tested is not None and not tested.circuit.is_empty
    lacks = idle = chance = None
    if tested is not None and testable:
        found = runs[-1].faithfulness
        if evaluation.completeness:
            lacks = completeness(runner, tested.circuit, evaluation, _generator(evaluation, "completeness"))
        if evaluation.minimality:
            idle = minimality(runner, tested.circuit, evaluation, _generator(evaluation, "minimality"))
        if evaluation.random and found is not None:
            drawn = _generator(evaluation, "random")
            chance = random_test(runner, tested.circuit, found, evaluation.random, drawn)
    gone = None
    if group is not None:
        gone = self_repair(
            model,
            pairs,
            group,
            options,
            bootstrap,
            reference=reference,
            checkpoint=checkpoint,
            progress=progress,
        )
    clean, corrupt = runner.ends
    return Evaluation(
        convention=options.convention.model_copy(update={"patching": evaluation.patching}),
        model=model.name,
        source=origin,
        method=source.method.name if isinstance(source, EdgeScores) else "given",
        graph_edges=graph.n_edges,
        pair_ids=[pair.id for pair in pairs],
        clean_metric=clean,
        corrupt_metric=corrupt,
        circuits=runs,
        curves=[curve_of(line, values, runner, options) for line, values in zip(curves, parts, strict=True)],
        completeness=lacks,
        minimality=idle,
        random=chance,
        overlaps=overlaps,
        stability=stable,
        repair=None if gone is None else gone.repair,
        tested=len(runs) - 1 if evaluation.asks_about_one else None,
        clean_per_pair=runner.clean.tolist(),
        corrupt_per_pair=runner.corrupt.tolist(),
        cost=runner.cost + (0.0 if gone is None else gone.cost),
        notes=[
            *notes_of(source, pairs, chosen, curves, runner, bootstrap, options, evaluation),
            *(() if gone is None else gone.notes),
        ],
    )


def _check(
    model: PatchModel,
    pairs: Sequence[Pair],
    source: EdgeScores | Circuit,
    truth: EdgeScores | Circuit | None,
    options: EdgeOptions,
    evaluation: EvaluateOptions,
    truth_name: str,
) -> None:
    if not pairs:
        raise InputError("there are no prompt pairs to evaluate on; expected at least one")
    check_circuit_options(options)
    check_graph(source, model.dims, "what is evaluated")
    if truth is not None:
        check_graph(truth, model.dims, f"what is compared with ({truth_name})")
    if evaluation.stability:
        if isinstance(source, Circuit):
            raise InputError(
                "stability selects again from bootstraps of the pairs, and a circuit was given; give the scores of every "
                "pair (patchkit edges --keep-pairs, keep_pairs=True)"
            )
        if source.per_pair is None or len(source.per_pair) < 2:
            raise InputError(
                "stability needs the scores of each of several pairs, and these have not kept them; score the edges "
                "again and keep them (patchkit edges --keep-pairs, keep_pairs=True)"
            )
        if source.circuit is not None and not evaluation.sizes and evaluation.tau is None:
            raise InputError(
                f"stability selects again by scores, and the circuit of method '{source.method.name}' is not selected by "
                "them; say how many edges (sizes)"
            )


def _generator(evaluation: EvaluateOptions, part: str) -> torch.Generator:
    """Draws of a part, the same whichever other parts are asked for."""
    parts = ("completeness", "minimality", "random")
    return torch.Generator().manual_seed(evaluation.seed * len(parts) + parts.index(part))


def _overlaps(
    source: EdgeScores | Circuit,
    chosen: Sequence[Chosen],
    truth: EdgeScores | Circuit | None,
    name: str,
    evaluation: EvaluateOptions,
) -> list[Overlap]:
    """Of every circuit, its edges and then its nodes, with the truth: given, or selected at the circuit's own size."""
    if truth is None:
        return []
    importance = source.importance if isinstance(source, EdgeScores) else None
    found: list[Overlap] = []
    for each in chosen:
        if isinstance(truth, Circuit):
            wanted = truth.pruned()
        elif truth.circuit is not None and not evaluation.sizes:
            wanted = truth.circuit.pruned()
        else:
            n = each.circuit.n_edges if each.requested is None else each.requested
            wanted = select(truth, n, evaluation.selection, evaluation.absolute).circuit
        ours, keys = each.circuit, importance
        if wanted.graph != ours.graph:
            # By query head an edge may be a dead end that shares its key or value with one that is not.
            ours, wanted, keys = ours.by_query_head().pruned(), wanted.by_query_head().pruned(), None
        for level in LEVELS:
            compared = overlap(ours, wanted, name, importance=keys, level=level)
            found.append(compared.model_copy(update={"requested": each.requested}))
    return found


def _stability(
    source: EdgeScores | Circuit, tested: Chosen | None, evaluation: EvaluateOptions
) -> Stability | None:
    if not evaluation.stability or tested is None or tested.circuit.is_empty or isinstance(source, Circuit):
        return None
    assert tested.requested is not None
    return stability(
        source.pair_importance,
        source.graph,
        tested.requested,
        # At a given number of edges a threshold takes the best of all.
        selection="greedy" if tested.selection == "greedy" else "top",
        absolute=tested.absolute,
        draws=evaluation.stability,
        seed=evaluation.seed,
    )
