"""Path patching: the effect of a sender along its paths to some receivers alone, and circuits found stage by stage.

The sender is replaced; what it changes reaches the receivers through the residual stream and the MLPs only, since all
other heads are held; the receivers' inputs are then put into the base run, where everything after them is recomputed
(Wang et al. 2022, arXiv:2211.00593, section 3.1; Goldowsky-Dill et al. 2023, arXiv:2304.05969). With MLPs held too, a
path to one receiver is an edge, and its effect is that of `patch_edges`.

    effect(sender, receivers) = metric(base run with those inputs put in) - metric(base run)

The definition for several receivers, and for the logits among them, is in `_path_program.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

from patchkit.data import Pair, Places, resolve_metric
from patchkit.errors import InputError
from patchkit.methods._edge_items import PathItem
from patchkit.methods._edge_options import EdgeOptions
from patchkit.methods._edge_replacement import EdgeReplacement, edge_replacement
from patchkit.methods._evaluate_bootstrap import PairBootstrap, same_metric
from patchkit.methods._path_names import MLPS as MLPS
from patchkit.methods._path_names import StagePlan as StagePlan
from patchkit.methods._path_names import find_receivers, find_senders, inputs_of, one_place, upstream_of
from patchkit.methods._path_program import Mlps, PatchPaths
from patchkit.model import PatchModel
from patchkit.model.edges import EdgeGraph
from patchkit.results.paths import PathEffect, PathResult, Stage
from patchkit.runtime import Journal, Progress, run_program

#: Senders patched in one pair between two base runs.
SENDERS_AN_ITEM = 256
#: Draws of the bootstrap over pairs.
DRAWS = 1000


def patch_paths(
    model: PatchModel,
    pairs: Sequence[Pair],
    senders: Sequence[str],
    receivers: Sequence[str],
    options: EdgeOptions | None = None,
    *,
    mlps: str = "recomputed",
    reference: Sequence[Pair] | None = None,
    checkpoint: Path | None = None,
    progress: Progress | None = None,
) -> PathResult:
    """The effect of each sender along its paths to the receivers, whose inputs are put in together.

    Args:
        senders: `input`, heads (`a1.h3`), MLPs (`m2`), or the words `heads`, `mlps`, `all`.
        receivers: `logits`, MLPs (`m2`), inputs of heads (`a1.h3<q>`; of `<k>` and `<v>` the KV head's number).
        options: `positions` are the tokens at which senders are replaced, one place.
        mlps: `recomputed`: MLPs on the way pass the change on; `frozen`: they are held as heads are.
        reference: prompt pairs whose source prompts the two means are taken over; default: the pairs themselves.
        checkpoint: a directory for finished batches, from which an interrupted run goes on.

    Returns:
        A `PathResult` of one stage; a sender that is upstream of no receiver has effect 0, exactly.

    Raises:
        InputError: no senders or receivers, an unknown one, several places, options that contradict the pairs.
    """
    study = PathStudy.of(model, pairs, options or EdgeOptions(), mlps, reference, checkpoint, progress)
    starts, ends = find_senders(study.graph, senders), find_receivers(study.graph, receivers)
    found = study.score("path patching", starts, ends)
    reached = int(study.graph.upstream[ends].max())
    notes = []
    if starts[0] >= reached:
        notes.append("no sender is upstream of any receiver, so every effect is 0 by construction")
    stage = Stage(
        name="paths",
        receivers=[study.graph.receiver_name(end) for end in ends],
        effects=study.effects(found, starts),
        chosen=[],
    )
    return study.result([stage], [found], notes, iterative=False)


def trace_paths_back(
    model: PatchModel,
    pairs: Sequence[Pair],
    options: EdgeOptions | None = None,
    *,
    stages: Sequence[StagePlan],
    mlps: str = "recomputed",
    reference: Sequence[Pair] | None = None,
    checkpoint: Path | None = None,
    progress: Progress | None = None,
) -> PathResult:
    """Iterative path patching from the logits backwards: who acts on the logits, who acts on these, and so on.

    Every stage scores all senders upstream of its receivers, keeps some of them as its plan says, and hands their inputs
    to the next as receivers. It ends early where nothing passes or nothing is left upstream, with a note.

    Args:
        stages: one plan each, from the logits on.
        mlps, reference, checkpoint: as for `patch_paths`.

    Returns:
        A `PathResult`; `as_circuit` makes a circuit of it.

    Raises:
        InputError: no stages or two of one name, several places, base and source runs of one metric (there is no share
            to choose by), options that contradict the pairs.
    """
    if not stages:
        raise InputError("there are no stages; expected at least one StagePlan")
    names = [plan.name for plan in stages]
    if len(set(names)) < len(names):
        raise InputError(f"two stages have one name, found {', '.join(names)}; give each its own")
    study = PathStudy.of(model, pairs, options or EdgeOptions(), mlps, reference, checkpoint, progress)
    graph, ends = study.graph, [study.graph.logits]
    done: list[Stage] = []
    found: list[_Found] = []
    notes: list[str] = []
    for number, plan in enumerate(stages):
        starts = upstream_of(graph, ends, plan.only)
        if not starts:
            notes.append(f"stage '{plan.name}': there are no {plan.only} upstream of its receivers")
            break
        found.append(study.score(plan.name, starts, ends))
        effects = study.effects(found[-1], starts)
        chosen = _choose(plan, effects)
        done.append(
            Stage(
                name=plan.name,
                receivers=[graph.receiver_name(end) for end in ends],
                effects=effects,
                chosen=[effect.sender for effect in chosen],
            )
        )
        if not chosen:
            notes.append(f"stage '{plan.name}': no sender passes, so the stages end here")
            break
        ends = inputs_of(graph, [graph.find_sender(effect.sender) for effect in chosen], plan.letters)
        if not ends and number + 1 < len(stages):
            notes.append(f"stage '{plan.name}': only the input was chosen, which nothing is upstream of")
            break
    left = names[len(done) :]
    if left:
        notes.append(f"not run: {', '.join(left)}")
    return study.result(done, found, notes, iterative=True)


def _choose(plan: StagePlan, effects: Sequence[PathEffect]) -> list[PathEffect]:
    """The effects that a plan keeps, largest first; ties by sender."""
    counted = []
    for effect in effects:
        if effect.share is None:
            raise InputError(
                "base and source runs have the same mean metric, so effects have no share of their difference to choose "
                "by; use other pairs or another metric"
            )
        wanted = {"hurt": effect.share < 0, "help": effect.share > 0, "both": effect.share != 0}[plan.sign]
        if wanted and (plan.threshold is None or abs(effect.share) >= plan.threshold):
            counted.append((abs(effect.share), effect))
    counted.sort(key=lambda each: -each[0])
    return [effect for _, effect in counted[: plan.k]]


@dataclass(frozen=True, eq=False)
class _Found:
    """Effects of some senders, metrics of both runs, forward-equivalents."""

    effects: Float[Tensor, "pairs senders"]
    base: Float[Tensor, " pairs"]
    source: Float[Tensor, " pairs"]
    cost: float


@dataclass(frozen=True, eq=False)
class PathStudy:
    """What every stage is scored with."""

    model: PatchModel
    graph: EdgeGraph
    pairs: tuple[Pair, ...]
    places: Places
    options: EdgeOptions
    mlps: Mlps
    made: EdgeReplacement
    checkpoint: Path | None
    progress: Progress | None

    @classmethod
    def of(
        cls,
        model: PatchModel,
        pairs: Sequence[Pair],
        options: EdgeOptions,
        mlps: str,
        reference: Sequence[Pair] | None,
        checkpoint: Path | None,
        progress: Progress | None,
    ) -> PathStudy:
        if mlps not in MLPS:
            raise InputError(f"mlps '{mlps}' is not known; expected one of: {', '.join(MLPS)}")
        resolve_metric(options.metric)
        places = one_place(options.positions, pairs)
        made = edge_replacement(model, pairs, options, reference)
        graph = EdgeGraph.of(model.dims)
        return cls(model, graph, tuple(pairs), places, options, cast(Mlps, mlps), made, checkpoint, progress)

    def score(self, label: str, senders: Sequence[int], receivers: Sequence[int]) -> _Found:
        """Patches each sender along its paths to all receivers, in every pair."""
        program, items, slices = self.work(senders, receivers)
        found = run_program(
            program,
            self.model,
            items,
            max_batch_tokens=self.options.max_batch_tokens,
            progress=self.progress,
            label=label,
            journal=None if self.checkpoint is None else Journal(self.checkpoint),
        )
        pairs = len(self.pairs)
        by_slice = found["effect"].reshape(len(slices), pairs, -1)
        parts = [values[:, : len(part)] for part, values in zip(slices, by_slice, strict=True)]
        cost = float(found["work"].double().sum()) / sum(len(pair.clean_ids) for pair in self.pairs)
        return _Found(torch.cat(parts, dim=1), found["base"][:pairs], found["source"][:pairs], cost)

    def work(
        self, senders: Sequence[int], receivers: Sequence[int]
    ) -> tuple[PatchPaths, list[PathItem], tuple[Tensor, ...]]:
        """The Program of these paths, its items, and the senders of each slice: slice by slice, pair by pair."""
        slices = torch.tensor(senders).tensor_split(-(-len(senders) // SENDERS_AN_ITEM))
        items = [
            PathItem(number, pair, self.places.covered[number], part)
            for part in slices
            for number, pair in enumerate(self.pairs)
        ]
        program = PatchPaths(
            self.graph,
            tuple(receivers),
            self.mlps,
            self.options.metric,
            self.options.direction,
            self.made,
            max(item.rows for item in items),
            self.options.max_batch_tokens,
        )
        return program, items, slices

    def effects(self, found: _Found, senders: Sequence[int]) -> list[PathEffect]:
        """One entry a sender, in their order."""
        base, source = float(found.base.double().mean()), float(found.source.double().mean())
        bootstrap = PairBootstrap(len(self.pairs), DRAWS, self.options.seed)
        entries = []
        for sender, values in zip(senders, found.effects.double().T, strict=True):
            effect = float(values.mean())
            entries.append(
                PathEffect(
                    sender=self.graph.sender_name(sender),
                    effect=effect,
                    effect_abs=float(values.abs().mean()),
                    share=None if same_metric(base, source) else effect / (base - source),
                    interval=bootstrap.interval(values),
                    per_pair=values.tolist(),
                )
            )
        return entries

    def result(
        self, stages: Sequence[Stage], found: Sequence[_Found], notes: Sequence[str], *, iterative: bool
    ) -> PathResult:
        return PathResult(
            convention=self.options.convention,
            model=self.model.name,
            mlps=self.mlps,
            positions=self.options.positions,
            pair_ids=[pair.id for pair in self.pairs],
            base_metric=float(found[0].base.double().mean()),
            source_metric=float(found[0].source.double().mean()),
            iterative=iterative,
            stages=list(stages),
            cost=sum(each.cost for each in found),
            notes=list(notes),
        )
