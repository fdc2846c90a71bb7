"""Cross-model activation patching: one model's activations put into another that has the same architecture.

    effect(n) = metric(model with n := the donor's activation on the same prompt) - metric(model)

After Prakash et al. 2024, "Fine-tuning enhances existing mechanisms" (arXiv:2402.14811), who call it CMAP: where two
training stages of one network differ in a behaviour, the nodes whose activations carry the difference over are where the
later stage does better. The share of the gap that is closed is

    share = (patched - model) / (donor - model)        of metrics' means over pairs

The donor runs each batch beside the model, so that no more than a batch of its activations is held at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from patchkit.data import Pair
from patchkit.errors import InputError
from patchkit.methods._node_options import Asked, NodeOptions, ask
from patchkit.methods._replacements import CROSS_MODEL, Replacement
from patchkit.methods.activation_patching import exact_scores, set_effects
from patchkit.model import PatchModel
from patchkit.results.scores import Scores
from patchkit.runtime import Progress, SecondModel


def check_alike(first: PatchModel, second: PatchModel) -> None:
    """Raises InputError unless both models have the same sizes and, where they say what their tokens are, the same
    vocabulary; it names what differs."""
    differing = [
        f"{field.name} {getattr(first.dims, field.name)} and {getattr(second.dims, field.name)}"
        for field in fields(first.dims)
        if field.compare and getattr(first.dims, field.name) != getattr(second.dims, field.name)
    ]
    if differing:
        raise InputError(
            f"{first.name} and {second.name} are not of one architecture: {'; '.join(differing)}. Compare two training "
            "stages of one model"
        )
    if first.tokenizer is None or second.tokenizer is None:
        return
    ours, theirs = first.tokenizer.get_vocab(), second.tokenizer.get_vocab()
    for word in sorted(ours.keys() | theirs.keys()):
        here, there = (
            f"token {vocabulary[word]}" if word in vocabulary else "no token" for vocabulary in (ours, theirs)
        )
        if here != there:
            raise InputError(
                f"{first.name} and {second.name} have different vocabularies: {word!r} is {here} of the first and "
                f"{there} of the second, so they cannot be given the same prompts. Compare two training stages of one "
                "model"
            )


def patch_across(
    model: PatchModel,
    donor: PatchModel,
    pairs: Sequence[Pair],
    options: NodeOptions | None = None,
    *,
    checkpoint: Path | None = None,
    progress: Progress | None = None,
) -> Scores:
    """The effect of every node of `model` when it holds what it holds in `donor` on the same clean prompt.

    Args:
        options: nodes, positions, metric and batches; direction and ablation stay as they are, since nothing of the
            corrupt prompts is run.
        checkpoint: a directory for finished batches, from which an interrupted run goes on.

    Returns:
        `Scores` of ablation `cross-model`: `base_metric` is the model's on clean prompts, `source_metric` the donor's;
        positive effects raise the model's metric.

    Raises:
        InputError: models that differ in more than their weights, a hosted model, options that mean nothing here, nodes
            or positions that do not exist.
    """
    asked, made = _prepared(model, donor, pairs, options)
    scores = exact_scores(model, asked, made, asked.ids, checkpoint, progress)
    return replace(scores, convention=scores.convention.model_copy(update={"ablation": CROSS_MODEL}))


@dataclass(frozen=True, eq=False)
class AcrossSets:
    """What sets of nodes did: `effects` of each set in each pair, and the cost in forward-equivalents."""

    effects: Float[Tensor, "pairs sets"]
    cost: float


def patch_sets_across(
    model: PatchModel,
    donor: PatchModel,
    pairs: Sequence[Pair],
    sets: Sequence[Sequence[str]],
    options: NodeOptions | None = None,
    *,
    checkpoint: Path | None = None,
    progress: Progress | None = None,
) -> AcrossSets:
    """The same of whole sets of nodes, each put in at once.

    Args:
        sets: names of nodes, or kinds, of those that `options` speak of.

    Raises:
        InputError: as `patch_across`; no sets, or one without nodes.
    """
    if not sets or not all(sets):
        raise InputError("there are no sets of nodes, or one of them is empty; expected names in each")
    asked, made = _prepared(model, donor, pairs, options)
    numbers = [asked.grid.select(tuple(names)) for names in sets]
    found = set_effects(
        model,
        asked,
        made,
        [each for _ in pairs for each in numbers],
        [pair for pair in range(len(pairs)) for _ in numbers],
        progress,
        checkpoint,
    )
    return AcrossSets(found.effects.reshape(len(pairs), len(sets)), found.cost)


def _prepared(
    model: PatchModel, donor: PatchModel, pairs: Sequence[Pair], options: NodeOptions | None
) -> tuple[Asked, Replacement]:
    options = options or NodeOptions()
    check_alike(model, donor)
    for name, rest in (("direction", "noise"), ("ablation", "resample")):
        if getattr(options, name) != rest:
            raise InputError(
                f"cross-model patching puts the donor's activations into clean prompts; {name} "
                f"'{getattr(options, name)}' means nothing there, leave it at {rest}"
            )
    if model.hosted is not None:
        raise InputError(
            f"{model.name} is hosted, and another model's activations would have to travel there; load both models here"
        )
    return ask(model, pairs, options), Replacement(CROSS_MODEL, donor=SecondModel.of(donor))
