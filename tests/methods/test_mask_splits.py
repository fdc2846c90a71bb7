"""Which triples train, validate and test a mask, and which are left out and counted."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from patchkit.data import Triple
from patchkit.errors import InputError
from patchkit.methods._mask_layout import Layout
from patchkit.methods._mask_prepare import difference
from patchkit.methods._mask_prepared import prepare
from patchkit.methods._mask_triples import Splits, make_splits
from tests.comparisons import pair
from tests.methods.mask_cases import chunks, random_triples

FAMILY = "gpt2"


def split(triples: Sequence[Triple], **options: object) -> Splits:
    usual: dict[str, object] = {"train_on": None, "validation_fraction": 0.25, "seed": 0}
    return make_splits(pair(FAMILY)[0], triples, **(usual | options))  # type: ignore[arg-type]


def own_answer(ids: Sequence[int]) -> int:
    _, twin = pair(FAMILY)
    with torch.no_grad():
        return int(twin(input_ids=torch.tensor([list(ids)])).logits[0, -1].argmax())


def prompts_of(part: dict[str, list[Triple]]) -> set[tuple[int, ...]]:
    return {triple.original_ids for members in part.values() for triple in members}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("given", [True, False])
def test_no_original_prompt_is_in_two_parts(seed: int, given: bool) -> None:
    """Also where a prompt comes in several triples and in several desiderata."""
    rng = random.Random(seed)
    triples = random_triples(16, seed=seed, names=("a", "b", "c"))
    repeated = [
        replace(
            t,
            desideratum=rng.choice("abc"),
            alternate_ids=t.original_ids[::-1],
            target_id=t.alternate_answer_id,
        )
        for t in rng.sample(triples, 12)
        if t.alternate_answer_id is not None
    ]
    triples = [replace(t, target_id=t.alternate_answer_id or 0) for t in triples] + repeated
    if given:
        sides = {p: rng.choice(["train", "test"]) for p in {t.original_ids for t in triples}}
        triples = [replace(t, split=sides[t.original_ids]) for t in triples]  # type: ignore[arg-type]
    made = split(triples, seed=seed)
    parts = [prompts_of(part) for part in (made.train, made.validation, made.test)]
    assert all(parts) and sum(len(part) for part in parts) == len(set().union(*parts))
    assert set().union(*parts) == {t.original_ids for t in triples}, "every prompt is used"
    if given:
        assert parts[2] == {t.original_ids for t in triples if t.split == "test"}
    for part in (made.train, made.validation, made.test):
        assert list(part) == ["a", "b", "c"]


def test_a_quarter_of_the_training_prompts_validates_and_half_of_all_tests() -> None:
    made = split(random_triples(40, names=("a",)))
    assert [len(part["a"]) for part in (made.train, made.validation, made.test)] == [15, 5, 20]
    made = split(random_triples(40, names=("a",)), validation_fraction=0.5)
    assert [len(part["a"]) for part in (made.train, made.validation, made.test)] == [10, 10, 20]


def test_a_prompt_given_for_training_and_for_testing_is_refused() -> None:
    triple = random_triples(1, names=("a",))[0]
    with pytest.raises(InputError, match="keep a prompt in one split"):
        split([replace(triple, split="train"), replace(triple, split="test", alternate_ids=(9, 9))])


def test_answers_that_the_data_does_not_state_are_the_models_own() -> None:
    triples = random_triples(12, names=("a",))
    unknown = [replace(t, original_answer_id=None, alternate_answer_id=None) for t in triples]
    # Targets that are the model's answer to neither prompt: all are dependences.
    unknown = [replace(t, target_id=_another(t)) for t in unknown]
    made = split(unknown)
    seen = [t for part in (made.train, made.validation, made.test) for t in part["a"]]
    assert len(seen) == 12 and not made.excluded
    for triple in seen:
        assert triple.original_answer_id == own_answer(triple.original_ids)
        assert triple.alternate_answer_id == own_answer(triple.alternate_ids)
    half = [replace(t, alternate_answer_id=_another(t)) for t in unknown]
    for triple in split(half).test["a"]:
        assert triple.original_answer_id == own_answer(triple.original_ids)
        assert triple.alternate_answer_id == _another(triple), "what is stated stands"


def _another(triple: Triple) -> int:
    """A token that is the model's answer to neither prompt."""
    taken = {own_answer(triple.original_ids), own_answer(triple.alternate_ids)}
    return next(token for token in range(3, 9) if token not in taken)


def triple(name: str, number: int, target: int, own: int, other: int) -> Triple:
    side = "train" if number % 2 else "test"
    return Triple(name, (5, 6, number), (7, number), target, side, own, other)


def test_what_cannot_tell_success_from_failure_is_left_out_and_counted() -> None:
    triples = [
        *(triple("keeps", i, target=3, own=3, other=4) for i in range(3, 11)),
        # The alternate has the same answer: patching everything would pass.
        *(triple("keeps", i, target=3, own=3, other=3) for i in range(11, 14)),
        # Not an invariance at all.
        *(triple("keeps", i, target=9, own=3, other=4) for i in range(14, 16)),
        *(triple("moves", i, target=4, own=3, other=4) for i in range(16, 24)),
        # The target is the original's answer: patching nothing would pass.
        *(triple("moves", i, target=3, own=3, other=4) for i in range(24, 25)),
        # A third answer is a dependence like any other.
        *(triple("moves", i, target=8, own=3, other=4) for i in range(25, 27)),
    ]
    made = split(triples)
    assert made.excluded == {
        "keeps: the alternate has the original's answer": 3,
        "keeps: the target is not the original's answer": 2,
        "moves: the target is the original's answer": 1,
    }
    counted = {
        name: sum(len(part[name]) for part in (made.train, made.validation, made.test)) for name in made.test
    }
    assert counted == {"keeps": 8, "moves": 10}
    model, _ = pair(FAMILY)
    assert prepare(model, Layout.build(("mlp",), model.dims), made.test).kinds == ("invariance", "dependence")


def test_a_desideratum_of_which_nothing_is_left_is_named() -> None:
    triples = [triple("moves", i, 4, 3, 4) for i in range(3, 11)] + [
        triple("keeps", i, 3, 3, 3) for i in range(11, 19)
    ]
    with pytest.raises(InputError, match="'keeps': no triple is left"):
        split(triples)


def test_only_what_is_trained_on_needs_training_triples() -> None:
    trained = [triple("moves", i, 4, 3, 4) for i in range(3, 15)]
    asked = [replace(triple("keeps", i, 3, 3, 4), split="test") for i in range(15, 20)]
    made = split(trained + asked, train_on=("moves",))
    assert list(made.train) == list(made.validation) == ["moves"] and list(made.test) == ["moves", "keeps"]
    with pytest.raises(InputError, match="'keeps' has no training triples"):
        split(trained + asked)
    with pytest.raises(InputError, match="'keeps' has no held-out triples"):
        split(trained + [replace(t, split="train") for t in asked])
    with pytest.raises(InputError, match="cannot train on 'shifts'; the desiderata given are: moves, keeps"):
        split(trained + asked, train_on=("moves", "shifts"))
    with pytest.raises(InputError, match="cannot train on 'nothing'"):
        split(trained + asked, train_on=())


def test_too_few_prompts_to_hold_some_out() -> None:
    with pytest.raises(InputError, match="too few to hold some out"):
        split(
            [
                replace(t, split="train" if i else "test")
                for i, t in enumerate(random_triples(2, names=("a",)))
            ]
        )


def test_rivals_and_unpatched_differences() -> None:
    """A dependence competes with the answer without patch, an invariance with the alternate's; from the twin's logits."""
    model, twin = pair(FAMILY)
    triples = random_triples(5, seed=2)
    groups = {name: [t for t in triples if t.desideratum == name] for name in ("value", "operation")}
    prepared = prepare(model, Layout.build(("head",), model.dims), groups, max_batch_tokens=20)
    flat = [t for members in groups.values() for t in members]
    assert prepared.sizes == (5, 5) and len(chunks(prepared)) > 1
    for chunk in chunks(prepared):
        for place, row in enumerate(chunk.numbers.tolist()):
            t = flat[row]
            with torch.no_grad():
                logits = twin(input_ids=torch.tensor([t.original_ids])).logits[:, -1]
            invariant = t.target_id == t.original_answer_id
            rival = t.alternate_answer_id if invariant else t.original_answer_id
            assert (int(chunk.target[place]), int(chunk.rival[place])) == (t.target_id, rival)
            assert bool(chunk.invariant[place]) == invariant == (t.desideratum == "operation")
            assert int(chunk.original_answer[place]) == int(logits.argmax())
            expected = difference(logits, torch.tensor([t.target_id]), torch.tensor([rival]))
            torch.testing.assert_close(chunk.base_difference[place], expected[0], atol=1e-4, rtol=1e-5)
