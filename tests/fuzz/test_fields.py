"""Every field of every JSON file, missing, of each wrong type, and with a field beside it that nobody knows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fuzz.damages import MISSING, UNKNOWN, WRONG, at, kind_of, places, removed, replaced, said
from tests.fuzz.specimens import SPECIMENS, Specimen
from tests.fuzz.trial import Bench

#: Beside `make test`, in a lane of its own.
pytestmark = pytest.mark.slow

CASES = [(s, file) for s in SPECIMENS for file in s.files if file.endswith((".json", ".jsonl"))]
#: Fields that may hold anything: metadata of pairs, options of commands.
FREE = {
    "pairs in ids": ("note",),
    "manifest": ("options",),
    "desiderata in ids": ("template",),
    "desiderata in text": ("template",),
}
#: Foreign files: other programs' keys are passed over, and NaN is an edge without a score.
FOREIGN = ("graph.json", "MIB folder")


def may_be_read(specimen: Specimen, path: tuple[str | int, ...], name: str) -> bool:
    """Whether such a damage can leave a sound file."""
    if path and path[0] in FREE.get(specimen.name, ()):
        return True
    if path == ("id",) and name == "a number for text":
        return True
    if specimen.name in FOREIGN and (name == UNKNOWN or name.startswith("NaN for a fraction")):
        return True
    # What is optional may be missing, or null; a mapping by names of the user's may have one more or less.
    return name in (MISSING, UNKNOWN) or name.startswith("null for")


def damages(first: Any) -> Iterator[tuple[tuple[str | int, ...], str, Any]]:
    """(path, name of the damage, damaged value) of a sound value."""
    if not isinstance(first, dict):
        return
    yield (), UNKNOWN, {**first, "colour\nx": 1}
    for number, path in enumerate(places(first)):
        value = at(first, path)
        yield path, MISSING, removed(first, path)
        if isinstance(value, dict):
            yield path, UNKNOWN, replaced(first, path, {**value, "colour\nx": 1})
        # Each field has two of them, and the next field the next two.
        wrong = WRONG.get(kind_of(value), ())
        for turn in range(min(2, len(wrong))):
            name, new = wrong[(2 * number + turn) % len(wrong)]
            yield path, name, replaced(first, path, new)


@pytest.mark.parametrize(("specimen", "file"), CASES, ids=[f"{s.name}, {file}" for s, file in CASES])
def test_each_field_has_its_type(specimen: Specimen, file: str, tmp_path: Path) -> None:
    bench, complaints, tried = Bench(specimen, tmp_path), {}, 0
    first, rest = bench.bytes_of(file).decode(), ""
    if file.endswith(".jsonl"):
        first, _, rest = first.partition("\n")
    for path, name, value in damages(json.loads(first)):
        text = f"{json.dumps(value)}\n{rest}"
        complaint = bench.complaint(file, lambda target, text=text: target.write_text(text, encoding="utf-8"))
        tried += 1
        read = complaint is not None and complaint.startswith("was read")
        if complaint is not None and not (read and may_be_read(specimen, path, name)):
            complaints[f"{said(path)}: {name}"] = complaint
    assert complaints == {} and (tried > 10 or file == "names.json")


def test_results_refuse_fields_that_nobody_knows(tmp_path: Path) -> None:
    """On top and inside: misspelt fields of results would be lost silently."""
    for number, specimen in enumerate(
        s for s in SPECIMENS if s.name in ("mask", "edges", "scores", "manifest", "ioi")
    ):
        (tmp_path / str(number)).mkdir()
        bench = Bench(specimen, tmp_path / str(number))
        for file in (name for name in specimen.files if name.endswith(".json")):
            data = json.loads(bench.bytes_of(file)) | {"colour": 1}
            assert bench.complaint(file, lambda path, data=data: path.write_text(json.dumps(data))) is None
