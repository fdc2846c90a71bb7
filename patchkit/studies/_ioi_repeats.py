"""What heads look at in random tokens that come twice: the token before, the same token's first place, the one after it.

`a b c d a b c d` has no words and no names, so a head that looks from the second `c` at the first `d` does so because
`c` was followed by `d` before (induction), and for no other reason.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from patchkit.data import Batch, positions
from patchkit.data.tokens import encode
from patchkit.errors import InputError
from patchkit.model import Dims, PatchModel
from patchkit.runtime import Cost, run_program
from patchkit.studies._attention_rows import Looking
from patchkit.tracing import attention_from

# Shorter ones have the token before and the token after the first place in one spot.
_SHORTEST = 4


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
    rows: list[Looking] = []
    for _ in range(n):
        drawn = rng.sample(words, length)
        asks = len(opening) + length + rng.randrange(length)
        rows.append(Looking((*opening, *drawn, *drawn), asks))
    sums = run_program(Repeats((1, length, length - 1)), model, rows, label="repeated tokens")["sums"]
    return RepeatScores(*(sums / n).float().unbind())


@dataclass(frozen=True)
class Repeats:
    """Program: the attention to tokens so many places `back`, added up over prompts: `sums`, `[back, layer, head]`."""

    back: tuple[int, ...]

    @property
    def summed(self) -> frozenset[str]:
        return frozenset({"sums"})

    def tokens(self, item: Looking) -> int:
        return len(item.ids)

    def run(self, model: PatchModel, items: Sequence[Looking]) -> dict[str, Tensor]:
        batch = Batch.from_ids([item.ids for item in items], model.pad_id).to(model.embed_device)
        columns = positions(batch, [item.query for item in items])
        patterns = attention_from(model, batch, range(model.dims.n_layers), columns)
        rows = torch.arange(len(items))
        asked = torch.tensor([item.query for item in items]) + batch.offset.cpu()
        sums = [
            torch.stack([weights.cpu()[rows, :, asked - back].double().sum(0) for back in self.back])
            for weights in patterns.values()
        ]
        return {"sums": torch.stack(sums, dim=1)}

    def cost(self, dims: Dims, items: Sequence[Looking]) -> Cost:
        """A forward over every prompt, and what all heads give to all its tokens."""
        tokens = sum(len(item.ids) for item in items)
        return Cost(float(tokens), dims.itemsize * tokens * dims.n_layers * dims.n_heads)


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
