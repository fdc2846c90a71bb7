"""What the IOI study is about: prompts in the model's language, and whether the model does the task at all."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from patchkit.data import Batch, Pair
from patchkit.errors import InputError
from patchkit.model import PatchModel
from patchkit.results.ioi import Accuracy
from patchkit.runtime import MAX_BATCH_TOKENS
from patchkit.tasks import ioi as task
from patchkit.tracing import capture


def study_pairs(
    model: PatchModel, n: int, seed: int, corruption: str, templates: int | None = None
) -> list[Pair]:
    """`n` pairs of the IOI task for the model's tokenizer.

    Raises:
        InputError: the model has no tokenizer, or one that the task cannot be written with.
    """
    if model.tokenizer is None:
        raise InputError(
            f"{model.name} has no tokenizer, and the IOI study writes prompts; give a model with one"
        )
    return task.pairs(model.tokenizer, n, seed, corruption=corruption, templates=templates)


def measure_accuracy(
    model: PatchModel, pairs: Sequence[Pair], max_batch_tokens: int = MAX_BATCH_TOKENS
) -> Accuracy:
    """Whether IO is preferred to S, and whether it is what the model says, on clean prompts."""
    prefers, says = 0, 0
    for part in parts(pairs, max_batch_tokens):
        batch = Batch.from_ids([pair.clean_ids for pair in part], model.pad_id).to(model.embed_device)
        logits = capture(model, batch, ()).logits
        answers, wrongs = (
            torch.tensor([getattr(pair, name) for pair in part], device=logits.device)[:, None]
            for name in ("answer_id", "wrong_id")
        )
        prefers += int((logits.gather(1, answers) > logits.gather(1, wrongs)).sum())
        says += int((logits.argmax(-1, keepdim=True) == answers).sum())
    return Accuracy(prefers_io=prefers / len(pairs), says_io=says / len(pairs))


def parts(pairs: Sequence[Pair], max_batch_tokens: int) -> list[Sequence[Pair]]:
    """The pairs in their order, at most so many padded tokens at once."""
    rows = max(1, max_batch_tokens // max(len(pair.clean_ids) for pair in pairs))
    return [pairs[start : start + rows] for start in range(0, len(pairs), rows)]
