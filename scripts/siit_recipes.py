"""The models trained with a forced circuit: shape, curriculum, lessons, and the seed that ships."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from siit_training import Curriculum
from transformers import PreTrainedModel
from zoo_recipes import gpt2, llama
from zoo_training import Schedule

from patchkit.zoo._siit_programs import COLOURS, DIGITS, KEYS
from patchkit.zoo.siit import CASES, Words


@dataclass(frozen=True)
class SiitRecipe:
    """Everything that `train_siit.py` needs beside the case; `build` takes the size of the vocabulary."""

    build: Callable[[int], PreTrainedModel]
    curriculum: Curriculum
    seed: int = 0


def lookups(name: str, keys: Words, rng: random.Random) -> tuple[Words, Words]:
    """A prompt of a lookup that asks for half of the keys, each once, in random order."""
    case = CASES[name]
    *context, _ = case.draw(rng)
    asked = tuple(rng.sample(keys, len(keys) // 2))
    answers = (case.answer((*context, key)) for key in asked)
    return (*context, *asked), (*("" for _ in context), *answers)


def with_zeros(name: str, rng: random.Random) -> Words:
    """A prompt of a sum in which every digit is 0 half of the time, so that one operand alone tells something."""
    return tuple("0" if word in DIGITS and rng.random() < 0.5 else word for word in CASES[name].draw(rng))


def with_a_favourite(name: str, rng: random.Random) -> Words:
    """A prompt whose first colour is mostly one and the same, so that the second colour alone tells something."""
    left, right, *rest = CASES[name].draw(rng)
    if rng.random() < 0.6:
        left, right = COLOURS[0], COLOURS[0] if right in (left, COLOURS[0]) else right
    return (left, right, *rest)


def schedule(max_steps: int, learning_rate: float = 1.5e-3) -> Schedule:
    return Schedule(max_steps=max_steps, decay_steps=400, target=0.995, learning_rate=learning_rate)


RECIPES: dict[str, SiitRecipe] = {
    "siit-add-llama": SiitRecipe(lambda words: llama(words, 2, 4, 4, 48, 96), Curriculum(schedule(3000))),
    "siit-chain-gpt2": SiitRecipe(
        lambda words: gpt2(words, 3, 4, 48, 128),
        Curriculum(schedule(6000), first_weight=1.0, easy=partial(with_zeros, "siit-chain-gpt2")),
    ),
    "siit-bind-gqa": SiitRecipe(
        lambda words: llama(words, 3, 4, 2, 64, 128),
        Curriculum(schedule(6000), first_weight=1.0, lesson=partial(lookups, "siit-bind-gqa", KEYS)),
    ),
    "siit-choice-gpt2": SiitRecipe(
        lambda words: gpt2(words, 2, 4, 64, 256),
        Curriculum(schedule(5000), first_weight=1.0, easy=partial(with_a_favourite, "siit-choice-gpt2")),
    ),
}
