"""`models`, `tasks` and `pairs` print what the package holds, and pairs are the same for the same seed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from patchkit import zoo
from patchkit.cli import app
from patchkit.data import read_pairs
from patchkit.tasks import TASKS


def test_models_prints_every_card() -> None:
    result = CliRunner().invoke(app, ["models"])
    assert result.exit_code == 0
    for name in zoo.names():
        assert name in result.stdout and f"{zoo.card(name).worst_accuracy:.1%}" in result.stdout


def test_one_model_prints_its_whole_card() -> None:
    (name, *_) = zoo.names()
    card = zoo.card(name)
    result = CliRunner().invoke(app, ["models", name])
    words = " ".join(result.stdout.split())
    assert result.exit_code == 0
    for text in (card.shows, card.does_not_show, *card.accuracy, card.command or ""):
        assert all(word in words for word in text.split())
    assert not any(other in words for other in zoo.names() if other not in name and name not in other)


def test_an_unknown_model_is_bad_input_and_the_known_are_named() -> None:
    result = CliRunner().invoke(app, ["models", "gpt-17"])
    assert result.exit_code == 2 and result.stdout == ""
    assert "gpt-17" in result.stderr and zoo.names()[0] in result.stderr


def test_tasks_prints_every_desideratum() -> None:
    result = CliRunner().invoke(app, ["tasks"])
    words = " ".join(result.stdout.split())
    assert result.exit_code == 0
    for task in TASKS.values():
        assert task.name in words and all(name in words for name in task.desiderata)


def make_pairs(
    out: Path, *, seed: int = 0, n: int = 7, task: str = "variable-binding", model: str = "varbind-llama"
):
    arguments = ["pairs", task, "--model", model, "--n", str(n), "--seed", str(seed), "--out", str(out)]
    return CliRunner().invoke(app, arguments)


def test_pairs_are_readable_and_follow_the_seed(tmp_path: Path) -> None:
    result = make_pairs(tmp_path / "a.jsonl")
    assert (result.exit_code, result.stdout) == (0, f"{tmp_path}/a.jsonl\n")
    assert "7 pairs" in result.stderr
    module, tokenizer = zoo.build("varbind-llama")
    pairs = read_pairs(tmp_path / "a.jsonl", tokenizer, module.config.vocab_size)
    assert len(pairs) == 7 and all(len(pair.clean_ids) == len(pair.corrupt_ids) for pair in pairs)
    make_pairs(tmp_path / "b.jsonl")
    make_pairs(tmp_path / "c.jsonl", seed=1)
    first, again, other = ((tmp_path / f"{name}.jsonl").read_bytes() for name in "abc")
    assert first == again != other
    assert all(isinstance(json.loads(line)["answer_id"], int) for line in first.splitlines())


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"task": "juggling"}, "variable-binding"), ({"model": "./nowhere"}, "nowhere"), ({"n": 0}, "--n")],
)
def test_pairs_of_something_unknown_are_bad_input(tmp_path: Path, changes: dict, words: str) -> None:
    result = make_pairs(tmp_path / "a.jsonl", **changes)
    assert result.exit_code == 2 and words in result.stderr
    assert list(tmp_path.iterdir()) == []
