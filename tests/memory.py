"""Live bytes of tensors that operations make, and their peak: what the CPU's allocator does not tell."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten


class LiveBytes(TorchDispatchMode):
    """Counts the storages of all tensors that are made inside and are still alive; `peak` is the most there were.

    Tensors that autograd keeps for a backward are alive; a view is of a storage that was counted, or was there before.

    Args:
        collect: let go of garbage before the peak is raised: what only Python's collector frees would be counted as long
            as that pleases to wait. (The peak is right within a twentieth then.)
    """

    def __init__(self, *, collect: bool = False) -> None:
        super().__init__()
        self.live = self.peak = self._clean = 0
        self.collect = collect
        self._seen: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        # A view is of something that was there: a weight, or what has been counted.
        given = {key for key, _ in self._storages((args, kwargs))}
        for key, storage in self._storages(found):
            if key not in given:
                self._note(storage)
        return found

    @staticmethod
    def _storages(values: Any) -> list[tuple[int, torch.UntypedStorage]]:
        tensors = [value for value in tree_flatten(values)[0] if isinstance(value, Tensor)]
        kept = [value.untyped_storage() for value in tensors if value.device.type != "meta"]
        return [(storage._cdata, storage) for storage in kept]

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._seen:
            return
        size = storage.nbytes()
        self._seen[key] = size
        self.live += size
        weakref.finalize(storage, self._gone, key)
        if self.collect and self.live > 1.05 * self._clean:
            gc.collect()
            self._clean = max(self._clean, self.live)
        self.peak = max(self.peak, self.live)

    def _gone(self, key: int) -> None:
        self.live -= self._seen.pop(key, 0)
