"""Whether two runs gave the same numbers: every tensor, parquet column and number in JSON that the first one holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patchkit.errors import InputError
from patchkit.results._scores_files import read_table
from patchkit.results.formats import load_tensors, read_json

# What two runs of one command do not share: where they ran, how long they took, and what they paid, which depends on how
# their batches were cut.
_OWN_FILES = frozenset({"manifest.json"})
# Sentences of studies name costs; the numbers that they are made of are compared.
_OWN_KEYS = frozenset(
    {"seconds", "date", "command", "cost", "forward_equivalents", "on_cpu", "findings", "best"}
)


def compare_runs(first: Path | str, second: Path | str) -> dict[str, float]:
    """Largest absolute difference of each tensor or parquet column (`file:name`) and of each JSON file's numbers.

    A tensor of another shape, a number on one side only, other text or another number of items is an infinite
    difference; NaN equals NaN. The manifest, wall times and costs are left out. InputError when a file of the first
    is not in the second, or the first holds no results.
    """
    first, second = Path(first), Path(second)
    files = sorted(
        path.name
        for path in first.iterdir()
        if path.suffix in (".safetensors", ".json", ".parquet") and path.name not in _OWN_FILES
    )
    if not files:
        raise InputError(
            f"{first}: no results to compare (no .safetensors, .json or .parquet beside the manifest)."
        )
    differences: dict[str, float] = {}
    for file in files:
        if file.endswith(".json"):
            differences[file] = _values(read_json(first / file), read_json(second / file))
            continue
        read = load_tensors if file.endswith(".safetensors") else _columns
        left, right = read(first / file), read(second / file)
        for name in sorted(left.keys() | right.keys()):
            both = name in left and name in right
            differences[f"{file}:{name}"] = _column(left[name], right[name]) if both else float("inf")
    return differences


def _columns(path: Path) -> dict[str, Any]:
    """Columns of a parquet file: those of numbers and of lists of numbers as one tensor, others as they are."""
    import pyarrow as pa

    columns: dict[str, Any] = {}
    table = read_table(path)
    for name, column in zip(table.column_names, table.columns, strict=True):
        listed = pa.types.is_list(column.type)
        flat = [chunk.flatten() if listed else chunk for chunk in column.chunks]
        if pa.types.is_floating(column.type.value_type if listed else column.type):
            parts = [torch.tensor(part.to_numpy(zero_copy_only=False)) for part in flat]
            columns[name] = torch.cat(parts) if parts else torch.empty(0)
        else:
            columns[name] = column.to_pylist()
    return columns


def _column(left: Any, right: Any) -> float:
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return _tensors(left, right)
    return (
        _values(left, right)
        if not isinstance(left, Tensor) and not isinstance(right, Tensor)
        else float("inf")
    )


def _tensors(left: Tensor, right: Tensor) -> float:
    if left.shape != right.shape or not left.isnan().equal(right.isnan()):
        return float("inf")
    if left.numel() == 0:
        return 0.0
    # Equal infinities differ by nothing; their subtraction would say NaN.
    difference = (left.double() - right.double()).abs().masked_fill(left == right, 0.0)
    return float(difference.nan_to_num(nan=0.0, posinf=float("inf")).max())


def _values(left: Any, right: Any) -> float:
    if isinstance(left, dict) and isinstance(right, dict):
        if left.get("measure") == right.get("measure") == "cost":
            return 0.0
        keys = (left.keys() | right.keys()) - _OWN_KEYS
        if keys != (left.keys() & right.keys()) - _OWN_KEYS:
            return float("inf")
        return max((_values(left[key], right[key]) for key in keys), default=0.0)
    if isinstance(left, list) and isinstance(right, list):
        if len(left) != len(right):
            return float("inf")
        return max((_values(*items) for items in zip(left, right, strict=True)), default=0.0)
    if isinstance(left, bool) or isinstance(right, bool) or not isinstance(left, (int, float)):
        return 0.0 if left == right else float("inf")
    if not isinstance(right, (int, float)):
        return float("inf")
    # Graph files say NaN where an edge has no score.
    if left != left or right != right:
        return 0.0 if left != left and right != right else float("inf")
    return float(abs(left - right))
