"""What counts as a difference between two runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from patchkit.errors import InputError
from patchkit.results.compare import compare_runs
from patchkit.results.formats import save_tensors, write_json

INF, NAN = float("inf"), float("nan")


def two(tmp_path: Path, left: Any, right: Any) -> dict[str, float]:
    for name, value in (("a", left), ("b", right)):
        write_json(tmp_path / name / "mask.json", value)
        write_json(tmp_path / name / "manifest.json", {"started": name})
    return compare_runs(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize(
    ("left", "right", "difference"),
    [
        ({"x": [1.0, 2.0]}, {"x": [1.0, 2.5]}, 0.5),
        ({"x": 1, "seconds": 3.0, "command": "p"}, {"x": 1.0, "seconds": 9.0, "command": "q"}, 0.0),
        ({"x": {"y": None}}, {"x": {"y": None}}, 0.0),
        ({"x": {"y": None}}, {"x": {"y": 0.0}}, INF),
        ({"x": 0.0}, {"x": None}, INF),
        ({"chosen": ["a1.h0"]}, {"chosen": ["a1.h1"]}, INF),
        ({"chosen": ["a1.h0"]}, {"chosen": []}, INF),
        ({"x": 1}, {"y": 1}, INF),
        ({"x": True}, {"x": 1}, 0.0),
        ({"x": True}, {"x": False}, INF),
        ({}, [], INF),
    ],
)
def test_json_numbers_and_words(tmp_path: Path, left: Any, right: Any, difference: float) -> None:
    assert two(tmp_path, left, right) == {"mask.json": difference}


@pytest.mark.parametrize(
    ("left", "right", "difference"),
    [
        ([1.0, 2.0], [1.0, 1.75], 0.25),
        ([NAN, 2.0], [NAN, 2.0], 0.0),
        ([NAN, 2.0], [1.0, 2.0], INF),
        ([INF, 2.0], [INF, 2.0], 0.0),
        ([INF, 2.0], [-INF, 2.0], INF),
        ([INF, 2.0], [3.0, 2.0], INF),
        ([1.0], [1.0, 1.0], INF),
        ([], [], 0.0),
    ],
)
def test_tensors(tmp_path: Path, left: list[float], right: list[float], difference: float) -> None:
    for name, values in (("a", left), ("b", right)):
        save_tensors(tmp_path / name / "s.safetensors", {"z": torch.tensor(values)})
    assert compare_runs(tmp_path / "a", tmp_path / "b") == {"s.safetensors:z": difference}


def test_a_tensor_on_one_side_only_is_a_difference(tmp_path: Path) -> None:
    save_tensors(tmp_path / "a" / "s.safetensors", {"z": torch.zeros(1)})
    save_tensors(tmp_path / "b" / "s.safetensors", {"z": torch.zeros(1), "q": torch.zeros(1)})
    assert compare_runs(tmp_path / "a", tmp_path / "b") == {"s.safetensors:q": INF, "s.safetensors:z": 0.0}


def test_what_cannot_be_compared_is_named(tmp_path: Path) -> None:
    write_json(tmp_path / "a" / "manifest.json", {})
    with pytest.raises(InputError, match="no results to compare"):
        compare_runs(tmp_path / "a", tmp_path / "a")
    write_json(tmp_path / "a" / "mask.json", {})
    (tmp_path / "b").mkdir()
    with pytest.raises(InputError, match=r"b/mask\.json: no such file"):
        compare_runs(tmp_path / "a", tmp_path / "b")
