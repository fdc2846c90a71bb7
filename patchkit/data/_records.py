"""Lines of a file or rows of a dataset, as records that remember where they came from.

Both readers of this floor (`pairs`, `desiderata`) go through here, so that every complaint names the file,
the line, what was expected, what was found and what to do.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset

from patchkit.errors import InputError
from patchkit.files import atomic_write
from patchkit.reading import parse_json, read_text

Source = str | Path | Dataset


@dataclass(frozen=True)
class Record:
    """One line or row: `where` says which one, for messages; `values` holds the columns.

    Those of JSON are `typed`; in a CSV, and in a dataset that was made of one, a number may be a text of digits.
    """

    where: str
    values: Mapping[str, Any]
    typed: bool = True

    def error(self, message: str) -> InputError:
        """An InputError about this record."""
        return InputError(f"{self.where}: {message}")

    @contextmanager
    def naming(self, column: str) -> Iterator[None]:
        """Puts this record's place and the column before an InputError raised inside."""
        try:
            yield
        except InputError as error:
            raise self.error(f"{column}: {error}") from None


def read_records(source: Source, what: str) -> list[Record]:
    """Every record of a JSON Lines file, a CSV file (by its ending) or a `datasets.Dataset`.

    `what` names the content in messages ("prompt pairs"). Blank lines are skipped; an empty source is an
    error. Arrow cannot tell an absent key from a null one, so nulls in a Dataset count as absent.
    """
    if isinstance(source, Dataset):
        # Rows as plain values, whatever format the dataset was set to.
        plain = source.with_format(None)
        rows = [{key: value for key, value in dict(row).items() if value is not None} for row in plain]
        records = [Record(f"dataset row {index}", row, typed=False) for index, row in enumerate(rows)]
        if not records:
            raise InputError(f"the dataset of {what} has no rows; expected at least one")
        return records
    if not isinstance(source, str | Path):
        raise InputError(
            f"{what}: expected a file or a datasets.Dataset, found {type(source).__name__}; of a dataset in splits give "
            "one of them"
        )
    path = Path(source)
    text = read_text(path, f"a file of {what} (JSON Lines or CSV)")
    records = _csv_records(path, text) if path.suffix.lower() == ".csv" else _json_records(path, text)
    if not records:
        found = "nothing but a header" if text.strip() else "an empty file"
        raise InputError(f"{path}: expected a file of {what} with at least one line, found {found}")
    return records


def _json_records(path: Path, text: str) -> list[Record]:
    records = []
    # split("\n"), not splitlines(): JSON strings may hold U+2028 and the like unescaped.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            # NaN may stand in metadata; columns that are read want whole numbers and text.
            values = parse_json(line, finite=False)
        except json.JSONDecodeError as error:
            raise InputError(
                f"{where}: malformed JSON at column {error.colno} ({error.msg}); expected one complete "
                "object a line"
            ) from None
        except ValueError as error:
            raise InputError(f"{where}: {error}; expected one complete JSON object a line") from None
        if not isinstance(values, dict):
            raise InputError(
                f"{where}: expected a JSON object, found {kind(values)}; write one object a line, without "
                "a list around"
            )
        records.append(Record(where, values))
    return records


def _csv_records(path: Path, text: str) -> list[Record]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    records: list[Record] = []
    header: list[str] | None = None
    try:
        for row in reader:
            if not row:
                continue
            if header is None:
                header = [name.strip() for name in row]
                repeated = {name for name in header if header.count(name) > 1}
                if repeated:
                    raise InputError(
                        f"{path} line 1: column {min(repeated)!r} appears twice; keep one of them"
                    )
                continue
            if len(row) != len(header):
                raise InputError(
                    f"{path} line {reader.line_num}: expected {len(header)} fields as in the header, "
                    f"found {len(row)}; quote fields that hold commas"
                )
            fields = dict(zip(header, row, strict=True))
            records.append(Record(f"{path} line {reader.line_num}", fields, typed=False))
    except csv.Error as error:
        raise InputError(
            f'{path} line {reader.line_num}: malformed CSV ({error}); quote fields with ""'
        ) from None
    return records


def kind(value: object) -> str:
    """What a JSON value is, in words for messages."""
    names = {
        dict: "an object",
        list: "a list",
        str: "text",
        bool: "true/false",
        int: "a number",
        float: "a fraction",
    }
    return "nothing" if value is None else names.get(type(value), type(value).__name__)


def write_json_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one object a line, whole or not at all.

    InputError where a value is not JSON; RunError, naming the file, where the disk refuses.
    """
    lines = []
    for index, row in enumerate(rows):
        try:
            lines.append(json.dumps(row, ensure_ascii=False) + "\n")
        except (TypeError, ValueError) as error:
            raise InputError(
                f"{path}: item {index} cannot be written as JSON ({error}); use plain values"
            ) from None
    atomic_write(path, "".join(lines))
