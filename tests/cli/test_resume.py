"""`--resume`: after an interruption, a full disk or failed pairs it gives what an undisturbed run gives.

Whatever does not belong to the run is refused in one line.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner, Result

from patchkit import Scores, files, write_pairs
from patchkit.cli import app
from patchkit.methods.attribution import Attribution, PairItem
from patchkit.model import PatchModel
from patchkit.results._run_lock import RunLock
from patchkit.results.manifest import read_manifest
from patchkit.runtime import journal
from tests.families import build
from tests.node_oracle import LONG, MIDDLE, SHORT

#: Beside `make test`, in a lane of its own.
pytestmark = pytest.mark.slow

PAIRS = [LONG, MIDDLE, SHORT]


class Batches:
    """What happens in the batches of a run: `at` them (counted from 0), or with a pair in them, something is raised."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.at: dict[int | str, BaseException] = {}


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> Batches:
    """One pair a batch, each written at once."""
    found, genuine = Batches(), Attribution.run

    def run(program: Attribution, model: PatchModel, items: Sequence[PairItem]) -> dict[str, Tensor]:
        (item,) = items
        for what in (len(found.seen), item.pair.id):
            if what in found.at:
                raise found.at[what]
        found.seen.append(item.pair.id)
        return genuine(program, model, items)

    monkeypatch.setattr(Attribution, "run", run)
    monkeypatch.setattr(journal, "PATIENCE", 0.0)
    return found


@pytest.fixture
def command(tmp_path: Path) -> list[object]:
    build("llama-gqa").save_pretrained(tmp_path / "model")
    write_pairs(tmp_path / "pairs.jsonl", PAIRS)
    return [
        *("attribute", "--model", tmp_path / "model", "--pairs", tmp_path / "pairs.jsonl"),
        *("--positions", "last", "--max-batch-tokens", "1", "--out", tmp_path / "out"),
    ]


def run(command: Sequence[object], *more: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in (*command, *more)])


def one_line(result: Result) -> str:
    """The one message of a command that could not do its work."""
    (line,) = [line for line in result.stderr.splitlines() if "patchkit" in line or "rror" in line][-1:]
    assert "Traceback" not in result.output
    return line


def same_as_undisturbed(command: Sequence[object], tmp_path: Path, batches: Batches) -> None:
    batches.at.clear()
    whole = run([*command[:-1], tmp_path / "whole"])
    assert whole.exit_code == 0, whole.output
    found, expected = Scores.load(tmp_path / "out"), Scores.load(tmp_path / "whole")
    assert torch.equal(found.effects, expected.effects) and torch.equal(found.magnitudes, expected.magnitudes)
    assert found.pair_ids == expected.pair_ids
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert left == {path.name for path in (tmp_path / "whole").iterdir()}


def interrupt(command: Sequence[object], batches: Batches) -> list[str]:
    """A run that is interrupted in its last batch; the pairs that it finished."""
    batches.at = {2: KeyboardInterrupt()}
    result = run(command)
    assert result.exit_code == 130 and "--resume" in result.stderr
    finished, batches.seen, batches.at = batches.seen, [], {}
    assert len(finished) == 2
    return finished


def test_only_what_is_missing_is_run(command: list[object], tmp_path: Path, batches: Batches) -> None:
    finished = interrupt(command, batches)
    # Other batches make no difference.
    resumed = run(command, "--resume", "--max-batch-tokens", "auto")
    assert resumed.exit_code == 0, resumed.output
    assert set(batches.seen) == {pair.id for pair in PAIRS} - set(finished) and len(batches.seen) == 1
    same_as_undisturbed(command, tmp_path, batches)


def test_another_training_stage_is_refused(command: list[object], tmp_path: Path, batches: Batches) -> None:
    """In the same directory, of the same sizes."""
    interrupt(command, batches)
    before = (tmp_path / "out" / "manifest.json").read_bytes()
    weights = (tmp_path / "model" / "model.safetensors").read_bytes()
    later = build("llama-gqa")
    with torch.no_grad():
        for parameter in later.parameters():
            parameter *= 1.001
    later.save_pretrained(tmp_path / "model")
    refused = run(command, "--resume")
    assert refused.exit_code == 2 and not batches.seen
    assert "fingerprint of the weights' values" in one_line(refused)
    assert "Give the same model, or another --out directory" in one_line(refused)
    assert (tmp_path / "out" / "manifest.json").read_bytes() == before
    (tmp_path / "model" / "model.safetensors").write_bytes(weights)
    assert run(command, "--resume").exit_code == 0 and len(batches.seen) == 1


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--seed", "1"], "--seed 0 there, 1 here"),
        (["--positions", "all"], "--positions 'last' there, 'all' here"),
        (["--dtype", "bfloat16"], "--dtype None there, 'bfloat16' here"),
        (["--attn-implementation", "eager"], "--attn-implementation None there, 'eager' here"),
    ],
)
def test_other_options_are_refused(
    command: list[object], batches: Batches, more: list[str], words: str
) -> None:
    interrupt(command, batches)
    refused = run(command, "--resume", *more)
    assert refused.exit_code == 2 and words in one_line(refused) and not batches.seen


def test_other_pairs_are_refused(command: list[object], tmp_path: Path, batches: Batches) -> None:
    interrupt(command, batches)
    write_pairs(tmp_path / "pairs.jsonl", PAIRS[:2])
    refused = run(command, "--resume")
    assert refused.exit_code == 2 and "content of --pairs" in one_line(refused) and not batches.seen


def test_a_damaged_shard_is_named(command: list[object], tmp_path: Path, batches: Batches) -> None:
    interrupt(command, batches)
    first, second = sorted((tmp_path / "out" / "journal").glob("*.parquet"))
    second.write_bytes(second.read_bytes()[:-5])
    refused = run(command, "--resume")
    assert refused.exit_code == 2 and str(second) in one_line(refused) and not batches.seen
    assert "Delete this file: what it held is then run again" in one_line(refused)
    second.unlink()
    assert run(command, "--resume").exit_code == 0 and len(batches.seen) == 2
    same_as_undisturbed(command, tmp_path, batches)


def test_two_runs_in_one_directory(command: list[object], tmp_path: Path, batches: Batches) -> None:
    interrupt(command, batches)
    lock = RunLock(tmp_path / "out")
    refused = run(command, "--resume")
    assert refused.exit_code == 2 and not batches.seen
    assert f"process {os.getpid()} on" in one_line(refused)
    lock.release()
    assert run(command, "--resume").exit_code == 0


@pytest.mark.parametrize("call", [2, 4, 7])
def test_a_full_disk(
    command: list[object], tmp_path: Path, batches: Batches, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    """At any of the writings: manifest, shards, results."""
    genuine, calls = os.fsync, [0]

    def fsync(descriptor: int) -> None:
        calls[0] += 1
        if calls[0] > call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        genuine(descriptor)

    monkeypatch.setattr(files.os, "fsync", fsync)
    full = run(command)
    assert full.exit_code == 1 and "no space left" in one_line(full) and "Free some space" in one_line(full)
    monkeypatch.setattr(files.os, "fsync", genuine)
    resumed = run(command, "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert set(batches.seen) == {pair.id for pair in PAIRS}
    same_as_undisturbed(command, tmp_path, batches)


def test_failed_pairs_are_tried_again(command: list[object], tmp_path: Path, batches: Batches) -> None:
    """With what the others gave, which is kept for it."""
    batches.at = {MIDDLE.id: torch.OutOfMemoryError("CUDA out of memory")}
    failing = run(command)
    assert failing.exit_code == 0 and MIDDLE.id in failing.stderr
    manifest = read_manifest(tmp_path / "out")
    assert manifest.status == "done" and manifest.pairs is not None
    assert [failure.id for failure in manifest.pairs.failures] == [MIDDLE.id] and manifest.pairs.used == 2
    assert (tmp_path / "out" / "journal").exists()
    batches.at, batches.seen = {}, []
    again = run(command, "--resume")
    assert again.exit_code == 0 and batches.seen == [MIDDLE.id]
    same_as_undisturbed(command, tmp_path, batches)
    complete: Any = read_manifest(tmp_path / "out").pairs
    assert (complete.total, complete.used, complete.failures) == (3, 3, [])
    assert "complete already" in run(command, "--resume").stderr
