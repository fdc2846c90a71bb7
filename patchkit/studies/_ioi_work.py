"""The parts of the IOI study that take time: heads watched, paths patched, the circuit judged.

The circuit's three scores are taken under node patching with the other prompt's activations (resample, `abc`), on pairs
that no path was patched on. Beside them stand the flip of the repeated name, the traced edges alone, and the protocol of
Wang et al. 2022: what is outside the circuit carries the mean over prompts about other people, template by template and
token by token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel

from patchkit.data import Pair
from patchkit.methods._edge_options import EdgeOptions
from patchkit.methods.evaluate import EvaluateOptions, evaluate
from patchkit.methods.path_patching import patch_paths
from patchkit.model import PatchModel
from patchkit.results.circuit import Circuit
from patchkit.results.evaluation import Evaluation
from patchkit.results.ioi import Accuracy, Attention, HeadBehaviour, ProtocolScore
from patchkit.results.paths import PathResult
from patchkit.runtime import Progress
from patchkit.studies._finished_parts import Checkpoint
from patchkit.studies._ioi_behaviour import measure_behaviour, named
from patchkit.studies._ioi_material import measure_accuracy, study_pairs
from patchkit.studies._ioi_options import IoiOptions
from patchkit.studies._ioi_repeats import repeat_scores

# What the circuit is judged under.
_CORRUPTION = "abc"
_BATCHES = "batches"


class Watched(BaseModel):
    """Whether the model does the task, and what each head does."""

    accuracy: Accuracy
    even: Attention
    heads: dict[str, HeadBehaviour]


class Protocols(BaseModel):
    """The circuit under several protocols."""

    scores: list[ProtocolScore]


@dataclass(frozen=True, eq=False)
class Work:
    """What the parts are made from, and whom they tell how far they are."""

    model: PatchModel
    options: IoiOptions
    kept: Checkpoint
    say: Progress

    def watch(self, pairs: Sequence[Pair]) -> Watched:
        """What every head does on clean prompts, and whether the model does the task."""
        options, dims = self.options, self.model.dims
        self.say("what heads do", 0, 2)
        repeats = repeat_scores(self.model, options.sequences, options.tokens, options.seed)
        self.say("what heads do", 1, 2)
        found = measure_behaviour(self.model, pairs, repeats)
        accuracy = measure_accuracy(self.model, pairs)
        self.say("what heads do", 2, 2)
        heads = [(layer, head) for layer in range(dims.n_layers) for head in range(dims.n_heads)]
        return Watched(
            accuracy=accuracy,
            even=named(found.even),
            heads={f"a{layer}.h{head}": found.of(layer, head) for layer, head in heads},
        )

    def stage(
        self, pairs: Sequence[Pair], corruption: str, stage: str, senders: list[str], receivers: list[str]
    ) -> PathResult:
        """One stage of path patching under one corruption."""
        return self.kept.part(
            f"paths {corruption} {stage}".replace(" ", "-"),
            PathResult,
            lambda: patch_paths(
                self.model,
                pairs,
                senders,
                receivers,
                EdgeOptions(seed=self.options.seed),
                checkpoint=self.kept.inside(_BATCHES),
                progress=lambda _, done, total: self.say(f"effects {stage} ({corruption})", done, total),
            ),
        )

    def judge(self, circuit: Circuit, knocked_out: Sequence[str]) -> Evaluation:
        """Faithfulness, completeness, minimality, random circuits of equal size, and the group knocked out."""
        options = self.options
        asked = EvaluateOptions(
            patching="node",
            completeness=options.completeness,
            minimality=True,
            random=options.random,
            knockout=tuple(knocked_out),
            removals=options.removals,
            candidates=options.candidates,
            seed=options.seed,
        )
        return evaluate(
            self.model,
            study_pairs(self.model, options.evaluated, options.seed + 1, _CORRUPTION),
            circuit,
            EdgeOptions(seed=options.seed),
            asked,
            origin="the traced heads, every MLP, and all edges among them",
            checkpoint=self.kept.inside(_BATCHES),
            progress=lambda part, done, total: self.say(f"the circuit: {part}", done, total),
        )

    def protocols(self, whole: Circuit, traced: Circuit) -> Protocols:
        """Both circuits under both corruptions, and the whole one on single templates."""
        options = self.options
        scores: list[ProtocolScore] = []
        made = {
            one: study_pairs(self.model, options.evaluated, options.seed + 1, one)
            for one in (_CORRUPTION, "s2-flip")
        }
        by_template: dict[str, list[Pair]] = {}
        drawn = options.templates * options.per_template
        for pair in study_pairs(self.model, drawn, options.seed + 1, _CORRUPTION, options.templates):
            by_template.setdefault(str(pair.meta["template"]), []).append(pair)
        total = 2 * len(made) + len(by_template)
        for corruption, pairs in made.items():
            self.say("the circuit under other protocols", len(scores), total)
            scores.append(self._score(pairs, whole, "all edges", corruption, "resample", "node"))
            scores.append(self._score(pairs, traced, "traced edges", corruption, "resample", "edge"))
        for template, pairs in by_template.items():
            self.say("the circuit under other protocols", len(scores), total)
            scores.append(
                self._score(pairs, whole, "all edges", _CORRUPTION, "mean-positional", "node", template)
            )
        self.say("the circuit under other protocols", total, total)
        return Protocols(scores=scores)

    def _score(
        self,
        pairs: Sequence[Pair],
        circuit: Circuit,
        name: Literal["all edges", "traced edges"],
        corruption: str,
        ablation: Literal["resample", "mean-positional"],
        patching: Literal["edge", "node"],
        template: str | None = None,
    ) -> ProtocolScore:
        found = evaluate(
            self.model,
            pairs,
            circuit,
            EdgeOptions(ablation=ablation, seed=self.options.seed),
            EvaluateOptions(patching=patching, seed=self.options.seed),
        )
        (run,) = found.circuits
        return ProtocolScore(
            circuit=name,
            corruption=corruption,
            ablation=ablation,
            patching=patching,
            template=template,
            pairs=len(pairs),
            n_edges=run.n_edges,
            clean_metric=found.clean_metric,
            circuit_metric=run.circuit_metric,
            corrupt_metric=found.corrupt_metric,
            faithfulness=run.faithfulness,
            interval=run.faithfulness_interval,
        )
