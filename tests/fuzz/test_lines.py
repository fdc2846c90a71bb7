"""Prompt pairs and desiderata whose lines are sound JSON, CSV or Arrow, and wrong all the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from patchkit.data import read_desiderata, read_pairs
from patchkit.errors import InputError
from tests.fuzz.specimens import CSV, IDS, TEXT, TOY, TRIPLE_IDS, TRIPLE_TEXT, VOCABULARY
from tests.fuzz.trial import unfit

#: Beside `make test`, in a lane of its own.
pytestmark = pytest.mark.slow

#: kind of damage -> what a line of pairs in ids has in place of sound values.
IN_IDS: dict[str, dict[str, Any]] = {
    "an id below zero": {"clean_ids": [1, -3, 7, 8]},
    "an answer below zero": {"answer_id": -1},
    "an id out of the vocabulary": {"clean_ids": [1, 3, 7, VOCABULARY]},
    "an answer out of the vocabulary": {"answer_id": VOCABULARY},
    "an id of thousands of digits": {"answer_id": 10**3999},
    "an id of too many digits to read": {"answer_id": "DIGITS"},
    "a boolean as an id": {"clean_ids": [True, 3, 7, 8]},
    "a fraction as an id": {"clean_ids": [1.0, 3, 7, 8]},
    "a power of ten as an id": {"answer_id": 4e0},
    "infinity as an id": {"clean_ids": [float("inf"), 3, 7, 8]},
    "NaN as an answer": {"answer_id": float("nan")},
    "text as an id": {"clean_ids": ["1", 3, 7, 8]},
    "null as an id": {"clean_ids": [None, 3, 7, 8]},
    "lists inside the ids": {"clean_ids": [[1, 3], [7, 8]]},
    "ids in a text": {"clean_ids": "1 3 7 8"},
    "ids in an object": {"clean_ids": {"0": 1}},
    "no ids": {"clean_ids": [], "corrupt_ids": []},
    "prompts of unequal length": {"corrupt_ids": [1, 4, 7]},
    "an answer of several ids": {"answer_id": [4]},
    "both answers the same": {"wrong_id": 4},
    "a span behind the end": {"spans": {"name": [1, 5]}},
    "a span that begins behind the end": {"spans": {"name": [9, 10]}},
    "a span below zero": {"spans": {"name": [-1, 2]}},
    "a span the wrong way round": {"spans": {"name": [2, 1]}},
    "an empty span": {"spans": {"name": [1, 1]}},
    "a span of one number": {"spans": {"name": [1]}},
    "a span of three numbers": {"spans": {"name": [0, 1, 2]}},
    "a span of fractions": {"spans": {"name": [0, 1.5]}},
    "a span of booleans": {"spans": {"name": [False, True]}},
    "a span in words": {"spans": {"name": "0 to 1"}},
    "a list of spans": {"spans": [[0, 1]]},
    "a misspelt column": {"span": {"name": [0, 1]}},
    "a column in capitals": {"Answer_id": 4},
    "a boolean as a pair's id": {"id": True},
    "a fraction as a pair's id": {"id": 1.5},
    "a list as a pair's id": {"id": ["first"]},
    "an empty pair's id": {"id": ""},
    "a pair's id of half a surrogate pair": {"id": "\ud800"},
    "a pair's id that is not its own": {"id": "first"},
    "metadata of half a surrogate pair": {"note": "\udfff"},
}
IN_TEXT: dict[str, dict[str, Any]] = {
    "an answer of several tokens": {"answer": "John went"},
    "an answer that is unknown": {"answer": "Zed"},
    "an empty answer": {"answer": ""},
    "an answer of white space": {"answer": " "},
    "an empty prompt": {"clean": ""},
    "a prompt of white space": {"clean": " \n "},
    "a prompt of unknown words": {"clean": "Mary kissed to"},
    "a prompt with an escaped zero byte": {"clean": "Mary\0 gave to"},
    "a prompt of half a surrogate pair": {"clean": "Mary \ud83d to"},
    "prompts of unequal token counts": {"corrupt": "Paul gave the to"},
    "the answer is the wrong one": {"wrong": "John"},
    "ids and text mixed up": {"answer_id": 4},
}
IN_TRIPLES: dict[str, dict[str, Any]] = {
    "a split that is none": {"split": "dev"},
    "a split in a list": {"split": ["train"]},
    "a split for some lines only": {"split": None},
    "an empty name of a desideratum": {"desideratum": ""},
    "a number as a desideratum": {"desideratum": 3},
    "a target out of the vocabulary": {"target_id": VOCABULARY},
    "digits in quotes as a target": {"target_id": "4"},
    "a boolean as an original answer": {"original_answer_id": True},
    "a span behind the end of the alternate": {"alternate_spans": {"name": [0, 9]}},
}
HEADER = "clean,corrupted,correct_idx,incorrect_idx\n"
SOUND = "Mary gave to,Paul gave to,4,3\n"
IN_CSV: dict[str, str] = {
    "a header alone": HEADER,
    "no header": SOUND,
    "a quote that is not closed": HEADER + '"Mary gave to,Paul gave to,4,3\n',
    "a quote in the middle of a field": HEADER + '"Mary" gave to,Paul gave to,4,3\n',
    "a field too few": HEADER + "Mary gave to,Paul gave to,4\n",
    "a field too many": HEADER + "Mary gave to,Paul gave to,4,3,9\n",
    "semicolons between fields": (HEADER + SOUND).replace(",", ";"),
    "tabs between fields": (HEADER + SOUND).replace(",", "\t"),
    "a column twice": "clean," + HEADER + "Mary gave to," + SOUND,
    "another column's name": HEADER.replace("incorrect_idx", "wrong_token") + SOUND,
    "a header in capitals": HEADER.upper() + SOUND,
    "an index with a point": HEADER + SOUND.replace("4", "4.0"),
    "an index below zero": HEADER + SOUND.replace("4", "-4"),
    "an index of thousands of digits": HEADER + SOUND.replace("4", "4" * 5000),
    "an index in other digits": HEADER + SOUND.replace("4", "\u0664"),
    "an index in words": HEADER + SOUND.replace("4", "four"),
    "no index": HEADER + SOUND.replace("4", ""),
    "a list of indices": HEADER + SOUND.replace("4", '"[4, 5]"'),
    "a field of 200,000 letters": HEADER + SOUND.replace("Mary", "Mary " * 40_000),
    "an empty id in CSV": HEADER.strip() + ",id\n" + SOUND.strip() + ",\n",
}
_ROW = {key: value for key, value in IDS.items() if key != "note"}
IN_DATASETS: dict[str, Callable[[], Any]] = {
    "a dataset without rows": lambda: Dataset.from_list([]),
    "a path with a zero byte": lambda: "pairs\0.jsonl",
    "a path of 5,000 letters": lambda: "p" * 5000,
    "a path through a file": lambda: f"{__file__}/pairs.jsonl",
    "a dataset with other columns": lambda: Dataset.from_list([{"prompt": "a"}]),
    "a dataset of fractions": lambda: Dataset.from_list([_ROW | {"clean_ids": [1.0, 3.0, 7.0, 8.0]}]),
    "a dataset of lists of lists": lambda: Dataset.from_list([_ROW | {"clean_ids": [[1, 3], [7, 8]]}]),
    "a dataset with nulls": lambda: Dataset.from_list([_ROW | {"clean_ids": [1, None, 7, 8]}]),
    "a dataset with bytes": lambda: Dataset.from_list([_ROW | {"id": b"\xff"}]),
    "a dataset with a row twice": lambda: Dataset.from_list([_ROW, _ROW]),
}
NAMES = (*IN_IDS, *IN_TEXT, *IN_TRIPLES, *IN_CSV, *IN_DATASETS)


def second_line(directory: Path, sound: dict[str, Any], change: dict[str, Any], **other: Any) -> Path:
    """A file whose second line has the damage."""
    rows = [sound, {**sound, **other, **change}]
    text = "".join(json.dumps(row) + "\n" for row in rows).replace('"DIGITS"', "9" * 5000)
    (directory / "data.jsonl").write_text(text, encoding="utf-8")
    return directory / "data.jsonl"


def refused(read: Callable[[], object], directory: Path | None, line: int | None) -> None:
    with pytest.raises(InputError) as caught:
        read()
    message = str(caught.value)
    assert unfit(message, directory or Path()) is None or directory is None and message.isprintable()
    assert line is None or f" line {line}: " in message


@pytest.mark.parametrize("name", IN_IDS)
def test_a_pair_in_ids(tmp_path: Path, name: str) -> None:
    path = second_line(tmp_path, IDS, IN_IDS[name], id="second")
    refused(lambda: read_pairs(path, TOY, VOCABULARY), tmp_path, 2)


@pytest.mark.parametrize("name", IN_TEXT)
def test_a_pair_in_text(tmp_path: Path, name: str) -> None:
    path = second_line(tmp_path, TEXT, IN_TEXT[name], id="second")
    refused(lambda: read_pairs(path, TOY, VOCABULARY), tmp_path, 2)


@pytest.mark.parametrize("name", IN_TRIPLES)
def test_a_triple(tmp_path: Path, name: str) -> None:
    path = second_line(tmp_path, TRIPLE_IDS, IN_TRIPLES[name])
    refused(lambda: read_desiderata(path, TOY, VOCABULARY), tmp_path, 2)


def test_text_of_desiderata_is_held_to_the_same(tmp_path: Path) -> None:
    for change in (
        {"original": "\ud800"},
        {"target": "Paul went"},
        {"alternate": ""},
        {"original_answer": 3},
    ):
        path = second_line(tmp_path, TRIPLE_TEXT, change)
        refused(lambda path=path: read_desiderata(path, TOY, VOCABULARY), tmp_path, 2)


@pytest.mark.parametrize("name", IN_CSV)
def test_a_csv(tmp_path: Path, name: str) -> None:
    (tmp_path / "data.csv").write_text(IN_CSV[name], encoding="utf-8")
    refused(lambda: read_pairs(tmp_path / "data.csv", TOY, VOCABULARY), tmp_path, None)


@pytest.mark.parametrize("name", IN_DATASETS)
def test_a_dataset(name: str) -> None:
    refused(lambda: read_pairs(IN_DATASETS[name](), TOY, VOCABULARY), None, None)


def test_formats_of_datasets_change_nothing() -> None:
    plain = read_pairs(Dataset.from_list([_ROW]), TOY, VOCABULARY)
    for kind in ("torch", "numpy", "pandas"):
        assert read_pairs(Dataset.from_list([_ROW]).with_format(kind), TOY, VOCABULARY) == plain


def test_what_is_harmless_is_read(tmp_path: Path) -> None:
    """Blank lines, line ends of old Macs, null for an optional column, NaN in metadata."""
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(IDS))
    sound = read_pairs(path, TOY, VOCABULARY)
    for text in (f"\n\n{json.dumps(IDS)}", f"{json.dumps(IDS)}\r\r", f"  {json.dumps(IDS)}  \n"):
        path.write_bytes(text.encode())
        assert read_pairs(path, TOY, VOCABULARY) == sound
    path.write_text(json.dumps(IDS | {"spans": None, "loss": float("nan")}))
    (pair,) = read_pairs(path, TOY, VOCABULARY)
    assert pair.spans == {} and pair.meta["loss"] != pair.meta["loss"]
    (tmp_path / "data.csv").write_bytes(CSV.replace("\n", "\r").encode())
    assert len(read_pairs(tmp_path / "data.csv", TOY, VOCABULARY)) == 2
