"""On the model whose circuit is known exactly, masks must find that circuit and nothing else."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest

from patchkit.data import Triple
from patchkit.methods import MaskOptions, Objective, Schedule, learn_mask
from patchkit.methods.mask_scores import answers_with
from patchkit.model import PatchModel
from patchkit.results.mask import MaskResult
from patchkit.zoo import handmade
from patchkit.zoo.load import load
from tests.methods.mask_cases import handmade_triples

#: Beside `make test`, in a lane of its own.
pytestmark = pytest.mark.slow

QUICK = Schedule(lambdas=(0.01, 0.1), steps=40, steps_after=20, lr=0.05)


@functools.cache
def model() -> PatchModel:
    return load("handmade-llama")


@functools.cache
def value_triples() -> tuple[Triple, ...]:
    return tuple(handmade_triples(24, seed=0))


def learn(triples: tuple[Triple, ...], *components: str, **options: object) -> MaskResult:
    usual: dict[str, object] = {
        "seeds": (0,),
        "own_masks": False,
        "schedule": QUICK,
        "slack": 0.0,
        "random_sets": 2,
    }
    return learn_mask(model(), triples, MaskOptions(components=components, **(usual | options)))  # type: ignore[arg-type]


@pytest.mark.parametrize("loss", ["published", "cross-entropy"])
@pytest.mark.parametrize("sparsity", ["l0.5", "l1"])
def test_among_heads_the_lookup_head_is_the_value(loss: str, sparsity: str) -> None:
    found = learn(value_triples(), "head", objective=Objective(loss, sparsity))  # type: ignore[arg-type]
    assert found.chosen == ["a1.h2"]
    assert found.joint["chosen"] == 1.0 and found.joint["empty"] == 0.0 and found.joint["complement"] == 0.0


def test_among_mlps_the_successor_is_the_value() -> None:
    found = learn(value_triples(), "mlp")
    assert found.chosen == ["m2"]
    assert found.joint["chosen"] == 1.0 and found.joint["complement"] == 0.0


def test_of_heads_and_mlps_one_of_the_two_that_each_suffice_is_left() -> None:
    """The lookup's output and the successor's carry the same, one after the other: pruning leaves one of them."""
    found = learn(value_triples(), "head", "mlp", seeds=(0, 1, 2))
    for run in found.seeds:
        assert run.chosen in (["a1.h2"], ["m2"]) and run.joint == 1.0
    # Distractors are worked out from letters, which are the same in both prompts, and nothing reads them.
    for name in handmade.DISTRACTOR_NODES:
        assert float(found.values["head"][int(name[1]), int(name[4])]) >= 0.9
    touched = {*found.chosen, *found.pruned}
    assert touched <= {"a1.h2", "m2"}, "a component that carries nothing was chosen"
    assert found.joint["complement"] == 1.0, "the other of the two is in the complement, and suffices too"


def test_another_letter_asked_for_is_in_the_query_of_the_lookup() -> None:
    triples = tuple(handmade_triples(24, seed=2, change="query"))
    found = learn(triples, "q", "k", "v")
    assert found.chosen == ["q.1.h2"] and found.joint["chosen"] == 1.0
    assert found.joint["empty"] == 0.0 and found.joint["complement"] == 0.0


def test_at_the_digit_the_value_is_in_what_the_lookup_copies() -> None:
    """At the position of the queried digit: the lookup's value vector, not its key and nothing of other heads."""
    found = learn(value_triples(), "q", "k", "v", "head", "mlp", position="digit")
    assert found.chosen == ["v.1.h2"] and found.joint["chosen"] == 1.0
    assert found.joint["empty"] == 0.0 and found.joint["complement"] == 0.0


def test_the_successor_as_neurons_is_its_eight_digits() -> None:
    """One neuron a digit: training finds these eight; pruning may drop a digit that the few validation prompts lack."""
    digits = Schedule(lambdas=(0.003,), steps=60, lr=0.05)
    found = learn(tuple(handmade_triples(64, seed=4)), "neuron", schedule=digits)
    assert {*found.chosen, *found.pruned} == {f"m2.n{i}" for i in range(8)}
    assert found.joint["soft"] == 1.0
    assert found.joint["chosen"] > 0.5 and found.joint["complement"] < 0.5


def test_a_set_given_by_name_is_scored_as_known() -> None:
    triples = {"value": value_triples(), "query": tuple(handmade_triples(8, seed=5, change="query"))}
    for names in (["a1.h2"], ["m2"], ["a1.h2", "m2", "a0.h0"]):
        scores, answers = answers_with(model(), triples, names)
        assert scores == {"value": 1.0, "query": 1.0}
        assert answers == [t.target_id for members in triples.values() for t in members]
    scores, answers = answers_with(model(), triples, ["a0.h1", "a0.h0", "a1.h0", "a2.h3", "m0", "m1"])
    assert scores == {"value": 0.0, "query": 0.0}
    assert answers == [_own(t) for members in triples.values() for t in members]


def _own(triple: Triple) -> int:
    """The answer to the original, read off its tokens."""
    words = [handmade.WORDS[i] for i in triple.original_ids]
    digit = int(words[words.index(words[-1]) + 2])
    return handmade.TOKEN_IDS[str((digit + 1) % 8)]


def test_an_invariance_that_the_circuit_cannot_have_is_not_claimed() -> None:
    """Dependence on the value and invariance to it at once: no set does both, and the joint score says so."""
    dependence = value_triples()
    invariance = tuple(
        replace(
            t,
            desideratum="stays",
            target_id=_own(t),
            original_answer_id=_own(t),
            alternate_answer_id=t.target_id,
        )
        for t in handmade_triples(24, seed=9)
    )
    found = learn((*dependence, *invariance), "head", "mlp")
    assert found.joint["chosen"] == 0.0
    by_name = {d.name: d for d in found.desiderata}
    assert (by_name["value"].kind, by_name["stays"].kind) == ("dependence", "invariance")
    assert by_name["value"].test.chosen + by_name["stays"].test.chosen == 1.0
