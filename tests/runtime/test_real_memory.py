"""Memory that really runs out: a process is held to a limit, and gives the numbers of one that is not."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from patchkit.data import write_pairs
from patchkit.results.manifest import read_manifest
from patchkit.results.scores import Scores
from tests import limited
from tests.comparisons import agree

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.skipif(sys.platform != "linux", reason="other kernels do not hold a process to these limits"),
]
ROOT = Path(__file__).resolve().parents[2]
#: Tokens of a prompt whose attention scores alone take more than the limit of its test.
MONSTROUS = 3000


def in_limits(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Threads would each take address space of their own."""
    run = [sys.executable, "-m", "tests.limited", *map(str, arguments)]
    there = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    return subprocess.run(run, capture_output=True, text=True, cwd=ROOT, env=there, timeout=600)


def method_in_limits(out: Path, *arguments: object) -> tuple[dict[str, Any], dict[str, Tensor]]:
    done = in_limits(*arguments, out)
    assert done.returncode == 0, done.stderr
    with safe_open(out, "pt") as file:  # pyright: ignore[reportCallIssue]
        said = json.loads(file.metadata()["said"])
    return said, load_file(out)


@functools.cache
def without_limit(method: str, count: int) -> Scores:
    return limited.run(method, limited.pairs(count), max_batch_tokens=1024)


@pytest.mark.parametrize(
    ("method", "limit", "megabytes"), [("attribute", "RLIMIT_AS", 150), ("patch", "RLIMIT_DATA", 60)]
)
def test_a_batch_that_memory_does_not_hold_is_run_in_parts(
    method: str, limit: str, megabytes: int, tmp_path: Path
) -> None:
    said, found = method_in_limits(tmp_path / "found", limit, megabytes, method, 200, 0)
    tried = said["tried"]
    assert tried[0][0] == 200, "all pairs are one batch, as long as memory does not say otherwise"
    assert max(rows for rows, _ in tried[1:]) == 100 and len(tried) >= 4
    assert said["left_out"] == []
    expected = without_limit(method, 200)
    agree(found["base"], expected.base_metric, "base metric")
    agree(found["effects"], expected.effects, "effects")


def test_a_pair_that_memory_does_not_hold_is_left_out_alone(tmp_path: Path) -> None:
    said, found = method_in_limits(tmp_path / "found", "RLIMIT_AS", 250, "attribute", 20, MONSTROUS)
    ((name, reason),) = said["left_out"]
    assert name == limited.MONSTER
    match = re.search(
        r"3,000 tokens, estimated at ([0-9.]+) GB beside the weights, and ([0-9.]+) MB are free", reason
    )
    assert match is not None, reason
    assert float(match[1]) > 1 and 100 < float(match[2]) <= 270
    assert said["ids"] == [f"p{number}" for number in range(20)]
    expected = without_limit("attribute", 20)
    agree(found["effects"], expected.effects, "effects")
    agree(found["base"], expected.base_metric, "base metric")


def command(out: Path, pairs: Path, *more: str) -> subprocess.CompletedProcess[str]:
    options = [
        "--model",
        limited.MODEL,
        "--attn-implementation",
        "eager",
        "--method",
        "atp",
        "--nodes",
        "z,mlp_out",
    ]
    return in_limits(
        "RLIMIT_AS", 450, "patchkit", "attribute", *options, "--pairs", pairs, "--out", out, *more
    )


def test_a_command_goes_on_without_such_a_pair_and_says_so(tmp_path: Path) -> None:
    file, out = tmp_path / "pairs.jsonl", tmp_path / "out"
    write_pairs(file, limited.pairs(20, MONSTROUS))
    done = command(out, file)
    assert done.returncode == 0, done.stderr
    pairs = read_manifest(out).pairs
    assert pairs is not None and (pairs.total, pairs.used) == (21, 20)
    ((name, reason),) = [(each.id, each.reason) for each in pairs.failures]
    assert name == limited.MONSTER and "3,000 tokens" in reason and "--max-batch-tokens" in reason
    said = " ".join(done.stderr.split())
    assert "1 of 21 gave no numbers" in said and limited.MONSTER in said
    assert "Traceback" not in done.stderr
    found, expected = Scores.load(out), without_limit("attribute", 20)
    agree(found.effects, expected.effects, "effects")

    refused = command(tmp_path / "refused", file, "--max-failures", "0")
    assert refused.returncode == 1 and "Traceback" not in refused.stderr
    said = " ".join(refused.stderr.split())
    assert "1 of 21 could not be run, more than --max-failures 0" in said and "3,000 tokens" in said
    assert "--resume" in said
    # What is finished was kept: without the limit on failures it goes on from there.
    resumed = command(tmp_path / "refused", file, "--max-failures", "1", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    agree(Scores.load(tmp_path / "refused").effects, expected.effects, "effects of the run that was resumed")
