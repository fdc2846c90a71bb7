"""Real processes: killed at any time, given another model, started by launchers; nothing is lost or counted twice."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from textwrap import dedent
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor

from patchkit import tasks
from patchkit.data import Pair
from patchkit.errors import InputError, RunError
from patchkit.methods._edge_options import EdgeOptions
from patchkit.methods._node_options import NodeOptions
from patchkit.methods.activation_patching import PatchSets, patch_nodes
from patchkit.methods.edge_attribution import attribute_edges
from patchkit.runtime import Execution, Group, started_processes, use_execution
from patchkit.runtime.queue import claimed_by
from patchkit.zoo.load import load
from tests.families import build

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals and gloo"),
]

MODEL = "varbind-llama"
OPTIONS = NodeOptions(nodes=("z",), positions="-1", max_batch_tokens=1)
GROUP = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_SECONDS = 180

#: A metric whose runs take a while, and one that is a mistake in processes other than the main one.
METRICS = """
    import os
    import time

    from patchkit.errors import InputError


    def slow(logits, answer, wrong):
        time.sleep(0.02)
        rows = range(len(logits))
        return logits[rows, answer] - logits[rows, wrong]


    def refused(logits, answer, wrong):
        if os.environ["RANK"] != "0":
            raise InputError("this metric is not for process " + os.environ["RANK"])
        return slow(logits, answer, wrong)
"""

#: A user's script: exact effects to a file, in as many processes as it is started in.
SCRIPT = """
    import sys

    import torch

    import patchkit
    from patchkit import tasks
    from patchkit.methods._node_options import NodeOptions

    model = patchkit.load("varbind-llama")
    with patchkit.joined_processes() as group:
        if group.is_main:
            pairs = tasks.pairs("variable-binding", model.tokenizer, 12, 0)
            options = NodeOptions(nodes=("z",), positions="-1", max_batch_tokens=1)
            claims = []

            def look(label, done, total):
                # Every batch has been claimed when the last has come, and nothing is taken off the store yet.
                if done == total:
                    claims.extend(group.read(f"run/{group.runs}/claim/{batch}") for batch in range(12))

            scores = patchkit.patch_nodes(model, pairs, options, progress=look)
            torch.save((scores.effects, group.size, claims), sys.argv[1])
        else:
            patchkit.serve(model, group=group)
"""

#: The main process of a run that is killed: it says which processes it has started.
DOOMED = """
    import sys

    import psutil

    import patchkit
    from patchkit import tasks
    from patchkit.methods._node_options import NodeOptions

    with patchkit.started_processes(2):
        print(*(child.pid for child in psutil.Process().children(recursive=True)), flush=True)
        model = patchkit.load("varbind-llama")
        pairs = tasks.pairs("variable-binding", model.tokenizer, 12, 0)
        options = NodeOptions(nodes=("z",), positions="-1", max_batch_tokens=1, metric="far:slow")
        patchkit.patch_nodes(model, pairs, options, checkpoint=sys.argv[1])
"""


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory of scripts, and of metrics that every process finds."""
    directory = tmp_path_factory.mktemp("scripts")
    for name, text in (("far", METRICS), ("script", SCRIPT), ("doomed", DOOMED)):
        (directory / f"{name}.py").write_text(dedent(text))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(directory)
        patch.setenv("PYTHONPATH", os.pathsep.join([str(directory), *sys.path]))
        yield directory


@pytest.fixture(scope="module")
def pairs() -> list[Pair]:
    return list(tasks.pairs("variable-binding", load(MODEL).tokenizer, 12, 0))


@pytest.fixture(scope="module")
def group(here: Path, pairs: list[Pair]) -> Iterator[Group]:
    """Two processes that both are at work: the other one has the model open."""
    with started_processes(2) as made:
        model, at_work = load(MODEL), set[int | None]()

        def look(label: str, done: int, total: int) -> None:
            at_work.update(claimed_by(made, made.runs, batch) for batch in range(total))

        wait(lambda: bool(patch_nodes(model, pairs, OPTIONS, progress=look)) and 1 in at_work)
        yield made


@pytest.fixture(scope="module")
def alone(here: Path, pairs: list[Pair]) -> Tensor:
    """Exact effects, by this process only."""
    with use_execution(Execution()):
        return patch_nodes(load(MODEL), pairs, OPTIONS).effects


def served() -> list[psutil.Process]:
    """The processes that this one has started to serve it."""
    children = psutil.Process().children()
    return [child for child in children if "patchkit.runtime.serving" in " ".join(child.cmdline())]


def check(found: Tensor, expected: Tensor) -> None:
    assert torch.equal(found.isnan(), expected.isnan())
    torch.testing.assert_close(found.nan_to_num(), expected.nan_to_num(), atol=2e-5, rtol=1e-5)


def test_a_mistake_is_raised_here_as_what_it_is_and_the_next_run_goes_well(
    group: Group, pairs: list[Pair]
) -> None:
    model = load(MODEL)
    with pytest.raises(InputError, match="^this metric is not for process 1$"):
        patch_nodes(model, pairs, replace(OPTIONS, metric="far:refused"))
    with pytest.raises(InputError, match="was made in the main process, and process 1 cannot open it"):
        patch_nodes(load(build("gpt2")), [Pair((3, 4, 5), (3, 6, 5), 7, 8)] * 30, OPTIONS)
    # Weights that the others do not find under this name.
    other = load(MODEL)
    with torch.no_grad():
        next(iter(other.hf.parameters())).add_(1.0)
    with pytest.raises(RunError, match=f"process 1 found another model under the name '{MODEL}'"):
        patch_nodes(other, pairs, OPTIONS)
    assert group.find_dead() == []


def test_a_process_that_is_killed_in_the_middle_loses_and_doubles_nothing(
    group: Group, pairs: list[Pair], alone: Tensor
) -> None:
    """Of numbers by pair and of sums over pairs; the process dies with a batch in hand."""
    model = load(MODEL)
    edges = EdgeOptions(max_batch_tokens=1, metric="far:slow")
    (process,) = served()
    done: list[int] = []
    killed: list[int] = []

    def kill(label: str, count: int, total: int) -> None:
        done.append(count)
        if not killed:
            process.suspend()
            claimed = sum(claimed_by(group, group.runs, batch) == 1 for batch in range(total))
            if claimed > group.count(f"run/{group.runs}/parts", 0):
                killed.append(count)
                process.kill()
            else:
                process.resume()

    found = attribute_edges(model, pairs * 3, edges, "eap", keep_pairs=True, progress=kill)
    assert done == sorted(set(done)) and done[-1] == 36 and killed[0] < 36
    process.wait(10)
    assert group.find_dead() == [] and group.dead == {1}, "it was noticed while the run went on"
    # The rest is done by this process alone.
    check(patch_nodes(model, pairs, OPTIONS).effects, alone)
    again = attribute_edges(model, pairs * 3, edges, "eap", keep_pairs=True)
    assert found.per_pair is not None and again.per_pair is not None
    check(found.per_pair, again.per_pair)
    check(found.mean, again.mean)
    check(found.mean_abs, again.mean_abs)


def ended(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_when_the_main_process_is_killed_the_others_end_and_the_journal_goes_on(
    here: Path, pairs: list[Pair], alone: Tensor, tmp_path: Path
) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in GROUP}
    main = subprocess.Popen(
        [sys.executable, here / "doomed.py", tmp_path / "kept"],
        env=environment | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert main.stdout is not None
    child = int(main.stdout.readline())
    try:
        wait(lambda: bool(list(tmp_path.rglob("*.parquet"))) or main.poll() is not None)
        assert main.poll() is None
        main.send_signal(signal.SIGKILL)
        main.communicate()
        wait(lambda: ended(child), 60)
    finally:
        for pid in (main.pid, child):
            if not ended(pid):
                os.kill(pid, signal.SIGKILL)
    ran: list[int] = []
    right = PatchSets.run

    def counted(self: PatchSets, model: Any, items: Sequence[Any]) -> dict[str, Tensor]:
        ran.append(len(items))
        return right(self, model, items)

    with pytest.MonkeyPatch.context() as patch, use_execution(Execution()):
        patch.setattr(PatchSets, "run", counted)
        options = replace(OPTIONS, metric="far:slow")
        found = patch_nodes(load(MODEL), pairs, options, checkpoint=tmp_path / "kept").effects
    assert sum(ran) < len(pairs), "some of it was in the journal"
    check(found, alone)


def wait(ready: Callable[[], bool], seconds: float = _SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def launched(*commands: list[str]) -> None:
    """Runs commands side by side to their end, outside of the group that this process may be in."""
    environment = {name: value for name, value in os.environ.items() if name not in GROUP}
    environment |= {"OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, "-m", *command],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for command in commands
    ]
    try:
        for process in started:
            said, _ = process.communicate(timeout=_SECONDS)
            assert process.returncode == 0, said
    finally:
        for process in started:
            process.kill()


@pytest.mark.parametrize("launcher", ["two nodes of torchrun", "accelerate launch"])
def test_a_script_that_a_launcher_starts_in_several_processes(
    launcher: str, here: Path, alone: Tensor, tmp_path: Path
) -> None:
    found, port = tmp_path / "found.pt", free_port()
    script = [str(here / "script.py"), str(found)]
    if launcher == "accelerate launch":
        # With --cpu accelerate starts a single process.
        shared = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
        shared += ["--dynamo_backend", "no", "--main_process_port", port]
        launched(["accelerate.commands.launch", *shared, *script])
    else:
        shared = ["--nnodes", "2", "--nproc_per_node", "1", "--master_addr", "127.0.0.1"]
        launched(
            *(
                ["torch.distributed.run", *shared, "--master_port", port, "--node_rank", rank, *script]
                for rank in "01"
            )
        )
    effects, size, claims = torch.load(found, weights_only=True)
    assert size == 2 and set(claims) == {b"0", b"1"}, "both processes had batches"
    check(effects, alone)
