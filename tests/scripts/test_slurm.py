"""The Slurm script, with two nodes that are two agents on this machine: a stand-in for srun starts both."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

#: Beside `make test`, in a lane of its own.
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "slurm_variable_binding.sh"
SRUN = """#!/usr/bin/env bash
# As srun does: the command once on every node, each with its number; the first that fails decides.
while [[ $1 == --* ]]; do shift; done
for node in 0 1; do SLURM_NODEID=$node "$@" & started[$node]=$!; done
status=0
for node in 0 1; do wait "${started[$node]}" || status=$?; done
exit "$status"
"""
SCONTROL = "#!/usr/bin/env bash\nprintf 'localhost\\nlocalhost\\n'\n"
ARGUMENTS = ["--model", "varbind-llama", "--samples", "18", "--iterations", "3", "--no-trailing-space"]


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """The environment of a job on two nodes."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    return {
        **os.environ,
        "PATH": f"{tools}:{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_NNODES": "2",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }


def call(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments], env=environment, capture_output=True, text=True, timeout=280
    )


def test_two_nodes_learn_the_mask_of_one_process(cluster: dict[str, str], tmp_path: Path) -> None:
    two = call(cluster, *ARGUMENTS, "--out", str(tmp_path / "two"))
    assert two.returncode == 0, two.stderr
    one = subprocess.run(
        [sys.executable, str(SCRIPT.with_name("reproduce_variable_binding.py")), *ARGUMENTS]
        + ["--out", str(tmp_path / "one")],
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert one.returncode == 0, one.stderr
    found, expected = (json.loads((tmp_path / name / "mask.json").read_text()) for name in ("two", "one"))
    assert found["chosen"] == expected["chosen"]
    manifest = json.loads((tmp_path / "two" / "manifest.json").read_text())
    assert manifest["status"] == "done"
    # The same job again, as Slurm does after a requeue, goes on: here with nothing left to do.
    again = call(
        cluster | {"MASTER_PORT": str(int(cluster["MASTER_PORT"]) + 1)},
        *ARGUMENTS,
        "--out",
        str(tmp_path / "two"),
    )
    assert again.returncode == 0 and "complete already" in again.stderr, again.stderr


def test_outside_of_a_job_it_says_what_to_do(cluster: dict[str, str]) -> None:
    del cluster["SLURM_JOB_NODELIST"]
    found = call(cluster, "--model", "varbind-llama")
    assert found.returncode != 0 and "--num-processes" in found.stderr


def test_a_copy_in_the_spool_finds_the_repository(cluster: dict[str, str], tmp_path: Path) -> None:
    found = call(cluster | {"SLURM_SUBMIT_DIR": str(tmp_path)}, "--model", "varbind-llama")
    assert found.returncode == 2 and "PATCHKIT_DIR" in found.stderr
