"""The ground-truth study on a few cases: what must hold of them, and that it goes on where it was."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import patchkit
from patchkit.errors import InputError
from patchkit.methods import EdgeOptions, EvaluateOptions, Schedule, attribute_edges, evaluate
from patchkit.results.scoreboard import Scoreboard
from patchkit.studies import ground_truth
from patchkit.studies._truth_methods import METHODS, MethodSettings
from patchkit.studies.ground_truth import TruthOptions, case_names, case_of, run_ground_truth

pytestmark = pytest.mark.slow

CASES = ("handmade-copy-gpt2", "handmade-majority-llama", "handmade-cancelling-gradient-gpt2")
OPTIONS = TruthOptions(
    pairs=6,
    test_pairs=6,
    draws=20,
    settings=MethodSettings(seeds=(0,), schedule=Schedule(lambdas=(0.04,), steps=20)),
)


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> tuple[Scoreboard, Path]:
    out = tmp_path_factory.mktemp("truth")
    return run_ground_truth([patchkit.load(name) for name in CASES], out, OPTIONS), out


def test_every_method_is_on_every_case(board: tuple[Scoreboard, Path]) -> None:
    found, out = board
    assert [case.name for case in found.cases] == list(CASES)
    assert all([row.method for row in case.methods] == list(METHODS) for case in found.cases)
    assert Scoreboard.load(out) == found


def test_a_linear_program_is_no_riddle(board: tuple[Scoreboard, Path]) -> None:
    """In a model that is linear from the true head to the logits every gradient method is right."""
    copy = board[0].cases[0]
    assert copy.truth_faithfulness == 1.0
    for row in copy.methods:
        if row.method.startswith(("exact", "atp", "eap", "clean", "acdc")):
            assert row.nodes is not None and row.edges is not None
            assert row.nodes.auroc == row.edges.precision == row.faithfulness == 1.0, row.method


def test_what_is_planted_is_counted_by_kind(board: tuple[Scoreboard, Path]) -> None:
    found, _ = board
    # Patching one of three that vote the same does nothing, and no gradient sees it; between the prompts there is one.
    assert found.missed("exact edges", "edges")["redundancy"] == (6, 6)
    assert found.missed("eap-ig-midpoint", "edges")["redundancy"] == (0, 6)
    assert found.missed("atp", "nodes")["cancellation"] == (1, 1)
    assert found.missed("atp-star", "nodes")["cancellation"] == (0, 1)
    (recovery,) = (each for each in found.recovery if each.kind == "cancellation")
    assert set(recovery.missed) == set(recovery.recovered) == {"a0.h1", "a0.h1<v>"}
    assert any("'cancellation'" in said for said in found.findings)


def test_numbers_are_those_of_the_methods_themselves(board: tuple[Scoreboard, Path]) -> None:
    """A cell of the table against the public functions, on the same pairs."""
    case = board[0].cases[2]
    model = patchkit.load(case.name)
    known = case_of(model)
    scores = attribute_edges(model, known.pairs(model, 6, 0), EdgeOptions(), "eap-ig-inputs")
    test = known.pairs(model, 6, 1)
    asked = EvaluateOptions(sizes=(case.true_edges,), absolute=True, curve=True)
    run = evaluate(model, test, scores, EdgeOptions(), asked)
    row = case.of("eap-ig-inputs")
    assert row is not None and row.cost == pytest.approx(scores.cost, abs=1e-3)
    assert row.faithfulness == pytest.approx(run.circuits[0].faithfulness, abs=1e-3)
    line = next(each for each in run.curves if each.absolute)
    # Below rounding the study ranks edges by number, as scores of 0; what is pruned away is the same.
    assert row.cmd == pytest.approx(line.cmd, abs=0.02)


def test_it_goes_on_where_it_was(
    board: tuple[Scoreboard, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found, out = board

    def refuse(*_: object) -> None:
        raise AssertionError("a finished case was measured again")

    models = [patchkit.load(name) for name in CASES]
    monkeypatch.setattr(ground_truth, "measure_case", refuse)
    again = run_ground_truth(models, out, OPTIONS)
    assert again.cases == found.cases and again.means == found.means
    with pytest.raises(InputError, match="checkpoint of a study with other models or options"):
        run_ground_truth(models, out, replace(OPTIONS, pairs=5))
    with pytest.raises(AssertionError, match="measured again"):
        run_ground_truth(models, tmp_path, OPTIONS)


def test_what_cannot_be_measured_is_said() -> None:
    with pytest.raises(
        InputError, match="what is true of induction-2l is not known; it is known of: handmade-copy"
    ):
        case_of(patchkit.load("induction-2l"))
    with pytest.raises(InputError, match="pairs must be at least 2, found 1"):
        TruthOptions(pairs=1)


def test_every_program_is_a_case_on_llama_and_gpt2() -> None:
    names = case_names()
    assert len(names) == len(set(names))
    for program in patchkit.zoo.programs.PROGRAMS:
        shapes = {
            name.rpartition("-")[2] for name in names if name.rpartition("-")[0] == f"handmade-{program}"
        }
        assert "gpt2" in shapes and shapes & {"llama", "gqa"}
