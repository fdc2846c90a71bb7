"""Programs that every method should get right: copying, looking up, following a pointer, comparing, adding."""

from __future__ import annotations

import random

from patchkit.zoo.programs.language import KEYS, VALUES, At, Head, Match, Mlp, Move, Neuron, Program, Prompt
from patchkit.zoo.programs.neurons import both, constant, linear
from patchkit.zoo.programs.parts import (
    GRADED,
    IDLE,
    NEXT_RESULT,
    RESULT,
    TOKEN_KEYS,
    TOKEN_VALUES,
    copier,
    idle_parts,
    lookup,
    owners,
)
from patchkit.zoo.programs.prompts import bindings, shifted, spoken


def _digits(n: int, rng: random.Random) -> list[str]:
    return [rng.choice(VALUES) for _ in range(n)]


def _copied(rng: random.Random) -> Prompt:
    words = _digits(6, rng)
    return Prompt(tuple(words), words[-4])


COPY = Program(
    name="copy",
    task="the digit three before the last: `5 1 7 0 3 3` -> `7`",
    shows="one head that looks back by a fixed offset, and nothing else that matters; linear from there to the logits",
    layers=2,
    spaces={"result": VALUES, **IDLE},
    parts=(copier(0, 1, 3, TOKEN_VALUES, RESULT), *idle_parts(2, mlp=1)),
    answers=VALUES,
    sample=_copied,
)


def _repeated(rng: random.Random) -> Prompt:
    words = rng.sample(VALUES, 6)
    place = rng.randrange(len(words) - 1)
    return Prompt((*words, words[place]), words[place + 1])


INDUCTION = Program(
    name="induction",
    task="what followed the last word before: `5 1 7 0 3 1` -> `7`",
    shows="two heads in composition by the key: one writes what stood before, the other looks for it",
    layers=2,
    spaces={"before": VALUES, "result": VALUES, **IDLE},
    parts=(
        copier(0, 0, 1, TOKEN_VALUES, At("before", VALUES)),
        lookup(1, 1, TOKEN_VALUES, At("before", VALUES), TOKEN_VALUES, RESULT, GRADED),
        *idle_parts(2, mlp=1),
    ),
    answers=VALUES,
    sample=_repeated,
)


def bound(rng: random.Random) -> Prompt:
    """Four bindings, one letter asked for; the answer is its digit plus one."""
    pairs = bindings(rng, 4)
    key, value = rng.choice(pairs)
    return Prompt((*spoken(pairs), key), shifted(value))


LOOKUP = Program(
    name="lookup",
    task="the digit bound to the last letter, plus one modulo 8: `a = 3 , b = 7 , c = 0 , d = 1 , b` -> `0`",
    shows="two heads and an MLP in composition; the lookup's softmax is not saturated",
    layers=3,
    spaces={"owner": KEYS, "found": VALUES, "result": VALUES, **IDLE},
    parts=(
        owners(),
        lookup(1, 2, TOKEN_KEYS, At("owner", KEYS), TOKEN_VALUES, At("found", VALUES), GRADED),
        Mlp(2, linear(At("found", VALUES), NEXT_RESULT)),
        *idle_parts(3, mlp=0),
    ),
    answers=VALUES,
    sample=bound,
)


def _pointed(rng: random.Random) -> Prompt:
    first, second, third, fourth = rng.sample(KEYS, 4)
    one, two = _digits(2, rng)
    lines = [(first, second), (second, one), (third, fourth), (fourth, two)]
    rng.shuffle(lines)
    asked, value = rng.choice([(first, one), (third, two)])
    words = [word for key, held in lines for word in (key, "=", held, ".")]
    return Prompt((*words, asked), shifted(value))


CHAIN = Program(
    name="chain",
    task="follow a pointer, then add one: `a = b . b = 5 . c = d . d = 2 . a` -> `6`",
    shows="four layers in a row; what the second head finds is the query of the third",
    layers=4,
    spaces={"owner": KEYS, "hop": KEYS, "found": VALUES, "result": VALUES, **IDLE},
    parts=(
        owners(),
        Head(
            1,
            2,
            (Match(TOKEN_KEYS, At("owner", KEYS), 2 * GRADED),),
            (Move(TOKEN_KEYS, At("hop", KEYS)),),
        ),
        lookup(2, 0, At("hop", KEYS), At("owner", KEYS), TOKEN_VALUES, At("found", VALUES), 2 * GRADED),
        Mlp(3, linear(At("found", VALUES), NEXT_RESULT)),
        *idle_parts(4, mlp=1),
    ),
    answers=VALUES,
    sample=_pointed,
)


def _compared(rng: random.Random) -> Prompt:
    first, second = rng.sample(VALUES, 2)
    if rng.random() < 0.5:
        second = first
    return Prompt((first, ",", second), "yes" if first == second else "no")


COMPARE = Program(
    name="compare",
    task="whether two digits are the same: `3 , 3` -> `yes`, `3 , 5` -> `no`",
    shows="a conjunction in an MLP, of what a head brings and of the word here",
    layers=2,
    spaces={"left": VALUES, "result": ("yes", "no"), **IDLE},
    parts=(
        copier(0, 2, 2, TOKEN_VALUES, At("left", VALUES)),
        Mlp(
            1,
            (
                *(
                    both(("left", v), ("token", v), [("result", "yes", 1.0), ("result", "no", -1.0)])
                    for v in VALUES
                ),
                constant([("result", "no", 1.0)]),
            ),
        ),
        *idle_parts(2),
    ),
    answers=("yes", "no"),
    sample=_compared,
)


def table(first: str, second: str) -> tuple[Neuron, ...]:
    """Neurons for the sum modulo 8 of what two spaces hold."""
    return tuple(
        both((first, one), (second, two), [("result", shifted(one, int(two)), 1.0)])
        for one in VALUES
        for two in VALUES
    )


def _added(rng: random.Random) -> Prompt:
    first, second = _digits(2, rng)
    return Prompt((first, "+", second), shifted(first, int(second)))


ADD = Program(
    name="add",
    task="the sum of two digits modulo 8: `3 + 7` -> `2`",
    shows="a table of conjunctions in an MLP: each neuron knows one pair of digits",
    layers=2,
    spaces={"left": VALUES, "result": VALUES, **IDLE},
    parts=(
        copier(0, 0, 2, TOKEN_VALUES, At("left", VALUES)),
        Mlp(1, table("left", "token")),
        *idle_parts(2),
    ),
    answers=VALUES,
    sample=_added,
)


def _asked_twice(rng: random.Random) -> Prompt:
    pairs = bindings(rng, 3)
    (first, one), (second, two) = rng.sample(pairs, 2)
    return Prompt((*spoken(pairs), first, second), shifted(one, int(two)))


TWO_LOOKUPS = Program(
    name="two-lookups",
    task="the sum of two letters' digits modulo 8: `a = 3 , b = 7 , c = 0 , a b` -> `2`",
    shows="two heads with the same keys and values and different queries; with grouped KV heads they share them",
    layers=3,
    spaces={
        "owner": KEYS,
        "asked": KEYS,
        "first": VALUES,
        "second": VALUES,
        "result": VALUES,
        **IDLE,
    },
    parts=(
        copier(0, 0, 1, TOKEN_KEYS, At("asked", KEYS)),
        owners(),
        lookup(1, 0, At("asked", KEYS), At("owner", KEYS), TOKEN_VALUES, At("first", VALUES), 3 * GRADED),
        Head(
            1,
            1,
            (Match(TOKEN_KEYS, At("owner", KEYS), 3 * GRADED),),
            (Move(TOKEN_VALUES, At("second", VALUES)),),
            twin=True,
        ),
        Mlp(2, table("first", "second")),
        *idle_parts(3, mlp=1),
    ),
    answers=VALUES,
    sample=_asked_twice,
)


def _handed_on(rng: random.Random) -> Prompt:
    words = _digits(7, rng)
    return Prompt(tuple(words), shifted(words[-4], 3))


DEEP = Program(
    name="deep",
    task="the digit three before the last, plus three modulo 8: `1 0 4 5 1 1 6` -> `0`",
    shows="six layers, heads and MLPs by turns, each of which hands the digit on by one token or one step",
    layers=6,
    spaces={**{f"s{i}": VALUES for i in range(5)}, "result": VALUES, **IDLE},
    parts=(
        copier(0, 0, 1, TOKEN_VALUES, At("s0", VALUES)),
        Mlp(1, linear(At("s0", VALUES), At("s1", (*VALUES[1:], VALUES[0])))),
        copier(2, 3, 1, At("s1", VALUES), At("s2", VALUES)),
        Mlp(3, linear(At("s2", VALUES), At("s3", (*VALUES[1:], VALUES[0])))),
        copier(4, 1, 1, At("s3", VALUES), At("s4", VALUES)),
        Mlp(5, linear(At("s4", VALUES), NEXT_RESULT)),
        *idle_parts(6, mlp=0),
    ),
    answers=VALUES,
    sample=_handed_on,
)


def _among_idle(rng: random.Random) -> Prompt:
    words = _digits(5, rng)
    return Prompt(tuple(words), words[-3])


CROWDED = Program(
    name="crowded",
    task="the digit two before the last: `5 1 7 0 3` -> `7`",
    shows="one true head among eleven heads and MLPs that write to the stream, read one another, and lead nowhere",
    layers=5,
    spaces={
        "result": VALUES,
        "idle": (*KEYS, *VALUES),
        "dead": (*KEYS, *VALUES),
        "more": VALUES,
        "most": VALUES,
    },
    parts=(
        copier(1, 2, 2, TOKEN_VALUES, RESULT),
        *idle_parts(5, mlp=1),
        copier(0, 0, 1, TOKEN_VALUES, At("more", VALUES)),
        copier(1, 0, 2, TOKEN_VALUES, At("more", VALUES), -1.0),
        copier(2, 1, 1, At("more", VALUES), At("most", VALUES)),
        copier(3, 0, 3, At("most", VALUES), At("dead", VALUES)),
        lookup(3, 2, At("more", VALUES), At("most", VALUES), TOKEN_VALUES, At("dead", VALUES), GRADED),
        Mlp(0, linear(TOKEN_VALUES, At("most", VALUES), 0.5)),
        Mlp(2, linear(At("more", VALUES), At("most", VALUES))),
        Mlp(4, linear(At("most", VALUES), At("dead", VALUES))),
    ),
    answers=VALUES,
    sample=_among_idle,
)
