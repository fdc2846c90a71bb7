"""Which errors say that memory ran out, what is free, and how far memory rose."""

from __future__ import annotations

import errno
import gc
import mmap
import resource
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from accelerate import cpu_offload

from patchkit.errors import InputError, RunError
from patchkit.runtime import _process_memory
from patchkit.runtime.memory import (
    bytes_text,
    free_bytes,
    is_out_of_memory,
    model_devices,
    model_free_bytes,
    peak_measure,
    release_memory,
)
from patchkit.zoo.load import load
from tests.comparisons import pair
from tests.families import build

CPU = torch.device("cpu")
MIB = 1 << 20

#: What accelerate's own tests raise, and what the allocators of this and other platforms say.
OUT_OF_MEMORY = [
    torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79 GiB"
    ),
    RuntimeError("CUDA out of memory."),
    RuntimeError("HIP out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("XPU out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError(
        "MPS backend out of memory (MPS allocated: 8.9 GB, max allowed: 9.1 GB). Tried to allocate 512 MB"
    ),
    RuntimeError("Invalid buffer size: 12.50 GB"),
    RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED."),
    RuntimeError("FATAL ERROR :: MODULE:PT_DEVMEM Allocation failed"),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
        "allocate 8589934592 bytes. Error code 12 (Cannot allocate memory)"
    ),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:80] data. DefaultCPUAllocator: not enough memory: you tried to ..."
    ),
    RuntimeError("posix_memalign failed"),
    RuntimeError("unable to mmap 4096 bytes from file <model.safetensors>: Cannot allocate memory (12)"),
    RuntimeError("std::bad_alloc"),
    RuntimeError("Storage size calculation overflowed with sizes=[4611686018427387904, 8]"),
    MemoryError(),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
]

#: What is something else, though some of it speaks of memory.
SOMETHING_ELSE = [
    RuntimeError("mat1 and mat2 shapes cannot be multiplied (3x4 and 5x6)"),
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("CUDA error: device-side assert triggered"),
    RuntimeError(),
    RuntimeError(7, "CUDA"),
    IndexError("index 40 is out of bounds"),
    ValueError("column 'std::bad_alloc' is not known"),
    KeyError("DefaultCPUAllocator: can't allocate memory"),
    InputError("pairs.jsonl, line 3: the prompt says 'CUDA out of memory.'"),
    RunError("the disk ran out of memory."),
    OSError(errno.ENOSPC, "No space left on device"),
    KeyboardInterrupt(),
    SystemExit("CUDA out of memory."),
]


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}-{error}"[:40]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=_named)
def test_errors_of_memory_are_known(error: BaseException) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize("error", SOMETHING_ELSE, ids=_named)
def test_other_errors_are_not_taken_for_them(error: BaseException) -> None:
    assert not is_out_of_memory(error)


#: More bytes than an address can have: refused on every machine.
TOO_MANY = 1 << 60
REAL: dict[str, Callable[[], object]] = {
    "torch": lambda: torch.empty(TOO_MANY, dtype=torch.uint8),
    "a storage": lambda: torch.UntypedStorage(TOO_MANY),
    "a copy": lambda: torch.ones(1, 1).expand(1 << 30, 1 << 28).clone(),
    "more than a number counts": lambda: torch.empty(1 << 62, 1 << 3),
    "numpy": lambda: np.empty(TOO_MANY, dtype=np.uint8),
    "python": lambda: [0] * (TOO_MANY >> 3),
    "a mapping": lambda: mmap.mmap(-1, TOO_MANY),
}


@pytest.mark.parametrize("what", REAL)
def test_what_the_allocators_of_this_machine_say_is_known(what: str) -> None:
    with pytest.raises(Exception) as caught:  # noqa: PT011
        REAL[what]()
    assert is_out_of_memory(caught.value), repr(caught.value)


def _raised(outer: BaseException, inner: BaseException, how: str) -> BaseException:
    """`outer`, as Python chains it when it is raised while `inner` is handled."""
    try:
        try:
            raise inner
        except BaseException as caught:
            if how == "from":
                raise outer from caught
            if how == "from nothing":
                raise outer from None
            raise outer  # noqa: B904
    except BaseException as found:
        return found


def test_what_an_error_was_raised_from_counts() -> None:
    memory, other = OUT_OF_MEMORY[0], RuntimeError("the layer failed")
    assert is_out_of_memory(_raised(RuntimeError("the layer failed"), memory, "from"))
    assert is_out_of_memory(_raised(ValueError("the layer failed"), memory, "while handling"))
    assert not is_out_of_memory(_raised(RuntimeError("the layer failed"), memory, "from nothing"))
    assert not is_out_of_memory(_raised(ValueError("the layer failed"), other, "from"))
    # The device was asked for: a smaller batch does not give one.
    assert not is_out_of_memory(_raised(InputError("device 'cuda' cannot be used"), memory, "from"))
    assert not is_out_of_memory(_raised(KeyboardInterrupt(), memory, "while handling"))


def test_errors_that_name_each_other_come_to_an_end() -> None:
    one, other = RuntimeError("one"), RuntimeError("other")
    one.__cause__, other.__cause__ = other, one
    assert not is_out_of_memory(one)


@pytest.mark.parametrize("place", ["body", "module"])
@pytest.mark.parametrize("error", [OUT_OF_MEMORY[0], *SOMETHING_ELSE[:1], KeyboardInterrupt()], ids=_named)
def test_an_error_in_a_trace_is_known_for_what_it_is(place: str, error: BaseException) -> None:
    """Raised by what the body does, or by a module of the model while it runs."""
    model, _ = pair("gpt2")

    def fail(*_: object) -> None:
        raise error

    mlp: Any = model.block_module(1).mlp
    hook = mlp.register_forward_pre_hook(fail) if place == "module" else None
    try:
        with pytest.raises(type(error)) as caught:
            with model.lm.trace(input_ids=torch.tensor([[1, 2, 3]])):
                model.block(0).output.save()
                if place == "body":
                    fail()
    finally:
        if hook is not None:
            hook.remove()
    assert is_out_of_memory(caught.value) is (error is OUT_OF_MEMORY[0])
    with model.lm.trace(input_ids=torch.tensor([[1, 2, 3]])):
        after = model.block(1).output.save()
    assert after.shape == (1, 3, model.dims.d_model)


def test_what_the_failed_frames_kept_is_released() -> None:
    """Of the batch, of the trace's body in it, and of what was called there."""
    kept: list[weakref.ref[torch.Tensor]] = []
    model, _ = pair("gpt2")

    def deep() -> None:
        local = torch.ones(1000)
        kept.append(weakref.ref(local))
        raise MemoryError(f"{local.numel()} more")

    def batch() -> None:
        held = torch.ones(1000)
        kept.append(weakref.ref(held))
        with model.lm.trace(input_ids=torch.tensor([[1, 2, 3]])):
            inside = model.block(0).output
            kept.append(weakref.ref(inside))
            deep()

    gc.disable()
    try:
        batch()
    except MemoryError:
        assert all(ref() is not None for ref in kept), "nothing is held, so nothing is tested"
    finally:
        gc.enable()
    release_memory()
    assert [ref() is None for ref in kept] == [True] * 3


def test_memory_can_be_released_where_nothing_went_wrong() -> None:
    cycle: list[Any] = [torch.ones(1000)]
    ref = weakref.ref(cycle[0])
    cycle.append(cycle)
    del cycle
    release_memory()
    assert ref() is None


class Kernel:
    """Files as Linux has them under /proc and /sys/fs/cgroup, in a folder of the test's own."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch, available: int) -> None:
        self.proc, self.groups = root / "proc", root / "cgroup"
        monkeypatch.setattr(_process_memory, "PROC", self.proc)
        monkeypatch.setattr(_process_memory, "GROUPS", self.groups)
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=available))

    def write(self, path: str, text: str) -> None:
        file = self.proc.parent / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def group(self, path: str, limit: str, used: int, cache: int = 0, *, version: int = 2) -> None:
        names = {1: ("limit_in_bytes", "usage_in_bytes", "total_"), 2: ("max", "current", "")}[version]
        folder = "cgroup/memory" if version == 1 else "cgroup"
        self.write(f"{folder}/{path}/memory.{names[0]}", f"{limit}\n")
        self.write(f"{folder}/{path}/memory.{names[1]}", f"{used}\n")
        self.write(
            f"{folder}/{path}/memory.stat", f"anon 5\n{names[2]}inactive_file {cache}\nactive_file 9\n"
        )


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    return Kernel(tmp_path, monkeypatch, available=1000)


def test_without_limits_what_the_machine_has_is_free(kernel: Kernel) -> None:
    assert free_bytes(CPU) == 1000
    assert free_bytes(CPU, processes=4) == 250


def test_a_control_group_of_version_2_limits(kernel: Kernel) -> None:
    kernel.write("proc/cgroup", "0::/user/job\n")
    kernel.group("user/job", "max", used=10)
    assert free_bytes(CPU) == 1000
    kernel.group("user/job", "500", used=200, cache=50)
    assert free_bytes(CPU) == 350, "files that the kernel would give up are room"
    assert free_bytes(CPU, processes=2) == 175
    kernel.write("cgroup/user/job/memory.high", "300")
    assert free_bytes(CPU) == 150
    kernel.group("user/job", "500", used=900)
    assert free_bytes(CPU) == 0


def test_the_groups_around_a_group_limit_too(kernel: Kernel) -> None:
    kernel.write("proc/cgroup", "0::/user/job\n")
    kernel.group("user/job", "900", used=100)
    kernel.group("user", "600", used=300)
    assert free_bytes(CPU) == 300
    # In a container the path is the host's, and its own group is the root.
    kernel.write("proc/cgroup", "0::/docker/0123abcd\n")
    kernel.group("", "400", used=300)
    assert free_bytes(CPU) == 100


def test_a_control_group_of_version_1_limits(kernel: Kernel) -> None:
    kernel.write("proc/cgroup", "5:cpu,cpuacct:/other\n4:memory:/job\n0::/\n")
    kernel.group("job", "9223372036854771712", used=100, version=1)
    assert free_bytes(CPU) == 1000
    kernel.group("job", "450", used=300, cache=100, version=1)
    assert free_bytes(CPU) == 250
    kernel.group("other", "1", used=1, version=1)
    assert free_bytes(CPU) == 250, "another controller's group is not the memory's"


def test_a_limit_of_the_process_is_its_own(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {resource.RLIMIT_AS: (700 * 1024, resource.RLIM_INFINITY), resource.RLIMIT_DATA: (-1, -1)}
    monkeypatch.setattr(resource, "getrlimit", limits.__getitem__)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=10**9))
    kernel.write("proc/status", "Name:\tpython\nVmPeak:\t  650 kB\nVmSize:\t  600 kB\nVmData:\t  100 kB\n")
    assert free_bytes(CPU) == 100 * 1024
    assert free_bytes(CPU, processes=4) == 100 * 1024, "each process has a limit of its own"
    limits[resource.RLIMIT_DATA] = (130 * 1024, -1)
    assert free_bytes(CPU) == 30 * 1024


def test_nothing_is_known_of_other_devices() -> None:
    assert free_bytes(torch.device("meta")) is None


LIMITED = """
import resource, sys
import torch
from patchkit.runtime._process_memory import status
from patchkit.runtime.memory import free_bytes, is_out_of_memory
limit, used = getattr(resource, sys.argv[1]), sys.argv[2]
now = status(used)
resource.setrlimit(limit, (now + (600 << 20), resource.RLIM_INFINITY))
free = free_bytes(torch.device("cpu"))
kept = torch.empty(free - (64 << 20), dtype=torch.uint8)
left = free_bytes(torch.device("cpu"))
try:
    torch.empty(free, dtype=torch.uint8)
    refused = None
except RuntimeError as error:
    refused = is_out_of_memory(error)
print(free >> 20, left >> 20, refused)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="other kernels do not hold a process to these limits")
@pytest.mark.parametrize(("limit", "used"), [("RLIMIT_AS", "VmSize"), ("RLIMIT_DATA", "VmData")])
def test_what_is_free_under_a_real_limit_can_be_taken_and_no_more(limit: str, used: str) -> None:
    run = [sys.executable, "-c", LIMITED, limit, used]
    found = subprocess.run(run, capture_output=True, text=True, check=True, timeout=120)
    free, left, refused = found.stdout.split()
    assert 560 <= int(free) <= 600 and int(left) <= 64 and refused == "True"


@pytest.mark.skipif(sys.platform != "linux", reason="no kernel else tells a process its peak")
# Half of each is more than what the C library may keep for the next allocation (32 MiB).
@pytest.mark.parametrize("mib", [80, 300])
def test_the_peak_is_the_most_that_was_held(mib: int) -> None:
    with peak_measure([CPU]) as peak:
        first = torch.ones(mib * MIB // 4)
        second = first + 1
        del first
        third = torch.ones(mib * MIB // 8)
        del second, third
    assert peak.rise is not None
    assert peak.rise == pytest.approx(2 * mib * MIB, rel=0.1, abs=2 * MIB)


@pytest.mark.skipif(sys.platform != "linux", reason="no kernel else tells a process its peak")
def test_an_earlier_peak_and_what_the_allocator_kept_do_not_count() -> None:
    large = torch.ones(200 * MIB // 4)
    small = [torch.ones(MIB // 4) for _ in range(100)]
    del large, small
    gc.collect()
    with peak_measure([CPU]) as peak:
        torch.ones(20 * MIB // 4)
    assert peak.rise == pytest.approx(20 * MIB, rel=0.1, abs=2 * MIB)
    with peak_measure([CPU]) as peak:
        small = [torch.ones(MIB // 4) for _ in range(100)]
    del small
    assert peak.rise == pytest.approx(100 * MIB, rel=0.1)


@pytest.mark.skipif(sys.platform != "linux", reason="no kernel else tells a process its peak")
def test_files_that_are_mapped_do_not_count(tmp_path: Path) -> None:
    """Weights that lie in a mapped file come in when they are first read, once."""
    (tmp_path / "weights").write_bytes(b"\1" * (80 * MIB))
    mapped = torch.from_file(str(tmp_path / "weights"), size=80 * MIB, dtype=torch.uint8)
    with peak_measure([CPU]) as peak:
        assert int(mapped.max()) == 1
        torch.ones(10 * MIB // 4)
    assert peak.rise == pytest.approx(10 * MIB, abs=4 * MIB)


def test_a_peak_is_measured_though_the_batch_failed() -> None:
    with pytest.raises(MemoryError), peak_measure([CPU]) as peak:
        torch.ones(30 * MIB // 4)
        raise MemoryError
    assert (peak.rise is None) is (sys.platform != "linux")
    with peak_measure([torch.device("meta")]) as peak:
        pass
    assert peak.rise is None


def test_no_peak_where_the_kernel_does_not_tell(kernel: Kernel) -> None:
    with peak_measure([CPU]) as peak:
        pass
    assert peak.rise is None


class Gpu:
    """The numbers of torch.cuda for two devices, as its documentation says what they are."""

    free = (900, 500)
    reserved = (100, 50)
    allocated = (60, 20)
    peak = (160, 25)

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reset: list[int] = []
        cuda: Any = torch.cuda
        monkeypatch.setattr(cuda, "mem_get_info", lambda device: (self.free[device.index], 1000))
        monkeypatch.setattr(cuda, "memory_reserved", lambda device: self.reserved[device.index])
        monkeypatch.setattr(cuda, "memory_allocated", lambda device: self.allocated[device.index])
        monkeypatch.setattr(cuda, "max_memory_allocated", lambda device: self.peak[device.index])
        monkeypatch.setattr(cuda, "reset_peak_memory_stats", lambda device: self.reset.append(device.index))


def test_on_a_gpu_what_torch_holds_unused_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(monkeypatch)
    one, two = torch.device("cuda", 0), torch.device("cuda", 1)
    assert (free_bytes(one), free_bytes(two)) == (940, 530)
    assert free_bytes(one, processes=8) == 940, "each process has a GPU of its own"
    with peak_measure([one, two]) as peak:
        assert gpu.reset == [0, 1]
    assert peak.rise == 100


def test_on_apple_what_metal_recommends_is_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 800)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 300)
    assert free_bytes(torch.device("mps")) == 500


def test_a_model_has_as_much_room_as_its_least_roomy_device(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = pair("gpt2")
    assert model_devices(model) == [CPU]
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=12345))
    assert model_free_bytes(model) == 12345
    Gpu(monkeypatch)
    spread = [torch.device("cuda", 0), torch.device("cuda", 1), torch.device("meta")]
    monkeypatch.setattr("patchkit.runtime.memory.model_devices", lambda _: spread)
    assert model_free_bytes(model) == 530
    monkeypatch.setattr("patchkit.runtime.memory.model_devices", lambda _: spread[2:])
    assert model_free_bytes(model) is None


def test_the_devices_of_offloaded_weights_are_where_they_are_brought() -> None:
    module: Any = build("gpt2")
    block = module.transformer.h[1]
    cpu_offload(block, execution_device=CPU)
    assert block.mlp.c_proj.weight.is_meta
    model = load(module)
    assert model_devices(model) == [CPU]
    block.mlp.c_proj._hf_hook.execution_device = "cuda:3"
    assert model_devices(model) == [CPU, torch.device("cuda", 3)]


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (999_949, "999.9 kB"),
        (999_951, "1.0 MB"),
        (1_500_000_000, "1.5 GB"),
        (26e12, "26.0 TB"),
        (4e15, "4,000.0 TB"),
    ],
)
def test_bytes_are_told_to_a_person(count: float, text: str) -> None:
    assert bytes_text(count) == text
