"""Prompt pairs for the recall study: the task that the model's tokenizer speaks, and random text in its words."""

from __future__ import annotations

import random
from collections.abc import Sequence

from patchkit import tasks
from patchkit.data import Pair
from patchkit.errors import InputError
from patchkit.methods._mask_triples import OwnAnswers
from patchkit.model import PatchModel
from patchkit.results.recall import Material
from patchkit.runtime import run_program
from patchkit.tasks.language import VOCABULARY

# Prompts of the task whose words random text is made of.
_PROMPTS = 32
# Random prompts whose answers are compared before giving up: most pairs of them have different answers.
_TRIES = 20


def task_of(model: PatchModel) -> Material:
    """`variable-binding` where the tokenizer speaks the binding language, else `ioi`.

    Raises:
        InputError: the model has no tokenizer.
    """
    if model.tokenizer is None:
        raise InputError(
            f"{model.name} has no tokenizer, and the recall study writes prompts; give a model with one"
        )
    return "variable-binding" if set(VOCABULARY) <= set(model.tokenizer.get_vocab()) else "ioi"


def task_pairs(model: PatchModel, n: int, seed: int, pool: int = 0) -> list[Pair]:
    """`n` pairs of the model's task; with a `pool` above n, the shortest of so many."""
    drawn = tasks.pairs(task_of(model), model.tokenizer, max(n, pool), seed)
    return sorted(drawn, key=lambda pair: len(pair.clean_ids))[:n] if pool > n else drawn


def random_text_pairs(model: PatchModel, n: int, tokens: int, seed: int) -> list[Pair]:
    """Pairs of unrelated prompts: `tokens` words of the task's prompts, each drawn at random.

    The answer is what the model says after the clean prompt, `wrong` what it says after the corrupt one, so that
    `logit-diff` asks what carries the difference. Prompts after which it says the same are not paired.

    Raises:
        InputError: the model says the same after almost all of them.
    """
    seen = [pair.clean_ids for pair in task_pairs(model, _PROMPTS, seed)]
    first = {ids[0] for ids in seen}
    # A token that opens every prompt is no word: it opens random text too.
    opening = tuple(first) if len(first) == 1 else ()
    words = sorted({token for ids in seen for token in ids[len(opening) :]})
    rng = random.Random(f"random text {seed}")
    found: list[Pair] = []
    for _ in range(_TRIES):
        prompts = [opening + tuple(rng.choices(words, k=tokens - len(opening))) for _ in range(2 * n)]
        answers = run_program(OwnAnswers(), model, prompts)["answer"].tolist()
        found += _different(prompts, answers, seed, len(found))
        if len(found) >= n:
            return found[:n]
    raise InputError(
        f"{model.name} says the same after almost all random prompts: {len(found)} of {n} pairs could be made"
    )


def _different(
    prompts: Sequence[tuple[int, ...]], answers: Sequence[int], seed: int, numbered: int
) -> list[Pair]:
    """Neighbouring prompts as pairs, where their answers differ."""
    made: list[Pair] = []
    for clean, corrupt, answer, wrong in zip(
        prompts[::2], prompts[1::2], answers[::2], answers[1::2], strict=True
    ):
        if answer != wrong:
            name = f"random-text-{seed}-{numbered + len(made)}"
            made.append(Pair(clean, corrupt, answer, wrong, id=name))
    return made
