"""How forced circuits are trained: the swaps, the lessons, and the script from end to end in three steps."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from patchkit.zoo.cards import read_card
from patchkit.zoo.siit import CASES
from tests import siit_oracle as oracle

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "scripts"
NAMES = sorted(CASES)


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scripts import each other by name, as they do when one of them is run."""
    monkeypatch.syspath_prepend(str(SCRIPTS))


@pytest.mark.parametrize("name", NAMES)
def test_every_case_has_a_recipe_and_swaps_agree_with_plain_hooks(name: str) -> None:
    from siit_interchange import NodeHooks
    from siit_recipes import RECIPES
    from siit_swaps import STRICT, drawn_swap

    case, rows = CASES[name], 12
    torch.manual_seed(0)
    model = RECIPES[name].build(len(case.tokenizer())).eval()
    ids = case.encode(case.tokenizer(), case.prompts(rows, seed=0))
    hooks = NodeHooks(model)
    assert sorted(hooks.names) == sorted(oracle.all_nodes(model))
    swap, taken = drawn_swap(random.Random(1), case, hooks, rows, STRICT)
    with torch.no_grad():
        with hooks.recording():
            plain = model(torch.tensor(ids)).logits[:, -1]
        with hooks.swapping(swap):
            swapped = model(torch.tensor(ids)).logits[:, -1]
        assert torch.equal(model(torch.tensor(ids)).logits[:, -1], plain), "a hook is left behind"
    kept = [oracle.activations(model, each) for each in ids]
    assert swap.changed.any() and swap.blank.any() and any(taken)
    for row in range(rows):
        values = {}
        for number, node in enumerate(hooks.names):
            if not swap.changed[row, number]:
                continue
            mean = torch.stack([each[node] for each in kept]).mean(0) * swap.scale[row]
            values[node] = mean if swap.blank[row, number] else kept[int(swap.donor[row, number])][node]
        with torch.no_grad(), oracle.hooked(model, values, {}):
            wanted = model(torch.tensor([ids[row]])).logits[0, -1]
        torch.testing.assert_close(swapped[row], wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_swaps_set_the_variables_that_they_say(name: str) -> None:
    from siit_interchange import NodeHooks
    from siit_recipes import RECIPES
    from siit_swaps import LESSON, STRICT, drawn_swap

    case, rows, rng = CASES[name], 200, random.Random(0)
    hooks = NodeHooks(RECIPES[name].build(len(case.tokenizer())))
    aligned = hooks.numbers(case.nodes)
    outside = [number for number in range(len(hooks.names)) if number not in aligned]
    swap, taken = drawn_swap(rng, case, hooks, rows, STRICT)
    for row, mine in enumerate(taken):
        for variable, number in zip(case.variables, aligned, strict=True):
            assert bool(swap.changed[row, number]) == (variable in mine)
            assert not swap.blank[row, number]
            if variable in mine:
                assert int(swap.donor[row, number]) == mine[variable]
    assert {variable for mine in taken for variable in mine} == set(case.variables)
    assert {len(mine) for mine in taken} >= {0, 1, len(case.variables)}
    shares = swap.changed[:, outside].float().mean(1)
    assert 0.4 < float((shares == 1).float().mean()) < 0.7 and bool((shares == 0).any())
    swap, taken = drawn_swap(rng, case, hooks, rows, LESSON)
    assert not any(taken) and not swap.changed[:, aligned].any() and swap.changed[:, outside].any()


@pytest.mark.parametrize("name", NAMES)
def test_lessons_and_easy_prompts_are_answered_rightly(name: str) -> None:
    from siit_recipes import RECIPES

    case, curriculum, rng = CASES[name], RECIPES[name].curriculum, random.Random(0)
    (usual,) = case.prompts(1, seed=0)
    for _ in range(50):
        if curriculum.easy is not None:
            prompt = curriculum.easy(rng)
            assert len(prompt) == len(usual) and set(prompt) <= set(case.vocabulary)
        if curriculum.lesson is not None:
            prompt, answers = curriculum.lesson(rng)
            assert len(prompt) == len(answers) > len(usual)
            asked = [place for place, answer in enumerate(answers) if answer]
            assert asked == list(range(len(usual) - 1, len(prompt)))
            for place in asked:
                assert answers[place] == case.answer((*prompt[: len(usual) - 1], prompt[place]))


def test_stages_follow_accuracy() -> None:
    from siit_recipes import RECIPES, SiitRecipe
    from siit_training import SiitTrainer

    stages = {}
    for name in NAMES:
        recipe: SiitRecipe = RECIPES[name]
        case = CASES[name]
        trainer = SiitTrainer(recipe.build(len(case.tokenizer())), case, recipe.curriculum, 0)
        seen = [trainer.stages[0]]
        while trainer.stages[0] != "strict":
            trainer.loss()
            trainer.running = dict.fromkeys(trainer.running, 1.0)
            seen.append(trainer.stages[0])
        stages[name] = list(dict.fromkeys(seen))
        assert not trainer.ready or min(trainer.running.values()) >= recipe.curriculum.schedule.target
    assert stages["siit-bind-gqa"] == ["lesson", "strict"] and stages["siit-chain-gpt2"] == ["easy", "strict"]
    assert stages["siit-add-llama"] == ["strict"]


@pytest.mark.slow
def test_the_command_end_to_end(tmp_path: Path) -> None:
    out = tmp_path / "model"
    command = [sys.executable, str(SCRIPTS / "train_siit.py"), "--case", "siit-bind-gqa", "--out", str(out)]
    options = ["--seed", "5", "--max-steps", "3", "--prompts", "20"]
    done = subprocess.run([*command, *options], check=True, cwd=ROOT, capture_output=True, text=True)
    assert "siit-bind-gqa: seed 5, 3 steps" in done.stdout
    card = read_card(out)
    assert (card.name, card.seed, card.train_steps) == ("siit-bind-gqa", 5, 3)
    assert card.worst_accuracy < 0.5, "three steps do not make a model"
    assert {path.name for path in out.iterdir()} == {
        "card.json",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "training_log.csv",
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", ["siit-chain-gpt2", "siit-add-llama"])
def test_the_same_seed_gives_the_same_model(name: str, tmp_path: Path) -> None:
    from dataclasses import replace

    import train_siit
    from siit_recipes import RECIPES

    recipe = RECIPES[name]
    schedule = replace(recipe.curriculum.schedule, max_steps=3)
    recipe = replace(recipe, curriculum=replace(recipe.curriculum, schedule=schedule))
    made = []
    for run, seed in (("a", 5), ("b", 5), ("c", 6)):
        train_siit.make(name, recipe, seed, tmp_path / run, prompts=20)
        made.append(load_file(tmp_path / run / "model.safetensors"))
    first, again, other = made
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)
