"""On a trained model nothing is known for certain; a mask must still be far better than every baseline of its size."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from patchkit.data import Triple, from_dataset
from patchkit.methods import MaskOptions, Schedule, learn_mask
from patchkit.tasks import variable_binding as task
from patchkit.tasks.building import Split
from patchkit.zoo.load import load

#: Beside `make test`, in a lane of its own.
pytestmark = pytest.mark.slow


def draw(tokenizer: object, split: Split, n: int) -> Sequence[Triple]:
    pair = (task.value_dependence, task.operation_invariance)
    return [
        triple
        for desideratum in pair
        for triple in from_dataset(desideratum(tokenizer, n, 0, split, form="symbol"))  # type: ignore[arg-type]
    ]


def test_a_small_mask_on_the_trained_model_beats_its_baselines() -> None:
    """A few triples and steps: the sparse set that moves the value and leaves the operation, on bindings not seen."""
    model = load("varbind-llama")
    triples = [*draw(model.tokenizer, "train", 64), *draw(model.tokenizer, "test", 40)]
    options = MaskOptions(
        seeds=(0,),
        own_masks=False,
        random_sets=8,
        # Enough of them that pruning can tell a component that is needed now and then.
        validation_fraction=0.5,
        schedule=Schedule(lambdas=(0.02, 0.08), steps=60, steps_after=30, lr=0.05),
    )
    found = learn_mask(model, triples, options)
    assert found.joint["chosen"] >= 0.8
    assert found.joint["empty"] <= 0.1 and found.joint["complement"] <= 0.3
    assert max(found.random_joint) < found.joint["chosen"] - 0.3
    assert 0 < found.fraction <= 0.34
    by_name = {d.name: d for d in found.desiderata}
    assert (
        by_name["value_dependence"].kind == "dependence"
        and by_name["operation_invariance"].kind == "invariance"
    )
    assert by_name["operation_invariance"].test.all <= 0.1, "patching everything takes the alternate's answer"
    assert found.excluded == {}
