"""What the benchmarks share: CPU seconds, ratios taken repetition by repetition, the machine, and the file of results."""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

#: Options of glibc's `mallopt`, and what they are set to so that freed memory stays with the process.
KEEP_MEMORY = {"M_TRIM_THRESHOLD": (-1, 2**30), "M_MMAP_THRESHOLD": (-3, 2**25), "M_ARENA_MAX": (-8, 1)}
#: Median and quartiles.
Spread = dict[str, float]


def seconds(run: Callable[[], object], times: int = 1) -> float:
    """CPU seconds of one run, over so many."""
    start = time.process_time()
    for _ in range(times):
        run()
    return (time.process_time() - start) / times


def keep_memory() -> bool:
    """Keeps freed memory with the process, if its allocator is glibc's; to be called before there are threads.

    Otherwise it goes back to the system and is mapped anew, page by page, now by one side of a comparison and now by
    the other, as the heap happens to lie: up to a quarter of the time of a run that uses much memory.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        return all(mallopt(option, value) == 1 for option, value in KEEP_MEMORY.values())
    return False


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles; quartiles lie within the values, however few there are."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": round(middle, 3), "lower_quartile": round(low, 3), "upper_quartile": round(high, 3)}


def ratio(above: Sequence[float], below: Sequence[float]) -> Spread:
    """Median and quartiles of the ratios, repetition by repetition."""
    return spread([a / b for a, b in zip(above, below, strict=True)])


def load_average() -> list[float]:
    return [round(load, 1) for load in os.getloadavg()]


def machine() -> dict[str, object]:
    """What the numbers were measured on."""
    models = [
        line.split(":", 1)[1].strip()
        for line in (Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else [])
        if line.startswith("model name")
    ]
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "threads_used": torch.get_num_threads(),
        "load_average": load_average(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
    }


def write(result: Mapping[str, object], out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")


def show(name: str, found: Spread, bar: str = "") -> None:
    """One line of a table: the median, the quartiles and what is promised."""
    quartiles = f"({found['lower_quartile']:.2f} to {found['upper_quartile']:.2f})"
    print(f"{name:<40}{found['median']:>7.2f}  {quartiles}  {bar}".rstrip())
