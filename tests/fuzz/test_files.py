"""Every file that patchkit reads, damaged as a whole: each kind of damage is refused in one line that names the file."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.damages import BINARY, DOCUMENTS, PLACES, SAFETENSORS, TEXT, Damage
from tests.fuzz.specimens import SPECIMENS, Specimen
from tests.fuzz.trial import Bench

#: Beside `make test`, in a lane of its own.
pytestmark = pytest.mark.slow

CASES = [(specimen, file) for specimen in SPECIMENS for file in specimen.files]
#: Damage that these formats cannot show, and why.
UNSEEN = {
    ("names of edges", "itself twice"): "a set of names is the same set",
    (
        "names of edges",
        "cut in the middle",
    ): "the first line is a comment, and a line less is a smaller circuit",
}
GONE = {"absent", "a link to nothing", "a link to itself"}


def kinds_for(file: str) -> list[Damage]:
    """The kinds of damage that a file can have, by its name."""
    text = file.endswith((".json", ".jsonl", ".csv", ".txt"))
    return [
        *PLACES,
        *BINARY,
        *(TEXT if text else ()),
        *(DOCUMENTS if file.endswith(".json") else ()),
        *(SAFETENSORS if file.endswith(".safetensors") else ()),
    ]


@pytest.mark.parametrize(("specimen", "file"), CASES, ids=[f"{s.name}, {file}" for s, file in CASES])
def test_each_damage_is_refused_in_one_line(specimen: Specimen, file: str, tmp_path: Path) -> None:
    bench, complaints = Bench(specimen, tmp_path), {}
    for damage in kinds_for(file):
        if damage.name in GONE and file in specimen.optional:
            continue
        if (specimen.name, damage.name) in UNSEEN or not damage.applies(bench.bytes_of(file)):
            continue
        complaint = bench.complaint(file, damage.do, harmless=damage.harmless)
        if complaint is not None:
            complaints[damage.name] = complaint
    assert complaints == {}
