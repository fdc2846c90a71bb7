"""Memory: whether an error says that there was too little, what is free, and how much a batch took at the most.

A run's batches are as large as memory allows, so that running out of it is an ordinary event: the scheduler asks here
whether an error was one, gives back what can be given back, and tries again with less.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import gc
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import psutil
import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from patchkit.errors import PatchkitError
from patchkit.model import PatchModel
from patchkit.model.weights import execution_device
from patchkit.runtime import _process_memory

#: What says so beside the texts that accelerate knows. Each is from the source of the library that says it.
_SAYS_OUT_OF_MEMORY = (
    "CUDA error: out of memory",
    "HIP error: out of memory",
    # The memory that a library of CUDA wants for itself: cuBLAS, cuDNN, cuSOLVER, cuSPARSE.
    "_STATUS_ALLOC_FAILED",
    "MPS backend out of memory",
    "Invalid buffer size: ",
    "kIOGPUCommandBufferCallbackErrorOutOfMemory",
    "UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY",
    "UR_RESULT_ERROR_OUT_OF_HOST_MEMORY",
    # The CPU's allocator, by platform and age.
    "DefaultCPUAllocator: not enough memory",
    "can't allocate memory",
    "Cannot allocate memory",
    "[enforce fail at alloc_cpu.cpp",
    "posix_memalign",
    "std::bad_alloc",
    # More bytes than a number can count.
    "Storage size calculation overflowed",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, itself or in what it was raised from.

    nnsight raises what went wrong in a trace again as it is, and what went wrong on a server as a text. An error that
    patchkit raised on purpose has said what it means, and an interruption is one whatever it interrupted: neither counts.
    """
    seen: set[int] = set()
    found: BaseException | None = error
    while found is not None and id(found) not in seen:
        if isinstance(found, PatchkitError) or not isinstance(found, Exception):
            return False
        if _says_so(found):
            return True
        seen.add(id(found))
        found = found.__cause__ or (None if found.__suppress_context__ else found.__context__)
    return False


def _says_so(error: Exception) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    # What is wrong with a value or its type is not memory, whatever its text quotes.
    if isinstance(error, ValueError | TypeError | LookupError | ArithmeticError | AttributeError):
        return False
    text = str(error)
    # accelerate looks at errors of one argument, and takes that for a text.
    return should_reduce_batch_size(RuntimeError(text)) or any(said in text for said in _SAYS_OUT_OF_MEMORY)


def says_out_of_memory(text: str) -> bool:
    """Whether a traceback from somewhere else ends in an error that says that memory ran out."""
    ends = list(re.finditer(r"^([A-Za-z_][\w.]*(?:Error|Exception)): ", text, re.MULTILINE))
    kind = ends[-1][1].rpartition(".")[2] if ends else ""
    said = text[ends[-1].end() :] if ends else text
    if kind in (
        "ValueError",
        "TypeError",
        "KeyError",
        "IndexError",
        "AttributeError",
        "InputError",
        "RunError",
    ):
        return False
    return kind in ("MemoryError", "OutOfMemoryError") or _says_so(RuntimeError(said))


def release_memory() -> None:
    """Gives back what can be given back.

    Call it when the handler of the error has ended: an error keeps its traceback, and that the frames that a batch failed
    in, with all their tensors. nnsight's hold each other in cycles, which is why garbage is collected.
    """
    gc.collect()
    clear_device_cache()
    _trim_heap()


def _trim_heap() -> None:
    """The C library's own reserve goes back to the system, where it can be told to."""
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    return getattr(ctypes.CDLL(None), "malloc_trim", None)


def free_bytes(device: torch.device, *, processes: int = 1) -> int | None:
    """Bytes that a batch could take on a device now, or None where nothing is known.

    Args:
        processes: how many processes of this run share the machine's memory: each may take its part of that. The
            limits that are a process's own, and a GPU's memory, are not divided.
    """
    if device.type == "cuda":
        # What torch holds unused is as good as free.
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    if device.type == "mps":
        return max(0, torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    if device.type != "cpu":
        return None
    shared = [psutil.virtual_memory().available, *_process_memory.group_rooms()]
    return max(0, min([min(shared) // processes, *_process_memory.own_rooms()]))


def model_devices(model: PatchModel) -> list[torch.device]:
    """The devices that a model's layers run on, each once; of offloaded weights, where accelerate brings them."""
    found: dict[torch.device, None] = {}
    for module in model.hf.modules():
        place = execution_device(module)
        if place is not None:
            found[place] = None
        for parameter in module.parameters(recurse=False):
            if not parameter.is_meta:
                found[parameter.device] = None
    return list(found)


def model_free_bytes(model: PatchModel, *, processes: int = 1) -> int | None:
    """Bytes that a batch could take where the model lies; of a model spread over devices, on the least roomy one.

    What a layer needs while it runs is needed on one device after the other, and what is kept is spread over them only
    as evenly as what is kept: it may be one layer's. So what fits on every device fits. It is careful where much is kept
    of every layer; the scheduler sees in `peak_measure` that a batch took less than was thought, and takes larger ones.
    """
    rooms = [free_bytes(device, processes=processes) for device in model_devices(model)]
    known = [room for room in rooms if room is not None]
    return min(known) if known else None


@dataclass
class Peak:
    """Filled when `peak_measure` ends: bytes by which memory rose at the most, None where that cannot be told."""

    rise: int | None = None


@contextmanager
def peak_measure(devices: Sequence[torch.device]) -> Iterator[Peak]:
    """Measures how far memory rises inside, on the device where it rises furthest.

    On a CPU that is what the process holds in memory, without files that are mapped (weights come in as they are first
    read). The reserve of the C library is given back first, which the next batch must fetch again: measure some batches,
    not every one.
    """
    peak, rises = Peak(), list[Callable[[], int | None]]()
    with ExitStack() as gone:
        gone.callback(lambda: setattr(peak, "rise", _largest([rise() for rise in rises])))
        rises.extend(_started(device) for device in devices)
        yield peak


def _started(device: torch.device) -> Callable[[], int | None]:
    """Starts measuring on a device: what is called when it ends gives the rise."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return lambda: torch.cuda.max_memory_allocated(device) - before
    if device.type == "cpu":
        _trim_heap()
        return _process_memory.rise()
    return lambda: None


def _largest(rises: Sequence[int | None]) -> int | None:
    known = [rise for rise in rises if rise is not None]
    return max(known) if known else None


def bytes_text(count: int | float) -> str:
    """Bytes for a person: 999 B, 1.5 kB, 2.0 GB."""
    power, units = 0, ("B", "kB", "MB", "GB", "TB")
    # What would round to 1,000.0 is one of the next unit.
    while power < len(units) - 1 and round(count / 1000**power, 1) >= 1000:
        power += 1
    return f"{count:,.0f} B" if power == 0 else f"{count / 1000**power:,.1f} {units[power]}"
