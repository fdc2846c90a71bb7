"""Text to token ids: prompts with the special tokens of the tokenizer, answers as they really continue."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from patchkit.errors import InputError

# After these a word follows without a space: `("`; after the second group only when glued to a word: `x=`.
_OPENING = frozenset("([{\"'`/$#@_")
_GLUE = frozenset("=-+*<>")


def encode(tokenizer: PreTrainedTokenizerBase, text: str, special: bool = True) -> list[int]:
    """Token ids of a text, by default with the special tokens that the tokenizer adds."""
    return list(tokenizer(text, add_special_tokens=special)["input_ids"])  # type: ignore[arg-type]


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> tuple[int, ...]:
    """A prompt's token ids, with the special tokens (bos) the tokenizer itself puts in front.

    InputError where there are no tokens, where the tokenizer puts one at the end (the last token would not be
    the prompt's), and where a word is unknown to it.
    """
    ids, bare = encode(tokenizer, prompt), encode(tokenizer, prompt, special=False)
    if not bare:
        raise InputError(f"{prompt!r} has no tokens; give a prompt with at least one")
    if ids[-1] != bare[-1]:
        raise InputError(
            f"the tokenizer puts {tokenizer.convert_ids_to_tokens(ids[-1])!r} at the end, so the last token "
            "is "
            "not the prompt's; turn that off (add_eos_token=False) or give token ids"
        )
    unknown = tokenizer.unk_token_id
    if unknown is not None and unknown in bare and str(tokenizer.unk_token) not in prompt:
        words = [word for word in prompt.split() if unknown in encode(tokenizer, word, special=False)]
        named = repr(words[0]) if words else f"a part of {prompt!r}"
        raise InputError(f"{named} is unknown to the tokenizer; use words of its vocabulary")
    return tuple(ids)


def continuation_ids(
    tokenizer: PreTrainedTokenizerBase, prompt: str, answers: Sequence[str], first_token: bool = False
) -> tuple[int, ...]:
    """The token that each answer puts after the prompt.

    An answer written with a leading space, or after a prompt that ends in one, is taken as it stands.
    Otherwise it is tried with a space and without, in the order that the prompt's end suggests, and all
    answers given together are spelled the same way. What counts is the real continuation: prompt + answer is
    tokenised together, must begin with the prompt's own tokens, and must go on with exactly one token (with
    `first_token`: one or more, of which the first is returned). InputError says which of these fails.
    """
    faults = []
    for space in _spacings(prompt, answers):
        found = []
        for answer in answers:
            result = _continuation(tokenizer, prompt, space + answer, first_token)
            if isinstance(result, str):
                faults.append(f"the answer {space + answer!r} {result}")
                break
            found.append(result)
        if len(found) == len(answers):
            return tuple(found)
    raise InputError("; ".join(faults))


def _spacings(prompt: str, answers: Sequence[str]) -> list[str]:
    if prompt[-1].isspace() or any(answer[0].isspace() for answer in answers):
        return [""]
    last = prompt.split()[-1]
    glued = last[-1] in _OPENING or (last[-1] in _GLUE and len(last) > 1)
    return ["", " "] if glued else [" ", ""]


def _continuation(
    tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str, first_token: bool
) -> int | str:
    """The first token of `answer` after `prompt`, or what is wrong with it."""
    before, after = encode(tokenizer, prompt), encode(tokenizer, prompt + answer)
    if after[: len(before)] != before or len(after) == len(before):
        return (
            "does not continue the prompt token by token: the tokenizer merges it with the prompt's end "
            f"({_end(tokenizer, before)} becomes {_end(tokenizer, after)}); "
            "move the space between prompt and answer, or give token ids"
        )
    rest = after[len(before) :]
    if rest[0] == tokenizer.unk_token_id:
        return "is unknown to the tokenizer; use a word of its vocabulary"
    if len(rest) > 1 and not first_token:
        tokens = ", ".join(repr(token) for token in tokenizer.convert_ids_to_tokens(rest))
        return (
            f"is {len(rest)} tokens ({tokens}), expected one; choose an answer that is one token, "
            "or score the first token only with --answer-first-token"
        )
    if first_token and not str(tokenizer.decode(rest[:1])).strip() and answer.strip():
        return "begins with a token that is only a space, which says nothing about the answer"
    return rest[0]


def _end(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return "... " + " ".join(repr(token) for token in tokenizer.convert_ids_to_tokens(ids[-3:]))


def word_span(tokenizer: PreTrainedTokenizerBase, text: str, start: int, end: int) -> tuple[int, int]:
    """The token span [start, end) of the characters `text[start:end]`, with the space before them.

    Found by tokenising the text up to the word and up to its end, which works without character offsets.
    InputError where the word's tokens are not its own, because the tokenizer merges it with its surroundings.
    """
    before = start - 1 if start and text[start - 1] == " " else start
    whole = encode(tokenizer, text)
    first, last = encode(tokenizer, text[:before]), encode(tokenizer, text[:end])
    if whole[: len(first)] != first or whole[: len(last)] != last or len(first) == len(last):
        raise InputError(
            f"the tokenizer merges {text[start:end]!r} with its surroundings in {text!r}; "
            "choose words that are tokens of their own"
        )
    return len(first), len(last)
