"""Planted mistakes in what heads are seen to do: the comparisons with the models' own modules must refuse them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from patchkit import load
from patchkit.model import PatchModel
from patchkit.studies import _ioi_behaviour as behaviour
from patchkit.studies import _ioi_repeats as repeats
from tests.studies import ioi_handmade, test_ioi_heads

#: Beside `make test`, in a lane of its own.
pytestmark = pytest.mark.slow

_TARGETS = behaviour.token_targets
_THROUGH = behaviour._through


@pytest.fixture(scope="module")
def handmade() -> PatchModel:
    return load(ioi_handmade.build()[0])


@pytest.fixture(scope="module")
def embedded() -> PatchModel:
    return load("ioi-gpt2")


@pytest.fixture(scope="module")
def induction() -> PatchModel:
    return load("induction-2l")


def refused(check: Callable[..., None], *given: object) -> None:
    with pytest.raises(AssertionError):
        check(*given)


@pytest.fixture(scope="module")
def scores(handmade: PatchModel) -> repeats.RepeatScores:
    return repeats.repeat_scores(handmade, 48, 12, seed=0)


def watched(model: PatchModel, scores: repeats.RepeatScores) -> behaviour.Behaviours:
    return behaviour.measure_behaviour(model, ioi_handmade.prompts(12, 0), scores)


MISTAKES = {
    "targets one token late": (
        "token_targets",
        lambda pair, asks: ["elsewhere", *_TARGETS(pair, asks)[:-1]],
    ),
    "the clause swallows the names": (
        "token_targets",
        lambda pair, asks: ["rest of clause" if one in ("io", "s1") else one for one in _TARGETS(pair, asks)],
    ),
    "a token too early attends": ("asking", lambda pair, query: [pair.spans[query][0] - 1]),
}


@pytest.mark.parametrize("mistake", sorted(MISTAKES))
def test_a_mistake_in_where_heads_look(
    mistake: str, handmade: PatchModel, scores: repeats.RepeatScores, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, wrong = MISTAKES[mistake]
    monkeypatch.setattr(behaviour, name, wrong)
    refused(test_ioi_heads.test_attention_is_that_of_the_model, handmade, watched(handmade, scores))


def test_heads_in_another_order(
    handmade: PatchModel, embedded: PatchModel, scores: repeats.RepeatScores, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(behaviour, "_through", lambda *given: _THROUGH(*given).flip(1))
    refused(test_ioi_heads.test_copying_is_that_of_the_models_modules, embedded)
    refused(test_ioi_heads.test_heads_written_by_hand_are_called_what_they_are, watched(handmade, scores))


def test_ties_count_as_raised(
    handmade: PatchModel, scores: repeats.RepeatScores, monkeypatch: pytest.MonkeyPatch
) -> None:
    def generous(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return (logits > logits.gather(1, tokens[:, None])).sum(1) < behaviour.TOP

    monkeypatch.setattr(behaviour, "_among_top", generous)
    refused(test_ioi_heads.test_a_head_that_writes_nothing_copies_nothing, watched(handmade, scores))


def test_more_names_count_than_should(embedded: PatchModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(behaviour, "TOP", 12)
    refused(test_ioi_heads.test_copying_is_that_of_the_models_modules, embedded)


def test_the_stream_is_read_without_its_norm(embedded: PatchModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PatchModel, "attention_norm", lambda self, layer: None)
    refused(test_ioi_heads.test_copying_is_that_of_the_models_modules, embedded)


def test_repeats_are_asked_one_token_off(induction: PatchModel, monkeypatch: pytest.MonkeyPatch) -> None:
    right = repeats.positions
    monkeypatch.setattr(repeats, "positions", lambda batch, at: right(batch, [one - 1 for one in at]))
    refused(test_ioi_heads.test_repeats_are_those_of_the_models_card, induction)
    refused(test_ioi_heads.test_the_heads_of_a_trained_induction_are_found, induction)
