"""Prompt pairs of the handmade programs: a task each, for every shape of its model."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from patchkit.data.pairs import Pair
from patchkit.errors import InputError
from patchkit.tasks.building import require_split
from patchkit.zoo import programs
from patchkit.zoo.programs.language import WORDS


def program_task(
    program: str, tokenizer: PreTrainedTokenizerBase | None, n: int, seed: int, split: str = "test"
) -> list[Pair]:
    """`n` pairs; the two splits are drawn with different seeds.

    Raises:
        InputError: the tokenizer of another model, or an unknown split.
    """
    vocabulary = {} if tokenizer is None else tokenizer.get_vocab()
    if any(vocabulary.get(word) != number for number, word in enumerate(WORDS)):
        raise InputError(
            f"task handmade-{program} is in the language of the handmade programs; expected one of their models "
            f"(handmade-{program}-llama), found another tokenizer"
        )
    return programs.program_pairs(
        programs.PROGRAMS[program], n, seed if require_split(split) == "test" else -1 - seed
    )
