"""Checks of a record's columns: names, token ids, whole numbers, spans; every complaint names the line."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence

from patchkit.data._records import Record, kind

# As a CSV writes a token id.
_DIGITS = re.compile("[0-9]{1,18}")


def check_columns(record: Record, needed: Sequence[str], known: Sequence[str]) -> None:
    """InputError for a missing column, and for an unknown one that is a known one misspelt.

    Other columns are metadata and pass: only a name that differs from a known one by letter case or by a slip
    of the pen would be lost silently.
    """
    missing = [name for name in needed if name not in record.values]
    if missing:
        raise record.error(
            f"column {missing[0]!r} is missing; expected {', '.join(needed)}; found "
            f"{', '.join(record.values) or 'none'}"
        )
    for name in record.values:
        if name in known:
            continue
        close = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.88)
        if close:
            raise record.error(
                f"unknown column {name!r}: it looks like {close[0]!r}; correct it, or rename it if it is "
                "metadata"
            )


def whole_number(record: Record, column: str) -> int:
    """An integer column; where there are no types, decimal digits."""
    value = record.values[column]
    if not record.typed and isinstance(value, str) and _DIGITS.fullmatch(value.strip()):
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise record.error(f"{column} must be one whole number, found {kind(value)} {value!r}")
    return value


def text(record: Record, column: str) -> str:
    """A text column that is not empty."""
    value = record.values[column]
    if not isinstance(value, str) or not value:
        raise record.error(f"{column} must be text that is not empty, found {kind(value)} {value!r}")
    return value


def name(record: Record, column: str) -> str:
    """A column that names the record: text that is not empty, or a whole number."""
    value = record.values[column]
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return text(record, column)


def token_id(record: Record, column: str, vocab_size: int | None) -> int:
    """One token id inside the vocabulary."""
    return _in_vocabulary(record, column, whole_number(record, column), vocab_size)


def token_ids(record: Record, column: str, vocab_size: int | None) -> tuple[int, ...]:
    """A list of token ids, at least one, all inside the vocabulary."""
    value = record.values[column]
    if not isinstance(value, list | tuple) or not value:
        raise record.error(
            f"{column} must be a list of token ids with at least one, found {kind(value)} {value!r}"
        )
    for index, item in enumerate(value):
        if isinstance(item, bool) or not isinstance(item, int):
            raise record.error(f"{column}[{index}] must be a whole number, found {kind(item)} {item!r}")
        _in_vocabulary(record, f"{column}[{index}]", item, vocab_size)
    return tuple(value)


def _in_vocabulary(record: Record, name: str, value: int, vocab_size: int | None) -> int:
    if value < 0 or (vocab_size is not None and value >= vocab_size):
        end = "the end of the vocabulary" if vocab_size is None else str(vocab_size - 1)
        raise record.error(
            f"{name} = {value} is outside the model's vocabulary (0 to {end}); was it made with another "
            "tokenizer?"
        )
    return value


def spans(record: Record, column: str, length: int) -> dict[str, tuple[int, int]]:
    """The optional column of named spans [start, end) in tokens, counted without padding; {} where absent."""
    value = record.values.get(column)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise record.error(f"{column} must be {{name: [start, end)}}, found {kind(value)} {value!r}")
    result = {}
    for name, span in value.items():
        if span is None:
            continue
        numbers = list(span) if isinstance(span, list | tuple) else []
        whole = all(isinstance(edge, int) and not isinstance(edge, bool) for edge in numbers)
        if len(numbers) != 2 or not whole or not 0 <= numbers[0] < numbers[1] <= length:
            raise record.error(
                f"{column}.{name} must be [start, end) with 0 <= start < end <= {length} (the prompt's "
                "tokens), "
                f"found {span!r}"
            )
        result[str(name)] = (numbers[0], numbers[1])
    return result
