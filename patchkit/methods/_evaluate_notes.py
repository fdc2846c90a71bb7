"""What a reader of an evaluation must know beside its numbers: what is empty, what means nothing, what is unusual."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from patchkit.data import Pair
from patchkit.methods._edge_options import EdgeOptions
from patchkit.methods._evaluate_bootstrap import PairBootstrap, same_metric
from patchkit.methods._evaluate_completeness import removable
from patchkit.methods._evaluate_options import EvaluateOptions
from patchkit.methods._evaluate_runs import CircuitRunner
from patchkit.methods._evaluate_sizes import Chosen
from patchkit.results.circuit import Circuit
from patchkit.results.curves import FRACTIONS
from patchkit.results.edge_scores import EdgeScores

#: Two base runs' metrics closer than this share are of the same prompts.
_SAME_RUN = 1e-2


def notes_of(
    source: EdgeScores | Circuit,
    pairs: Sequence[Pair],
    chosen: Sequence[Chosen],
    curves: Sequence[Sequence[Chosen]],
    runner: CircuitRunner,
    bootstrap: PairBootstrap,
    options: EdgeOptions,
    asked: EvaluateOptions,
) -> list[str]:
    """The notes of one evaluation, one sentence or two each."""
    return [
        *_about_circuits(chosen, runner.patching),
        *_about_curves(curves),
        *_about_ends(runner, bootstrap, options),
        *_about_tests(chosen, runner, asked),
        *_about_scoring(source, pairs, runner, options),
    ]


def _about_circuits(chosen: Sequence[Chosen], patching: str) -> Iterator[str]:
    for each in chosen:
        name = "The circuit" if each.requested is None else f"The circuit of {each.requested} edges asked for"
        if each.circuit.is_empty:
            yield (
                f"{name} is empty after pruning: no path from the input to the logits is in it. Its numbers are those of "
                "the run with every edge cut."
            )
        elif each.selection == "given" and each.dead_ends:
            total = each.circuit.n_edges + each.dead_ends
            yield (
                f"{each.dead_ends} of the {total} edges that were given are dead ends (no path from the input to the "
                "logits goes through them) and were pruned."
            )
    if patching == "node" and chosen:
        yield (
            "Node patching: a circuit stands for its nodes, which read and write everything; which of their edges are in "
            "it makes no difference."
        )


def _about_curves(curves: Sequence[Sequence[Chosen]]) -> Iterator[str]:
    for line in curves:
        empty = [
            f"{fraction:.1%}" for fraction, each in zip(FRACTIONS, line, strict=True) if each.circuit.is_empty
        ]
        if empty:
            ranking = "absolute" if line[0].absolute else "signed"
            yield (
                f"Curve by {ranking} scores: the circuits of {', '.join(empty)} of the edges are empty after pruning, so "
                "that their faithfulness is that of the run with every edge cut."
            )


def _about_ends(runner: CircuitRunner, bootstrap: PairBootstrap, options: EdgeOptions) -> Iterator[str]:
    if same_metric(*runner.ends):
        yield (
            "The base runs and the runs with every edge cut have the same mean metric, so there is no faithfulness: "
            "nothing is lost that a circuit could keep."
        )
    elif bootstrap.changes_sign(runner.clean, runner.corrupt):
        yield (
            "The difference between the base runs and the runs with every edge cut may as well be 0: its 95 % interval "
            "over pairs includes 0. Faithfulness is a share of that difference and says little here."
        )
    if bootstrap.pairs == 1:
        yield "One pair: there are no intervals."
    if options.direction == "denoise":
        yield (
            "Direction denoise: the base runs are those of the corrupt prompts, and edges outside the circuit carry the "
            "clean prompts' values. A faithful circuit keeps behaviour broken; `clean_metric` is the corrupt prompts'."
        )


def _about_tests(chosen: Sequence[Chosen], runner: CircuitRunner, asked: EvaluateOptions) -> Iterator[str]:
    tests = asked.asks_about_one
    if not tests:
        return
    tested = chosen[-1].circuit
    words = ", ".join(tests)
    if len(chosen) > 1:
        yield f"About the circuit of {tested.n_edges} edges, the last of the sizes: {words}."
    if tested.is_empty:
        yield f"Left out, because the circuit is empty: {words}."
    elif asked.random and same_metric(*runner.ends):
        yield "Left out, because there is no faithfulness to compare: random."
    nodes = int(removable(tested).sum())
    if asked.completeness and nodes > asked.candidates:
        yield (
            f"Greedy completeness tried {asked.candidates} of the circuit's {nodes} nodes a step, drawn anew each time."
        )


def _about_scoring(
    source: EdgeScores | Circuit, pairs: Sequence[Pair], runner: CircuitRunner, options: EdgeOptions
) -> Iterator[str]:
    if not isinstance(source, EdgeScores):
        return
    found, wanted = source.convention, options.convention
    differing = [
        f"{name} {getattr(found, name)}, evaluated with {getattr(wanted, name)}"
        for name in ("metric", "direction", "ablation", "positions")
        if getattr(found, name) != getattr(wanted, name)
    ]
    if differing:
        yield f"Edges were scored with {'; '.join(differing)}."
    if (found.metric, found.direction) != (wanted.metric, wanted.direction):
        return
    base = dict(zip(source.pair_ids, source.base_metric.tolist(), strict=True))
    again = [
        pair.id
        for pair, clean in zip(pairs, runner.clean.tolist(), strict=True)
        if pair.id in base and abs(base[pair.id] - clean) <= _SAME_RUN * max(abs(clean), 1.0)
    ]
    if again:
        yield (
            f"{len(again)} of the {len(pairs)} pairs are pairs that the edges were scored on: on others the circuit may "
            "do worse."
        )
