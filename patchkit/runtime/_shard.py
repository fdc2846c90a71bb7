"""One shard of a journal as a parquet file: a row for each tensor of each item, and for each sum.

Columns: `batch` (number in the shard), `key` (of the item; empty for a sum), `name`, `dtype` and `shape` of the tensor,
and its `data`. An item without a tensor of its own has a row with an empty name, so that it is known to be done.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

_SCHEMA = pa.schema(
    {
        "batch": pa.int32(),
        "key": pa.string(),
        "name": pa.string(),
        "dtype": pa.string(),
        "shape": pa.list_(pa.int64()),
        "data": pa.large_binary(),
    },
    metadata={"patchkit": "journal 1"},
)
_DTYPES = {
    str(dtype): dtype
    for dtype in (
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128),
        *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    )
}
# Values go to disk by so many rows, and a page cannot hold 2 GiB.
_ROWS_AT_ONCE = 16


class Damaged(ValueError):
    """What is wrong with a shard."""


@dataclass(frozen=True)
class Batch:
    """Finished items.

    Attributes:
        keys: of the items.
        tensors: per item: the first axis is the keys.
        sums: over all the items.
    """

    keys: tuple[str, ...]
    tensors: Mapping[str, Tensor]
    sums: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def nbytes(self) -> int:
        return sum(value.nbytes for value in (*self.tensors.values(), *self.sums.values()))

    def item(self, place: int) -> dict[str, Tensor]:
        """The tensors of one item, without the axis of items."""
        return {name: value[place] for name, value in self.tensors.items()}


def pack(batches: Sequence[Batch]) -> bytes:
    """The file that holds these batches.

    Raises:
        TypeError: a tensor of a dtype that is not kept.
    """
    parts: list[pa.RecordBatch] = []
    for number, batch in enumerate(batches):
        rows = [(batch.keys, name, value) for name, value in batch.tensors.items()]
        if not rows:
            rows.append((batch.keys, "", torch.empty(len(batch), 0, dtype=torch.uint8)))
        rows += [(("",), name, value[None]) for name, value in batch.sums.items()]
        parts += [_rows(number, keys, name, value) for keys, name, value in rows]
    sink = pa.BufferOutputStream()
    pq.write_table(
        pa.Table.from_batches(parts, _SCHEMA),
        sink,
        # Numbers hardly become smaller.
        compression={name: "none" if name == "data" else "zstd" for name in _SCHEMA.names},  # pyright: ignore[reportArgumentType]
        use_dictionary=[name for name in _SCHEMA.names if name not in ("data", "shape")],  # pyright: ignore[reportArgumentType]
        write_statistics=False,
        write_page_checksum=True,
        write_batch_size=_ROWS_AT_ONCE,
    )
    return sink.getvalue().to_pybytes()


def _rows(number: int, keys: tuple[str, ...], name: str, value: Tensor) -> pa.RecordBatch:
    if str(value.dtype) not in _DTYPES:
        raise TypeError(f"{name}: the journal keeps no tensors of {value.dtype}")
    rows, shape = len(keys), np.array(value.shape[1:], dtype=np.int64)
    flat = value.contiguous().reshape(-1).view(torch.uint8).numpy()
    ends = np.arange(rows + 1, dtype=np.int64) * (flat.nbytes // rows)
    return pa.record_batch(
        [
            pa.array(np.full(rows, number, dtype=np.int32)),
            pa.array(keys, pa.string()),
            pa.repeat(name, rows),
            pa.repeat(str(value.dtype), rows),
            pa.ListArray.from_arrays(
                np.arange(rows + 1, dtype=np.int32) * len(shape), pa.array(np.tile(shape, rows))
            ),
            pa.LargeBinaryArray.from_buffers(
                pa.large_binary(), rows, [None, pa.py_buffer(ends), pa.py_buffer(flat)]
            ),
        ],
        schema=_SCHEMA,
    )


@lru_cache(maxsize=1 << 12)
def read_keys(path: Path) -> frozenset[str]:
    """The keys of a shard, without its tensors. Remembered, since a path is that of one content: its name says which.

    Raises:
        Damaged: it cannot be read.
    """
    with _opened(path) as file:
        keys = frozenset(_read(file, ["key"])["key"].to_pylist()) - {"", None}
    if not keys:
        raise Damaged("it holds nothing")
    return keys


def unpack(data: bytes) -> list[Batch]:
    """The batches of a file.

    Raises:
        Damaged: anything about it is not as `pack` writes it.
    """
    with _opened(pa.BufferReader(data)) as file:
        table = _read(file, _SCHEMA.names)
    if any(column.null_count for column in table.columns):
        raise Damaged("a row lacks a value")
    values = table["data"].combine_chunks()
    _, ends, raw = values.buffers()
    ends = np.frombuffer(ends, np.int64)[values.offset :] if len(values) else np.zeros(1, np.int64)
    rows = zip(*(table[name].to_pylist() for name in _SCHEMA.names if name != "data"), strict=True)
    found: dict[int, _Parts] = {}
    begin = 0
    # One tensor of a batch, an item a row, lies in one piece.
    for (number, _, name, dtype, shape), run in groupby(rows, lambda row: (row[0], not row[1], *row[2:])):
        keys = [key for _, key, *_ in run]
        size = _bytes(name, dtype, shape)
        lengths = np.diff(ends[begin : begin + len(keys) + 1])
        if (lengths != size).any():
            wrong = lengths[lengths != size][0]
            raise Damaged(f"tensor {name!r} has {wrong:,} bytes where {dtype} {list(shape)} takes {size:,}")
        # Copied: what arrow read may not be written to, and is shared by the whole shard.
        piece = bytearray(raw[int(ends[begin]) : int(ends[begin + len(keys)])] if size else b"")
        value = (
            torch.frombuffer(piece, dtype=_DTYPES[dtype]) if piece else torch.empty(0, dtype=_DTYPES[dtype])
        )
        found.setdefault(number, _Parts()).add(keys, name, value.reshape(len(keys), *shape))
        begin += len(keys)
    return [parts.batch() for parts in found.values()]


@dataclass
class _Parts:
    """A batch as it is put together."""

    keys: list[str] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    sums: dict[str, Tensor] = field(default_factory=dict)

    def add(self, keys: list[str], name: str, value: Tensor) -> None:
        of_items = bool(keys[0])
        if of_items and self.keys and keys != self.keys:
            raise Damaged("the items of one batch have different tensors")
        if len(set(keys)) < len(keys) or name in (self.tensors if of_items else self.sums):
            raise Damaged(f"tensor {name!r} of one item occurs twice")
        if not name and (not of_items or value.numel()):
            raise Damaged("a tensor has no name")
        if of_items:
            self.keys, self.tensors[name] = keys, value
        else:
            self.sums[name] = value[0]

    def batch(self) -> Batch:
        if not self.keys:
            raise Damaged("a sum over no items")
        if self.tensors.pop("", None) is not None and self.tensors:
            raise Damaged("a tensor has no name")
        return Batch(tuple(self.keys), self.tensors, self.sums)


def _bytes(name: str, dtype: str, shape: Sequence[Any]) -> int:
    """How many one such tensor takes."""
    if dtype not in _DTYPES:
        raise Damaged(f"tensor {name!r} is of an unknown dtype {dtype!r}")
    if any(size is None or size < 0 for size in shape):
        raise Damaged(f"tensor {name!r} has shape {shape}")
    return math.prod(shape) * _DTYPES[dtype].itemsize


def _opened(source: Path | pa.BufferReader) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(source, page_checksum_verification=True)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise Damaged(f"it cannot be read as parquet ({_line(error)})") from None


def _read(file: pq.ParquetFile, columns: Sequence[str]) -> pa.Table:
    found = file.schema_arrow
    if (found.metadata or {}).get(b"patchkit") != b"journal 1" or not found.equals(_SCHEMA):
        raise Damaged(
            f"it is parquet, but not of a journal: expected columns {', '.join(_SCHEMA.names)} of known types, found "
            f"{', '.join(found.names) or 'none'}"
        )
    try:
        table = file.read(columns=list(columns))
    except (pa.ArrowException, OSError, ValueError) as error:
        raise Damaged(f"its content cannot be read ({_line(error)})") from None
    return table


def _line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
