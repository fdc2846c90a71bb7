"""What the IOI study is about: prompts in the model's language, and whether the model does the task at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from patchkit.data import Batch, Pair
from patchkit.errors import InputError
from patchkit.model import Dims, PatchModel
from patchkit.results.ioi import Accuracy
from patchkit.runtime import MAX_BATCH_TOKENS, Cost, run_program
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
    found = run_program(Preference(), model, pairs, max_batch_tokens=max_batch_tokens, label="accuracy")
    share = {name: float(values.double().mean()) for name, values in found.items()}
    return Accuracy(prefers_io=share["prefers"], says_io=share["says"])


@dataclass(frozen=True)
class Preference:
    """Program: whether the model `prefers` the answer to the wrong one, and whether it `says` it, on clean prompts."""

    def tokens(self, item: Pair) -> int:
        return len(item.clean_ids)

    def run(self, model: PatchModel, items: Sequence[Pair]) -> dict[str, Tensor]:
        batch = Batch.from_ids([pair.clean_ids for pair in items], model.pad_id).to(model.embed_device)
        logits = capture(model, batch, ()).logits
        answers, wrongs = (
            torch.tensor([getattr(pair, name) for pair in items], device=logits.device)[:, None]
            for name in ("answer_id", "wrong_id")
        )
        return {
            "prefers": (logits.gather(1, answers) > logits.gather(1, wrongs))[:, 0],
            "says": (logits.argmax(-1, keepdim=True) == answers)[:, 0],
        }

    def cost(self, dims: Dims, items: Sequence[Pair]) -> Cost:
        """A forward over every clean prompt."""
        return Cost(float(sum(len(item.clean_ids) for item in items)))
