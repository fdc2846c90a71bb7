"""The handmade Llama with a lookup that does not saturate, and pairs of prompts with different answers."""

from __future__ import annotations

import functools

from patchkit.data import Pair
from patchkit.model import PatchModel
from patchkit.zoo import handmade
from patchkit.zoo.load import load


@functools.cache
def handmade_pairs(count: int = 6) -> tuple[PatchModel, tuple[Pair, ...]]:
    hf, tokenizer = handmade.build(handmade.GRADED)
    drawn = handmade.sample_prompts(10 * count, seed=0)
    pairs = [
        Pair(
            *(tuple(tokenizer(prompt.text)["input_ids"]) for prompt in (one, other)),
            *(handmade.TOKEN_IDS[prompt.answer] for prompt in (one, other)),
            id=str(number),
        )
        for number, (one, other) in enumerate(zip(drawn[::2], drawn[1::2], strict=True))
        if one.answer != other.answer
    ]
    return load(hf, tokenizer=tokenizer), tuple(pairs[:count])
