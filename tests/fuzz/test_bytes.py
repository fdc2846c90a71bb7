"""Damage that nobody thought of: bytes of every file changed at random.

A format with checksums gives the same content or an error. One without can, by chance, become another sound file; what is
read is then content all the same, or an error of one line that names the file: never anything else.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.specimens import SPECIMENS, Specimen
from tests.fuzz.trial import Bench

#: Beside `make test`, in a lane of its own.
pytestmark = pytest.mark.slow

CASES = [(specimen, file) for specimen in SPECIMENS for file in specimen.files]
#: A digest of the whole file is kept.
DIGESTED = ("journal",)


@st.composite
def changes(draw: st.DrawFn, size: int) -> list[tuple[str, int, int, bytes]]:
    """One to three changes: (what, from, length, new bytes)."""
    kinds = st.sampled_from(["flip", "cut", "remove", "insert", "overwrite", "double"])
    length = st.sampled_from([1, 2, 4, 16, 256])
    one = st.tuples(kinds, st.integers(0, max(0, size - 1)), length, st.binary(min_size=1, max_size=9))
    return draw(st.lists(one, min_size=1, max_size=3))


def changed(content: bytes, steps: list[tuple[str, int, int, bytes]]) -> bytes:
    for kind, start, length, new in steps:
        match kind:
            case "flip" if start < len(content):
                bit = 1 << (new[0] % 8)
                content = content[:start] + bytes([content[start] ^ bit]) + content[start + 1 :]
            case "cut":
                content = content[:start]
            case "remove":
                content = content[:start] + content[start + length :]
            case "insert":
                content = content[:start] + new + content[start:]
            case "overwrite":
                content = content[:start] + new + content[start + len(new) :]
            case "double":
                content = content[:start] + content[start : start + length] + content[start:]
    return content


@pytest.mark.parametrize(("specimen", "file"), CASES, ids=[f"{s.name}, {file}" for s, file in CASES])
def test_changed_bytes_are_read_or_refused_in_one_line(specimen: Specimen, file: str, tmp_path: Path) -> None:
    bench = Bench(specimen, tmp_path)
    content = bench.bytes_of(file)

    @settings(deadline=None, max_examples=15, suppress_health_check=list(HealthCheck), database=None)
    @given(changes(len(content)))
    def check(steps: list[tuple[str, int, int, bytes]]) -> None:
        damaged = changed(content, steps)
        complaint = bench.complaint(file, lambda path: path.write_bytes(damaged))
        if complaint is None or (damaged == content and complaint == "was read as if nothing were wrong"):
            return
        assert complaint.startswith("was read") and specimen.name not in DIGESTED, complaint

    check()


CUT = [
    s
    for s in SPECIMENS
    if s.name in ("pairs in ids", "circuit.json", "circuit.safetensors", "checkpoint of a mask")
]


@pytest.mark.parametrize("specimen", CUT, ids=lambda specimen: specimen.name)
def test_a_file_cut_at_any_byte_is_refused(specimen: Specimen, tmp_path: Path) -> None:
    bench, file = Bench(specimen, tmp_path), specimen.files[0]
    content = bench.bytes_of(file)
    # Of longer files, at one byte in five.
    for size in range(0, len(content.rstrip()), 1 if len(content) < 400 else 5):
        # A file of lines that ends with one of them is a shorter one.
        if (
            file.endswith(".jsonl")
            and size
            and (content[:size].endswith(b"\n") or content[size : size + 1] == b"\n")
        ):
            continue
        complaint = bench.complaint(file, lambda path, size=size: path.write_bytes(content[:size]))
        assert complaint is None, f"cut at {size}: {complaint}"
