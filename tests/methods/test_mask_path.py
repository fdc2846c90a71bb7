"""A path that is left after any step and gone on with from its state is the unbroken one, bit for bit."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from patchkit.data import group
from patchkit.methods import Objective, Schedule
from patchkit.methods._mask_layout import Layout
from patchkit.methods._mask_path import PathResult, PathTraining, Recipe
from patchkit.methods._mask_prepared import Prepared, prepare
from patchkit.methods._mask_train import train_path
from tests.comparisons import pair
from tests.methods.mask_cases import random_triples

#: Beside `make test`, in a lane of its own.
pytestmark = pytest.mark.slow

State = dict[str, Any]
#: Steps in pieces of three end in the middle of a lambda, at its end, and between two looks at the rounded set.
SHORT = Schedule(lambdas=(0.01, 0.03), steps=5, steps_after=4, lr=0.15, check_every=2, patience=0)


@dataclass
class Case:
    """A path to train.

    Attributes:
        poisoned: the call of the loss from which on it is no number.
    """

    objective: Objective
    schedule: Schedule
    seed: int = 1
    poisoned: int | None = None


CASES = {
    "cross-entropy": Case(Objective("cross-entropy", "l0.5"), SHORT),
    "published": Case(Objective("published", "l1"), SHORT, seed=0),
    "cold": Case(Objective("cross-entropy", "l0.5"), replace(SHORT, warm=False)),
    "hard-concrete": Case(Objective("cross-entropy", "hard-concrete"), replace(SHORT, lambdas=(0.5, 0.3))),
    # Nothing leaves at so high a price: the set does not change, and the path ends before its last lambda.
    "patience": Case(
        Objective("cross-entropy", "l0.5"),
        Schedule(lambdas=(1e3, 2e3), steps=12, steps_after=9, check_every=2, patience=3),
        seed=0,
    ),
    # Call 8 is step 3 of the second lambda, and, of the published loss, one half of a step.
    "diverging": Case(Objective("cross-entropy", "l0.5"), SHORT, poisoned=8),
    "diverging-half": Case(Objective("published", "l0.5"), SHORT, poisoned=8),
}


def made(case: Case) -> tuple[Recipe, list[Prepared], Prepared]:
    model, _ = pair("gpt2")
    layout = Layout.build(("head", "mlp"), model.dims)
    groups = group(random_triples(3, split="train"), "train")
    parts = (
        [{name: members} for name, members in groups.items()] if case.objective.alternates_steps else [groups]
    )
    training = [prepare(model, layout, part, max_batch_tokens=12) for part in parts]
    validation = prepare(model, layout, group(random_triples(2, seed=5, split="train"), "train"))
    return Recipe(layout, case.objective, case.schedule, case.seed), training, validation


def poison(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    if case.poisoned is None:
        return
    # Batches are several calls a step: what counts is the step that the weights of a whole group are asked for.
    real, calls = Prepared.gradient, iter(range(1, 10_000))

    def gradient(self: Prepared, *given: Any) -> Any:
        loss, found = real(self, *given)
        return (float("nan") if next(calls) >= case.poisoned else loss), found  # type: ignore[operator]

    monkeypatch.setattr(Prepared, "gradient", gradient)


def through_disk(state: State) -> State:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)


def chopped(case: Case, every: int, spoil: Callable[[State], None] = lambda state: None) -> PathResult:
    """The path, left and gone on with after so many steps each time."""
    recipe, training, validation = made(case)
    path = PathTraining.begin(recipe, training)
    while not path.result.stopped:
        left = iter(range(1, every))
        path.advance(training, validation, lambda left=left: next(left, None) is not None)
        state = through_disk(path.state())
        spoil(state)
        path = PathTraining.restored(recipe, state)
    return path.result


def unbroken(case: Case) -> PathResult:
    recipe, training, validation = made(case)
    return train_path(recipe.layout, training, validation, case.objective, case.schedule, case.seed)


def same(one: PathResult, other: PathResult) -> bool:
    masks = [torch.equal(a.values, b.values) for a, b in zip(one.points, other.points, strict=False)]
    rest = [
        ([(p.lam, p.validation, p.steps) for p in path.points], path.history, path.stopped, path.diverged)
        for path in (one, other)
    ]
    return all(masks) and rest[0] == rest[1]


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("name", CASES)
def test_a_path_in_pieces_is_the_unbroken_one(name: str, every: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    with monkeypatch.context() as first:
        poison(case, first)
        whole = unbroken(case)
    poison(case, monkeypatch)
    assert same(chopped(case, every), whole)
    assert whole.diverged == (case.poisoned is not None)
    assert whole.stopped and len({float(p.values.sum()) for p in whole.points}) == len(whole.points)


def test_patience_and_divergence_end_the_paths_that_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    patient = unbroken(CASES["patience"])
    assert [point.steps for point in patient.points] == [8] and "nothing is patched" in patient.stopped
    poison(CASES["diverging"], monkeypatch)
    assert "lambda 0.03, step 3" in unbroken(CASES["diverging"]).stopped


def _no_moments(state: State) -> None:
    state["adam"] = [{} for _ in state["adam"]]


def _no_counts_of_adam(state: State) -> None:
    for moments in state["adam"]:
        moments.get("step", torch.zeros(())).fill_(1.0)


def _fresh_generator(state: State) -> None:
    state["mask"]["generator"] = torch.Generator().manual_seed(1).get_state()


def _no_multipliers(state: State) -> None:
    state["mask"]["multipliers"].zero_()


def _set(name: str, value: Any) -> Callable[[State], None]:
    return lambda state: state.update({name: value})


def _ones(name: str) -> Callable[[State], None]:
    return lambda state: state.update({name: torch.ones_like(state[name])})


def _even_weights(state: State) -> None:
    state["weights"] = [torch.full_like(each, 1 / len(each)) for each in state["weights"]]


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("cross-entropy", _no_moments),
        ("published", _no_moments),
        ("cross-entropy", _no_counts_of_adam),
        ("hard-concrete", _fresh_generator),
        ("hard-concrete", _no_multipliers),
        ("patience", _set("before", None)),
        ("patience", _set("unchanged", 0)),
        ("cross-entropy", _even_weights),
        ("cold", _ones("start")),
        ("diverging", _ones("good")),
        ("cross-entropy", _set("history", [])),
    ],
)
def test_a_part_of_the_state_that_is_left_out_is_noticed(
    name: str, spoil: Callable[[State], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[name]
    with monkeypatch.context() as first:
        poison(case, first)
        whole = unbroken(case)
    poison(case, monkeypatch)
    assert not same(chopped(case, 1, spoil), whole)


def test_what_is_done_grows_to_the_whole_schedule() -> None:
    case = CASES["cross-entropy"]
    recipe, training, validation = made(case)
    path, seen = PathTraining.begin(recipe, training), [0]
    while not path.result.stopped:
        path.advance(training, validation, lambda: False)
        seen.append(path.done)
    assert seen == list(range(case.schedule.total_steps + 1))
