"""`rerun` gives the command of a manifest again, and says whether the numbers are the same."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from patchkit.cli.app import CommandGroup
from patchkit.cli.options import Out, Quiet, Resume, Seed, options_of
from patchkit.cli.runs import report, rerun
from patchkit.results.compare import compare_runs
from patchkit.results.formats import save_tensors, write_json
from patchkit.results.manifest import open_run_dir, read_manifest

made = typer.Typer(cls=CommandGroup, pretty_exceptions_enable=False)
made.command("rerun")(rerun)
made.command("report")(report)
drift = {"by": 0.0}


@made.command()
def draw(
    ctx: typer.Context,
    shape: Annotated[list[int], typer.Argument()],
    out: Out,
    pairs: Annotated[Path | None, typer.Option("--pairs")] = None,
    scale: Annotated[float, typer.Option("--scale")] = 1.0,
    kinds: Annotated[list[str] | None, typer.Option("--kind")] = None,
    normal: Annotated[bool, typer.Option("--normal/--uniform")] = True,
    seed: Seed = 0,
    resume: Resume = False,
    quiet: Quiet = False,
) -> None:
    """A command like the real ones: random numbers that depend on every option."""
    with open_run_dir(out, "draw", options_of(ctx), resume):
        generator = torch.Generator().manual_seed(seed + (len(pairs.read_text()) if pairs else 0))
        source = torch.randn if normal else torch.rand
        tensors = {kind: source(*shape, generator=generator) * scale + drift["by"] for kind in kinds or ["z"]}
        save_tensors(out / "scores.safetensors", tensors)
        write_json(out / "scores.json", {"seconds": float(os.urandom(1)[0]), "n": len(shape)})


@pytest.fixture
def first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run with options of every sort, given with relative paths from a directory that is then left."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    Path("pairs.jsonl").write_text("{}\n")
    arguments = "draw --pairs pairs.jsonl --scale 0.1 --kind q --kind k --uniform --seed 7 --out first -- 2 3"
    result = CliRunner().invoke(made, arguments.split())
    assert result.exit_code == 0, result.output
    monkeypatch.chdir(tmp_path)
    return tmp_path / "work" / "first"


@pytest.fixture(autouse=True)
def no_drift(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(drift, "by", 0.0)


def edit_manifest(directory: Path, **changes: Any) -> None:
    file = directory / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_the_same_command_gives_the_same_numbers(first: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(made, ["rerun", "work/first"])
    assert result.exit_code == 0, result.output
    second = first.with_name("first-rerun")
    assert str(second) in result.stdout and "scores.safetensors:q" in result.stdout
    assert compare_runs(first, second) == {
        "scores.json": 0,
        "scores.safetensors:k": 0,
        "scores.safetensors:q": 0,
    }
    old, new = read_manifest(first).options, read_manifest(second).options
    assert {**old, "out": "", "pairs": ""} == {**new, "out": "", "pairs": ""}
    assert Path.cwd() == tmp_path


def test_the_new_directory_can_be_named_relative_to_here(first: Path, tmp_path: Path) -> None:
    assert CliRunner().invoke(made, ["rerun", str(first), "--out", "again"]).exit_code == 0
    assert (tmp_path / "again" / "scores.safetensors").is_file()


def test_other_numbers_are_a_failure_that_says_how_far(first: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(drift, "by", 0.25)
    result = CliRunner().invoke(made, ["rerun", str(first)])
    assert result.exit_code == 1 and "differ" in result.stderr and "0.25" in result.stderr
    result = CliRunner().invoke(made, ["rerun", str(first), "--out", "b", "--tolerance", "0.3"])
    assert result.exit_code == 0


def test_a_second_rerun_is_refused(first: Path) -> None:
    CliRunner().invoke(made, ["rerun", str(first)])
    result = CliRunner().invoke(made, ["rerun", str(first)])
    assert result.exit_code == 2 and "already holds a run" in result.stderr


def test_a_changed_input_file_is_refused(first: Path) -> None:
    first.with_name("pairs.jsonl").write_text("{}\n{}\n")
    result = CliRunner().invoke(made, ["rerun", str(first)])
    assert result.exit_code == 2 and "has changed" in result.stderr
    first.with_name("pairs.jsonl").unlink()
    result = CliRunner().invoke(made, ["rerun", str(first)])
    assert result.exit_code == 2 and "not there any more" in result.stderr


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"command": "dance"}, "`patchkit dance`, which this version lacks"),
        ({"options": {"colour": "blue"}}, "no option --colour"),
        ({"command": 3}, "field command"),
        ({"status": "interrupted"}, "this run is interrupted"),
    ],
)
def test_a_manifest_that_cannot_be_followed_is_refused(
    first: Path, changes: dict[str, Any], words: str
) -> None:
    edit_manifest(first, **changes)
    result = CliRunner().invoke(made, ["rerun", str(first)])
    assert result.exit_code == 2 and words in result.stderr


def test_other_versions_are_said(first: Path) -> None:
    versions = read_manifest(first).versions
    edit_manifest(first, versions={**versions, "torch": "1.0"})
    result = CliRunner().invoke(made, ["rerun", str(first)])
    assert result.exit_code == 0 and "torch 1.0 then" in result.stderr
    result = CliRunner().invoke(made, ["rerun", str(first), "--quiet", "--out", "q"])
    assert result.exit_code == 0 and result.stderr == ""


@pytest.mark.parametrize("command", ["rerun", "report"])
def test_a_directory_without_a_run_is_bad_input(tmp_path: Path, command: str) -> None:
    result = CliRunner().invoke(made, [command, str(tmp_path)])
    assert result.exit_code == 2 and str(tmp_path) in result.stderr


def test_report_prints_where_the_page_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("patchkit.report.write_report", lambda directory: directory / "report.html")
    result = CliRunner().invoke(made, ["report", str(tmp_path)])
    assert (result.exit_code, result.stdout) == (0, f"{tmp_path}/report.html\n")
