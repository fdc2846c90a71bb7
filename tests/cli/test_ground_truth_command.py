"""`study ground-truth` from the command line: to the page, gone on with, run again, in two processes, refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from patchkit.cli import app
from patchkit.results.manifest import read_manifest
from patchkit.results.scoreboard import Scoreboard

CASE = "handmade-copy-gpt2"


def run(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def test_a_model_whose_truth_is_unknown_is_refused(tmp_path: Path) -> None:
    result = run("study", "ground-truth", "--model", "induction-2l", "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "what is true of induction-2l is not known; it is known of: handmade-copy" in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_host_is_refused(tmp_path: Path) -> None:
    words = ("study", "ground-truth", "--backend", "ndif", "--host", "http://127.0.0.1:9")
    result = run(*words, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "expected --backend local or accelerate, found ndif" in result.stderr


def test_one_case_is_planned() -> None:
    result = run("plan", "study", "ground-truth", "--model", CASE, "--no-measure")
    assert result.exit_code == 0, result.stderr
    assert all(
        label in result.stdout
        for label in ("searches", "atp-star", "eap-ig-midpoint", "acdc", "mask", "circuits")
    )


@pytest.mark.slow
def test_from_the_command_to_the_page_and_again(tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ("study", "ground-truth", "--model", CASE, "--out", out)
    result = run(*words)
    assert result.exit_code == 0, result.stderr
    assert "eap-ig-midpoint" in result.stdout and "which edges matter, over many pairs: " in result.stdout
    page = (out / "report.html").read_text()
    assert CASE in page and 'src="http' not in page
    board = Scoreboard.load(out)
    assert [case.name for case in board.cases] == [CASE]
    manifest = read_manifest(out)
    assert manifest.pairs is not None and manifest.pairs.used == 32
    assert manifest.model is not None and manifest.model.id == CASE
    # Finished: it says so; another case is another run.
    assert "complete already" in run(*words, "--resume").stderr
    other = run("study", "ground-truth", "--model", "handmade-add-gpt2", "--out", out, "--resume")
    assert other.exit_code == 2
    again = run("rerun", out)
    assert again.exit_code == 0, again.stdout + again.stderr
