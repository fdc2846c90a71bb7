"""Commands shared by processes, and commands that are asked to end: started by themselves, by torchrun, interrupted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from patchkit import tasks, write_pairs, zoo
from patchkit.results.compare import compare_runs
from patchkit.results.manifest import read_manifest
from patchkit.results.scores import Scores

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals and gloo"),
]

GROUP = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
ALONE = {name: value for name, value in os.environ.items() if name not in GROUP} | {"OMP_NUM_THREADS": "1"}
_SECONDS = 300


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs of several lengths."""
    file = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    made = tasks.pairs("variable-binding", zoo.build("varbind-llama")[1], 24, 0)
    assert len({len(pair.clean_ids) for pair in made}) > 1
    write_pairs(file, made)
    return file


def patch(pairs: Path, out: Path, *more: str) -> list[str]:
    return ["patch", "--model", "varbind-llama", "--pairs", str(pairs), "--out", str(out), *more]


Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(scope="module")
def start() -> Iterator[Start]:
    """Starts `python -m ...`, in a session of its own so that a signal reaches it alone; none of them is left."""
    started: list[subprocess.Popen[str]] = []

    def starting(*words: str, **environment: str) -> subprocess.Popen[str]:
        started.append(
            subprocess.Popen(
                [sys.executable, "-m", *words],
                env=ALONE | environment,
                text=True,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
        )
        return started[-1]

    yield starting
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def finished(process: subprocess.Popen[str]) -> tuple[str, str]:
    """(stdout, stderr) of a command that ends well."""
    stdout, stderr = process.communicate(timeout=_SECONDS)
    assert process.returncode == 0, stderr
    return stdout, stderr


@pytest.fixture(scope="module")
def alone(pairs: Path, tmp_path_factory: pytest.TempPathFactory, start: Start) -> tuple[Path, str]:
    """The run of one process: its directory, and what it printed."""
    out = tmp_path_factory.mktemp("alone") / "run"
    return out, finished(start("patchkit", *patch(pairs, out)))[0]


def same(first: Path, second: Path) -> None:
    differences = compare_runs(first, second)
    assert max(differences.values()) < 1e-5, differences
    assert Scores.load(first).pair_ids == Scores.load(second).pair_ids


def test_a_command_starts_its_own_processes(
    pairs: Path, alone: tuple[Path, str], tmp_path: Path, start: Start
) -> None:
    out = tmp_path / "two"
    stdout, stderr = finished(
        start("patchkit", *patch(pairs, out, "--backend", "accelerate", "--num-processes", "2"))
    )
    same(alone[0], out)
    assert stdout == alone[1].replace(str(alone[0]), str(out)), "one process prints"
    assert stderr.count("done: patching (24 in") == 1 and "\r" not in stderr
    assert read_manifest(out).options["num_processes"] == 2


def free_port() -> int:
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def test_a_command_joins_the_processes_of_a_launcher(
    pairs: Path, alone: tuple[Path, str], tmp_path: Path, start: Start
) -> None:
    out = tmp_path / "two"
    launcher = ("torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port()))
    stdout, stderr = finished(start(*launcher, "-m", "--", "patchkit", *patch(pairs, out)))
    same(alone[0], out)
    assert stdout == alone[1].replace(str(alone[0]), str(out)), "the main process alone prints"
    assert stderr.count("done: patching (24 in") == 1


def test_bad_input_ends_all_processes_of_a_launcher_with_one_message(tmp_path: Path, start: Start) -> None:
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    words = patch(tmp_path / "nowhere.jsonl", tmp_path / "out")
    main, other = (start("patchkit", *words, RANK=rank, LOCAL_RANK=rank, **group) for rank in "01")
    # Read at the same time: each waits for the other.
    with ThreadPoolExecutor() as readers:
        said = list(readers.map(lambda process: process.communicate(timeout=_SECONDS), (main, other)))
    assert (main.returncode, other.returncode) == (2, 0)
    assert said[0][0] == "" and "nowhere.jsonl" in said[0][1] and said[0][1].count("Error: ") == 1
    assert said[1] == ("", ""), "another process than the main one says nothing"


def journalled(out: Path) -> int:
    return len(list(out.rglob("*.parquet")))


@pytest.fixture
def slow(pairs: Path, tmp_path: Path, start: Start) -> tuple[Path, subprocess.Popen[str]]:
    """A run of many small batches that has finished some of them."""
    out = tmp_path / "out"
    words = patch(pairs, out, "--positions", "1,2,3,4", "--max-batch-tokens", "1")
    process = start("patchkit", *words)
    deadline = time.monotonic() + _SECONDS
    while not out.exists() or not journalled(out):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    return out, process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_command_that_is_asked_to_end_keeps_its_work_and_says_how_to_go_on(
    number: signal.Signals, slow: tuple[Path, subprocess.Popen[str]], pairs: Path, start: Start
) -> None:
    out, process = slow
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (130, ""), stderr
    assert "batch in hand is finished" in stderr and "Traceback" not in stderr
    last = stderr.splitlines()[-1]
    assert last.startswith("Interrupted. What is finished was kept; go on with: patchkit patch ")
    assert last.endswith(" --resume") and str(pairs) in last
    assert read_manifest(out).status == "interrupted" and journalled(out) > 0
    again = last.partition("go on with: patchkit ")[2].split()
    stdout, _ = finished(start("patchkit", *again))
    assert str(out / "report.html") in stdout and read_manifest(out).status == "done"
    assert bool(torch.isfinite(Scores.load(out).effects).all()) and len(Scores.load(out).pair_ids) == 24


def test_a_command_that_is_asked_to_end_before_its_work_began_says_the_same(
    tmp_path: Path, start: Start
) -> None:
    fifo = tmp_path / "pairs.jsonl"
    os.mkfifo(fifo)
    process = start("patchkit", *patch(fifo, tmp_path / "out"))
    deadline = time.monotonic() + _SECONDS
    # It has opened its model, and waits for pairs that nobody writes.
    while not (tmp_path / "out" / "manifest.json").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(1.0)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and "--resume" in stderr and "Traceback" not in stderr
    assert read_manifest(tmp_path / "out").status == "interrupted"
