"""Generalisation: a circuit found on one set of prompts, run on others, as a matrix.

A row is a circuit, a column the held-out half of a set; a cell is the circuit's faithfulness there, which is 1 for the
whole model on every set. Beside the sets' own circuits stand the circuit of all sets' scores together, and random
circuits of as many edges. A set whose clean and corrupt prompts have one metric has no faithfulness, and says so.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from patchkit.data import Pair, halves
from patchkit.errors import InputError
from patchkit.methods import EdgeOptions
from patchkit.methods._evaluate_bootstrap import PairBootstrap, faithfulness
from patchkit.methods._evaluate_runs import CircuitRunner
from patchkit.methods._evaluate_sampler import edges_by_stratum, random_circuit
from patchkit.methods._evaluate_sizes import Chosen, circuit_run, select
from patchkit.model import EdgeGraph, PatchModel
from patchkit.results.circuit import Circuit
from patchkit.results.edge_scores import EdgeScores
from patchkit.results.evaluation import CircuitRun, Overlap
from patchkit.results.generalisation import CircuitRow, Generalisation, PromptSet, RandomRow, SizeMatrix
from patchkit.results.overlap import overlap
from patchkit.results.rank import rank_correlation
from patchkit.runtime import Progress
from patchkit.studies._finding import accuracy, check_sizes, part, renamed, score_edges
from patchkit.studies._generalisation_findings import TOGETHER, findings, notes


@dataclass(frozen=True)
class GeneraliseOptions:
    """How circuits are found and tried.

    Attributes:
        sizes: numbers of edges of the circuits, ascending.
        method: that scores edges: one of `patchkit edges`, but ACDC.
        absolute: rank edges by |score|.
        edges: what edges carry when they are cut, and the metric.
        random: random circuits of as many edges to compare with.
        draws: bootstrap draws of an interval.
        seed: of the halves and of what is drawn.
    """

    sizes: tuple[int, ...] = (50,)
    method: str = "eap-ig-inputs"
    absolute: bool = True
    edges: EdgeOptions = EdgeOptions()
    random: int = 5
    draws: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        check_sizes(self.sizes)
        if self.random < 0:
            raise InputError(f"random must be at least 0, found {self.random}")


def generalise(
    model: PatchModel,
    sets: Mapping[str, Sequence[Pair]],
    options: GeneraliseOptions | None = None,
    *,
    task: str = "",
    command: str = "",
    checkpoint: Path | None = None,
    progress: Progress | None = None,
) -> Generalisation:
    """A circuit from half of each set, run on the other half of every set.

    Args:
        sets: prompt pairs by the set's name.
        task: that made them, for the report; `command`: what makes this again.
        checkpoint: a directory for finished batches, from which an interrupted run goes on.

    Raises:
        InputError: fewer than two sets, one of fewer than two prompts, sizes beyond the graph, or the name 'all sets'.
    """
    options, started = options or GeneraliseOptions(), time.monotonic()
    if len(sets) < 2:
        raise InputError(
            f"generalising takes at least two sets of pairs; found {len(sets)} ({', '.join(sets) or 'none'})"
        )
    if TOGETHER in sets:
        raise InputError(f"a set is called '{TOGETHER}', as the circuit of all is; give it another name")
    graph = EdgeGraph.of(model.dims)
    if options.sizes[-1] > graph.n_edges:
        raise InputError(f"{options.sizes[-1]} edges were asked for; {model.name} has {graph.n_edges}")
    split = {name: halves(pairs, options.seed) for name, pairs in sets.items()}
    scores = {
        name: score_edges(
            model,
            found_on,
            options.method,
            options.edges,
            checkpoint=part(checkpoint, "edges"),
            progress=renamed(progress, f"edges of {name}"),
        )
        for name, (found_on, _) in split.items()
    }
    every = {**scores, TOGETHER: together(list(scores.values()))}
    chosen = {
        (name, size): select(each, size, "top", options.absolute)
        for size in options.sizes
        for name, each in every.items()
    }
    drawn = {size: _random(chosen[TOGETHER, size].circuit, options) for size in options.sizes}
    trials = [_Trial(model, name, split[name][1], options, checkpoint, progress) for name in sets]
    runs = [
        trial.run(list(chosen.values()), [each for size in drawn.values() for each in size])
        for trial in trials
    ]
    matrices = [_matrix(size, list(every), chosen, drawn, runs, options) for size in options.sizes]
    counted = sum(len(held_out) for _, held_out in split.values())
    cost = sum(trial.cost * len(trial.held_out) for trial in trials) + sum(
        scores[name].cost * len(found_on) for name, (found_on, _) in split.items()
    )
    found = Generalisation(
        model=model.name,
        task=task,
        convention=options.edges.convention,
        method=options.method,
        absolute=options.absolute,
        sets=[trial.prompt_set(len(split[trial.name][0])) for trial in trials],
        sizes=matrices,
        rank_correlations=[
            [rank_correlation(_flat(ours), _flat(theirs)) for theirs in scores.values()]
            for ours in scores.values()
        ],
        cost=cost / counted,
        command=command,
        seconds=round(time.monotonic() - started, 1),
    )
    return found.model_copy(update={"findings": findings(found), "notes": notes(found)})


def together(scores: Sequence[EdgeScores]) -> EdgeScores:
    """The scores over all pairs of several sets: each mean weighted by its pairs, as if all had been scored at once.

    Raises:
        InputError: scores of different graphs.
    """
    first = scores[0]
    if any(each.graph != first.graph for each in scores):
        raise InputError("scores of different graphs have no mean; score the edges of one model")
    total = sum(len(each.pair_ids) for each in scores)

    def mean(values: Sequence[Tensor]) -> Tensor:
        weighted = [value.double() * len(each.pair_ids) for value, each in zip(values, scores, strict=True)]
        return (torch.stack(weighted).sum(0) / total).to(values[0].dtype)

    return replace(
        first,
        pair_ids=tuple(name for each in scores for name in each.pair_ids),
        mean=mean([each.mean for each in scores]),
        mean_abs=mean([each.mean_abs for each in scores]),
        base_metric=torch.cat([each.base_metric for each in scores]),
        source_metric=torch.cat([each.source_metric for each in scores]),
        cost=sum(each.cost * len(each.pair_ids) for each in scores) / total,
        by_query=None,
        per_pair=None,
    )


class _Trial:
    """One set's held-out half, on which all circuits are run at once."""

    def __init__(
        self,
        model: PatchModel,
        name: str,
        held_out: Sequence[Pair],
        options: GeneraliseOptions,
        checkpoint: Path | None,
        progress: Progress | None,
    ) -> None:
        self.model, self.name, self.held_out, self.options = model, name, held_out, options
        self.bootstrap = PairBootstrap(len(held_out), options.draws, options.seed)
        self.answers = part(checkpoint, "answers")
        self.runner = CircuitRunner(
            model, held_out, options.edges, "edge", checkpoint=part(checkpoint, "circuits"), progress=progress
        )

    @property
    def cost(self) -> float:
        return self.runner.cost + 1

    def run(
        self, chosen: Sequence[Chosen], random: Sequence[Circuit]
    ) -> tuple[list[CircuitRun], list[float | None]]:
        """(each circuit, each random circuit's faithfulness)."""
        metric = self.runner.run([*(each.circuit for each in chosen), *random], f"circuits on {self.name}")
        runs = [
            circuit_run(each, metric[:, column], self.runner, self.bootstrap, self.options.edges)
            for column, each in enumerate(chosen)
        ]
        means = metric[:, len(chosen) :].mean(0).tolist()
        return runs, [faithfulness(mean, *self.runner.ends) for mean in means]

    def prompt_set(self, pairs: int) -> PromptSet:
        """What the set is, and what the whole model does on it."""
        clean, corrupt = self.runner.ends
        batch = self.options.edges.max_batch_tokens
        return PromptSet(
            name=self.name,
            pairs=pairs,
            held_out=[pair.id for pair in self.held_out],
            clean=clean,
            corrupt=corrupt,
            accuracy=accuracy(self.model, self.held_out, batch, self.answers),
            defined=faithfulness(clean, clean, corrupt) is not None
            and not self.bootstrap.changes_sign(self.runner.clean, self.runner.corrupt),
        )


def _flat(scores: EdgeScores) -> Tensor:
    return scores.mean_abs[scores.graph.real]


def _random(like: Circuit, options: GeneraliseOptions) -> list[Circuit]:
    """Random circuits that match the circuit of all sets; none where that is empty."""
    if like.is_empty:
        return []
    generator = torch.Generator().manual_seed(options.seed)
    quotas = edges_by_stratum(like)
    return [random_circuit(like.graph, like.n_edges, quotas, generator) for _ in range(options.random)]


def _matrix(
    size: int,
    names: Sequence[str],
    chosen: Mapping[tuple[str, int], Chosen],
    drawn: Mapping[int, Sequence[Circuit]],
    runs: Sequence[tuple[list[CircuitRun], list[float | None]]],
    options: GeneraliseOptions,
) -> SizeMatrix:
    """The part of all runs that is of one size."""
    places = {key: place for place, key in enumerate(chosen)}
    circuits = {name: chosen[name, size].circuit for name in names}
    start = sum(len(drawn[other]) for other in options.sizes if other < size)

    def overlaps(level: Literal["edge", "node"]) -> list[list[Overlap]]:
        return [
            [overlap(ours, theirs, name, level=level) for name, theirs in circuits.items()]
            for ours in circuits.values()
        ]

    return SizeMatrix(
        requested=size,
        rows=[
            CircuitRow(
                circuit=name,
                kind="together" if name == TOGETHER else "set",
                runs=[found[places[name, size]] for found, _ in runs],
            )
            for name in names
        ],
        random=RandomRow(
            count=len(drawn[size]),
            n_edges=drawn[size][0].n_edges,
            faithfulness=[random[start : start + len(drawn[size])] for _, random in runs],
        )
        if drawn[size]
        else None,
        overlaps=overlaps("edge"),
        node_overlaps=overlaps("node"),
    )
