"""The files that scores are kept in: `scores.json` says what they are, `pairs.parquet` holds every pair's numbers."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from patchkit.errors import InputError
from patchkit.files import atomic_write
from patchkit.model.nodes import NodeGrid
from patchkit.reading import read_bytes
from patchkit.results.convention import Convention
from patchkit.results.formats import load_tensors, read_model

if TYPE_CHECKING:
    import pyarrow as pa

MEANS, MEANS_ABS, PAIRS, HEADER = (
    "scores.safetensors",
    "scores_abs.safetensors",
    "pairs.parquet",
    "scores.json",
)
VERIFICATION, BOUND = "verification.json", "bound.json"
# Offsets of Arrow's lists are 32 bits: longer columns are written in pieces.
_CHUNK = 1 << 28


class Header(BaseModel):
    """`scores.json`: what the numbers are, and the grid they are laid out in."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    schema_version: int = 1
    method: str
    convention: Convention
    grid: NodeGrid
    pairs: int
    cost: float
    layer_backwards: int


class PairNumbers(NamedTuple):
    """The content of `pairs.parquet`; `magnitudes` are there when they are not the absolute effects."""

    ids: tuple[str, ...]
    base_metric: Float[Tensor, " pairs"]
    source_metric: Float[Tensor, " pairs"]
    effects: Float[Tensor, "pairs nodes"]
    magnitudes: Float[Tensor, "pairs nodes"] | None


def read_header(path: Path) -> Header:
    """Reads `scores.json`. InputError names the file and the field, also where the grid cannot be."""
    try:
        return read_model(path, Header)
    except InputError as error:
        # A grid that contradicts itself is refused by NodeGrid, which does not know the file.
        raise error if str(path) in str(error) else InputError(f"{path}: {error}") from error


def write_pairs(path: Path, grid: NodeGrid, numbers: PairNumbers) -> None:
    """Writes one row a pair: id, metrics, and the nodes of each kind as a list, atomically."""
    # Loading Arrow takes as long as a small command; most commands write no scores.
    import pyarrow as pa

    columns: dict[str, pa.Array | pa.ChunkedArray] = {
        "id": pa.array(numbers.ids, pa.string()),
        "base_metric": pa.array(numbers.base_metric.float().numpy()),
        "source_metric": pa.array(numbers.source_metric.float().numpy()),
    }
    for prefix, values in (("effect", numbers.effects), ("magnitude", numbers.magnitudes)):
        if values is not None:
            columns |= {
                f"{prefix}.{kind}": lists(part.flatten(1)) for kind, part in grid.split(values).items()
            }
    write_table(path, columns)


def read_pairs(path: Path, grid: NodeGrid, pairs: int) -> PairNumbers:
    """Reads what `write_pairs` wrote.

    Raises:
        InputError: the file is missing or malformed, or its rows or lists do not fit the grid.
    """
    table = read_table(path)
    if table.num_rows != pairs:
        raise InputError(f"{path}: expected {pairs} pairs as {HEADER} says, found {table.num_rows} rows.")
    prefixes = ["effect"] + ["magnitude"] * any(name.startswith("magnitude.") for name in table.column_names)
    wanted = ["id", "base_metric", "source_metric", *(f"{p}.{kind}" for p in prefixes for kind in grid.kinds)]
    missing = [name for name in wanted if name not in table.column_names]
    if missing:
        raise InputError(f"{path}: no column '{missing[0]}', found {', '.join(table.column_names)}.")
    parts = {
        prefix: {kind: matrix(path, table, f"{prefix}.{kind}", grid.size(kind)) for kind in grid.kinds}
        for prefix in prefixes
    }
    magnitudes = grid.join(parts["magnitude"], lead=1) if "magnitude" in parts else None
    if magnitudes is not None and bool((magnitudes < 0).any()):
        raise InputError(f"{path}: expected magnitudes of at least 0, found {float(magnitudes.min())}.")
    return PairNumbers(
        read_ids(path, table),
        matrix(path, table, "base_metric", 1)[:, 0],
        matrix(path, table, "source_metric", 1)[:, 0],
        grid.join(parts["effect"], lead=1),
        magnitudes,
    )


def write_table(path: Path, columns: Mapping[str, pa.Array | pa.ChunkedArray]) -> None:
    """Writes a parquet file, atomically."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    table = pa.table(dict(columns))
    # With checksums of pages a number that was damaged on disk is found when it is read.
    pq.write_table(table, buffer, compression="zstd", use_dictionary=False, write_page_checksum=True)
    atomic_write(path, buffer.getvalue())


def read_table(path: Path) -> pa.Table:
    """Reads a parquet file. InputError when it is missing or malformed, or has two columns of one name."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    payload = read_bytes(path, "a parquet file")
    try:
        # Without Arrow's thread pools: a process that ends soon after they were started is aborted by them.
        file = pq.ParquetFile(pa.BufferReader(payload), pre_buffer=False, page_checksum_verification=True)
        table = file.read(use_threads=False)
        # Offsets and letters are taken on trust until here.
        table.validate(full=True)
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{path}: expected a parquet file, found something else or a damaged one ({reason}). Write it again."
        ) from error
    names = table.column_names
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(
            f"{path}: column '{twice}' is there twice; expected each once. Write the file again."
        )
    return table


def read_ids(path: Path, table: pa.Table) -> tuple[str, ...]:
    """The column `id`. InputError where it is not a text of its own in every row."""
    import pyarrow as pa

    column = table["id"]
    if not pa.types.is_string(column.type) and not pa.types.is_large_string(column.type):
        raise InputError(f"{path}, column 'id': expected texts, found {column.type}.")
    ids = column.to_pylist()
    if None in ids or len(set(ids)) < len(ids):
        found = "null" if None in ids else f"'{next(name for name in ids if ids.count(name) > 1)}' twice"
        raise InputError(f"{path}, column 'id': expected an id of its own in every row, found {found}.")
    return tuple(ids)


def check_means(path: Path, grid: NodeGrid) -> None:
    """Checks that a file of means has the grid's tensors.

    Raises:
        InputError: naming the tensor that is missing, unknown or of another shape.
    """
    tensors: Mapping[str, Tensor] = load_tensors(path)
    for kind in sorted(tensors.keys() | set(grid.kinds)):
        if kind not in tensors:
            raise InputError(
                f"{path}: no tensor '{kind}', which {HEADER} names; found {', '.join(sorted(tensors))}."
            )
        if kind not in grid.kinds:
            raise InputError(
                f"{path}: tensor '{kind}' is not in {HEADER}, which names {', '.join(grid.kinds)}."
            )
        if tuple(tensors[kind].shape) != grid.shape(kind):
            raise InputError(
                f"{path}: tensor '{kind}' has shape {list(tensors[kind].shape)}, expected {list(grid.shape(kind))} "
                f"({', '.join(grid.axes(kind))}) as {HEADER} says."
            )


def lists(values: Float[Tensor, "pairs nodes"]) -> pa.ChunkedArray:
    """A column with a list of numbers a pair."""
    import pyarrow as pa

    size = values.shape[1]
    chunks = values.split(max(1, _CHUNK // size)) if len(values) else ()
    arrays = []
    for chunk in chunks:
        offsets = torch.arange(len(chunk) + 1, dtype=torch.int32) * size
        flat = chunk.float().contiguous().flatten()
        arrays.append(pa.ListArray.from_arrays(pa.array(offsets.numpy()), pa.array(flat.numpy())))
    return pa.chunked_array(arrays, pa.list_(pa.float32()))


def matrix(path: Path, table: pa.Table, name: str, size: int) -> Float[Tensor, "pairs {size}"]:
    """A column of numbers, or of lists of `size` numbers, as a matrix."""
    import pyarrow as pa

    column = table[name]
    listed = pa.types.is_list(column.type)
    kind = column.type.value_type if listed else column.type
    lengths = {n for chunk in column.chunks for n in chunk.value_lengths().to_pylist()} if listed else {1}
    if not pa.types.is_floating(kind) or column.null_count or lengths - {size}:
        found = f"lists of {', '.join(map(str, lengths))}" if listed else str(column.type)
        raise InputError(f"{path}, column '{name}': expected {size} float32 in every row, found {found}.")
    parts = [chunk.flatten() if listed else chunk for chunk in column.chunks]
    if any(part.null_count for part in parts):
        raise InputError(f"{path}, column '{name}': expected a number in every place, found null.")
    flat = [torch.tensor(part.to_numpy(zero_copy_only=False), dtype=torch.float32) for part in parts]
    return torch.cat([torch.empty(0), *flat]).reshape(table.num_rows, size)
