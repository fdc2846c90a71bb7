"""`patchkit study attribution-recall`: what it writes and prints, with little enough measured to be quick."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from patchkit.cli import app
from patchkit.results.manifest import read_manifest
from patchkit.results.recall import RecallStudy
from patchkit.studies import RecallOptions
from patchkit.studies._recall_settings import SearchOptions

#: Beside `make test`, in a lane of its own.
pytestmark = pytest.mark.slow


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def small(seed: int) -> RecallOptions:
    searches = SearchOptions(subsampling=((0.1, 10),), block_sizes=(16,), branchings=(8,), random_orders=2)
    return RecallOptions(
        pairs=1, distribution=2, pool=4, random_tokens=4, group=64, seed=seed, searches=searches
    )


def test_the_study_writes_its_table_and_its_report(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("patchkit.studies.attribution_recall.RecallOptions", small)
    command = (
        "study",
        "attribution-recall",
        "--model",
        "varbind-llama",
        "--seed",
        "2",
        "--out",
        tmp_path / "a",
    )
    result = run(*command)
    assert result.exit_code == 0, result.output
    assert {path.name for path in (tmp_path / "a").iterdir()} == {
        "manifest.json", "recall.json", "recall.png", "report.html",
    }  # fmt: skip
    study = RecallStudy.load(tmp_path / "a")
    assert len(study.settings) == 8 and study.seeds["single pairs and searches"] == 2
    assert study.command == "patchkit study --model varbind-llama --seed 2 -- attribution-recall"
    for setting in study.settings:
        assert setting.name in result.stdout and f"{setting.aggregate('atp-star'):.2f}" in result.stdout
    assert all(finding in result.stdout for finding in study.findings)
    assert "done: settings" in result.stderr and str(tmp_path / "a" / "report.html") in result.stdout
    manifest = read_manifest(tmp_path / "a")
    assert manifest.model is not None and manifest.model.id == "varbind-llama" and manifest.seed == 2
    assert manifest.pairs is not None and manifest.pairs.used == sum(s.pairs for s in study.settings)
    finished = run(*command, "--resume")
    assert finished.exit_code == 0 and "complete already" in finished.stderr


def test_a_study_that_is_not_there(tmp_path: Path) -> None:
    result = run("study", "everything", "--out", tmp_path / "out")
    assert result.exit_code == 2 and "expected one of: variable-binding, attribution-recall" in result.stderr
    assert not (tmp_path / "out").exists()
