"""Comparing two models of one architecture, such as two training stages: what changed, and where it is.

1. what each does on the same prompts;
2. the circuit of each by the same method, what they share, and each circuit run in both models;
3. activations of one put into the other, node by node and group by group (Prakash et al. 2024, arXiv:2402.14811, "CMAP");
4. desiderata of groups, patched from either model.

Edges are scored on one set of pairs; everything else is measured on another. Numbers are of `first` and `second`; an
effect is metric(model with the other's activation) - metric(model).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from patchkit.data import Pair, Triple, read_places
from patchkit.errors import InputError
from patchkit.methods import patch_across, patch_sets_across, scores_of_sets
from patchkit.methods._evaluate_bootstrap import PairBootstrap, faithfulness
from patchkit.methods._evaluate_runs import CircuitRunner
from patchkit.methods._evaluate_sizes import Chosen, circuit_run, select
from patchkit.methods.cross_model import check_alike
from patchkit.methods.evaluate import LEVELS
from patchkit.model import EdgeGraph, PatchModel
from patchkit.results.comparison import (
    WHICH,
    Across,
    Behaviour,
    Comparison,
    FoundCircuit,
    GroupScores,
    GroupShift,
    NodeShift,
)
from patchkit.results.edge_scores import EdgeScores
from patchkit.results.overlap import overlap
from patchkit.results.rank import rank_correlation
from patchkit.runtime import Progress
from patchkit.studies._compare_options import CompareOptions as CompareOptions
from patchkit.studies._comparison_findings import findings
from patchkit.studies._comparison_groups import groups_of, random_groups
from patchkit.studies._finding import accuracy, part, renamed, score_edges


def compare_models(
    first: PatchModel,
    second: PatchModel,
    pairs: Sequence[Pair],
    held_out: Sequence[Pair],
    options: CompareOptions | None = None,
    *,
    desiderata: Mapping[str, Sequence[Triple]] | None = None,
    groups: Mapping[str, Sequence[str]] | None = None,
    task: str = "",
    command: str = "",
    checkpoint: Path | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Compares two models of one architecture and one vocabulary.

    Args:
        pairs: that edges are scored on; `held_out`: others, that everything is measured on.
        desiderata: held-out triples by desideratum; without them that part is left out.
        groups: names of nodes by the group's name, in place of the circuits' heads by layer.
        task: what the pairs are, for the report; `command`: what makes this again.
        checkpoint: a directory for finished batches, from which an interrupted run goes on.

    Raises:
        InputError: models of other sizes or with another vocabulary, sizes beyond the graph, nodes, groups or positions
            that do not exist, no pairs.
    """
    options, started = options or CompareOptions(), time.monotonic()
    check_alike(first, second)
    models = (first, second)
    graph = EdgeGraph.of(first.dims)
    if options.sizes[-1] > graph.n_edges:
        raise InputError(f"{options.sizes[-1]} edges were asked for; {first.name} has {graph.n_edges}")
    if read_places(options.positions, held_out).placed:
        raise InputError(
            f"positions '{options.positions}': a comparison puts activations across at all of a prompt's tokens "
            "together, at the last, or at one named span"
        )
    work = _Work(models, held_out, options, checkpoint, progress)
    scores = [work.score(which, pairs) for which in range(2)]
    chosen = [[select(each, size, "top", options.absolute) for size in options.sizes] for each in scores]
    named = groups_of([each[-1].circuit for each in chosen], groups, first.dims)
    runners = [work.runner(which) for which in range(2)]
    # All of one model before the other: processes that share the work open the one that is run.
    (in_second, behaviour, into_second), (in_first, earlier, into_first) = (
        (
            work.run_circuits(which, runners[which], chosen),
            work.behaviour(which, runners[which]),
            work.across(which, named),
        )
        for which in (1, 0)
    )
    scored = work.desiderata(named, desiderata) if desiderata else []
    spread = [each.importance[graph.real] for each in scores]
    found = Comparison(
        task=task,
        convention=scores[0].convention,
        method=options.method,
        absolute=options.absolute,
        positions=options.positions,
        pairs=len(pairs),
        held_out=[pair.id for pair in held_out],
        models=[earlier, behaviour],
        circuits=[*in_first, *in_second],
        overlaps=[
            overlap(ours.circuit, theirs.circuit, second.name, level=level).model_copy(
                update={"requested": ours.requested}
            )
            for ours, theirs in zip(*chosen, strict=True)
            for level in LEVELS
        ],
        rank_correlation=rank_correlation(*spread),
        rank_correlation_abs=rank_correlation(*(each.mean_abs[graph.real] for each in scores)),
        across=[into_first, into_second],
        desiderata=scored,
        triples={name: len(triples) for name, triples in (desiderata or {}).items()},
        notes=work.notes,
        cost=work.cost + sum(runner.cost for runner in runners),
        command=command,
        seconds=round(time.monotonic() - started, 1),
        scores=(scores[0], scores[1]),
    )
    return found.model_copy(update={"findings": findings(found)})


class _Work:
    """What all parts share: both models, the held-out pairs and the draws of their bootstrap."""

    def __init__(
        self,
        models: tuple[PatchModel, PatchModel],
        held_out: Sequence[Pair],
        options: CompareOptions,
        checkpoint: Path | None,
        progress: Progress | None,
    ) -> None:
        self.models, self.held_out, self.options = models, held_out, options
        self.checkpoint, self.progress = checkpoint, progress
        self.bootstrap = PairBootstrap(len(held_out), options.draws, options.seed)
        self.cost, self.notes = 0.0, list[str]()

    def score(self, which: int, pairs: Sequence[Pair]) -> EdgeScores:
        """Edges of one model."""
        scores = score_edges(
            self.models[which],
            pairs,
            self.options.method,
            self.options.edges,
            checkpoint=part(self.checkpoint, "edges"),
            progress=self._renamed(f"edges of the {WHICH[which]}"),
        )
        self.cost += scores.cost * len(pairs) / len(self.held_out)
        return scores

    def runner(self, which: int) -> CircuitRunner:
        """What runs circuits in one model."""
        return CircuitRunner(
            self.models[which],
            self.held_out,
            self.options.edges,
            "edge",
            checkpoint=part(self.checkpoint, "circuits"),
            progress=self.progress,
        )

    def run_circuits(
        self, which: int, runner: CircuitRunner, chosen: Sequence[Sequence[Chosen]]
    ) -> list[FoundCircuit]:
        """The circuits of both, in one model."""
        every = [each for found in chosen for each in found]
        metric = runner.run([each.circuit for each in every], f"circuits in the {WHICH[which]}")
        return [
            FoundCircuit(
                found_in=WHICH[number // len(chosen[0])],
                run_in=WHICH[which],
                run=circuit_run(each, metric[:, number], runner, self.bootstrap, self.options.edges),
            )
            for number, each in enumerate(every)
        ]

    def behaviour(self, which: int, runner: CircuitRunner) -> Behaviour:
        """What one model does, unpatched."""
        model, (clean, corrupt) = self.models[which], runner.ends
        batch = self.options.edges.max_batch_tokens
        self.cost += 1
        return Behaviour(
            model=model.name,
            clean=clean,
            corrupt=corrupt,
            accuracy=accuracy(model, self.held_out, batch, part(self.checkpoint, "answers")),
            clean_interval=self.bootstrap.interval(runner.clean),
        )

    def across(self, which: int, groups: Mapping[str, Sequence[str]]) -> Across:
        """The other model's activations in one: node by node, and group by group."""
        model, donor, options = self.models[which], self.models[1 - which], self.options.across
        into = f"into the {WHICH[which]}"
        nodes = patch_across(
            model,
            donor,
            self.held_out,
            options,
            checkpoint=part(self.checkpoint, "across"),
            progress=self._renamed(f"nodes {into}"),
        )
        drawn = {
            name: random_groups(members, model.dims, self.options.random, self.options.seed)
            for name, members in groups.items()
        }
        sets = [each for name, members in groups.items() for each in (members, *drawn[name])]
        effects = patch_sets_across(
            model,
            donor,
            self.held_out,
            sets,
            self.options.grouped,
            checkpoint=part(self.checkpoint, "across"),
            progress=self._renamed(f"groups {into}"),
        )
        self.cost += nodes.cost + effects.cost
        base, source = nodes.base_metric.double(), nodes.source_metric.double()
        shifts, place = list[GroupShift](), 0
        for name, members in groups.items():
            own, *random = effects.effects[:, place : place + 1 + len(drawn[name])].double().unbind(1)
            place += 1 + len(drawn[name])
            shifts.append(self._shift(name, members, own, random, base, source))
        where = nodes.grid.locate(torch.arange(len(nodes.grid)))
        means = zip(
            nodes.grid.names(),
            *(value.double().mean(0).tolist() for value in (nodes.effects, nodes.magnitudes)),
            *(each.tolist() for each in (where.kind, where.layer, where.unit)),
            strict=True,
        )
        return Across(
            model=WHICH[which],
            donor=WHICH[1 - which],
            model_metric=float(base.mean()),
            donor_metric=float(source.mean()),
            nodes=[
                NodeShift(
                    node=name,
                    kind=nodes.grid.kinds[kind],
                    layer=layer,
                    unit=unit,
                    effect=effect,
                    effect_abs=size,
                    share=faithfulness(effect + float(base.mean()), float(source.mean()), float(base.mean())),
                )
                for name, effect, size, kind, layer, unit in means
                # Of names only these were asked for.
                if effect == effect
            ],
            groups=shifts,
        )

    def _shift(
        self,
        name: str,
        members: Sequence[str],
        effect: Tensor,
        random: Sequence[Tensor],
        base: Tensor,
        source: Tensor,
    ) -> GroupShift:
        ends = float(source.mean()), float(base.mean())
        return GroupShift(
            group=name,
            nodes=list(members),
            effect=float(effect.mean()),
            interval=self.bootstrap.interval(effect),
            share=faithfulness(float((base + effect).mean()), *ends),
            share_interval=self.bootstrap.faithfulness_interval(base + effect, source, base),
            random=[faithfulness(float((base + each).mean()), *ends) for each in random],
        )

    def desiderata(
        self, groups: Mapping[str, Sequence[str]], triples: Mapping[str, Sequence[Triple]]
    ) -> list[GroupScores]:
        """Every group patched at the last token: in each model from itself, and from the other one."""
        asked = {"nothing": [], **groups}
        found: list[GroupScores] = []
        for model in range(2):
            for donor in (model, 1 - model):
                scores = scores_of_sets(
                    self.models[model],
                    triples,
                    list(asked.values()),
                    donor=None if donor == model else self.models[donor],
                    max_batch_tokens=self.options.edges.max_batch_tokens,
                )
                found += [
                    GroupScores(group=name, model=WHICH[model], donor=WHICH[donor], scores=each)
                    for name, each in zip(asked, scores, strict=True)
                ]
        return found

    def _renamed(self, stage: str) -> Progress | None:
        return renamed(self.progress, stage)
