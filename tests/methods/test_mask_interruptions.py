"""Interrupted masks go on where they stopped; losses that are not finite end a mask, and the last good one is kept."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from patchkit.errors import InputError, RunError
from patchkit.methods import MaskOptions, Objective, Schedule, _mask_steps, desiderata_mask, learn_mask
from patchkit.results.mask import MaskResult
from tests.comparisons import pair
from tests.methods.mask_cases import random_triples

#: Beside `make test`, in a lane of its own.
pytestmark = pytest.mark.slow

FAMILY = "gpt2"
PLAN = Schedule(lambdas=(0.002, 0.01), steps=4, steps_after=3, lr=0.2, patience=0, check_every=2)


def learn(checkpoint: Path | None = None, progress: Any = None, n: int = 8, **options: Any) -> MaskResult:
    usual: dict[str, Any] = {"seeds": (0, 1), "schedule": PLAN, "random_sets": 2}
    model, _ = pair(FAMILY)
    made = MaskOptions(**(usual | options))
    return learn_mask(model, random_triples(n), made, checkpoint=checkpoint, progress=progress)


def same(one: MaskResult, other: MaskResult) -> bool:
    paid = {"forward_equivalents"}
    values = all(torch.equal(one.values[kind], other.values[kind]) for kind in one.values)
    return values and one.model_dump(exclude=paid | {"values"}) == other.model_dump(exclude=paid | {"values"})


class Recorder:
    """Notes the stages it is told of, and interrupts at one of them."""

    def __init__(self, until: str | None = None) -> None:
        self.stages: list[str] = []
        self.until = until

    def __call__(self, stage: str, done: int, total: int) -> None:
        assert 0 <= done <= total
        self.stages.append(stage)
        if stage == self.until:
            raise KeyboardInterrupt


@pytest.mark.parametrize("until", ["training seed 1", "testing"])
def test_an_interrupted_mask_that_goes_on_is_the_uninterrupted_one(
    tmp_path: Path, until: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A random model satisfies no desideratum, so that pruning would leave nothing of any seed to compare.
    monkeypatch.setattr(desiderata_mask, "prune", lambda layout, prepared, chosen, slack: (chosen, []))
    whole = learn()
    assert len({tuple(run.chosen) for run in whole.seeds}) == 2, (
        "two seeds that differ make the comparison sharper"
    )
    with pytest.raises(KeyboardInterrupt):
        learn(tmp_path, Recorder(until))
    second = Recorder()
    resumed = learn(tmp_path, second)
    assert same(resumed, whole)
    assert "training seed 0" not in second.stages, "what was finished is not trained again"
    assert ("training seed 1" in second.stages) == (until == "training seed 1")
    third = Recorder()
    assert same(learn(tmp_path, third), whole)
    assert not any(stage.startswith("training") for stage in third.stages)


@pytest.mark.parametrize(
    "objective", [Objective("cross-entropy", "l0.5"), Objective("published", "hard-concrete")], ids=str
)
def test_a_path_goes_on_at_the_lambda_where_it_stopped(
    objective: Objective, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {
        "seeds": (1,),
        "own_masks": False,
        "objective": objective,
        "schedule": replace(PLAN, lambdas=(0.3, 0.2)),
    }
    whole = learn(**asked)
    with pytest.raises(KeyboardInterrupt):
        learn(tmp_path, Recorder("training seed 1"), **asked)
    described = tmp_path / "seed 1.json"
    first = described.read_text()
    assert len(json.loads(first)["points"]) == 1
    real, steps = _mask_steps.row_losses, []
    monkeypatch.setattr(_mask_steps, "row_losses", lambda *given: steps.append(1) or real(*given))
    groups = 2 if objective.alternates_steps else 1
    assert same(learn(tmp_path, **asked), whole)
    assert len(steps) == groups * PLAN.steps_after
    # Stopped between the two files, one mask is not described yet; it is trained again.
    described.write_text(first)
    assert same(learn(tmp_path, **asked), whole)
    assert len(steps) == 2 * groups * PLAN.steps_after


def test_seeds_may_be_added_to_a_run(tmp_path: Path) -> None:
    learn(tmp_path, seeds=(0,), own_masks=False)
    stages = Recorder()
    assert same(learn(tmp_path, stages, own_masks=False), learn(own_masks=False))
    assert "training seed 0" not in stages.stages and "training seed 1" in stages.stages


@pytest.mark.parametrize(
    "changed",
    [
        {"n": 9},
        {"components": ("mlp",)},
        {"objective": Objective("published", "l0.5")},
        {"schedule": Schedule(lambdas=(0.5,), steps=2)},
        {"position": "middle"},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_the_paths_of_another_run_are_refused(tmp_path: Path, changed: dict[str, Any]) -> None:
    learn(tmp_path, seeds=(0,), own_masks=False)
    with pytest.raises(InputError, match="checkpoint of another run"):
        learn(tmp_path, seeds=(0,), own_masks=False, **changed)


def test_a_path_half_written_is_trained_again_and_a_damaged_one_refused(tmp_path: Path) -> None:
    whole = learn(tmp_path, seeds=(0,), own_masks=False)
    described, tensors = tmp_path / "seed 0.json", tmp_path / "seed 0.safetensors"
    text, values = described.read_text(), tensors.read_bytes()
    # Stopped between the two files: without the JSON it was never finished.
    described.unlink()
    tensors.write_bytes(values[:50])
    assert same(learn(tmp_path, seeds=(0,), own_masks=False), whole)
    for damage in (text[: len(text) // 2], "[]", json.dumps({**json.loads(text), "points": []})):
        described.write_text(damage)
        with pytest.raises(InputError, match="seed 0"):
            learn(tmp_path, seeds=(0,), own_masks=False)
    described.write_text(text)
    tensors.write_bytes(values[:50])
    with pytest.raises(InputError, match="seed 0.safetensors"):
        learn(tmp_path, seeds=(0,), own_masks=False)
    tensors.unlink()
    with pytest.raises(InputError, match="seed 0.safetensors"):
        learn(tmp_path, seeds=(0,), own_masks=False)


def test_names_of_desiderata_cannot_lead_out_of_the_directory(tmp_path: Path) -> None:
    model, _ = pair(FAMILY)
    names = ("a/b", "../up")
    triples = random_triples(8, names=names)
    inside = tmp_path / "deep" / "checkpoint"
    options = MaskOptions(seeds=(0,), schedule=PLAN, random_sets=1)
    first = learn_mask(model, triples, options, checkpoint=inside)
    assert [own.trained_on for own in first.own_masks] == list(names)
    assert {path.parent for path in tmp_path.rglob("*.json")} == {inside}
    assert same(learn_mask(model, triples, options, checkpoint=inside), first)


def poisoned(monkeypatch: pytest.MonkeyPatch, at: int, value: float) -> None:
    """From its call number `at` on (from 1), the loss of a step's triples is this value."""
    real, calls = _mask_steps.row_losses, iter(range(1, 10_000))

    def losses(loss: Any, logits: Any, chunk: Any) -> torch.Tensor:
        found = real(loss, logits, chunk)
        return found * value if next(calls) >= at else found

    monkeypatch.setattr(_mask_steps, "row_losses", losses)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_mask(
    monkeypatch: pytest.MonkeyPatch, value: float, tmp_path: Path
) -> None:
    """Call 4 is step 4 of the first lambda: what is kept is the mask of three steps."""
    three = learn(
        seeds=(0,), own_masks=False, schedule=Schedule(lambdas=(0.002,), steps=3, lr=0.2, patience=0)
    )
    poisoned(monkeypatch, 4, value)
    found = learn(tmp_path, seeds=(0,), own_masks=False)
    assert found.diverged
    assert "seed 0: loss is not finite at lambda 0.002, step 4" in found.stopped
    assert "mask of step 3 is kept" in found.stopped and "value, operation" in found.stopped
    assert [(point.lam, point.steps) for point in found.lambda_path] == [(0.002, 3)]
    for kind in three.values:
        assert torch.equal(found.values[kind], three.values[kind])
    assert found.chosen == three.chosen and found.joint == three.joint
    assert not list(tmp_path.iterdir()), "a path that went wrong is no checkpoint"
    assert not any(bool(v.isnan().any()) for v in found.values.values())
    found.save(tmp_path)
    assert MaskResult.load(tmp_path).diverged


def test_a_later_lambda_that_goes_wrong_leaves_the_path_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    poisoned(monkeypatch, 5, float("nan"))
    found = learn(seeds=(0,), own_masks=False)
    assert found.diverged and "lambda 0.01, step 1" in found.stopped
    assert [(point.lam, point.steps) for point in found.lambda_path] == [(0.002, 4)]


def test_the_published_steps_say_which_desideratum_went_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """One call a desideratum: call 4 is step 2 on the second; its first half is undone with it."""
    three = learn(
        seeds=(0,),
        own_masks=False,
        objective=Objective("published"),
        schedule=Schedule(lambdas=(0.002,), steps=1, lr=0.2, patience=0),
    )
    poisoned(monkeypatch, 4, float("nan"))
    found = learn(seeds=(0,), own_masks=False, objective=Objective("published"))
    assert "step 2, on operation" in found.stopped and "mask of step 1 is kept" in found.stopped
    for kind in three.values:
        assert torch.equal(found.values[kind], three.values[kind])


def test_a_mask_on_one_desideratum_that_goes_wrong_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven steps jointly, seven on the first alone; call 16 is step 2 on the second alone."""
    poisoned(monkeypatch, 16, float("nan"))
    found = learn(seeds=(0,))
    assert found.diverged and found.stopped.startswith("alone operation: loss is not finite")
    assert "step 2" in found.stopped


def test_nothing_good_at_all_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    poisoned(monkeypatch, 1, float("nan"))
    with pytest.raises(
        RunError, match="training seed 0: loss is not finite at lambda 0.002, step 1.*no good mask"
    ):
        learn(seeds=(0,))


def test_a_model_that_gives_nan_is_a_failure_that_says_where() -> None:
    """Half precision that overflows, say: here a weight of the last MLP that only the alternates' last token meets."""
    from patchkit.zoo.load import load
    from tests.families import build

    module = build(FAMILY)
    model = load(module)
    triples = random_triples(8, names=("value",))
    marked = [replace(t, alternate_ids=(*t.alternate_ids[:-1], 3)) for t in triples]
    with torch.no_grad():
        module.get_parameter("transformer.wte.weight")[3] = float("nan")
    options = MaskOptions(seeds=(0,), schedule=PLAN, own_masks=False)
    with pytest.raises(RunError, match="loss is not finite at lambda 0.002, step 1, on value"):
        learn_mask(model, marked, options)
