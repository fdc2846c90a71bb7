"""`patchkit recommend`: what it prints, as text and as JSON, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from patchkit.cli import app
from patchkit.results.recommendation import Recommendation
from tests.studies.recommend_boards import board

QUALITIES = {
    "exact": 0.99,
    "atp": 0.8,
    "atp-star": 0.95,
    "exact edges": 0.99,
    "eap": 0.8,
    "eap-ig-inputs": 0.95,
}


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("study")
    board(QUALITIES).save(path)
    return path


def run(study: Path, *words: object) -> Result:
    given = ["recommend", "--model", "varbind-llama-gqa", "--scoreboard", study, *words]
    return CliRunner().invoke(app, list(map(str, given)))


def test_the_row_is_printed_with_its_evidence(study: Path) -> None:
    result = run(study, "--budget", 20, "--nodes", "q,k,v")
    assert result.exit_code == 0, result.stderr
    for words in (
        "4 layers x 8 heads (2 KV)",
        "Recommended: atp-star (what atp-star is)",
        "patchkit attribute --model varbind-llama-gqa --method atp-star --pairs pairs.jsonl --nodes q,k,v --verify 10 "
        "--out DIR",
        "over 8 cases, every family weighed alike",
        "Runner-up: atp,",
        "Over the budget: exact",
        "What no method within the budget sees",
        "patchkit study ground-truth of 2026-11-27 (patchkit 0.1.0, torch 2.13.0)",
    ):
        assert words in result.stdout
    assert result.stderr == ""


def test_edges_and_a_single_pair(study: Path) -> None:
    result = run(study, "--edges", "--single-pair", "--budget", 20)
    assert "Recommended: eap-ig-inputs" in result.stdout and "from a single pair" in result.stdout


def test_json_has_everything(study: Path) -> None:
    result = run(study, "--edges", "--json", "--pairs", 7)
    found = Recommendation.model_validate(json.loads(result.stdout))
    assert found.chosen == "exact edges" and found.pairs == 7 and found.of == "edges"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--edges", "--nodes", "z"), "one of the two"),
        (("--single-pair", "--pairs", 5), "--single-pair contradicts --pairs 5"),
        (("--nodes", "nonsense"), "neither a node kind"),
        (("--nodes", ","), "--nodes is empty"),
        (("--question", "why"), "--question why: expected one of: rank, top, circuit, sizes"),
        (("--budget", 0.5), "below the cheapest method"),
        (("--budget", -1), "above 0"),
        (("--scoreboard", "nowhere"), "nowhere/scoreboard.json: no such file"),
        (("--model", "/nothing/here"), "/nothing/here"),
    ],
    ids=str,
)
def test_what_cannot_be_answered_is_one_line(study: Path, words: tuple[object, ...], said: str) -> None:
    result = run(study, *words)
    assert (result.exit_code, result.stdout) == (2, "")
    assert (
        result.stderr.startswith("Error: ") and len(result.stderr.splitlines()) == 1 and said in result.stderr
    )
