"""Places: which tokens a node covers, from what the user says: `last`, `all`, `each`, names of spans, or indices.

Positions are counted on unpadded tokens, negative ones from the end. `all` and a span are patched together, as one
node; `each` makes one node a position, and so do indices.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from patchkit.data.pairs import Pair
from patchkit.errors import InputError

_INDEX = re.compile(r"[+-]?[0-9]+")


@dataclass(frozen=True)
class Places:
    """The places of every pair, read from pairs: made by `read_places`.

    Attributes:
        text: what the user said.
        labels: of the position axis.
        placed: whether results have a position axis: not for `last` and `all`.
        covered: for each pair and place, the tokens, counted from 0 on unpadded tokens.
    """

    text: str
    labels: tuple[str, ...]
    placed: bool
    covered: tuple[tuple[tuple[int, ...], ...], ...]


def covering(
    covered: Sequence[Sequence[Sequence[int]]], lengths: Sequence[int], width: int
) -> Bool[Tensor, "rows places width"]:
    """Which padded columns each place covers, for prompts padded on the left to `width`."""
    mask = torch.zeros(len(covered), len(covered[0]), width, dtype=torch.bool)
    for row, (places, length) in enumerate(zip(covered, lengths, strict=True)):
        for place, tokens in enumerate(places):
            mask[row, place, torch.tensor(tokens, dtype=torch.long) + width - length] = True
    return mask


def read_places(text: str, pairs: Sequence[Pair]) -> Places:
    """The places that `text` names, for each pair.

    Args:
        text: `last`, `all`, `each`, or a comma-separated list of span names and indices.

    Raises:
        InputError: `each` on pairs that do not align, an index outside a prompt, a span that a pair does not have;
            naming the pair.
    """
    if not pairs:
        raise InputError("there are no prompt pairs; expected at least one")
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise InputError("positions are empty; expected last, all, each, names of spans, or indices")
    if words == ["last"]:
        return Places(text, ("last",), False, tuple(((len(pair.clean_ids) - 1,),) for pair in pairs))
    if words == ["all"]:
        return Places(text, ("all",), False, tuple((tuple(range(len(pair.clean_ids))),) for pair in pairs))
    if words == ["each"]:
        length = len(pairs[0].clean_ids)
        for pair in pairs:
            if len(pair.clean_ids) != length:
                raise InputError(
                    f"positions 'each' need pairs of one length, so that a position means the same in all: pair "
                    f"{pairs[0].id!r} has {length} tokens, pair {pair.id!r} {len(pair.clean_ids)}; use last, all, "
                    "spans, or one run per length"
                )
        single = tuple((position,) for position in range(length))
        return Places(text, tuple(str(i) for i in range(length)), True, (single,) * len(pairs))
    mixed = [word for word in words if word in ("last", "all", "each")]
    if mixed:
        raise InputError(
            f"positions '{text}': '{mixed[0]}' stands alone; a list is of span names and indices"
        )
    if len(set(words)) < len(words):
        raise InputError(f"positions '{text}': a place comes twice; name each once")
    return Places(text, tuple(words), True, tuple(tuple(_place(w, pair) for w in words) for pair in pairs))


def _place(word: str, pair: Pair) -> tuple[int, ...]:
    length = len(pair.clean_ids)
    if _INDEX.fullmatch(word):
        index = int(word)
        if not -length <= index < length:
            raise InputError(
                f"position {index} is outside pair {pair.id!r}, which has {length} tokens (0 to {length - 1})"
            )
        return (index % length,)
    if word not in pair.spans:
        raise InputError(
            f"positions: pair {pair.id!r} has no span {word!r}; its spans: {', '.join(pair.spans) or 'none'}. Expected "
            "last, all, each, names of spans, or indices"
        )
    start, end = pair.spans[word]
    if start == end:
        raise InputError(f"positions: span {word!r} of pair {pair.id!r} is empty ({start} to {end})")
    return tuple(range(start, end))
