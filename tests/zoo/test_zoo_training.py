"""The training script from end to end in three steps, and the streams of batches it trains on."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from patchkit.tasks import language
from patchkit.zoo.cards import read_card

#: Beside `make test`, in a lane of its own.
pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "scripts"


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scripts import each other by name, as they do when one of them is run."""
    monkeypatch.syspath_prepend(str(SCRIPTS))


def train_three_steps(name: str, seed: int, out: Path) -> dict[str, torch.Tensor]:
    import train_zoo
    from zoo_recipes import RECIPES

    recipe = RECIPES[name]
    recipe = replace(recipe, schedule=replace(recipe.schedule, max_steps=3))
    train_zoo.make(name, recipe, seed, out, prompts=4)
    return load_file(out / "model.safetensors")


def test_the_command_end_to_end(tmp_path: Path) -> None:
    out = tmp_path / "model"
    command = [sys.executable, str(SCRIPTS / "train_zoo.py"), "--model", "induction-2l", "--out", str(out)]
    options = ["--seed", "5", "--max-steps", "3", "--prompts", "4"]
    done = subprocess.run([*command, *options], check=True, cwd=ROOT, capture_output=True, text=True)
    assert "induction-2l: seed 5, 3 steps" in done.stdout
    card = read_card(out)
    assert (card.name, card.seed, card.train_steps) == ("induction-2l", 5, 3)
    assert {path.name for path in out.iterdir()} == {
        "card.json",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "training_log.csv",
    }


@pytest.mark.usefixtures("scripts")
@pytest.mark.parametrize("name", ["varbind-llama", "ioi-gpt2"])
def test_the_same_seed_gives_the_same_model(name: str, tmp_path: Path) -> None:
    first, again, other = (
        train_three_steps(name, seed, tmp_path / run) for run, seed in (("a", 5), ("b", 5), ("c", 6))
    )
    assert first.keys() == again.keys() == other.keys()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


@pytest.mark.usefixtures("scripts")
def test_an_earlier_stage_is_the_same_run_ended_before() -> None:
    from zoo_recipes import RECIPES
    from zoo_training import train

    recipe = RECIPES["varbind-llama-gqa-early"]
    whole = RECIPES["varbind-llama-gqa"]
    assert recipe.schedule == replace(whole.schedule, ends_at=1600) and recipe.seed == whole.seed
    assert recipe.build is whole.build and recipe.stream is whole.stream
    kept: dict[int, dict[str, torch.Tensor]] = {}
    for ends_at in (None, 2):
        torch.manual_seed(5)
        model, stream = recipe.build(), recipe.stream(5)
        feedback, seen = stream.feedback, list[float]()

        def note(accuracy: float, model=model, feedback=feedback, seen=seen) -> None:  # type: ignore[no-untyped-def]
            feedback(accuracy)
            seen.append(accuracy)
            if len(seen) == 2:
                state = {name: value.clone() for name, value in model.state_dict().items()}
                kept.setdefault(len(kept), state)

        stream.feedback = note  # type: ignore[method-assign]
        record = train(model, stream, replace(recipe.schedule, max_steps=700, ends_at=ends_at or 4))
        assert record.steps == (ends_at or 4)
    assert all(torch.equal(kept[0][name], kept[1][name]) for name in kept[0])


@pytest.mark.usefixtures("scripts")
def test_training_contexts_are_from_the_train_split_and_answered_rightly() -> None:
    """Read back from the ids alone: every binding list, every query and its label."""
    from zoo_curricula import BindingStream

    stream = BindingStream(0)
    stream.stage, stream.max_variables = "operations", 6
    words = language.VOCABULARY
    phrases = {
        (form, operation): template.split()
        for form, operations in language.FORMS.items()
        for operation, template in operations.items()
    }
    checked = 0
    while checked < 400:
        ids, labels = stream.next()
        if ids.shape[0] != stream.batch:
            continue  # an induction batch
        for row, wanted in zip(ids.tolist(), labels.tolist(), strict=True):
            tokens = [words[i] for i in row]
            end = tokens.index(";")
            connectors = set(language.CONNECTORS.values())
            places = [i for i in range(end) if tokens[i] in connectors]
            bindings = tuple(language.Binding(tokens[i - 1], int(tokens[i + 1])) for i in places)
            assert language.split_of(bindings) == "train"
            context, start = language.Context(bindings), end + 1
            for place in (i for i, label in enumerate(wanted) if label >= 0):
                asked, matches = tokens[start:place], []
                for (form, operation), template in phrases.items():
                    digits = [word for word in asked if word.isdigit()]
                    constant = int(digits[0]) if digits else None
                    if [str(constant) if word == "{c}" else word for word in template] == asked:
                        matches.append(language.Query(operation, tokens[place], constant, form))
                assert len(matches) >= 1
                assert words[wanted[place]] == language.answer(context, matches[0]) == tokens[place + 1]
                start, checked = place + 3, checked + 1


@pytest.mark.usefixtures("scripts")
def test_induction_batches_repeat() -> None:
    from zoo_curricula import InductionStream

    ids, labels = InductionStream(0, 51).next()
    length = (ids.shape[1] - 1) // 2
    assert torch.equal(ids[:, 1 : length + 1], ids[:, length + 1 :])
    assert (labels[:, : length + 1] == -100).all()
    assert torch.equal(labels[:, length + 1 : -1], ids[:, length + 2 :])


@pytest.mark.usefixtures("scripts")
def test_stages_follow_accuracy() -> None:
    from zoo_curricula import BindingStream

    stream, seen = BindingStream(0), []
    while not stream.ready(0.98):
        stream.next()
        stream.feedback(1.0)
        seen.append((stream.stage, stream.max_variables))
    order = list(dict.fromkeys(seen))
    assert order[0] == ("induction", 2)
    assert order[1:6] == [("recall", n) for n in range(2, 7)]
    assert order[6:] == [("operations", 6)]
