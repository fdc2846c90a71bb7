"""Learned masks against a plain torch loop written from the paper's description, and reuse against whole prompts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from patchkit.data import group
from patchkit.methods import Objective, Schedule
from patchkit.methods._mask_layout import Layout
from patchkit.methods._mask_path import triple_weights
from patchkit.methods._mask_prepared import prepare
from patchkit.methods._mask_train import train_path
from tests.comparisons import pair
from tests.families import FAMILIES, WITHOUT_NEURONS
from tests.methods import plain_mask
from tests.methods.mask_cases import as_example, random_triples

HEADS_AND_MLPS = ("head", "mlp")
OBJECTIVES = [
    Objective("published", "l0.5"),
    Objective("published", "l1"),
    Objective("cross-entropy", "l0.5"),
    Objective("cross-entropy", "l1"),
]


def schedule(**changes: Any) -> Schedule:
    """Fast enough to reach the clamp at both ends in a few steps; every step is taken."""
    usual = {"lambdas": (0.002, 0.02), "steps": 5, "steps_after": 2, "lr": 0.12, "patience": 0}
    return Schedule(**(usual | changes))


def learn(
    family: str, objective: Objective, plan: Schedule, *, seed: int = 0, **options: Any
) -> list[torch.Tensor]:
    """The masks along the path, each desideratum stepped on as the objective asks."""
    model, _ = pair(family)
    components = options.pop("components", HEADS_AND_MLPS)
    layout = Layout.build(components, model.dims)
    groups = group(random_triples(3, split="train"), "train")
    together = (
        [{name: members} for name, members in groups.items()] if objective.alternates_steps else [groups]
    )
    training = [prepare(model, layout, part, **options) for part in together]
    validation = prepare(model, layout, groups, **options)
    return [point.values for point in train_path(layout, training, validation, objective, plan, seed).points]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: f"{o.loss}-{o.sparsity}")
@pytest.mark.parametrize("family", ["llama-gqa", "gpt2", "gemma2-post-norms-softcap", "neox-parallel"])
def test_the_mask_is_that_of_a_plain_torch_loop(family: str, objective: Objective) -> None:
    model, twin = pair(family)
    plan = schedule()
    found = learn(family, objective, plan)
    examples = {
        name: [as_example(triple) for triple in members]
        for name, members in group(random_triples(3, split="train"), "train").items()
    }
    expected = plain_mask.train(
        twin,
        examples,
        model.dims.n_heads,
        model.dims.n_layers,
        loss=objective.loss,
        sparsity=objective.sparsity,
        lambdas=plan.lambdas,
        steps=plan.steps,
        steps_after=plan.steps_after,
        lr=plan.lr,
    )
    assert float(torch.stack(expected).min()) < 0.7, "the masks moved too little to compare"
    torch.testing.assert_close(torch.stack(found), torch.stack(expected), atol=1e-5, rtol=0)


def test_a_mask_at_a_named_position_is_that_of_a_plain_torch_loop() -> None:
    model, twin = pair("llama-gqa")
    plan = schedule(lambdas=(0.002,))
    examples = {
        name: [as_example(triple, "middle") for triple in members]
        for name, members in group(random_triples(3, split="train"), "train").items()
    }
    expected = plain_mask.train(
        twin, examples, model.dims.n_heads, model.dims.n_layers,
        loss="cross-entropy", sparsity="l0.5", lambdas=plan.lambdas, steps=plan.steps, steps_after=1, lr=plan.lr,
    )  # fmt: skip
    found = learn("llama-gqa", Objective("cross-entropy", "l0.5"), plan, position="middle")
    torch.testing.assert_close(found[0], expected[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("position", "components"), [("last", ("head", "mlp")), ("middle", ("q", "v", "neuron"))], ids=str
)
@pytest.mark.parametrize("family", FAMILIES)
def test_reuse_gives_the_mask_of_whole_prompts(
    family: str, position: str, components: tuple[str, ...]
) -> None:
    """Prompts of mixed lengths in padded batches."""
    if family in WITHOUT_NEURONS:
        components = tuple("mlp" if each == "neuron" else each for each in components)
    plan = schedule(lambdas=(0.01,), steps=3)
    objective = Objective("cross-entropy", "l1")
    (plain,) = learn(family, objective, plan, reuse=False, components=components, position=position)
    (reused,) = learn(family, objective, plan, reuse=True, components=components, position=position)
    assert float((plain - 1).abs().max()) > 0.2, "the mask did not move"
    torch.testing.assert_close(reused, plain, atol=1e-5, rtol=0)


def test_the_size_of_batches_does_not_change_the_mask() -> None:
    plan = schedule(lambdas=(0.01,), steps=3)
    objective = Objective("published", "l0.5")
    whole, small = (learn("llama-gqa", objective, plan, max_batch_tokens=budget)[0] for budget in (999, 10))
    assert float((whole - 1).abs().max()) > 0.2
    torch.testing.assert_close(small, whole, atol=1e-5, rtol=0)


def test_without_warm_starts_every_lambda_starts_afresh() -> None:
    objective = Objective("cross-entropy", "l0.5")
    both = learn("gpt2", objective, schedule(lambdas=(0.002, 0.02), steps=5, warm=False))
    alone = learn("gpt2", objective, schedule(lambdas=(0.02,), steps=5))
    warm = learn("gpt2", objective, schedule(lambdas=(0.002, 0.02), steps=5, steps_after=5))
    assert torch.equal(both[1], alone[0])
    assert not torch.allclose(warm[1], alone[0], atol=1e-3)


def test_a_seed_gives_one_mask_and_another_seed_another() -> None:
    objective, plan = Objective("cross-entropy", "l0.5"), schedule(lambdas=(0.05,), steps=3)
    first, again, other, published = (learn("gpt2", objective, plan, seed=seed)[0] for seed in (1, 1, 2, 0))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, atol=1e-3) and not torch.allclose(first, published, atol=1e-3)


def test_seeds_weigh_triples_and_every_desideratum_counts_the_same() -> None:
    """Seed 0 is the plain mean; others draw weights, whose sum over a desideratum is one all the same."""
    model, _ = pair("gpt2")
    layout = Layout.build(HEADS_AND_MLPS, model.dims)
    triples = group(random_triples(6, split="train"), "train")
    triples["operation"] = triples["operation"][:2]
    prepared = prepare(model, layout, triples, max_batch_tokens=20)
    assert len(prepared.sessions[0].batches) > 2
    for seed in (None, 1, 2):
        weights = triple_weights(prepared, None if seed is None else torch.Generator().manual_seed(seed))
        torch.testing.assert_close(weights[:6].sum(), torch.tensor(1.0))
        torch.testing.assert_close(weights[6:].sum(), torch.tensor(1.0))
        even = torch.tensor([1 / 6] * 6 + [1 / 2] * 2)
        assert torch.allclose(weights, even) == (seed is None)


def test_a_lambda_is_done_when_its_set_has_stopped_changing() -> None:
    model, _ = pair("gpt2")
    layout = Layout.build(HEADS_AND_MLPS, model.dims)
    ready = prepare(model, layout, group(random_triples(3, split="train"), "train"))
    # So heavy a price that no component ever leaves: nothing changes from the first look on.
    plan = Schedule(lambdas=(1e3, 2e3), steps=40, steps_after=40, check_every=2, patience=3)
    path = train_path(layout, [ready], ready, Objective(), plan, seed=0)
    assert [point.steps for point in path.points] == [8] and not path.points[0].chosen
    assert "lambda 1000" in path.stopped and not path.diverged
    assert [row["step"] for row in path.history] == [2, 4, 6, 8]


def test_a_path_that_starts_slowly_or_grows_lighter_is_tried_to_its_end() -> None:
    """Patching nothing so far is a reason to stop only where a heavier price has pushed everything back."""
    objective = Objective("cross-entropy", "l1")
    slow = learn("gpt2", objective, schedule(lambdas=(0.0, 0.0), steps=2, steps_after=8, lr=0.1))
    assert not (slow[0] < 0.5).any() and (slow[1] < 0.5).any()
    lighter = learn("gpt2", objective, schedule(lambdas=(1e3, 0.0), steps=2, steps_after=8, lr=0.1))
    assert bool((lighter[0] == 1).all()) and (lighter[1] < 0.5).any()
