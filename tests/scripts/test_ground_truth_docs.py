"""The script that makes the repository's page: from a run, a page, its pictures and what `recommend` reads."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner
from write_ground_truth_docs import app

from patchkit.results.scoreboard import Scoreboard
from patchkit.results.scoreboard_short import shortened
from tests.report.scoreboard_example import smallest


def test_a_run_becomes_a_page_and_a_shipped_scoreboard(tmp_path: Path) -> None:
    run, docs, package = tmp_path / "run", tmp_path / "docs", tmp_path / "package"
    smallest().save(run)
    given = ["--run", str(run), "--docs", str(docs), "--package", str(package)]
    result = CliRunner().invoke(app, given)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines() == [str(docs / "ground-truth.md"), str(package / "scoreboard.json")]
    assert (docs / "ground-truth" / "heat-nodes.png").stat().st_size > 1000
    assert Scoreboard.load(package) == shortened(smallest())


def test_no_run_is_bad_input(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["--run", str(tmp_path / "nowhere"), "--docs", str(tmp_path / "docs")])
    assert result.exit_code == 2 and result.stderr.startswith("Error: ") and not (tmp_path / "docs").exists()
