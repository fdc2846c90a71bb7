"""Prompt pairs as a command is given them: a file, or a task that makes them; and the reference set of means."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchkit.errors import InputError

if TYPE_CHECKING:
    from patchkit.data import Pair
    from patchkit.model import PatchModel


def check_pairs(given: Mapping[str, Any]) -> None:
    """Raises InputError unless the pairs come from one place."""
    if (given["pairs"] is None) == (given["task"] is None):
        raise InputError("give either --pairs FILE or --task NAME, one of the two")


def given_pairs(model: PatchModel, given: Mapping[str, Any]) -> list[Pair]:
    """The pairs that `--pairs` or `--task` ask for."""
    if given["task"] is None:
        return read_given(model, given["pairs"], given)
    from patchkit import tasks

    return tasks.pairs(given["task"], model.tokenizer, given["n"], given["seed"])


def given_reference(model: PatchModel, given: Mapping[str, Any]) -> list[Pair] | None:
    """The pairs of `--reference`, or None."""
    return None if given["reference"] is None else read_given(model, given["reference"], given)


def read_given(model: PatchModel, file: Path, given: Mapping[str, Any]) -> list[Pair]:
    """Pairs of a file, read as `--answer-first-token` says."""
    from patchkit.data import read_pairs

    return read_pairs(file, model.tokenizer, model.dims.vocab_size, given["answer_first_token"])
