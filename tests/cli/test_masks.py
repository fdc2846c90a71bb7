"""`patchkit mask`: what it writes, how it ends on bad input, on Ctrl-C, on NaN and on a full disk."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from patchkit.cli import app
from patchkit.errors import InputError
from patchkit.results.manifest import read_manifest
from patchkit.results.mask import MaskResult

#: Beside `make test`, in a lane of its own.
pytestmark = pytest.mark.slow

FAST = [
    "--n", "12", "--mask-seeds", "1", "--no-own-masks", "--random-sets", "3",
    "--steps", "20", "--lambdas", "0.02", "--quiet",
]  # fmt: skip
TASK = ["--model", "varbind-llama", "--task", "variable-binding", *FAST]
SCRIPT = Path(sys.executable).with_name("patchkit")


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("mask") / "run"
    result = run("mask", *TASK, "--out", out)
    assert result.exit_code == 0, result.output
    return out


def test_a_run_leaves_the_contracts_files(finished: Path) -> None:
    assert {"manifest.json", "mask.json", "mask.safetensors", "report.html"} <= {
        p.name for p in finished.iterdir()
    }
    assert not (finished / "journal").exists()
    manifest = read_manifest(finished)
    assert manifest.status == "done" and manifest.model is not None and manifest.model.id == "varbind-llama"
    assert manifest.options["steps"] == 20 and manifest.options["components"] == "head,mlp"
    assert manifest.pairs is not None and manifest.pairs.used > 0
    result = MaskResult.load(finished)
    assert {name: tuple(v.shape) for name, v in result.values.items()}.keys() == {"head", "mlp"}
    assert result.n_components == result.values["head"].numel() + result.values["mlp"].numel()


def test_a_second_run_is_refused_and_a_finished_one_not_redone(finished: Path) -> None:
    before = (finished / "mask.json").stat().st_mtime_ns
    again = run("mask", *TASK, "--out", finished)
    assert again.exit_code == 2 and "already holds a run" in again.stderr
    resumed = run("mask", *TASK, "--out", finished, "--resume")
    assert resumed.exit_code == 0 and str(finished / "report.html") in resumed.stdout
    assert (finished / "mask.json").stat().st_mtime_ns == before


def test_rerun_gives_the_same_numbers(finished: Path, tmp_path: Path) -> None:
    result = run("rerun", finished, "--out", tmp_path / "again", "--quiet")
    assert result.exit_code == 0, result.output
    first, second = MaskResult.load(finished), MaskResult.load(tmp_path / "again")
    assert first.chosen == second.chosen
    for kind, values in first.values.items():
        torch.testing.assert_close(second.values[kind], values, atol=1e-6, rtol=0)


def write_triples(path: Path, lines: list[str]) -> Path:
    path.write_text("".join(line + "\n" for line in lines))
    return path


GOOD = {"desideratum": "d", "original_ids": [1, 5, 6], "alternate_ids": [1, 5, 7], "target_id": 9}


@pytest.mark.parametrize(
    ("lines", "named"),
    [
        (None, "no such file|not found|does not exist"),
        ([], "empty|no lines|no records"),
        (['{"desideratum": "d", '], "line 1"),
        ([json.dumps(GOOD), json.dumps({**GOOD, "target_id": 99999})], "line 2"),
        ([json.dumps({k: v for k, v in GOOD.items() if k != "target_id"})], "target"),
        ([json.dumps({"desideratum": "d", "original": "a = 3 , ;", "alternate": "a = 5 , ;", "target": "7 8"})], "token"),
    ],
)  # fmt: skip
def test_bad_triples_are_one_message_and_status_2(
    lines: list[str] | None, named: str, tmp_path: Path
) -> None:
    file = tmp_path / "triples.jsonl"
    if lines is not None:
        write_triples(file, lines)
    result = run(
        "mask", "--model", "varbind-llama", "--desiderata", file, "--out", tmp_path / "out", "--quiet"
    )
    assert result.exit_code == 2, result.output
    assert result.stderr.count("\n") == 1 and "triples.jsonl" in result.stderr
    assert any(word in result.stderr.lower() for word in named.split("|")), result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--components", "head,brain"], "brain"),
        (["--components", ","], "--components"),
        (["--lambdas", "0.1,x"], "--lambdas"),
        (["--loss", "hinge"], "hinge"),
        (["--sparsity", "l2"], "l2"),
        (["--sparsity", "hard-concrete", "--lambdas", "1.5"], "1.5"),
        (["--train-on", "nothing_like_it"], "nothing_like_it"),
        (["--position", "subject"], "subject"),
        (["--dtype", "float99"], "float99"),
        (["--max-batch-tokens", "0"], "--max-batch-tokens"),
        (["--desiderata", "x.jsonl"], "one of the two"),
        (["--model", "no-such-model"], "no-such-model"),
        (["--task", "no-such-task"], "no-such-task"),
    ],
)
def test_bad_options_are_one_message_and_status_2(options: list[str], named: str, tmp_path: Path) -> None:
    result = run("mask", *TASK, *options, "--out", tmp_path / "out")
    assert result.exit_code == 2, result.output
    assert named in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_unequal_lengths_matter_only_off_the_last_token(tmp_path: Path) -> None:
    rows = [
        {
            "desideratum": "d", "original": f"a = {v} , b = 7 , ; + 4 a", "alternate": f"a = {v + 1} , ; + 4 a",
            "target": str((v + 5) % 10), "spans": {"value": [3, 4]}, "split": split,
        }
        for v, split in ((1, "train"), (2, "train"), (3, "test"), (4, "test"), (5, "train"), (6, "train"))
    ]  # fmt: skip
    file = write_triples(tmp_path / "t.jsonl", [json.dumps(row) for row in rows])
    base = ["mask", "--model", "varbind-llama", "--desiderata", file, *FAST[2:]]
    at_last = run(*base, "--out", tmp_path / "last")
    assert at_last.exit_code == 0, at_last.output
    rows[0]["alternate_spans"] = {"value": [30, 31]}
    file = write_triples(tmp_path / "u.jsonl", [json.dumps(row) for row in rows])
    bad = run(
        "mask", "--model", "varbind-llama", "--desiderata", file, *FAST[2:], "--position", "value",
        "--out", tmp_path / "span",
    )  # fmt: skip
    assert bad.exit_code == 2 and "line 1" in bad.stderr, bad.output


def test_nan_keeps_the_last_good_mask_and_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from patchkit.methods import _mask_steps

    genuine, calls = _mask_steps.row_losses, [0]

    def sour(*arguments: object) -> torch.Tensor:
        calls[0] += 1
        losses = genuine(*arguments)  # pyright: ignore[reportArgumentType]
        return losses * float("nan") if calls[0] > 12 else losses

    monkeypatch.setattr(_mask_steps, "row_losses", sour)
    result = run("mask", *TASK, "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert "not finite" in result.stderr and "step 13" in result.stderr and "last good mask" in result.stderr
    kept = MaskResult.load(tmp_path / "out")
    assert kept.diverged and all(bool(torch.isfinite(values).all()) for values in kept.values.values())
    assert read_manifest(tmp_path / "out").status == "failed"


def test_a_full_disk_is_said_and_leaves_nothing_half_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    out = tmp_path / "out"
    from patchkit.methods import _mask_checkpoint

    genuine = _mask_checkpoint.Checkpoint.save

    def save(self: _mask_checkpoint.Checkpoint, *arguments: object) -> None:
        monkeypatch.setattr(os, "fsync", full)
        genuine(self, *arguments)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(_mask_checkpoint.Checkpoint, "save", save)
    result = run("mask", *TASK, "--out", out)
    assert result.exit_code == 1 and "space" in result.stderr.lower(), result.output
    monkeypatch.undo()
    left = [path for path in out.rglob("*") if path.is_file() and path.name != "manifest.json"]
    assert left == []
    resumed = run("mask", *TASK, "--out", out, "--resume")
    assert resumed.exit_code == 0, resumed.output


def test_ctrl_c_ends_with_130_and_resume_gives_the_unbroken_result(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    slow = [word if word != "20" else "4000" for word in TASK]
    # A process group of its own, so that the signal reaches the command alone.
    process = subprocess.Popen(
        [str(SCRIPT), "mask", *slow, "--out", str(out)],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while not (out / "manifest.json").exists() or read_manifest(out).model is None:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    # In training, which settles after some seconds however many steps it may take.
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "--resume" in stderr and "Traceback" not in stderr
    assert read_manifest(out).status == "interrupted"
    assert not (out / "mask.json").exists()
    other = run("mask", *TASK, "--out", out, "--resume")
    assert other.exit_code == 2 and "--steps" in other.stderr


def test_the_command_that_makes_it_again_names_what_is_not_a_default(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def stop(*arguments: object, command: str, **options: object) -> None:
        raise InputError(f"<{command}>")

    monkeypatch.setattr("patchkit.studies.run_study", stop)
    plain = run("demo", "--out", tmp_path / "a", "--quiet")
    assert "<patchkit demo>" in plain.stderr, plain.output
    seeded = run("study", "variable-binding", "--seed", "7", "--out", tmp_path / "b", "--quiet")
    assert "<patchkit study --seed 7 -- variable-binding>" in seeded.stderr, seeded.output
