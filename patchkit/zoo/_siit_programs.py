"""Prompts and steps of the high-level programs that the forced circuits compute (see `siit.py`).

Prompts are tuples of words, without the `<s>` that the tokenizer puts first. The prompts of one kind have one length
and the same words at the same places, apart from those that carry a value, so that another prompt's activations fit
position by position. The lookup draws permutations of one set of keys: the key that is asked for is then in every other
prompt too, and a program whose keys come from another prompt still has an answer.
"""

from __future__ import annotations

import random
from collections.abc import Mapping

Words = tuple[str, ...]
Value = str | bool | Words
Values = Mapping[str, Value]

DIGITS: Words = tuple("01234567")
KEYS: Words = tuple("abcd")
COLOURS: Words = ("red", "blue", "green", "black")
NOUNS: Words = ("cat", "dog", "cow", "fox", "owl", "bee", "ant", "hen")

SUM_WORDS: Words = (*DIGITS, "plus", "skip", "is")
CHAIN_WORDS: Words = (*DIGITS, "plus", "minus", "is")
BINDING_WORDS: Words = (*DIGITS, *KEYS, ";")
CHOICE_WORDS: Words = (*COLOURS, *NOUNS, "?", ":")


def draw_sum(rng: random.Random) -> Words:
    """`3 plus 6 skip 2 is`."""
    first, second, ignored = (rng.choice(DIGITS) for _ in range(3))
    return (first, "plus", second, "skip", ignored, "is")


def draw_chain(rng: random.Random) -> Words:
    """`3 plus 6 minus 5 is`."""
    first, second, third = (rng.choice(DIGITS) for _ in range(3))
    return (first, "plus", second, "minus", third, "is")


def draw_binding(rng: random.Random) -> Words:
    """`b 3 a 7 d 0 c 7 ; a`: all keys in random order, each before its digit, and one of them again."""
    keys = rng.sample(KEYS, len(KEYS))
    bindings = [word for key in keys for word in (key, rng.choice(DIGITS))]
    return (*bindings, ";", rng.choice(KEYS))


def draw_choice(rng: random.Random) -> Words:
    """`red blue ? cat dog :`: the colours are the same in half of the prompts, the nouns never."""
    left, other = rng.sample(COLOURS, 2)
    return (left, rng.choice((left, other)), "?", *rng.sample(NOUNS, 2), ":")


def plus(left: Value, right: Value) -> str:
    """The sum modulo 8, as a word."""
    return DIGITS[(int(str(left)) + int(str(right))) % len(DIGITS)]


def minus(left: Value, right: Value) -> str:
    """The difference modulo 8, as a word."""
    return DIGITS[(int(str(left)) - int(str(right))) % len(DIGITS)]


def owners(words: Words) -> Words:
    """The key that each digit of the bindings belongs to, in order."""
    return words[0 : 2 * len(KEYS) : 2]


def bound(words: Words, keys: Value) -> str:
    """The digit at the place whose key, of `keys`, is the prompt's last word."""
    assert isinstance(keys, tuple)
    return words[2 * keys.index(words[-1]) + 1]
