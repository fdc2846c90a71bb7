"""What `patchkit doctor` looks at: every check says what it found and, if something is wrong, what to do."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from huggingface_hub.constants import HF_HOME
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from patchkit import zoo

Status = Literal["ok", "warning", "failed"]
_LITTLE_SPACE = 1 << 30
# Seconds until a connection on this machine counts as impossible.
_PATIENCE = 5
# Each process holds the model and imports torch; more than these make little sense without a GPU.
_MOST_ON_CPU = 8


@dataclass(frozen=True)
class Check:
    """One line of the doctor's table; `todo` is empty when nothing need be done."""

    name: str
    status: Status
    found: str
    todo: str = ""


def local_checks() -> list[Check]:
    """Everything that can be seen without the network."""
    checks = [_python(), *_packages(), *_models()]
    checks += [_writable("this directory", Path.cwd()), _writable("hub cache", Path(HF_HOME)), _device()]
    checks.append(_processes())
    return checks


def _python() -> Check:
    wanted = metadata("patchkit")["Requires-Python"]
    found = f"{platform.python_version()} ({sys.executable})"
    if SpecifierSet(wanted).contains(platform.python_version()):
        return Check("Python", "ok", found)
    return Check("Python", "failed", found, f"Install a Python {wanted} and make a new environment.")


def _packages() -> list[Check]:
    checks = [Check("patchkit", "ok", version("patchkit"))]
    for line in requires("patchkit") or []:
        wanted = Requirement(line)
        if wanted.marker is not None:
            continue
        todo = f"pip install '{wanted.name}{wanted.specifier}'"
        try:
            found = version(wanted.name)
        except PackageNotFoundError:
            checks.append(Check(wanted.name, "failed", "not installed", todo))
            continue
        good = wanted.specifier.contains(found, prereleases=True)
        checks.append(Check(wanted.name, "ok" if good else "failed", found, "" if good else todo))
    return checks


def _models() -> list[Check]:
    checks = []
    for name in zoo.names():
        try:
            module, _ = zoo.build(name)
            finite = all(bool(parameter.isfinite().all()) for parameter in module.parameters())
        except (OSError, ValueError, RuntimeError) as error:
            checks.append(
                Check(name, "failed", _reason(error), "Reinstall patchkit: its weights are damaged.")
            )
            continue
        count = sum(parameter.numel() for parameter in module.parameters())
        todo = "" if finite else "Reinstall patchkit: its weights are damaged."
        checks.append(Check(name, "ok" if finite else "failed", f"embedded, {count:,} parameters", todo))
    return checks


def _writable(what: str, directory: Path) -> Check:
    existing = next(path for path in (directory, *directory.parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            free = shutil.disk_usage(existing).free
    except OSError as error:
        todo = "Work in a directory you may write to, or set HF_HOME for the hub cache."
        return Check(what, "failed", f"{directory}: {_reason(error)}", todo)
    found = f"{directory}: writable, {free / 1e9:.1f} GB free"
    if free < _LITTLE_SPACE:
        return Check(what, "warning", found, "Free some space before a run writes its results.")
    return Check(what, "ok", found)


def _device() -> Check:
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        names = ", ".join(torch.cuda.get_device_name(index) for index in range(count))
        return Check("device", "ok", f"{count} GPU: {names}")
    if torch.backends.mps.is_available():
        return Check("device", "ok", "Apple GPU (mps)")
    threads = torch.get_num_threads()
    return Check("device", "ok", f"no GPU; {threads} CPU threads of {os.cpu_count()}, enough for the demo")


def _processes() -> Check:
    """Whether several processes can share a run here: through accelerate, and the loopback that they meet on."""
    if problem := _no_group():
        todo = "Let processes connect to 127.0.0.1 (a firewall or sandbox may forbid it), or run without --num-processes."
        return Check("processes", "warning", f"no group on 127.0.0.1: {problem}", todo)
    gpus, cores = torch.cuda.device_count(), _cores()
    if gpus > 1:
        todo = f"Many pairs: --backend accelerate --num-processes {gpus}, or fewer with --gpus-per-replica."
    elif gpus == 0 and cores > 1:
        todo = f"Many pairs: --backend accelerate --num-processes {min(cores, _MOST_ON_CPU)} on this CPU."
    else:
        todo = ""
    place = f"{gpus} GPU{'s' if gpus > 1 else ''}" if gpus else f"{cores} CPU core{'s' if cores > 1 else ''}"
    return Check(
        "processes", "ok", f"accelerate {version('accelerate')}, {place}; they can meet on 127.0.0.1", todo
    )


def _no_group() -> str:
    """Why processes of this machine cannot meet; empty where they can."""
    if not dist.is_available():
        return "this PyTorch was built without torch.distributed"
    make = partial(dist.TCPStore, "127.0.0.1", timeout=timedelta(seconds=_PATIENCE))  # pyright: ignore[reportPrivateImportUsage]
    try:
        # What a group meets on: a store that one process holds and another reaches.
        held = make(0, is_master=True)
        make(held.port, is_master=False).set("doctor", "here")
        return "" if held.get("doctor") == b"here" else "what one process wrote did not reach the other"
    except (RuntimeError, ValueError) as error:
        return str(error).strip().splitlines()[0]


def _cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _reason(error: BaseException) -> str:
    return str(getattr(error, "strerror", None) or error)
