"""Files are whole or absent, errors name file and field, and numbers come back as they went."""

from __future__ import annotations

import errno
import json
import os
import struct
from pathlib import Path

import pytest
import torch
from pydantic import BaseModel, ConfigDict, Field

from patchkit import files
from patchkit.errors import InputError, RunError
from patchkit.files import atomic_write
from patchkit.results.formats import (
    load_metadata,
    load_tensors,
    read_json,
    read_model,
    save_tensors,
    write_json,
    write_model,
)


class Shape(BaseModel):
    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)
    schema_version: int = 1
    name: str
    sizes: list[float]
    values: dict[str, torch.Tensor] = Field(default_factory=dict, exclude=True)


def entries(directory: Path) -> list[str]:
    return sorted(item.name for item in directory.iterdir())


def test_atomic_write_replaces_and_leaves_nothing_beside(tmp_path: Path) -> None:
    target = tmp_path / "new" / "deep" / "a.txt"
    atomic_write(target, "first")
    atomic_write(target, "zweiter — Text".encode())
    assert target.read_text(encoding="utf-8") == "zweiter — Text"
    assert entries(target.parent) == ["a.txt"]


def test_written_files_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        atomic_write(tmp_path / "a.txt", "x")
    finally:
        os.umask(before)
    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("step", ["fsync", "replace", "fdopen"])
@pytest.mark.parametrize(
    ("number", "words"),
    [(errno.ENOSPC, "no space left"), (errno.EACCES, "not allowed"), (errno.EIO, os.strerror(errno.EIO))],
)
def test_a_failed_write_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, number: int, words: str
) -> None:
    target = tmp_path / "mask.json"
    atomic_write(target, "old")

    def fail(descriptor: int | Path, *args: object) -> None:
        if step == "fdopen":
            assert isinstance(descriptor, int)
            os.close(descriptor)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.os, step, fail)
    with pytest.raises(RunError) as caught:
        atomic_write(target, "new")
    monkeypatch.undo()
    assert str(target) in str(caught.value) and words in str(caught.value) and "--out" in str(caught.value)
    assert target.read_text() == "old"
    assert entries(tmp_path) == ["mask.json"]


def test_an_interrupt_while_writing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        atomic_write(tmp_path / "a.txt", "x")
    assert entries(tmp_path) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_really_full_device_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open
    monkeypatch.setattr(files.os, "open", lambda path, flags, mode: real("/dev/full", os.O_WRONLY))
    with pytest.raises(RunError, match="no space left"):
        atomic_write(tmp_path / "a.txt", "x" * 100_000)
    assert entries(tmp_path) == []


def test_a_file_in_the_way_of_the_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(RunError, match=r"out/mask\.json.*where a directory should be"):
        atomic_write(tmp_path / "out" / "mask.json", "x")


def test_json_round_trip_is_exact(tmp_path: Path) -> None:
    value = {"x": 0.1 + 0.2, "none": None, "list": [1, True, "ü"]}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value
    assert "ü" in (tmp_path / "a.json").read_text(encoding="utf-8")


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_json_refuses_numbers_it_does_not_have(tmp_path: Path, number: float) -> None:
    with pytest.raises(RunError, match=r"a\.json: cannot write field joint\.random\[1\]"):
        write_json(tmp_path / "a.json", {"joint": {"random": [0.5, number]}})
    assert entries(tmp_path) == []


def test_a_model_with_nan_is_refused_by_field(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"field sizes\[0\]"):
        write_model(tmp_path / "a.json", Shape(name="n", sizes=[float("nan")]))


def test_model_round_trip_with_tensors_kept_elsewhere(tmp_path: Path) -> None:
    values = {"head": torch.rand(2, 3)}
    write_model(tmp_path / "a.json", Shape(name="n", sizes=[1.0, 0.3], values=values))
    assert "values" not in json.loads((tmp_path / "a.json").read_text())
    again = read_model(tmp_path / "a.json", Shape, extra={"values": values})
    assert again == Shape(name="n", sizes=[1.0, 0.3], values=values)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"name": "n"}', "field sizes: Field required"),
        ('{"name": "n", "sizes": ["wide"]}', "field sizes.0: .*found 'wide'"),
        ('{"name": "n", "sizes": [], "colour": 1}', "field colour: "),
        ('{"name": "n",\n "sizes": [}', "line 2, column 12: not valid JSON"),
        ("[1, 2]", "expected a JSON object that holds a Shape, found a list"),
        ('{"schema_version": 2, "name": "n", "sizes": []}', "expected schema_version 1, found 2"),
    ],
)
def test_a_malformed_model_names_file_and_field(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(InputError, match=words) as caught:
        read_model(tmp_path / "a.json", Shape)
    assert str(tmp_path / "a.json") in str(caught.value)


def test_other_bytes_are_not_json(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(InputError, match="UTF-8"):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize("read", [read_json, load_tensors, load_metadata])
def test_a_missing_file_is_named(tmp_path: Path, read) -> None:
    with pytest.raises(InputError, match=r"none/x\.bin: no such file \(there is no directory"):
        read(tmp_path / "none" / "x.bin")
    with pytest.raises(InputError, match="expected a .*file, found a directory"):
        read(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_floats_are_stored_as_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    path = tmp_path / "t.safetensors"
    tensor = torch.tensor([[0.5, -1.25], [3.0, 1e-3]], dtype=dtype)
    save_tensors(path, {"a": tensor})
    # The oracle is the file format itself: 8 bytes of header length, a JSON header, raw little-endian floats.
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    assert header["a"]["dtype"] == "F32" and header["a"]["shape"] == [2, 2]
    assert struct.unpack("<4f", raw[8 + length :]) == tuple(tensor.float().flatten().tolist())
    assert torch.equal(load_tensors(path)["a"], tensor.float())


def test_integers_stay_and_views_and_gradients_are_accepted(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4).requires_grad_()
    tensors = {"t": base.T, "row": base[1], "ids": torch.tensor([1, 2]), "empty": torch.zeros(0, 3)}
    save_tensors(tmp_path / "t.safetensors", tensors)
    loaded = load_tensors(tmp_path / "t.safetensors")
    assert loaded["ids"].dtype == torch.int64 and loaded["empty"].shape == (0, 3)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_metadata_is_in_the_header(tmp_path: Path) -> None:
    save_tensors(tmp_path / "t.safetensors", {"a": torch.zeros(1)}, metadata={"senders": '["input"]'})
    assert load_metadata(tmp_path / "t.safetensors") == {"senders": '["input"]'}
    save_tensors(tmp_path / "t.safetensors", {"a": torch.zeros(1)})
    assert load_metadata(tmp_path / "t.safetensors") == {}


@pytest.mark.parametrize("read", [load_tensors, load_metadata])
@pytest.mark.parametrize("content", [b"", b"not tensors at all", struct.pack("<Q", 1 << 40)])
def test_a_malformed_tensor_file_is_named(tmp_path: Path, read, content: bytes) -> None:
    (tmp_path / "t.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=r"t\.safetensors: expected a safetensors file"):
        read(tmp_path / "t.safetensors")


def test_a_truncated_tensor_file_is_refused(tmp_path: Path) -> None:
    save_tensors(tmp_path / "t.safetensors", {"a": torch.zeros(100)})
    whole = (tmp_path / "t.safetensors").read_bytes()
    (tmp_path / "t.safetensors").write_bytes(whole[:-4])
    with pytest.raises(InputError, match="expected a safetensors file"):
        load_tensors(tmp_path / "t.safetensors")
