"""Pairs of the handmade programs as tasks: for their own models, and refused to others."""

from __future__ import annotations

import pytest

from patchkit import tasks, zoo
from patchkit.errors import InputError
from patchkit.zoo import programs


def test_every_program_is_a_task() -> None:
    assert {name.removeprefix("handmade-") for name in tasks.TASKS if name.startswith("handmade-")} == set(
        programs.PROGRAMS
    )


def test_pairs_are_those_of_the_program() -> None:
    tokenizer = zoo.build("handmade-lookup-gpt2")[1]
    made = tasks.pairs("handmade-lookup", tokenizer, 5, seed=2)
    assert made == programs.pairs("handmade-lookup-llama", 5, seed=2)
    assert made != tasks.pairs("handmade-lookup", tokenizer, 5, seed=2, split="train")


def test_another_models_tokenizer_is_refused() -> None:
    for tokenizer in (zoo.build("ioi-gpt2")[1], None):
        with pytest.raises(InputError, match="expected one of their models \\(handmade-add-llama\\)"):
            tasks.pairs("handmade-add", tokenizer, 1, seed=0)
    with pytest.raises(InputError, match="split must be 'train' or 'test'"):
        tasks.pairs("handmade-add", zoo.build("handmade-add-llama")[1], 1, seed=0, split="all")
