"""Files and directories that the system does not let be read: the same one line."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from patchkit.errors import InputError
from patchkit.report import write_report
from patchkit.results.manifest import open_run_dir
from tests.fuzz.specimens import CIRCUIT, EDGES, EVALUATION, JOURNAL, MASK, MIB, MODEL, SPECIMENS, Specimen
from tests.fuzz.trial import unfit

#: Beside `make test`, in a lane of its own.
pytestmark = pytest.mark.slow

NOBODY = 65534
NAMES = ("a file that may not be read", "a directory that may not be entered")
#: Nothing is found in a journal's directory that may not be looked into, and writing into it fails then.
CLOSED = [specimen for specimen in SPECIMENS if specimen is not JOURNAL]


@contextmanager
def as_nobody() -> Iterator[None]:
    """Without the rights of root, whom permissions do not stop."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory whose parents anybody may enter, as those of `tmp_path` are not."""
    directory = Path(tempfile.mkdtemp())
    directory.chmod(0o755)
    yield directory
    directory.chmod(0o755)
    shutil.rmtree(directory)


def refused(read: Callable[[], object], directory: Path) -> None:
    with pytest.raises(InputError) as caught, as_nobody():
        read()
    assert unfit(str(caught.value), directory) is None


@pytest.mark.parametrize("specimen", [*SPECIMENS, MODEL], ids=lambda specimen: specimen.name)
def test_a_file_that_may_not_be_read(specimen: Specimen, place: Path) -> None:
    specimen.make(place)
    specimen.read(place)
    for file in specimen.files:
        path = specimen.path(place, file)
        path.chmod(0)
        if (specimen, file) != (MODEL, "tokenizer_config.json"):
            refused(lambda: specimen.read(place), place)
        path.chmod(0o644)


@pytest.mark.parametrize("specimen", CLOSED, ids=lambda specimen: specimen.name)
def test_a_directory_that_may_not_be_entered(specimen: Specimen, place: Path) -> None:
    specimen.make(place)
    specimen.read(place)
    place.chmod(0o700 if os.geteuid() == 0 else 0)
    refused(lambda: specimen.read(place), place)


@pytest.mark.parametrize("specimen", [EDGES, EVALUATION, MASK], ids=lambda specimen: specimen.name)
def test_a_run_that_may_not_be_entered(specimen: Specimen, place: Path) -> None:
    specimen.make(place)
    place.chmod(0o700 if os.geteuid() == 0 else 0)
    refused(lambda: write_report(place), place)
    refused(lambda: open_run_dir(place, "edges", {}), place)


def test_an_input_that_may_not_be_read(place: Path) -> None:
    (place / "pairs.jsonl").write_text("{}")
    (place / "pairs.jsonl").chmod(0)
    refused(lambda: open_run_dir(place / "out", "patch", {"pairs": place / "pairs.jsonl"}), place)


def test_a_directory_that_may_not_be_listed(place: Path) -> None:
    """One with the files that are wanted need not be."""
    for specimen, inside in ((CIRCUIT, place), (MIB, place / "ioi_gpt2")):
        specimen.make(place)
        for path in inside.glob("*.json"):
            path.unlink()
        inside.chmod(0o711 if os.geteuid() == 0 else 0o100)
        refused(lambda specimen=specimen: specimen.read(place), place)
        inside.chmod(0o755)
