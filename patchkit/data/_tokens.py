"""Text to token ids: prompts with the tokenizer's own special tokens, answers as they really continue the
prompt.
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from patchkit.data._records import Record

# After these a word follows without a space: `("`; after the second group only when glued to what is before:
# `x=`.
_OPENING = frozenset("([{\"'`/$#@_")
_GLUE = frozenset("=-+*<>")


def prompt_ids(
    record: Record, column: str, prompt: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[int, ...]:
    """The prompt's token ids, with the special tokens (bos) the tokenizer itself puts in front."""
    ids = _encode(tokenizer, prompt)
    bare = _encode(tokenizer, prompt, special=False)
    if not bare:
        raise record.error(f"{column} {prompt!r} has no tokens; give a prompt with at least one")
    if ids[-1] != bare[-1]:
        token = tokenizer.convert_ids_to_tokens(ids[-1])
        raise record.error(
            f"the tokenizer puts {token!r} after {column}, so the last token is not the prompt's; "
            "turn that off (add_eos_token=False) or give token ids"
        )
    unknown = tokenizer.unk_token_id
    if unknown is not None and unknown in bare and str(tokenizer.unk_token) not in prompt:
        words = [word for word in prompt.split() if unknown in _encode(tokenizer, word, special=False)]
        named = f"{words[0]!r}" if words else "a part"
        raise record.error(f"{column}: {named} is unknown to the tokenizer; use words of its vocabulary")
    return tuple(ids)


def answer_ids(
    record: Record,
    prompt: str,
    answers: Sequence[tuple[str, str]],
    tokenizer: PreTrainedTokenizerBase,
    first_token: bool,
) -> tuple[int, ...]:
    """The token that each answer puts after the prompt; `answers` are (column, text).

    An answer written with a leading space, or after a prompt that ends in one, is taken as it stands.
    Otherwise it is tried with a space and without, in the order that the prompt's end suggests, and all
    answers of a record are spelled the same way. What counts is the real continuation: prompt + answer is
    tokenised together, must begin with the prompt's own tokens, and must go on with exactly one token (with
    `first_token`: one or more).
    """
    faults = []
    for space in _spacings(prompt, [text for _, text in answers]):
        found = []
        for column, text in answers:
            result = _continuation(prompt, space + text, tokenizer, first_token)
            if isinstance(result, str):
                faults.append(f"{column} {space + text!r} {result}")
                break
            found.append(result)
        if len(found) == len(answers):
            return tuple(found)
    raise record.error("; ".join(faults))


def _spacings(prompt: str, answers: Sequence[str]) -> list[str]:
    if prompt[-1].isspace() or any(answer[0].isspace() for answer in answers):
        return [""]
    last = prompt.split()[-1]
    glued = last[-1] in _OPENING or (last[-1] in _GLUE and len(last) > 1)
    return ["", " "] if glued else [" ", ""]


def _continuation(
    prompt: str, answer: str, tokenizer: PreTrainedTokenizerBase, first_token: bool
) -> int | str:
    """The first token of `answer` after `prompt`, or what is wrong with it."""
    before = _encode(tokenizer, prompt)
    after = _encode(tokenizer, prompt + answer)
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
        tokens = tokenizer.convert_ids_to_tokens(rest)
        return (
            f"is {len(rest)} tokens ({' '.join(map(repr, tokens))}), expected one; choose an answer that is "
            "one token, "
            "or score the first token only with --answer-first-token"
        )
    if first_token and not str(tokenizer.decode(rest[:1])).strip() and answer.strip():
        return "begins with a token that is only a space, which says nothing about the answer"
    return rest[0]


def _end(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return "... " + " ".join(repr(token) for token in tokenizer.convert_ids_to_tokens(ids[-3:]))


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, special: bool = True) -> list[int]:
    return list(tokenizer(text, add_special_tokens=special)["input_ids"])  # type: ignore[arg-type]
