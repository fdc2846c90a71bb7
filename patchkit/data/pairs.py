"""Prompt pairs: a clean prompt, a corrupt one of the same length, and the two answers that the metrics
compare.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from patchkit.data._fields import check_columns, name, spans, text, token_id, token_ids
from patchkit.data._records import Record, Source, read_records, write_json_lines
from patchkit.data.tokens import continuation_ids, prompt_ids
from patchkit.errors import InputError

_IDS = ("clean_ids", "corrupt_ids", "answer_id", "wrong_id")
_TEXT = ("clean", "corrupt", "answer", "wrong")
_CSV = ("clean", "corrupted", "correct_idx", "incorrect_idx")
_OPTIONAL = ("spans", "id")


@dataclass(frozen=True)
class Pair:
    """One prompt pair in token ids, without padding.

    `answer_id` is right after the clean prompt and `wrong_id` is the alternative; both are scored at the last
    token. `spans` are named [start, end) in tokens, valid in both prompts since they have one length.
    """

    clean_ids: tuple[int, ...]
    corrupt_ids: tuple[int, ...]
    answer_id: int
    wrong_id: int
    spans: dict[str, tuple[int, int]] = field(default_factory=dict)
    id: str = ""
    # Kept for the user: no number depends on it.
    meta: dict[str, Any] = field(default_factory=dict, compare=False)


def read_pairs(
    source: Source,
    tokenizer: PreTrainedTokenizerBase | None,
    vocab_size: int,
    answer_first_token: bool = False,
) -> list[Pair]:
    """Pairs from a JSON Lines file, a CSV of the EAP-IG repository, or a `datasets.Dataset`.

    A record in id form (`clean_ids`, `corrupt_ids`, `answer_id`, `wrong_id`) is taken as it is, and text
    beside the ids is metadata; a record in text form (`clean`, `corrupt`, `answer`, `wrong`) needs the
    tokenizer, which adds its own special tokens. `answer_first_token` lets an answer be longer than one token
    and scores its first. Pairs without an `id` get their index. Raises InputError that names the line: see
    the checks of `Pair` below.
    """
    records = read_records(source, "prompt pairs")
    pairs: list[Pair] = []
    seen: dict[str, str] = {}
    for index, record in enumerate(records):
        pair = _read(record, str(index), tokenizer, vocab_size, answer_first_token)
        if pair.id in seen:
            raise record.error(f"the id {pair.id!r} is also that of {seen[pair.id]}; give every pair its own")
        seen[pair.id] = record.where
        pairs.append(pair)
    return pairs


def _read(
    record: Record, number: str, tokenizer: PreTrainedTokenizerBase | None, vocab_size: int, first_token: bool
) -> Pair:
    values = record.values
    if any(name in values for name in _IDS):
        check_columns(record, _IDS, (*_IDS, *_TEXT, *_OPTIONAL))
        clean, corrupt = (
            token_ids(record, "clean_ids", vocab_size),
            token_ids(record, "corrupt_ids", vocab_size),
        )
        answer, wrong = token_id(record, "answer_id", vocab_size), token_id(record, "wrong_id", vocab_size)
        used = _IDS
    elif any(name in values for name in _CSV if name not in _TEXT):
        check_columns(record, _CSV, (*_CSV, *_OPTIONAL))
        clean, corrupt = (_prompt(record, name, tokenizer, vocab_size) for name in ("clean", "corrupted"))
        answer, wrong = (token_id(record, name, vocab_size) for name in ("correct_idx", "incorrect_idx"))
        used = _CSV
    else:
        check_columns(record, _TEXT, (*_TEXT, *_OPTIONAL))
        clean, corrupt = (_prompt(record, name, tokenizer, vocab_size) for name in ("clean", "corrupt"))
        assert tokenizer is not None
        answers = text(record, "answer"), text(record, "wrong")
        with record.naming("answer, wrong"):
            answer, wrong = continuation_ids(tokenizer, text(record, "clean"), answers, first_token)
        _within(record, (answer, wrong), vocab_size)
        used = _TEXT
    if len(clean) != len(corrupt):
        raise record.error(
            f"clean has {len(clean)} tokens and corrupt {len(corrupt)}; expected one length, so that "
            "positions match"
        )
    if answer == wrong:
        raise record.error(f"answer and wrong are the same token ({answer}); no metric can tell them apart")
    # A column without a name is the index that pandas writes.
    column = next((column for column in ("id", "") if column in values), None)
    called = number if column is None else name(record, column)
    meta = {key: value for key, value in values.items() if key not in (*used, *_OPTIONAL, "")}
    return Pair(clean, corrupt, answer, wrong, spans(record, "spans", len(clean)), called, meta)


def _prompt(
    record: Record, column: str, tokenizer: PreTrainedTokenizerBase | None, vocab_size: int
) -> tuple[int, ...]:
    prompt = text(record, column)
    if tokenizer is None:
        raise record.error(
            f"{column} is text, but the model has no tokenizer; give {', '.join(_IDS)} instead, or load a "
            "tokenizer"
        )
    with record.naming(column):
        ids = prompt_ids(tokenizer, prompt)
    return _within(record, ids, vocab_size)


def _within(record: Record, ids: tuple[int, ...], vocab_size: int) -> tuple[int, ...]:
    if max(ids) >= vocab_size:
        raise record.error(
            f"the tokenizer gives id {max(ids)}, outside the model's vocabulary (0 to {vocab_size - 1}); "
            "use the model's own tokenizer"
        )
    return ids


def write_pairs(path: Path | str, pairs: Iterable[Pair]) -> None:
    """Writes pairs as JSON Lines in id form, whole or not at all; `read_pairs` gives the same pairs back.

    Raises InputError where there are none or a metadata key would hide a column, RunError where the disk
    refuses.
    """
    rows = []
    for pair in pairs:
        row: dict[str, Any] = {
            "id": pair.id,
            "clean_ids": list(pair.clean_ids),
            "corrupt_ids": list(pair.corrupt_ids),
            "answer_id": pair.answer_id,
            "wrong_id": pair.wrong_id,
        }
        if pair.spans:
            row["spans"] = {name: list(span) for name, span in pair.spans.items()}
        hidden = [key for key in pair.meta if key in (*_IDS, *_OPTIONAL)]
        if hidden:
            raise InputError(
                f"pair {pair.id!r}: metadata key {hidden[0]!r} is the name of a column; rename it"
            )
        rows.append({**row, **pair.meta})
    if not rows:
        raise InputError(f"{path}: no prompt pairs to write; expected at least one")
    write_json_lines(Path(path), rows)
