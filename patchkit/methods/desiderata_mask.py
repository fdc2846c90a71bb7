"""Desiderata-based component masking (Davies et al. 2023, arXiv 2307.03637): which components carry a variable's value?

A desideratum is a set of triples (original, alternate, target). A mask w over components, learned on several desiderata
jointly, blends the two runs at one position, `w * original + (1 - w) * alternate`, so that the answer becomes the
target: the alternate's where the component's content should decide (dependence), the original's where it should not
(invariance). The result is the smallest set found, never without its baselines on held-out triples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from patchkit.data import Triple
from patchkit.errors import RunError
from patchkit.methods._mask_baselines import Scorer
from patchkit.methods._mask_checkpoint import Checkpoint
from patchkit.methods._mask_evaluate import (
    evaluate_mask,
    jaccard,
    joint_score,
    rounded,
)
from patchkit.methods._mask_layout import Layout
from patchkit.methods._mask_options import MaskOptions as MaskOptions
from patchkit.methods._mask_path import PathPoint, PathResult
from patchkit.methods._mask_prepared import Prepared, Tally, pool, prepare
from patchkit.methods._mask_prune import ROUNDING, prune
from patchkit.methods._mask_steps import check_host
from patchkit.methods._mask_train import train_path
from patchkit.methods._mask_triples import make_splits
from patchkit.model import PatchModel
from patchkit.results.mask import LambdaPoint, MaskResult, OwnMask, SeedRun
from patchkit.runtime import ItemsFailed, Progress
from patchkit.runtime.failures import ItemFailure


@dataclass(frozen=True)
class _Chosen:
    """The outcome of one path: the point taken, the set after pruning, and what pruning dropped."""

    point: PathPoint
    kept: list[int]
    dropped: list[int]
    validation: float


def learn_mask(
    model: PatchModel,
    triples: Sequence[Triple],
    options: MaskOptions | None = None,
    *,
    descriptions: dict[str, str] | None = None,
    checkpoint: Path | None = None,
    progress: Progress | None = None,
) -> MaskResult:
    """Learns, discretises, prunes and tests a mask.

    Args:
        triples: with splits, or without (half of the prompts is then held out).
        descriptions: what each desideratum asks, for the report.
        checkpoint: a directory where training paths are kept, lambda by lambda, and found again.
        progress: called with (stage, done, total).

    Returns:
        The result with all baselines on held-out triples. If a loss was not finite, `diverged` is set, `stopped` says
        where, and the result is that of the last good mask.

    Raises:
        InputError: triples or options that cannot be used.
        RunError: the loss was not finite before there was any mask.
    """
    options = options or MaskOptions()
    try:
        with ExitStack() as opened:
            return _learn(model, triples, options, descriptions or {}, checkpoint, progress, opened)
    except ItemsFailed as error:
        raise ItemsFailed(_of_triples(error.failures, triples), len(triples)) from error


def _learn(
    model: PatchModel,
    triples: Sequence[Triple],
    options: MaskOptions,
    descriptions: dict[str, str],
    checkpoint: Path | None,
    progress: Progress | None,
    opened: ExitStack,
) -> MaskResult:
    layout = Layout.build(options.components, model.dims)
    check_host(model)
    splits = make_splits(
        model,
        triples,
        train_on=options.train_on,
        validation_fraction=options.validation_fraction,
        seed=0,
        max_batch_tokens=options.max_batch_tokens,
    )
    say = progress or (lambda stage, done, total: None)
    together = (
        [{name: members} for name, members in splits.train.items()]
        if options.objective.alternates_steps
        else [splits.train]
    )
    parts = [*together, splits.validation, splits.test]
    tally = Tally()
    ready: list[Prepared] = []
    for place, part in enumerate(parts):
        say("caching activations", place, len(parts))
        ready.append(_prepare(model, layout, part, options, tally))
        opened.callback(ready[-1].close)
    say("caching activations", len(parts), len(parts))
    *training, validation, test = ready
    kept_paths = Checkpoint(checkpoint, _what_paths_depend_on(model, triples, options))
    trainer = _Trainer(
        model, layout, options, splits.train, splits.validation, training, validation, kept_paths, say, tally
    )
    runs = [(seed, trainer.path(seed)) for seed in options.seeds]
    chosen = [trainer.choose(path) for _, path in runs]
    best = max(range(len(runs)), key=lambda i: (round(chosen[i].validation, 2), -len(chosen[i].kept), -i))
    own = trainer.own_masks() if options.own_masks and len(splits.train) > 1 else []
    trained = tuple(splits.train)
    scorer = Scorer(layout, test, trained, options.random_sets, say)
    point, kept = chosen[best].point, chosen[best].kept
    scorer.see(_asked_for(scorer, runs, best, chosen, [pick.kept for _, _, pick in own], options))
    desiderata = scorer.desiderata(
        kept, point.values, splits, _train_scores(layout, training, kept), descriptions
    )
    diverged = [f"seed {seed}: {path.stopped}" for seed, path in runs if path.diverged]
    diverged += [f"alone {name}: {path.stopped}" for name, path, _ in own if path.diverged]
    seeds = [_seed_run(scorer, seed, pick) for (seed, _), pick in zip(runs, chosen, strict=True)]
    return MaskResult(
        model=model.name,
        components=list(options.components),
        n_components=layout.size,
        position=options.position,
        loss=options.objective.loss,
        sparsity=options.objective.sparsity,
        chosen=scorer.names(kept),
        pruned=scorer.names(chosen[best].dropped),
        desiderata=desiderata,
        joint=scorer.joint(desiderata),
        random_joint=scorer.random_joint(desiderata),
        lambda_path=[_lambda_point(scorer, p, trained) for p in runs[best][1].points],
        seeds=seeds,
        jaccard=[[jaccard(a.chosen, b.chosen) for b in seeds] for a in seeds],
        own_masks=[
            OwnMask(trained_on=name, chosen=scorer.names(pick.kept), test=scorer.score(pick.kept))
            for name, _, pick in own
        ],
        carried=scorer.carried(kept[: options.carried_limit], kept),
        history=runs[best][1].history,
        excluded=splits.excluded,
        stopped="; ".join(diverged) or runs[best][1].stopped,
        diverged=bool(diverged),
        forward_equivalents=tally.token_forwards / sum(len(triple.original_ids) for triple in triples),
        values=layout.by_kind(point.values),
    )


def _asked_for(
    scorer: Scorer,
    runs: Sequence[tuple[int, PathResult]],
    best: int,
    chosen: Sequence[_Chosen],
    own: Sequence[list[int]],
    options: MaskOptions,
) -> Iterator[Sequence[int]]:
    """Every set that the result tells the scores of."""
    kept = chosen[best].kept
    yield from scorer.compared(kept)
    for (seed, _), pick in zip(runs, chosen, strict=True):
        yield from scorer.compared(pick.kept, seed)
    for point in runs[best][1].points:
        yield point.chosen
    yield from own
    yield from scorer.carried_sets(kept[: options.carried_limit], kept)


def _what_paths_depend_on(model: PatchModel, triples: Sequence[Triple], options: MaskOptions) -> str:
    """What decides the outcome of training, as text; seeds may be added to a run, so only the first one counts."""
    how = (
        options.components,
        options.position,
        options.train_on,
        options.objective,
        options.schedule,
        options.validation_fraction,
        options.seeds[0],
    )
    data = [replace(triple, meta={}, where="") for triple in triples]
    return repr((model.content_key(), how, data))


def _prepare(
    model: PatchModel, layout: Layout, triples: dict[str, list[Triple]], options: MaskOptions, tally: Tally
) -> Prepared:
    return prepare(
        model,
        layout,
        triples,
        position=options.position,
        tally=tally,
        reuse=options.reuse,
        max_batch_tokens=options.max_batch_tokens,
    )


def _of_triples(failures: Sequence[ItemFailure], triples: Sequence[Triple]) -> list[ItemFailure]:
    """The failures as those of the triples that were given, which were filled in and split since."""
    found: dict[int, ItemFailure] = {}
    for failure in failures:
        # A prompt alone, where the model's own answer was asked for.
        triple = getattr(failure.item, "triple", None)
        for number, given in enumerate(triples):
            prompts = (given.original_ids, given.alternate_ids)
            if failure.item in prompts if triple is None else _same(triple, given):
                found.setdefault(number, ItemFailure(given, failure.reason))
    return list(found.values()) or list(failures)


def _same(one: Triple, other: Triple) -> bool:
    return all(
        getattr(one, name) == getattr(other, name)
        for name in ("desideratum", "original_ids", "alternate_ids")
    )


def _train_scores(layout: Layout, training: Sequence[Prepared], kept: list[int]) -> dict[str, float]:
    keep = layout.keep_all_but(kept)
    return {name: score for part in training for name, score in evaluate_mask(part, keep).items()}


def _lambda_point(scorer: Scorer, point: PathPoint, trained: Sequence[str]) -> LambdaPoint:
    scores = scorer.score(point.chosen)
    return LambdaPoint(
        lam=point.lam,
        size=len(point.chosen),
        soft_size=float((1 - point.values).sum()),
        test=scores,
        joint=joint_score(scores, trained),
        steps=point.steps,
    )


def _seed_run(scorer: Scorer, seed: int, pick: _Chosen) -> SeedRun:
    scores = scorer.score(pick.kept)
    _, _, _, complement, *random = map(scorer.score, scorer.compared(pick.kept, seed))
    return SeedRun(
        seed=seed,
        lam=pick.point.lam,
        chosen=scorer.names(pick.kept),
        test=scores,
        joint=joint_score(scores, scorer.trained),
        complement_joint=joint_score(complement, scorer.trained),
        random_joint=[joint_score(scores, scorer.trained) for scores in random],
        steps=pick.point.steps,
    )


@dataclass(frozen=True)
class _Trainer:
    """Trains paths by seed and by desideratum, finding again the ones that were finished before."""

    model: PatchModel
    layout: Layout
    options: MaskOptions
    train: dict[str, list[Triple]]
    held: dict[str, list[Triple]]
    training: list[Prepared]
    validation: Prepared
    checkpoint: Checkpoint
    say: Progress
    tally: Tally

    def _run(self, name: str, training: list[Prepared], validation: Prepared, seed: int) -> PathResult:
        found = self.checkpoint.load(name)
        if found is not None and found.stopped:
            return found
        path = train_path(
            self.layout,
            training,
            validation,
            self.options.objective,
            self.options.schedule,
            seed,
            report=lambda done, total: self.say(f"training {name}", done, total),
            checkpoint=self.checkpoint,
            name=name,
        )
        if not path.points:
            raise RunError(
                f"training {name}: {path.stopped}; there is no good mask to keep. Try another dtype or loss"
            )
        return path

    def path(self, seed: int) -> PathResult:
        """The path on all desiderata jointly."""
        return self._run(f"seed {seed}", self.training, self.validation, seed)

    def own_masks(self) -> list[tuple[str, PathResult, _Chosen]]:
        """A mask for each desideratum alone, with the path that led to it."""
        found = []
        ready = {part.names: part for part in self.training}
        for name, members in self.train.items():
            with ExitStack() as opened:
                own = ready.get((name,)) or self._open({name: members}, opened)
                alone = self._open({name: self.held[name]}, opened)
                path = self._run(f"alone {name}", [own], alone, self.options.seeds[0])
                found.append((name, path, self._choose(path, [own], alone)))
        return found

    def _open(self, triples: dict[str, list[Triple]], opened: ExitStack) -> Prepared:
        ready = _prepare(self.model, self.layout, triples, self.options, self.tally)
        opened.callback(ready.close)
        return ready

    def choose(self, path: PathResult) -> _Chosen:
        """The smallest set of a path that validation does not tell from the best, pruned."""
        return self._choose(path, self.training, self.validation)

    def _choose(self, path: PathResult, training: list[Prepared], validation: Prepared) -> _Chosen:
        best = max(point.joint for point in path.points)
        good = [point for point in path.points if point.joint >= best - self.options.slack - ROUNDING]
        point = min(good, key=lambda p: (len(p.chosen), -p.joint))
        # Every component dropped is one more choice: a small validation set alone would be fitted by pruning.
        known = pool([*training, validation])
        kept, dropped = prune(self.layout, known, rounded(point.values), self.options.slack)
        scores = evaluate_mask(validation, self.layout.keep_all_but(kept))
        return _Chosen(point, kept, dropped, joint_score(scores))
