"""What heads look at in random tokens that come twice: the token before, the same token's first place, the one after it.

`a b c d a b c d` has no words and no names, so a head that looks from the second `c` at the first `d` does so because
`c` was followed by `d` before (induction), and for no other reason.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from patchkit.data import Batch, positions
from patchkit.data.tokens import encode
from patchkit.errors import InputError
from patchkit.model import PatchModel
from patchkit.tracing import attention_from

# Shorter ones have the token before and the token after the first place in one spot.
_SHORTEST = 4
# Rows of one forward.
_ROWS = 32


@dataclass(frozen=True, eq=False)
class RepeatScores:
    """Mean attention of each head from a token of the second copy.

    Attributes:
        previous: to the token before it.
        duplicate: to the same token in the first copy.
        induction: to the token after that one.
    """

    previous: Float[Tensor, "layer head"]
    duplicate: Float[Tensor, "layer head"]
    induction: Float[Tensor, "layer head"]


def repeat_scores(model: PatchModel, n: int, length: int, seed: int) -> RepeatScores:
    """The scores over `n` random sequences of `length` different tokens each, one token of the second copy in each.

    Raises:
        InputError: the vocabulary has fewer tokens, the prompt would be longer than the model reads, or n or length is
            too small.
    """
    if n < 1 or length < _SHORTEST:
        raise InputError(
            f"repeated tokens: expected at least 1 sequence of at least {_SHORTEST} tokens, found {n} of {length}"
        )
    opening, words = _opening(model), _words(model)
    limit = getattr(model.config, "max_position_embeddings", None)
    longest = min(len(words), limit // 2 - len(opening) if limit is not None else length)
    if length > longest:
        raise InputError(
            f"repeated tokens: {model.name} takes sequences of up to {longest} different tokens twice, found {length}"
        )
    rng = random.Random(f"repeated tokens {seed}")
    rows: list[list[int]] = []
    asked: list[int] = []
    for _ in range(n):
        drawn = rng.sample(words, length)
        rows.append([*opening, *drawn, *drawn])
        asked.append(len(opening) + length + rng.randrange(length))
    sums = torch.zeros(3, model.dims.n_layers, model.dims.n_heads)
    for start in range(0, n, _ROWS):
        batch = Batch.from_ids(rows[start : start + _ROWS], model.pad_id).to(model.embed_device)
        at = asked[start : start + _ROWS]
        patterns = attention_from(model, batch, range(model.dims.n_layers), positions(batch, at))
        for layer, pattern in patterns.items():
            weights = pattern.cpu()
            for row, place in enumerate(at):
                for kind, back in enumerate((1, length, length - 1)):
                    sums[kind, layer] += weights[row, :, place - back]
    return RepeatScores(*(sums / n).unbind())


def _words(model: PatchModel) -> list[int]:
    """Every token that is no special one."""
    if model.tokenizer is None:
        return list(range(model.dims.vocab_size))
    special = set(model.tokenizer.all_special_ids)
    size = min(len(model.tokenizer), model.dims.vocab_size)
    return [token for token in range(size) if token not in special]


def _opening(model: PatchModel) -> list[int]:
    """The special token that the tokenizer puts first, if it does."""
    if model.tokenizer is None:
        return []
    first, bare = encode(model.tokenizer, "a"), encode(model.tokenizer, "a", special=False)
    return first[:1] if len(first) > len(bare) and first[-1:] == bare[-1:] else []
