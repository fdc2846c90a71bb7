"""The study of circuits: every way to score edges, beside exact patching, on one embedded model.

Edges are scored on one set of pairs and the circuits run on another. Exact patching of every edge says what a method
should have found (`overlap`, rank correlation), and the circuits themselves whether it matters (faithfulness, CPR, CMD):
on IOI the two come apart (Hanna et al. 2024).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from patchkit import tasks
from patchkit.data import Pair
from patchkit.errors import InputError
from patchkit.methods import (
    EdgeOptions,
    EvaluateOptions,
    acdc,
    attribute_edges,
    evaluate,
    patch_edges,
)
from patchkit.model import EdgeGraph, PatchModel
from patchkit.results.circuit import Circuit
from patchkit.results.circuit_study import CircuitStudy, MethodRow
from patchkit.results.edge_scores import EdgeMethod, EdgeScores
from patchkit.results.evaluation import Overlap
from patchkit.results.manifest import CHECKPOINT
from patchkit.results.overlap import overlap
from patchkit.results.rank import rank_correlation
from patchkit.runtime import Progress
from patchkit.studies._recall_material import task_of

#: Scores to compare with exact patching: label and options of `attribute_edges`.
ESTIMATES: dict[str, dict[str, object]] = {
    "eap": {"method": "eap"},
    "eap, QK fix": {"method": "eap", "qk_fix": True},
    "eap, QK fix and GradDrop": {"method": "eap", "qk_fix": True, "grad_drop": True},
    "clean-corrupted": {"method": "clean-corrupted"},
    "eap-ig-inputs": {"method": "eap-ig-inputs"},
    "eap-ig-inputs, midpoint": {"method": "eap-ig-inputs", "rule": "midpoint"},
    "eap-ig-activations": {"method": "eap-ig-activations"},
    "ifr": {"method": "ifr"},
}


@dataclass(frozen=True)
class CircuitStudyOptions:
    """How much is measured.

    Attributes:
        pairs: that edges are scored on; `test_pairs`: others, that circuits are run on.
        sizes: numbers of edges; of a model with fewer edges those that it has.
        tau: ACDC's threshold, in shares of |base - source| metric.
        seed: of pairs and of random scores.
    """

    pairs: int = 16
    test_pairs: int = 32
    sizes: tuple[int, ...] = (10, 20, 50, 100, 200, 400)
    tau: float = 0.005
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("pairs", "test_pairs"):
            if getattr(self, name) < 1:
                raise InputError(f"circuits study: {name} must be at least 1, found {getattr(self, name)}")
        if not self.sizes or min(self.sizes) < 1:
            raise InputError(f"circuits study: sizes are numbers of edges, at least 1; found {self.sizes}")


def run_circuit_study(
    model: PatchModel,
    out: Path,
    options: CircuitStudyOptions | None = None,
    *,
    task: str | None = None,
    command: str = "patchkit study circuits",
    progress: Progress | None = None,
) -> CircuitStudy:
    """Scores, selects, runs and compares; writes `circuits.json` into `out`.

    Args:
        task: that makes the pairs; by default the one that the embedded model was trained on.

    Raises:
        InputError: a model without a task, or options that nothing can be measured with.
    """
    options, started = options or CircuitStudyOptions(), time.monotonic()
    task = task or task_of(model)
    study = _Study(
        model,
        tasks.pairs(task, model.tokenizer, options.pairs, options.seed),
        tasks.pairs(task, model.tokenizer, options.test_pairs, options.seed + 1),
        options,
        out / CHECKPOINT,
        progress,
    )
    exact = patch_edges(
        model, study.train, study.edge_options, checkpoint=study.part("exact"), progress=progress
    )
    scored: dict[str, EdgeScores] = {"exact": exact}
    for label, asked in ESTIMATES.items():
        scored[label] = attribute_edges(
            model,
            study.train,
            study.edge_options,
            checkpoint=study.part(label),
            progress=study.renamed(label),
            **asked,  # type: ignore[arg-type]
        )
    scored["random"] = _random(exact, options.seed)
    rows = [study.row(label, scores, exact) for label, scores in scored.items()]
    rows.append(study.acdc_row(exact))
    study_size = study.sizes[min(len(study.sizes) - 1, len(study.sizes) // 2)]
    result = CircuitStudy(
        question="Which way of scoring edges finds circuits that behave as the model does, and at what cost?",
        model=model.name,
        task=task,
        pairs=len(study.train),
        convention=study.edge_options.convention,
        exact_size=study_size,
        methods=rows,
        findings=_findings(rows, study_size),
        command=command,
        seconds=round(time.monotonic() - started, 1),
    )
    result.save(out)
    return result


class _Study:
    """What every row shares."""

    def __init__(
        self,
        model: PatchModel,
        train: Sequence[Pair],
        test: Sequence[Pair],
        options: CircuitStudyOptions,
        checkpoint: Path,
        progress: Progress | None,
    ) -> None:
        self.model, self.train, self.test, self.options = model, train, test, options
        self.checkpoint, self.progress = checkpoint, progress
        self.edge_options = EdgeOptions(seed=options.seed)
        self.graph = EdgeGraph.of(model.dims)
        self.sizes = [size for size in options.sizes if size < self.graph.n_edges]
        if not self.sizes:
            raise InputError(
                f"circuits study: {model.name} has {self.graph.n_edges} edges, fewer than the least size "
                f"({min(options.sizes)})"
            )

    def part(self, name: str) -> Path:
        """Where what is finished of one part is kept."""
        return self.checkpoint / name.replace(" ", "-").replace(",", "")

    def renamed(self, stage: str) -> Progress | None:
        """The same progress under a name of its own."""
        report: Callable[..., None] | None = self.progress
        return None if report is None else lambda _, done, total: report(stage, done, total)

    def row(self, label: str, scores: EdgeScores, exact: EdgeScores) -> MethodRow:
        """A method's circuits, and what they share with those of the exact effects."""
        found = evaluate(
            self.model,
            self.test,
            scores,
            self.edge_options,
            EvaluateOptions(
                sizes=tuple(self.sizes), absolute=True, curve=True, draws=200, seed=self.options.seed
            ),
            truth=None if label == "exact" else exact,
            truth_name="exact",
            checkpoint=self.part(f"run {label}"),
            progress=self.renamed(f"run {label}"),
        )
        return MethodRow(
            method=label,
            cost=scores.cost,
            runs=found.circuits,
            curves=found.curves,
            overlap=[each for each in found.overlaps if each.level == "edge"],
            rank_correlation=None if label == "exact" else rank_correlation(_flat(scores), _flat(exact)),
        )

    def acdc_row(self, exact: EdgeScores) -> MethodRow:
        """ACDC gives one circuit, of the size that its threshold leads to."""
        scale = float((exact.base_metric.double().mean() - exact.source_metric.double().mean()).abs())
        found = acdc(
            self.model,
            self.train,
            self.edge_options,
            tau=self.options.tau * scale,
            checkpoint=self.part("acdc"),
            progress=self.renamed("acdc"),
        )
        assert found.circuit is not None
        run = evaluate(
            self.model,
            self.test,
            found.circuit,
            self.edge_options,
            EvaluateOptions(draws=200, seed=self.options.seed),
            checkpoint=self.part("run acdc"),
        )
        return MethodRow(
            method="acdc",
            cost=found.cost,
            runs=run.circuits,
            overlap=_against_exact(found.circuit, exact),
        )


def _flat(scores: EdgeScores) -> Tensor:
    return scores.mean_abs[scores.graph.real]


def _against_exact(circuit: Circuit, exact: EdgeScores) -> list[Overlap]:
    """A circuit against the exact one of as many edges."""
    from patchkit.results.circuit import top_n

    if circuit.is_empty:
        return []
    truth = top_n(exact.graph, exact.importance, circuit.n_edges, absolute=True).pruned()
    return [overlap(circuit, truth, "exact")]


def _random(like: EdgeScores, seed: int) -> EdgeScores:
    """Scores that know nothing: what every method must beat."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(like.mean.shape, generator=generator).masked_fill(~like.graph.real, torch.nan)
    return EdgeScores(
        graph=like.graph,
        method=EdgeMethod(name="random"),
        convention=like.convention,
        pair_ids=like.pair_ids,
        mean=drawn,
        mean_abs=drawn.abs(),
        base_metric=like.base_metric,
        source_metric=like.source_metric,
        cost=0.0,
    )


def _findings(rows: Sequence[MethodRow], size: int) -> list[str]:
    """What the table shows, in words that its numbers choose."""
    at_size = {
        row.method: run
        for row in rows
        for run in row.runs
        if run.requested == size and run.faithfulness is not None
    }
    told: list[str] = []
    if at_size:
        near = sorted(at_size, key=lambda name: abs(1 - (at_size[name].faithfulness or 0.0)))
        best, worst = at_size[near[0]], at_size[near[-1]]
        told.append(
            f"With {size} edges asked for, the circuit of {near[0]} comes closest to the model (faithfulness "
            f"{best.faithfulness:.3f}), that of {near[-1]} stays furthest ({worst.faithfulness:.3f})."
        )
        empty = sorted(name for name, run in at_size.items() if run.empty)
        if empty:
            told.append(f"Nothing is left after pruning of {', '.join(empty)} at that size.")
    ranked = sorted(
        (row for row in rows if row.rank_correlation is not None),
        key=lambda row: -(row.rank_correlation or 0.0),
    )
    if ranked:
        first = ranked[0]
        told.append(
            f"Of the estimates {first.method} ranks edges most like exact patching (rank correlation "
            f"{first.rank_correlation:.2f}), at {first.cost:,.1f} forwards a prompt; exact patching takes "
            f"{next(row.cost for row in rows if row.method == 'exact'):,.1f}."
        )
    curves = [
        (row.method, curve.cmd)
        for row in rows
        for curve in row.curves
        if curve.absolute and curve.cmd is not None
    ]
    if curves:
        name, value = min(curves, key=lambda item: item[1])
        told.append(
            f"Over all sizes the least distance from the model (CMD, absolute scores) is that of {name}: {value:.3f}."
        )
    kept = next((row for row in rows if row.method == "acdc"), None)
    if kept is not None and kept.runs:
        run = kept.runs[0]
        shown = "undefined" if run.faithfulness is None else f"{run.faithfulness:.3f}"
        told.append(
            f"ACDC keeps {run.n_edges} edges (faithfulness {shown}) at {kept.cost:,.0f} forwards a prompt."
        )
    return told
