"""`compare` and `generalise`: from the command line to the report, gone on with, run again, planned, refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from typer.testing import CliRunner, Result

from patchkit import write_pairs
from patchkit.cli import app
from patchkit.cli.compare import groups_of
from patchkit.errors import InputError
from patchkit.methods._set_rows import SetItem
from patchkit.methods.activation_patching import PatchSets
from patchkit.methods.circuits import RunCircuits
from patchkit.model import PatchModel
from patchkit.results.compare import compare_runs
from patchkit.results.comparison import Comparison
from patchkit.results.edge_scores import EdgeScores
from patchkit.results.generalisation import Generalisation
from patchkit.results.manifest import read_manifest
from patchkit.runtime import journal
from tests.families import build
from tests.node_oracle import LONG, MIDDLE, SHORT

PAIRS = [LONG, MIDDLE, SHORT, replace(LONG, clean_ids=(6, *LONG.clean_ids[1:]), id="other")]


def run(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two stages of a tiny model, one of another shape, and pairs in ids."""
    found = tmp_path_factory.mktemp("stages")
    build("llama-gqa", 0).save_pretrained(found / "early")
    build("llama-gqa", 1).save_pretrained(found / "late")
    build("gpt2").save_pretrained(found / "other")
    write_pairs(found / "pairs.jsonl", PAIRS)
    write_pairs(found / "more.jsonl", [replace(pair, id=f"{pair.id}2") for pair in reversed(PAIRS)])
    return found


def compare_words(place: Path, out: Path) -> list[object]:
    return [
        *("compare", place / "early", place / "late", "--pairs", place / "pairs.jsonl", "--top-n", "10,20"),
        *("--random", 2, "--group", "some=a1.h0,m2", "--out", out),
    ]


def generalise_words(place: Path, out: Path) -> list[object]:
    return [
        *("generalise", "--model", place / "early", "--pairs", f"one={place / 'pairs.jsonl'}"),
        *("--pairs", f"two={place / 'more.jsonl'}", "--top-n", "20", "--random", 2, "--out", out),
    ]


def test_a_comparison_from_files_to_its_report(place: Path, tmp_path: Path) -> None:
    done = run(*compare_words(place, tmp_path / "out"))
    assert done.exit_code == 0, done.output
    assert "Activations of the second put into the first" in done.stdout and "some" in done.stdout
    found = Comparison.load(tmp_path / "out")
    assert [each.model for each in found.models] == [str(place / "early"), str(place / "late")]
    assert [each.group for each in found.into("first").groups if each.group == "some"] == ["some"]
    assert not found.desiderata and len(found.held_out) + found.pairs == len(PAIRS)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"report.html", "across.png", "gap.png", "manifest.json", "first", "second"} <= names
    assert "journal" not in names
    assert EdgeScores.load(tmp_path / "out" / "first").graph.n_layers == 3
    manifest = read_manifest(tmp_path / "out")
    assert manifest.model is not None and manifest.model.id == f"{place / 'early'}, {place / 'late'}"
    assert manifest.base_metric == pytest.approx(found.models[0].clean)
    assert manifest.inputs["pairs"].path == str(place / "pairs.jsonl")


@pytest.mark.slow
def test_both_commands_are_run_again_with_the_same_numbers(place: Path, tmp_path: Path) -> None:
    for words in (compare_words, generalise_words):
        out = tmp_path / words.__name__
        assert run(*words(place, out)).exit_code == 0
        again = run("rerun", out, "--out", tmp_path / f"{out.name}-again")
        assert again.exit_code == 0, again.output
        assert max(compare_runs(out, tmp_path / f"{out.name}-again").values()) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "program"),
    [(compare_words, PatchSets), (generalise_words, RunCircuits)],
    ids=["compare", "generalise"],
)
def test_an_interrupted_run_goes_on(
    words: Any, program: Any, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    genuine, seen, fails = program.run, list[int](), [True]

    def stopped(self: Any, model: PatchModel, items: Sequence[SetItem]) -> dict[str, Tensor]:
        if fails[0] and len(seen) == 1:
            raise KeyboardInterrupt
        seen.append(len(items))
        return genuine(self, model, items)

    monkeypatch.setattr(program, "run", stopped)
    monkeypatch.setattr(journal, "PATIENCE", 0.0)
    interrupted = run(*words(place, tmp_path / "out"))
    assert interrupted.exit_code == 130 and "--resume" in interrupted.stderr
    fails[0] = False
    resumed = run(*words(place, tmp_path / "out"), "--resume")
    assert resumed.exit_code == 0, resumed.output
    gone_on = len(seen) - 1
    seen.clear()
    assert run(*words(place, tmp_path / "whole")).exit_code == 0
    assert gone_on == len(seen) - 1
    assert max(compare_runs(tmp_path / "out", tmp_path / "whole").values()) == 0.0


def test_generalisation_from_files_to_its_report(place: Path, tmp_path: Path) -> None:
    done = run(*generalise_words(place, tmp_path / "out"))
    assert done.exit_code == 0, done.output
    found = Generalisation.load(tmp_path / "out")
    assert [each.name for each in found.sets] == ["one", "two"] and "random, mean of 2" in done.stdout
    assert {"report.html", "generalisation.png"} <= {path.name for path in (tmp_path / "out").iterdir()}
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["options"]["pairs"][0].startswith(
        "one="
    )


@pytest.mark.slow
def test_a_task_with_desiderata_and_its_templates(tmp_path: Path) -> None:
    embedded = ("varbind-llama-gqa-early", "varbind-llama-gqa")
    small = ("--task", "variable-binding", "--n", 3, "--top-n", 20, "--random", 1)
    done = run("compare", *embedded, *small, "--triples", 3, "--out", tmp_path / "compare")
    assert done.exit_code == 0, done.output
    found = Comparison.load(tmp_path / "compare")
    assert list(found.triples.values()) == [3, 3, 3] and len(found.desiderata) > 8
    done = run(
        "generalise",
        "--model",
        embedded[1],
        *small,
        "--templates",
        "recall,symbol+plus",
        "--out",
        tmp_path / "g",
    )
    assert done.exit_code == 0, done.output
    assert [each.name for each in Generalisation.load(tmp_path / "g").sets] == ["recall", "symbol+plus"]


@pytest.mark.slow
def test_both_have_plans(place: Path) -> None:
    embedded = ("varbind-llama-gqa-early", "varbind-llama-gqa")
    for words in (
        ("compare", *embedded, "--n", 6),
        ("compare", *embedded, "--task", "variable-binding", "--n", 4, "--method", "exact"),
        ("generalise", "--model", embedded[0], "--n", 6),
        ("generalise", "--model", embedded[0], "--task", "variable-binding", "--n", 4),
        tuple(compare_words(place, Path("unused"))),
        tuple(generalise_words(place, Path("unused"))),
    ):
        done = run("plan", *words, "--no-measure")
        assert done.exit_code == 0, done.output
        assert "circuits" in done.stdout and "forwards" in done.stdout
    both = run("plan", "compare", *embedded, "--n", 6, "--no-measure").stdout
    assert all(f"{name}: 4 layers" in both for name in embedded) and "both models" in both


def test_what_is_refused(place: Path, tmp_path: Path) -> None:
    early, out = place / "early", tmp_path / "out"
    pairs = ("--pairs", place / "pairs.jsonl")
    for words, said in (
        (("compare", early, place / "other", *pairs), "are not of one architecture"),
        (("compare", early, place / "late"), "give either --pairs FILE or --task NAME"),
        (("compare", early, place / "late", *pairs, "--backend", "ndif"), "a machine that holds both models"),
        (("compare", early, place / "late", *pairs, "--group", "a1.h0"), "expected NAME=nodes"),
        (("compare", early, place / "late", *pairs, "--method", "acdc"), "--method acdc"),
        (("compare", early, place / "late", *pairs, "--top-n", "few"), "'few' is no number of edges"),
        (("generalise", "--model", early, "--pairs", place / "pairs.jsonl"), "expected NAME=FILE"),
        (("generalise", "--model", early), "give either --pairs NAME=FILE"),
        (("generalise", "--model", early, "--pairs", "a=x", "--templates", "b"), "--templates are those of"),
        (("generalise", "--model", early, "--pairs", f"a={place / 'pairs.jsonl'}"), "at least two sets"),
    ):
        refused = run(*words, "--out", out)
        assert refused.exit_code == 2 and said in refused.stderr, (words, refused.output)
        assert "Traceback" not in refused.output and not out.exists()


def test_groups_are_read_once_each() -> None:
    assert groups_of(None) is None
    assert groups_of(["a=a1.h0, m2", "b=m1"]) == {"a": ("a1.h0", "m2"), "b": ("m1",)}
    for given, words in ((["a=m1", "a=m2"], "there is a group 'a' already"), (["a="], "is empty")):
        with pytest.raises(InputError, match=words):
            groups_of(given)
