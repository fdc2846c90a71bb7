"""The study end to end on the embedded model, small, and the reproduction at published settings."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from patchkit import InputError, MaskOptions, Schedule, StudyOptions, load, run_study, write_report
from patchkit.model import PatchModel
from patchkit.results.mask import MaskResult
from patchkit.results.study import VariableBindingStudy
from patchkit.runtime.plan_words import Machine
from patchkit.studies.published import (
    PUBLISHED_COMPONENTS,
    compare_with_published,
    plan_published,
    published_options,
    published_triples,
)
from patchkit.studies.variable_binding import TRAINED, make_triples
from patchkit.tasks.language import FORMS

#: Beside `make test`, in a lane of its own.
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model() -> PatchModel:
    return load("varbind-llama")


@pytest.fixture(scope="module")
def small(
    model: PatchModel, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, MaskResult, VariableBindingStudy]:
    out = tmp_path_factory.mktemp("study")
    schedule = Schedule(lambdas=(0.02, 0.04), steps=80, steps_after=40)
    mask = MaskOptions(schedule=schedule, seeds=(0, 1), random_sets=5, validation_fraction=0.4)
    result, study = run_study(model, out, StudyOptions(n_train=64, n_test=40, mask=mask))
    return out, result, study


def test_the_study_finds_a_set_that_beats_its_baselines(
    small: tuple[Path, MaskResult, VariableBindingStudy],
) -> None:
    _, result, _ = small
    assert 0 < len(result.chosen) <= 0.2 * result.n_components
    assert result.joint["chosen"] >= 0.9
    assert result.joint["complement"] <= 0.2 and result.joint["empty"] == 0 and result.joint["random"] <= 0.4
    assert [d.name for d in result.desiderata if d.trained] == [d.name for d in TRAINED]
    assert len(result.seeds) == 2 and len(result.own_masks) == len(TRAINED)


def test_what_is_written_is_what_was_returned(small: tuple[Path, MaskResult, VariableBindingStudy]) -> None:
    out, result, study = small
    assert VariableBindingStudy.load(out) == study
    back = MaskResult.load(out)
    assert back.model_dump() == result.model_dump()
    page = write_report(out).read_text(encoding="utf-8")
    for name in result.chosen:
        assert name in page


def test_examples_and_attention_are_consistent(small: tuple[Path, MaskResult, VariableBindingStudy]) -> None:
    _, result, study = small
    for example in study.examples:
        assert example.position == len(example.original) - 1
        assert example.target in (example.original_answer, example.alternate_answer)
    for shown in study.attention:
        assert shown.head in result.chosen and len(shown.weights) == len(shown.tokens)
        assert sum(shown.weights) == pytest.approx(1, abs=1e-4)
    for parts in study.attention_summary.values():
        assert sum(parts.values()) == pytest.approx(1, abs=1e-4)
    assert [f.form for f in study.forms] == list(FORMS) and sum(f.trained for f in study.forms) == 1


def test_forms_average_to_the_whole(small: tuple[Path, MaskResult, VariableBindingStudy]) -> None:
    _, result, study = small
    for each in result.desiderata:
        mean = sum(form.scores[each.name] for form in study.forms) / len(study.forms)
        assert mean == pytest.approx(each.test.chosen, abs=1e-6)


def test_train_and_test_share_no_prompt(model: PatchModel) -> None:
    triples, excluded = make_triples(model, StudyOptions(n_train=30, n_test=30))
    prompts = {
        split: {ids for t in triples if t.split == split for ids in (t.original_ids, t.alternate_ids)}
        for split in ("train", "test")
    }
    assert not prompts["train"] & prompts["test"]
    assert all(count > 0 for count in excluded.values())


def test_a_model_of_another_language_is_refused() -> None:
    with pytest.raises(InputError, match="tokenizer lacks words"):
        make_triples(load("handmade-llama"), StudyOptions())


@pytest.fixture(scope="module")
def llama_13b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LLaMA-13B's shape, without weights."""
    path = tmp_path_factory.mktemp("llama-13b")
    LlamaConfig(
        hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40, vocab_size=32000,
        dtype="float16",
    ).save_pretrained(path)  # fmt: skip
    return path


def test_the_plan_has_the_published_shape_without_weights(llama_13b: Path) -> None:
    model = load(str(llama_13b), lazy=True)
    found = plan_published(model, published_options())
    lines = dict(found.lines())
    assert lines["components"] == f"{PUBLISHED_COMPONENTS:,} (1,600 heads, 40 MLPs)"
    # 13.016 billion parameters of two bytes.
    assert sum(found.spread.weights) == pytest.approx(2 * 13.016e9, rel=1e-3)
    assert found.triples == 4 * 45 and found.steps == 7 * 100 * 2
    # A token goes through 12.7 billion weights of the blocks: the token embedding is looked up.
    assert found.plan.token_flops == pytest.approx(2 * 12.7e9, rel=0.01)
    eight = plan_published(model, published_options(), Machine(processes=8), devices=2)
    assert eight.spread.devices == 2 and "8 processes" in dict(eight.lines())["time"]
    with pytest.raises(InputError, match="lazy"):
        model.require_weights()
    assert all(parameter.is_meta for parameter in model.hf.parameters())


def test_the_published_triples_need_a_tokenizer(llama_13b: Path) -> None:
    with pytest.raises(InputError, match="no tokenizer"):
        published_triples(load(str(llama_13b), lazy=True), seed=0)


def test_another_model_is_said_plainly(
    small: tuple[Path, MaskResult, VariableBindingStudy], model: PatchModel
) -> None:
    _, result, _ = small
    found = compare_with_published(model, result, "variable-binding")
    assert found["comparison"].startswith("NOT the published model")
    assert "9 heads, 1 MLP of 1,640" in found["published"]


def test_published_settings_are_the_published_ones() -> None:
    options = published_options()
    schedule = options.schedule
    assert (options.objective.loss, options.objective.sparsity) == ("published", "l0.5")
    assert (schedule.steps, schedule.lr, schedule.warm, len(schedule.lambdas)) == (100, 0.01, False, 7)
    assert options.components == ("head", "mlp") and options.position == "last"


def test_the_script_runs_on_the_embedded_model(tmp_path: Path) -> None:
    script = ROOT / "scripts" / "reproduce_variable_binding.py"
    arguments = ["--model", "varbind-llama", "--samples", "18", "--iterations", "10", "--quiet"]
    arguments += ["--out", str(tmp_path / "r")]
    done = subprocess.run(
        [sys.executable, str(script), *arguments], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "NOT the published model" in done.stdout
    result = MaskResult.load(tmp_path / "r")
    assert result.loss == "published" and len(result.lambda_path) == 7
    assert all(bool(torch.isfinite(v).all()) for v in result.values.values())
    again = subprocess.run(
        [sys.executable, str(script), *arguments], capture_output=True, text=True, timeout=120
    )
    assert again.returncode == 2 and "already holds a run" in again.stderr


def test_seeds_differ_and_the_same_seed_does_not(model: PatchModel, tmp_path: Path) -> None:
    mask = MaskOptions(
        schedule=Schedule(lambdas=(0.05,), steps=30),
        seeds=(0,),
        random_sets=2,
        own_masks=False,
        carried_limit=0,
    )
    runs = []
    for number, seed in enumerate((3, 3, 4)):
        out = tmp_path / str(number)
        out.mkdir()
        options = StudyOptions(n_train=16, n_test=8, seed=seed, mask=replace(mask))
        runs.append(run_study(model, out, options)[0].values["head"])
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
