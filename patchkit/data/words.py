"""Tokenizers of small languages: one token a word, words separated by spaces."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast


def word_tokenizer(words: Sequence[str], *, pad: str, bos: str, unk: str) -> PreTrainedTokenizerFast:
    """A tokenizer whose ids are the places in `words`; `bos` is put first, padding is on the left.

    `pad`, `bos` and `unk` are words themselves.
    """
    vocabulary = {word: place for place, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=unk))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    begin = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, vocabulary[bos])])
    tokenizer.post_processor = begin  # type: ignore[assignment]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, bos_token=bos, unk_token=unk, padding_side="left"
    )
