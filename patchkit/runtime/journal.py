"""The journal of a run: what every finished item gave, on disk, so that an interrupted run goes on where it was.

Shards are parquet files, each written once and by rename, so that one is there whole or not at all. A row is one tensor
of one item, known by the item's key (`content.py`): batches may be cut otherwise when the run goes on. A tensor that is
the sum over a batch has no item: it can only be taken if every item of its batch is asked for, and the batch's items only
with it.

A shard's name ends in a digest of its bytes, which is checked beside parquet's own checksums: those leave out the footer.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import chain
from pathlib import Path

from torch import Tensor

from patchkit.errors import InputError, RunError
from patchkit.files import atomic_write, remove
from patchkit.runtime._shard import Batch, Damaged, pack, read_keys, unpack

#: Finished batches wait this long to be written together, seconds, ...
PATIENCE = 1.0
#: ... and no more of them than this, bytes.
MOST_WAITING = 1 << 28
#: A shard that takes no more bytes is remembered until another one is read.
MOST_REMEMBERED = 1 << 24

_SHARD = re.compile(r"(\d{6,})-([0-9a-f]{16})\.parquet")


@dataclass(frozen=True)
class Found:
    """What was finished of some keys.

    Attributes:
        items: position in the keys -> the item's tensors (none of a program that only sums).
        sums: over some of these items each; together over all that are of batches with sums.
    """

    items: Mapping[int, Mapping[str, Tensor]]
    sums: Sequence[Mapping[str, Tensor]]


class Journal:
    """The finished items in one directory; opened when it is first asked or told something.

    Whatever else lies in the directory is left alone. There is one writer at a time.
    """

    def __init__(self, directory: Path | str) -> None:
        self._directory = Path(directory)
        # The shards that hold a key; read once.
        self._index: dict[str, list[Path]] | None = None
        self._number = 0
        self._waiting: list[Batch] = []
        self._written = 0.0
        # The shard that was read last, unless it is large: a search asks again and again for what one shard holds.
        self._last: tuple[Path, list[Batch]] | None = None

    @property
    def directory(self) -> Path:
        return self._directory

    def find(self, keys: Sequence[str]) -> Found:
        """What was finished of these keys.

        Raises:
            InputError: a shard that is damaged, or a file that is none.
        """
        place = {key: index for index, key in enumerate(keys)}
        if len(place) < len(keys):
            raise ValueError("a key occurs twice; what tells equal items apart must be in their keys")
        index = self._opened()
        shards = dict.fromkeys(path for key in keys for path in index.get(key, ()))
        items: dict[int, Mapping[str, Tensor]] = {}
        sums: list[Mapping[str, Tensor]] = []
        # One shard in memory at a time, beside what is taken from it.
        for batch in chain(chain.from_iterable(map(self._read, shards)), self._waiting):
            rows = [row for row, key in enumerate(batch.keys) if key in place and place[key] not in items]
            whole = len(rows) == len(batch)
            if batch.sums and not whole:
                # A sum cannot be taken apart.
                continue
            for row in rows:
                item = batch.item(row)
                # A part of a batch must not keep the rest of it in memory.
                items[place[batch.keys[row]]] = (
                    item if whole else {name: value.clone() for name, value in item.items()}
                )
            if batch.sums:
                sums.append(batch.sums)
        return Found(items, sums)

    def add(
        self, keys: Sequence[str], tensors: Mapping[str, Tensor], summed: frozenset[str] = frozenset()
    ) -> None:
        """Notes a finished batch: tensors whose first axis is the keys, and `summed` ones, which are sums over them.

        It is written with its neighbours, at the latest when something is added a second after the last writing.

        Raises:
            RunError: it could not be written; it is kept and written with what comes next.
        """
        if not keys:
            raise ValueError("a batch without items")
        kept = {name: value.detach().to("cpu", copy=True) for name, value in tensors.items()}
        sums = {name: kept.pop(name) for name in sorted(summed & kept.keys())}
        for name, value in kept.items():
            if not value.ndim or len(value) != len(keys):
                raise ValueError(f"{name}: expected {len(keys)} rows, found shape {list(value.shape)}")
        self._opened()
        self._waiting.append(Batch(tuple(keys), kept, sums))
        waited = time.monotonic() - self._written
        if waited >= PATIENCE or sum(batch.nbytes for batch in self._waiting) > MOST_WAITING:
            self.flush()

    def flush(self) -> None:
        """Writes what waits to be written.

        Raises:
            RunError: it could not be; nothing is lost but the time, if this process goes on.
        """
        if not self._waiting:
            return
        data = pack(self._waiting)
        path = self._directory / f"{self._number:06d}-{_digest(data)}.parquet"
        try:
            atomic_write(path, data)
        except RunError as error:
            raise RunError(f"{error} What was finished before is kept; go on with --resume.") from error
        index = self._opened()
        for key in (key for batch in self._waiting for key in batch.keys):
            index.setdefault(key, []).append(path)
        self._number += 1
        self._waiting = []
        self._written = time.monotonic()

    def _opened(self) -> dict[str, list[Path]]:
        if self._index is not None:
            return self._index
        index: dict[str, list[Path]] = {}
        paths = self._files()
        for path in paths:
            # Of a writer that was killed.
            if fnmatch(path.name, ".*.parquet.*.tmp"):
                remove(path)
        for path in paths:
            if path.suffix != ".parquet":
                continue
            if not (named := _SHARD.fullmatch(path.name)):
                raise _damaged(path, "its name is not that of a shard")
            self._number = max(self._number, int(named[1]) + 1)
            try:
                keys = read_keys(path)
            except Damaged as error:
                raise _damaged(path, str(error)) from None
            for key in keys:
                index.setdefault(key, []).append(path)
        self._index, self._written = index, time.monotonic()
        return index

    def _files(self) -> list[Path]:
        """What lies in the directory, by name. (`Path.glob` finds nothing where it may not look.)"""
        try:
            return sorted(self._directory / name for name in os.listdir(self._directory))
        except FileNotFoundError:
            return []
        except NotADirectoryError:
            raise InputError(
                f"{self._directory}: expected the directory of a journal, found a file"
            ) from None
        except OSError as error:
            raise InputError(
                f"{self._directory}: the journal could not be read ({error.strerror}). Allow this user to read it, or "
                "begin again in another directory"
            ) from error

    def _read(self, path: Path) -> list[Batch]:
        if self._last is not None and self._last[0] == path:
            return self._last[1]
        self._last = None
        try:
            data = path.read_bytes()
        except OSError as error:
            raise InputError(
                f"{path}: a shard of a journal could not be read ({error.strerror}). Put it back, or begin again"
            ) from error
        if _digest(data) != path.stem.rpartition("-")[2]:
            raise _damaged(path, "its content is not what was written")
        try:
            batches = unpack(data)
        except Damaged as error:
            raise _damaged(path, str(error)) from None
        if len(data) <= MOST_REMEMBERED:
            self._last = path, batches
        return batches


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _damaged(path: Path, what: str) -> InputError:
    return InputError(
        f"{path}: a damaged shard of a journal: {what}. Delete this file: what it held is then run again."
    )
