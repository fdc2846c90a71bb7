"""Random prompts of the handmade programs, and prompt pairs of them."""

from __future__ import annotations

import random
from collections.abc import Sequence

from patchkit.data import Pair
from patchkit.errors import InputError
from patchkit.zoo.programs.language import KEYS, VALUES, WORDS, Program, Prompt

_IDS = {word: number for number, word in enumerate(WORDS)}
#: Draws of a second prompt before giving up: answers of one pair must differ.
_TRIES = 1000


def program_pairs(program: Program, n: int, seed: int) -> list[Pair]:
    """`n` pairs of independent prompts with different answers; the same seed gives the same pairs.

    Raises:
        InputError: n below 1.
    """
    if n < 1:
        raise InputError(f"{program.name}: expected at least one pair, found {n}")
    rng = random.Random(f"{program.name} {seed}")
    return [_pair(program, rng, str(number)) for number in range(n)]


def _pair(program: Program, rng: random.Random, name: str) -> Pair:
    clean = program.sample(rng)
    for _ in range(_TRIES):
        corrupt = program.sample(rng)
        if corrupt.answer != clean.answer and len(corrupt.words) == len(clean.words):
            return Pair(_ids(clean), _ids(corrupt), _IDS[clean.answer], _IDS[corrupt.answer], id=name)
    raise InputError(f"{program.name}: no prompt of another answer and the same length was drawn")


def _ids(prompt: Prompt) -> tuple[int, ...]:
    return (_IDS["<s>"], *(_IDS[word] for word in prompt.words))


def shifted(value: str, by: int = 1) -> str:
    """The digit so many further, modulo 8."""
    return VALUES[(int(value) + by) % len(VALUES)]


def bindings(rng: random.Random, n: int) -> list[tuple[str, str]]:
    """Distinct letters, each with any digit."""
    return [(key, rng.choice(VALUES)) for key in rng.sample(KEYS, n)]


def spoken(bound: Sequence[tuple[str, str]]) -> list[str]:
    """`a = 3 , b = 7 ,`"""
    return [word for key, value in bound for word in (key, "=", value, ",")]
