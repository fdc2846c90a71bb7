"""Which triples a mask is trained, validated and tested on, and which cannot tell success from failure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from patchkit.data import Batch, Triple, drop_uninformative, group, require_disjoint, split_if_needed
from patchkit.errors import InputError
from patchkit.model import Dims, PatchModel
from patchkit.runtime import MAX_BATCH_TOKENS, Cost, run_program
from patchkit.tracing import capture
from patchkit.tracing.prefixes import share_prefixes


@dataclass(frozen=True)
class OwnAnswers:
    """Program: the model's own answer to each prompt (the argmax after the last token)."""

    def tokens(self, item: Sequence[int]) -> int:
        return len(item)

    def run(self, model: PatchModel, items: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        (batch,), _ = share_prefixes(model, [Batch.from_ids(items, pad_id=model.pad_id)])
        logits = capture(model, batch, []).logits
        return {"answer": logits.argmax(-1).cpu()}

    def cost(self, dims: Dims, items: Sequence[Sequence[int]]) -> Cost:
        return Cost(forwards=float(sum(len(item) for item in items)), bytes=8 * len(items))


@dataclass(frozen=True)
class Splits:
    """Triples by desideratum in three disjoint parts, and how many were left out, by reason."""

    train: dict[str, list[Triple]]
    validation: dict[str, list[Triple]]
    test: dict[str, list[Triple]]
    excluded: dict[str, int]


def make_splits(
    model: PatchModel,
    triples: Sequence[Triple],
    *,
    train_on: Sequence[str] | None,
    validation_fraction: float,
    seed: int,
    max_batch_tokens: int = MAX_BATCH_TOKENS,
) -> Splits:
    """Fills in unknown answers, leaves out what cannot tell success from failure, and splits.

    Desiderata that are not trained on need test triples only. Without `split` in the data, half of the prompts is held
    out; validation always comes out of the training part, so that nothing about the test part is used before the end.

    Raises:
        InputError: a desideratum to train on that is not there, one that no triple is left of, or a prompt in both
            splits.
    """
    triples = split_if_needed(triples, seed)
    require_disjoint(triples)
    kept, excluded = drop_uninformative(_with_answers(model, triples, max_batch_tokens))
    kept = _one_kind(kept, excluded)
    names = list(dict.fromkeys(triple.desideratum for triple in triples))
    trained = list(train_on) if train_on is not None else names
    unknown = [name for name in trained if name not in names]
    if unknown or not trained:
        raise InputError(
            f"cannot train on '{(unknown or ['nothing'])[0]}'; the desiderata given are: {', '.join(names)}"
        )
    for name in names:
        if not any(t.desideratum == name for t in kept):
            raise InputError(
                f"desideratum '{name}': no triple is left that can tell success from failure ({excluded})"
            )
    training = [replace(t, split=None) for t in kept if t.split == "train" and t.desideratum in trained]
    for name in trained:
        if not any(t.desideratum == name for t in training):
            raise InputError(
                f"desideratum '{name}' has no training triples; expected at least two different prompts"
            )
    dealt = split_if_needed(training, seed, validation_fraction)
    return Splits(
        train=_ordered(group(dealt, "train"), trained),
        validation=_ordered(group(dealt, "test"), trained),
        test=_ordered(group([t for t in kept if t.split == "test"], "test"), names),
        excluded=excluded,
    )


def _ordered(groups: dict[str, list[Triple]], names: Sequence[str]) -> dict[str, list[Triple]]:
    missing = [name for name in names if name not in groups]
    if missing:
        raise InputError(
            f"desideratum '{missing[0]}' has no held-out triples; expected some with split 'test'"
        )
    return {name: groups[name] for name in names}


def _with_answers(model: PatchModel, triples: Sequence[Triple], max_batch_tokens: int) -> list[Triple]:
    """Answers that the data does not state are the model's own."""
    unknown = [t for t in triples if t.original_answer_id is None or t.alternate_answer_id is None]
    if not unknown:
        return list(triples)
    prompts = list(dict.fromkeys(ids for t in unknown for ids in (t.original_ids, t.alternate_ids)))
    found = run_program(OwnAnswers(), model, prompts, max_batch_tokens=max_batch_tokens)["answer"].tolist()
    answers = dict(zip(prompts, found, strict=True))
    return [
        replace(
            t,
            original_answer_id=answers[t.original_ids]
            if t.original_answer_id is None
            else t.original_answer_id,
            alternate_answer_id=answers[t.alternate_ids]
            if t.alternate_answer_id is None
            else t.alternate_answer_id,
        )
        for t in triples
    ]


def _one_kind(triples: Sequence[Triple], excluded: dict[str, int]) -> list[Triple]:
    """Leaves out triples whose kind is not that of most of their desideratum.

    In a dependence, a target that is the original's answer is reached without any patch; in an invariance, another
    target cannot be kept.
    """
    kept = []
    for name in dict.fromkeys(triple.desideratum for triple in triples):
        members = [triple for triple in triples if triple.desideratum == name]
        invariant = torch.tensor([triple.kind == "invariance" for triple in members])
        kind = "invariance" if float(invariant.float().mean()) > 0.5 else "dependence"
        fitting = [triple for triple in members if triple.kind == kind]
        if len(fitting) < len(members):
            reason = (
                "the target is the original's answer"
                if kind == "dependence"
                else "the target is not the original's answer"
            )
            excluded[f"{name}: {reason}"] = len(members) - len(fitting)
        kept.extend(fitting)
    return kept
