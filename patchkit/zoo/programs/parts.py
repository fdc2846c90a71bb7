"""Parts that several handmade programs share."""

from __future__ import annotations

from patchkit.zoo.programs.language import (
    KEYS,
    VALUES,
    At,
    Everywhere,
    Head,
    Match,
    Mlp,
    Move,
    Offset,
)
from patchkit.zoo.programs.neurons import linear

#: Scores of lookups. At the first the right token gets most of the attention and others their share; at the second all of
#: it, and the softmax has no gradient.
GRADED, SATURATED = 4.0, 500.0

SHIFTED = (*VALUES[1:], VALUES[0])
TOKEN_KEYS, TOKEN_VALUES = At("token", KEYS), At("token", VALUES)
RESULT, NEXT_RESULT = At("result", VALUES), At("result", SHIFTED)

#: Spaces of what is written and leads nowhere.
IDLE: dict[str, tuple[str, ...]] = {"idle": (*KEYS, *VALUES), "dead": (*KEYS, *VALUES)}


def idle_parts(layers: int, mlp: int | None = None) -> tuple[Head | Mlp, ...]:
    """Dead ends: the last head of the first layer counts words, that of the last layer carries the count on, and an MLP,
    if a layer without one is named, copies part of it.
    """
    counted = At("idle", (*KEYS, *VALUES))
    dead = At("dead", (*KEYS, *VALUES))
    words = At("token", (*KEYS, *VALUES))
    parts: list[Head | Mlp] = [
        Head(0, 3, (Everywhere(),), (Move(words, counted),)),
        Head(layers - 1, 3, (Everywhere(),), (Move(counted, dead),)),
    ]
    if mlp is not None:
        parts.append(Mlp(mlp, linear(At("idle", VALUES), At("dead", VALUES))))
    return tuple(parts)


def copier(layer: int, head: int, back: int, reads: At, writes: At, scale: float = 1.0) -> Head:
    """A head that copies from so many tokens back."""
    return Head(layer, head, (Offset(back),), (Move(reads, writes, scale),))


def lookup(
    layer: int, head: int, query: At, key: At, reads: At, writes: At, score: float, scale: float = 1.0
) -> Head:
    """A head that looks for the symbol it holds, and copies what it finds there."""
    return Head(layer, head, (Match(query, key, score),), (Move(reads, writes, scale),))


def owners(layer: int = 0, head: int = 1) -> Head:
    """Writes at every digit of `a = 3` which letter it belongs to."""
    return copier(layer, head, 2, TOKEN_KEYS, At("owner", KEYS))
