"""Prompt pairs in two halves: one to find something on, one to test it."""

from __future__ import annotations

import random
from collections.abc import Sequence

from patchkit.data.pairs import Pair
from patchkit.errors import InputError


def halves(pairs: Sequence[Pair], seed: int) -> tuple[list[Pair], list[Pair]]:
    """(pairs to find with, held-out pairs), about as many of each; each half in the order given.

    Pairs of one clean prompt go to one half, so that nothing is tested on a prompt that it was found with.

    Raises:
        InputError: fewer than two different clean prompts.
    """
    prompts = list(dict.fromkeys(pair.clean_ids for pair in pairs))
    if len(prompts) < 2:
        raise InputError(
            f"expected pairs of at least two different clean prompts, one to find with and one to test on; found "
            f"{len(prompts)}. Give more pairs"
        )
    random.Random(seed).shuffle(prompts)
    finding = set(prompts[: len(prompts) // 2])
    return (
        [pair for pair in pairs if pair.clean_ids in finding],
        [pair for pair in pairs if pair.clean_ids not in finding],
    )
