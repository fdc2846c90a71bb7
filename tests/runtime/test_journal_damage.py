"""Damaged shards, and files that are none: an error that names the file and the fix, and never a wrong number."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patchkit.errors import InputError
from patchkit.runtime import Journal
from tests.runtime.journals import BATCHES, Totals, equal, run, shards

UNDISTURBED = run(Totals(), None)
Rows = list[dict[str, Any]]


def sound() -> bytes:
    """A shard as it is written."""
    return _BYTES[0]


_BYTES: list[bytes] = []


@pytest.fixture(autouse=True, scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = tmp_path_factory.mktemp("sound")
    run(Totals(), directory)
    _BYTES.append(shards(directory)[0].read_bytes())


def put(directory: Path, data: bytes, name: str | None = None) -> Path:
    """A file under the name that its content should have."""
    path = directory / (name or f"000000-{hashlib.sha256(data).hexdigest()[:16]}.parquet")
    path.write_bytes(data)
    return path


def rewritten(change: Callable[[Rows], Any], schema: pa.Schema | None = None, **options: Any) -> bytes:
    """The shard with its rows changed, as whole as parquet can be."""
    table = pq.read_table(io.BytesIO(sound()))
    rows = table.to_pylist()
    rows = change(rows) or rows
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema or table.schema), sink, **options)
    return sink.getvalue()


def refused(directory: Path, words: str = "") -> str:
    """The error of a run that finds this; without the file, the run gives what it should."""
    program = Totals()
    with pytest.raises(InputError) as caught:
        run(program, directory)
    message = str(caught.value)
    assert program.runs == []
    (path,) = directory.glob("*.parquet")
    assert message.startswith(f"{path}: a damaged shard of a journal: ") and words in message, message
    assert message.endswith("Delete this file: what it held is then run again.")
    path.unlink()
    again = Totals()
    assert equal(run(again, directory), UNDISTURBED) and again.runs == BATCHES
    assert equal(run(Totals(last_run=0), directory), UNDISTURBED)
    return message


def test_an_undamaged_one_is_taken(tmp_path: Path) -> None:
    """What the other tests damage; written anew by their own means it is as good."""
    put(tmp_path, sound())
    assert equal(run(Totals(last_run=0), tmp_path), UNDISTURBED)
    other = tmp_path / "other"
    other.mkdir()
    put(other, rewritten(lambda rows: rows))
    assert equal(run(Totals(last_run=0), other), UNDISTURBED)


@pytest.mark.parametrize("left", [0, 1, 4, 7, 60, 0.25, 0.5, 0.9, -9, -8, -4, -1])
@pytest.mark.parametrize("renamed", [False, True])
def test_cut_short(tmp_path: Path, left: float, renamed: bool) -> None:
    whole = sound()
    data = whole[: left if isinstance(left, int) else int(left * len(whole))]
    put(tmp_path, data, None if renamed else shards_name(whole))
    refused(tmp_path)


def shards_name(data: bytes) -> str:
    return f"000000-{hashlib.sha256(data).hexdigest()[:16]}.parquet"


@settings(deadline=None, max_examples=60)
@given(st.floats(0, 1, exclude_max=True), st.integers(1, 255))
def test_any_byte_changed(tmp_path_factory: pytest.TempPathFactory, where: float, by: int) -> None:
    directory = tmp_path_factory.mktemp("flipped")
    data = bytearray(sound())
    data[int(where * len(data))] ^= by
    put(directory, bytes(data), shards_name(sound()))
    # Where the damage hides all keys nothing is asked of the file, so it is looked at directly.
    with pytest.raises(InputError, match="a damaged shard"):
        Journal(directory).find([key for key in keys_of(sound())])


def keys_of(data: bytes) -> list[str]:
    return sorted({key for key in pq.read_table(io.BytesIO(data))["key"].to_pylist() if key})


def test_a_value_changed_is_seen_by_the_pages_own_checksum(tmp_path: Path) -> None:
    """Even where the name is that of the changed content."""
    data = bytearray(sound())
    value = UNDISTURBED["square"][:1].numpy().tobytes()
    where = bytes(data).index(value)
    data[where] ^= 1
    put(tmp_path, bytes(data))
    refused(tmp_path, "CRC checksum verification failed")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"PAR1",
        b"PAR1PAR1",
        b"PK\x03\x04" + bytes(50),
        b"{}",
        bytes(1000),
        b"PAR1" + bytes(100) + b"PAR1",
    ],
)
def test_no_parquet(tmp_path: Path, data: bytes) -> None:
    put(tmp_path, data)
    refused(tmp_path, "cannot be read as parquet")


def test_bytes_behind_the_end(tmp_path: Path) -> None:
    put(tmp_path, sound() + b"PAR1", shards_name(sound()))
    refused(tmp_path)


@pytest.mark.parametrize(
    "name", ["pairs.parquet", "0-0123456789abcdef.parquet", "000000-0123.parquet", "000000.parquet"]
)
def test_a_name_that_no_shard_has(tmp_path: Path, name: str) -> None:
    put(tmp_path, sound(), name)
    refused(tmp_path, "its name is not that of a shard")


def test_the_name_of_another_shard(tmp_path: Path) -> None:
    put(tmp_path, sound(), "000000-0123456789abcdef.parquet")
    refused(tmp_path, "its content is not what was written")


def test_a_directory_in_its_place(tmp_path: Path) -> None:
    (tmp_path / shards_name(sound())).mkdir()
    with pytest.raises(InputError, match="a damaged shard"):
        run(Totals(), tmp_path)


def test_a_link_to_nothing(tmp_path: Path) -> None:
    (tmp_path / shards_name(sound())).symlink_to(tmp_path / "absent")
    with pytest.raises(InputError, match="a damaged shard"):
        run(Totals(), tmp_path)


def schema(**changes: pa.DataType | None) -> pa.Schema:
    """The shard's schema with columns of other types, without some, or with more."""
    found = pq.read_schema(io.BytesIO(sound()))
    fields = {field.name: field.type for field in found} | changes
    return pa.schema({name: kind for name, kind in fields.items() if kind is not None}, found.metadata)


@pytest.mark.parametrize(
    "changes",
    [
        {"key": None},
        {"data": None},
        {"batch": None},
        {"more": pa.int64()},
        {"batch": pa.int64()},
        {"key": pa.large_string()},
        {"shape": pa.list_(pa.int32())},
        {"dtype": pa.dictionary(pa.int32(), pa.string())},
        {"data": pa.binary()},
    ],
    ids=str,
)
def test_other_columns(tmp_path: Path, changes: dict[str, pa.DataType | None]) -> None:
    put(tmp_path, rewritten(lambda rows: rows, schema(**changes)))
    refused(tmp_path, "parquet, but not of a journal: expected columns batch, key, name, dtype, shape, data")


@pytest.mark.parametrize("metadata", [{}, {"patchkit": "journal 2"}, {"pandas": "{}"}])
def test_of_something_else(tmp_path: Path, metadata: dict[str, str]) -> None:
    put(tmp_path, rewritten(lambda rows: rows, schema().with_metadata(metadata)))
    refused(tmp_path, "not of a journal")


def test_a_table_of_pandas(tmp_path: Path) -> None:
    sink = io.BytesIO()
    pq.write_table(pa.table({"key": ["a"], "value": [1.0]}), sink)
    put(tmp_path, sink.getvalue())
    refused(
        tmp_path,
        "not of a journal: expected columns batch, key, name, dtype, shape, data of known types, found key",
    )


def change(of: str, to: Any, where: int = 0) -> Callable[[Rows], None]:
    def changed(rows: Rows) -> None:
        rows[where][of] = to(rows[where][of]) if callable(to) else to

    return changed


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (lambda rows: rows.clear(), "it holds nothing"),
        *((change(column, None), "a row lacks a value") for column in ("batch", "key", "name", "dtype", "shape", "data")),
        (change("shape", [None]), "has shape [None]"),
        (change("shape", [-8]), "has shape [-8]"),
        (change("shape", [2]), "has 8 bytes where torch.float64 [2] takes 16"),
        (change("shape", [1 << 62, 1 << 62]), "has 8 bytes where torch.float64"),
        (change("shape", [0]), "has 8 bytes where torch.float64 [0] takes 0"),
        (change("data", lambda data: data[:-1]), "has 7 bytes where torch.float64 [] takes 8"),
        (change("data", b""), "has 0 bytes"),
        (change("dtype", "torch.float32"), "has 8 bytes where torch.float32 [] takes 4"),
        (change("dtype", "float64"), "unknown dtype 'float64'"),
        (change("dtype", "torch.load"), "unknown dtype 'torch.load'"),
        (change("dtype", "torch.int64", -8), "the items of one batch have different tensors"),
        (change("name", "other", -8), "the items of one batch have different tensors"),
        (change("name", ""), "a tensor has no name"),
        (change("name", "", -1), "a tensor has no name"),
        (lambda rows: rows[0].update(name="", data=b"", shape=[0]), "a tensor has no name"),
        (lambda rows: [row for row in rows if row["key"]][:1] + rows, "occurs twice"),
        (lambda rows: rows + [row for row in rows if not row["key"]][:1], "occurs twice"),
        (lambda rows: [row for row in rows if not row["key"]], "it holds nothing"),
        (lambda rows: rows + [dict(rows[-1], batch=99)], "a sum over no items"),
    ],
)  # fmt: skip
def test_rows_that_say_no_tensor(tmp_path: Path, changed: Callable[[Rows], Any], words: str) -> None:
    put(tmp_path, rewritten(changed))
    refused(tmp_path, words)


def test_a_damaged_one_beside_sound_ones(tmp_path: Path) -> None:
    """Only what the damaged one held is run again."""
    program = Totals(last_run=2)
    with pytest.raises(KeyboardInterrupt):
        run(program, tmp_path)
    run(Totals(), tmp_path)
    first, second = shards(tmp_path)
    second.write_bytes(second.read_bytes()[:-20])
    with pytest.raises(InputError, match=second.name):
        run(Totals(), tmp_path)
    second.unlink()
    again = Totals()
    assert equal(run(again, tmp_path), UNDISTURBED) and again.runs == BATCHES[2:]
    assert first in shards(tmp_path)


def test_a_damaged_one_that_nobody_asks_for_is_in_nobodys_way(tmp_path: Path) -> None:
    run(Totals(), tmp_path)
    (path,) = shards(tmp_path)
    run(Totals(power=3), tmp_path)
    data = bytearray(path.read_bytes())
    data[data.index(UNDISTURBED["square"][:1].numpy().tobytes())] ^= 1
    path.write_bytes(data)
    run(Totals(power=3, last_run=0), tmp_path)
    with pytest.raises(InputError, match=path.name):
        run(Totals(), tmp_path)


def test_what_is_no_parquet_file_is_left_alone(tmp_path: Path) -> None:
    for name in ("op.json", "op.safetensors", ".hidden", ".op.json.0a.tmp"):
        (tmp_path / name).write_text("x")
    (tmp_path / "study").mkdir()
    run(Totals(), tmp_path)
    assert equal(run(Totals(last_run=0), tmp_path), UNDISTURBED)
    assert {"op.json", "op.safetensors", ".hidden", ".op.json.0a.tmp", "study"} <= {
        item.name for item in tmp_path.iterdir()
    }


def test_what_a_killed_writer_left_is_taken_away(tmp_path: Path) -> None:
    left = tmp_path / f".{shards_name(sound())}.0a1b2c.tmp"
    left.write_bytes(sound()[:100])
    program = Totals()
    assert equal(run(program, tmp_path), UNDISTURBED) and program.runs == BATCHES
    assert not left.exists() and torch.is_tensor(UNDISTURBED["total"])
