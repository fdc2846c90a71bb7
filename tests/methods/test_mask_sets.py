"""Sets of components: their scores against brute force, pruning, random sets, similarity, selection along a path."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import pytest
import torch

from patchkit.data import Triple
from patchkit.methods import MaskOptions, Objective, Schedule, _mask_prune, desiderata_mask, learn_mask
from patchkit.methods._mask_evaluate import evaluate_mask, jaccard, joint_score, random_sets, rounded
from patchkit.methods._mask_layout import Layout
from patchkit.methods._mask_path import PathPoint, PathResult
from patchkit.methods._mask_prepared import Prepared, Tally, pool, prepare
from patchkit.methods._mask_prune import prune
from tests.comparisons import pair
from tests.methods.planted import EVERY_SET, FAMILY, KINDS, planted, score_table

#: Beside `make test`, in a lane of its own.
pytestmark = pytest.mark.slow


def ready(triples: Sequence[Triple]) -> tuple[Layout, Prepared]:
    model, _ = pair(FAMILY)
    layout = Layout.build(KINDS, model.dims)
    return layout, prepare(model, layout, {"planted": triples}, max_batch_tokens=40)


def test_scores_of_sets_equal_brute_force() -> None:
    model, _ = pair(FAMILY)
    triples = planted({0, 4})
    layout, prepared = ready(triples)
    brute = score_table(triples)
    seen = set()
    for components in EVERY_SET[::3] + [{0, 4}]:
        found = evaluate_mask(prepared, layout.keep_all_but(sorted(components)))
        assert found == {"planted": pytest.approx(brute(components))}
        seen.add(round(found["planted"], 3))
    assert len(seen) > 3 and brute({0, 4}) == 1 and brute(set()) == 0


@pytest.mark.parametrize("slack", [0.0, 0.2])
@pytest.mark.parametrize("truth", [{4}, {1, 3}, {0, 2, 5}], ids=str)
def test_pruning_keeps_the_score_and_nothing_that_is_not_needed(truth: set[int], slack: float) -> None:
    model, _ = pair(FAMILY)
    triples = planted(truth)
    layout, prepared = ready(triples)
    score = score_table(triples)
    for start in ([*range(6)], sorted(truth | {1, 4})):
        kept, dropped = prune(layout, prepared, start, slack)
        assert sorted(kept + dropped) == start
        floor = score(start) - slack - 1e-9
        assert score(kept) >= floor
        for component in kept:
            assert score(set(kept) - {component}) < floor, f"{component} is not needed"
        enough = [s for s in EVERY_SET if s <= set(start) and score(s) >= floor]
        smallest = min(len(s) for s in enough)
        if sum(len(s) == smallest for s in enough) == 1 and all(min(enough, key=len) <= s for s in enough):
            assert set(kept) == min(enough, key=len)


@pytest.mark.parametrize("truth", [1, 2, 5])
def test_a_learned_mask_is_as_good_and_as_small_as_brute_force_finds(truth: int) -> None:
    """The model knows nothing; what is planted is one component that gives every target."""
    model, _ = pair(FAMILY)
    triples = planted({truth})
    score = score_table(triples)
    options = MaskOptions(
        components=KINDS,
        seeds=(0,),
        own_masks=False,
        slack=0.0,
        random_sets=1,
        objective=Objective("cross-entropy", "l0.5"),
        schedule=Schedule(lambdas=(0.01, 0.05, 0.2), steps=40, steps_after=20, lr=0.05),
    )
    found = learn_mask(model, triples, options)
    assert [s for s in EVERY_SET if len(s) <= 1 and score(s) == 1] == [{truth}]
    assert found.chosen == [Layout.build(KINDS, model.dims).names[truth]]
    assert found.joint["chosen"] == 1.0 and found.joint["empty"] == 0.0


def synthetic(
    monkeypatch: pytest.MonkeyPatch, scores: Callable[[set[int]], Mapping[str, float]]
) -> list[set[int]]:
    """Replaces evaluation by a function of the patched set; returns the list of sets it was asked for."""
    asked: list[set[int]] = []

    def evaluate(prepared: object, keep: torch.Tensor) -> dict[str, float]:
        asked.append({int(i) for i in (keep < 0.5).nonzero()})
        return dict(scores(asked[-1]))

    def several(
        layout: Layout, prepared: object, sets: Iterable[Sequence[int]]
    ) -> Iterator[dict[str, float]]:
        return (evaluate(prepared, layout.keep_all_but(patched)) for patched in sets)

    monkeypatch.setattr(_mask_prune, "evaluate_mask", evaluate)
    monkeypatch.setattr(_mask_prune, "evaluate_sets", several)
    monkeypatch.setattr(desiderata_mask, "evaluate_mask", evaluate)
    return asked


def test_pruning_drops_the_cheapest_first_and_the_lowest_number_of_equals(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layout, prepared = ready(planted({0}))
    worth = {0: 0.0, 1: 0.01, 2: 0.3, 3: 0.0, 4: 0.02, 5: 0.5}
    synthetic(monkeypatch, lambda s: {"a": float(sum(worth[c] for c in s)), "b": 1.0})
    model, _ = pair(FAMILY)
    assert prune(layout, prepared, range(6), 0.0) == ([1, 2, 4, 5], [0, 3])
    assert prune(layout, prepared, range(6), 0.015) == ([2, 4, 5], [0, 3, 1])
    assert prune(layout, prepared, range(6), 0.05) == ([2, 5], [0, 3, 1, 4])
    assert prune(layout, prepared, [], 0.0) == ([], [])
    # Worth nothing at all: everything goes.
    synthetic(monkeypatch, lambda s: {"a": 0.4})
    assert prune(layout, prepared, [3, 1], 0.0) == ([], [1, 3])


def test_pruning_of_many_components_takes_few_evaluations(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = pair(FAMILY)
    layout = Layout.build(("neuron",), model.dims)
    prepared = ready(planted({0}))[1]
    needed = {3, 17, 40, 64, 100, 119}
    asked = synthetic(monkeypatch, lambda s: {"a": len(s & needed) / 6})
    kept, dropped = prune(layout, prepared, range(120), 0.0)
    assert set(kept) == needed and len(dropped) == 114
    assert len(asked) < 3 * 120


def test_pruning_of_many_components_that_stand_in_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each one alone can go, but never all of them: a block that goes too far is halved."""
    model, _ = pair(FAMILY)
    layout = Layout.build(("neuron",), model.dims)
    prepared = ready(planted({0}))[1]
    synthetic(monkeypatch, lambda s: {"a": min(len(s), 30) / 30})
    kept, dropped = prune(layout, prepared, range(100), 0.0)
    assert len(kept) == 30 and sorted(kept + dropped) == list(range(100))


def chosen_of(
    monkeypatch: pytest.MonkeyPatch, points: Mapping[tuple[int, ...], float], slack: float
) -> list[int]:
    """What is chosen of a path with these rounded sets and validation scores, pruning aside."""
    model, _ = pair(FAMILY)
    layout, prepared = ready(planted({0}))
    synthetic(monkeypatch, lambda s: {"planted": points[tuple(sorted(s))]})
    monkeypatch.setattr(desiderata_mask, "prune", lambda layout, prepared, chosen, slack: (list(chosen), []))
    path = PathResult([PathPoint(0.1, layout.keep_all_but(s), {"planted": v}, 1) for s, v in points.items()])
    trainer = desiderata_mask._Trainer(  # noqa: SLF001
        model,
        layout,
        MaskOptions(components=KINDS, slack=slack),
        {},
        {},
        [prepared],
        prepared,
        desiderata_mask.Checkpoint(None, ""),
        lambda stage, done, total: None,
        Tally(),
    )
    return trainer.choose(path).kept


def test_the_smallest_set_that_is_not_worse_than_the_best_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    path = {(0, 1, 2, 3): 0.99, (0, 1, 2): 1.0, (0, 2): 0.97, (2,): 0.5, (): 0.0}
    assert chosen_of(monkeypatch, path, slack=0.0) == [0, 1, 2]
    assert chosen_of(monkeypatch, path, slack=0.05) == [0, 2]
    assert chosen_of(monkeypatch, path, slack=0.6) == [2]
    assert chosen_of(monkeypatch, {(0,): 0.9, (1,): 0.95}, slack=0.1) == [1], "the better of two of one size"


def test_random_sets_are_of_the_size_and_the_same_every_time() -> None:
    sets = random_sets(36, 5, 200, seed=4)
    assert len(sets) == 200 and all(len(set(s)) == 5 and s == sorted(s) for s in sets)
    assert {c for s in sets for c in s} == set(range(36)), "every component is drawn now and then"
    counts = torch.bincount(torch.tensor([c for s in sets for c in s]), minlength=36).float()
    assert float((counts / 200 - 5 / 36).abs().max()) < 5 * (5 / 36 * 31 / 36 / 200) ** 0.5
    assert sets == random_sets(36, 5, 200, seed=4) != random_sets(36, 5, 200, seed=5)
    assert random_sets(4, 4, 2, 0) == [[0, 1, 2, 3]] * 2 and random_sets(4, 0, 2, 0) == [[], []]


def test_small_things() -> None:
    assert jaccard(["a", "b"], ["b", "c"]) == pytest.approx(1 / 3)
    assert jaccard([], []) == 1.0 and jaccard(["a"], []) == 0.0 and jaccard(["a", "b"], ["b", "a"]) == 1.0
    assert joint_score({"a": 0.5, "b": 0.2, "c": 0.9}) == 0.2
    assert joint_score({"a": 0.5, "b": 0.2, "c": 0.9}, ["a", "c"]) == 0.5
    assert rounded(torch.tensor([0.4999, 0.5, 0.0, 1.0])) == [0, 2]


def test_pooled_preparations_score_as_all_their_triples_together() -> None:
    model, _ = pair(FAMILY)
    triples = planted({0, 4})
    layout = Layout.build(KINDS, model.dims)

    def made(**groups: Sequence[Triple]) -> Prepared:
        return prepare(model, layout, groups, max_batch_tokens=40)

    together = pool([made(a=triples[:5]), made(b=triples[5:9], a=triples[9:])])
    whole = made(a=[*triples[:5], *triples[9:]], b=triples[5:9])
    assert together.names == whole.names and together.sizes == whole.sizes
    assert sum(len(session.items) for session in together.sessions) == len(triples)
    for components in ([], [0], [0, 4], [1, 4]):
        keep = layout.keep_all_but(components)
        assert evaluate_mask(together, keep) == evaluate_mask(whole, keep)
