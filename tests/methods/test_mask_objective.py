"""Losses, penalties and gates: values and slopes worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from patchkit.data import Triple
from patchkit.errors import InputError
from patchkit.methods import Objective
from patchkit.methods._mask_layout import Layout
from patchkit.methods._mask_objective import DirectMask, HardConcreteMask, row_losses
from patchkit.methods._mask_prepare import Chunk
from patchkit.methods._mask_prepared import prepare
from patchkit.methods._mask_schedule import Schedule
from patchkit.methods._mask_train import train_path
from tests.comparisons import pair
from tests.methods.mask_cases import chunks, handmade_triples


def chunk(target: list[int], rival: list[int], invariant: list[bool], base: list[float]) -> Chunk:
    """A chunk of which only what the losses read is real."""
    model, _ = pair("gpt2")
    layout = Layout.build(("mlp",), model.dims)
    triples = [Triple("any", (5, 6), (7, 8), 3, original_answer_id=4, alternate_answer_id=3)] * len(target)
    (made,) = chunks(prepare(model, layout, {"any": triples}))
    return replace(
        made,
        target=torch.tensor(target),
        rival=torch.tensor(rival),
        invariant=torch.tensor(invariant),
        base_difference=torch.tensor(base),
    )


def test_published_losses_by_hand() -> None:
    """A dependence costs 5 (d0 - d), an invariance (d - d0)^2."""
    logits = torch.tensor([[1.0, 4.0, 2.0], [1.0, 4.0, 2.0]], requires_grad=True)
    case = chunk([1, 2], [2, 0], [False, True], [0.5, -1.0])
    # Row 0: d = 4 - 2 = 2, d0 = 0.5. Row 1: d = 2 - 1 = 1, d0 = -1.
    losses = row_losses("published", logits, case)
    assert losses.tolist() == [-7.5, 4.0]
    losses.sum().backward()
    assert logits.grad is not None
    assert logits.grad.tolist() == [[0.0, -5.0, 5.0], [-4.0, 0.0, 4.0]]


def test_cross_entropy_by_hand() -> None:
    logits = torch.tensor([[0.0, math.log(3.0)], [0.0, math.log(3.0)]], requires_grad=True)
    losses = row_losses("cross-entropy", logits, chunk([1, 0], [0, 1], [False, True], [0.0, 0.0]))
    assert losses.tolist() == pytest.approx([math.log(4 / 3), math.log(4)])
    losses.sum().backward()
    assert logits.grad is not None
    assert logits.grad.flatten().tolist() == pytest.approx([0.25, -0.25, -0.75, 0.75])


def slope(mask: DirectMask) -> Tensor:
    (gradient,) = torch.autograd.grad(mask.penalty(), mask.values)
    return gradient


@pytest.mark.parametrize("lam", [0.01, 2.0])
def test_the_half_norm_is_steepest_where_everything_is_kept(lam: float) -> None:
    mask = DirectMask(torch.tensor([1.0, 0.0, 0.5]), "l0.5", lam)
    expected = [0.001**0.5, 1.001**0.5, 0.501**0.5]
    assert float(mask.penalty().detach()) == pytest.approx(lam * sum(expected), rel=1e-4)
    at_one, at_zero, at_half = (slope(mask) / lam).tolist()
    assert at_one == pytest.approx(-15.811, rel=1e-3)
    assert at_zero == pytest.approx(-0.49975, rel=1e-3)
    assert at_half == pytest.approx(-0.5 / 0.501**0.5, rel=1e-3)


def test_the_one_norm_costs_the_same_everywhere() -> None:
    mask = DirectMask(torch.tensor([1.0, 0.0, 0.5]), "l1", 0.3)
    assert float(mask.penalty().detach()) == pytest.approx(0.45)
    assert slope(mask).tolist() == pytest.approx([-0.3] * 3)


def test_values_are_clamped_before_use_and_in_the_end() -> None:
    start = torch.tensor([1.4, -0.2, 0.3])
    mask = DirectMask(start, "l0.5", 0.1)
    assert mask.final().tolist() == pytest.approx([1.0, 0.0, 0.3])
    mask.before_step()
    assert mask.sample().tolist() == pytest.approx([1.0, 0.0, 0.3])
    assert torch.isfinite(slope(mask)).all()
    assert start.tolist() == pytest.approx([1.4, -0.2, 0.3]), "the start is not written to"


def gates(alpha: list[float], seed: int = 0) -> HardConcreteMask:
    mask = HardConcreteMask(torch.ones(len(alpha)), 0.3, seed)
    with torch.no_grad():
        mask.alpha.copy_(torch.tensor(alpha))
    return mask


def test_the_gate_is_open_as_often_as_the_closed_form_says() -> None:
    """Monte Carlo over the very samples that training uses; the closed form is the penalty's, at multipliers (1, 0)."""
    for alpha in (-3.0, -1.0, 0.0, 1.5, 3.0):
        mask = gates([alpha] * 40_000)
        patched = float((mask.sample().detach() < 1).float().mean())
        closed = 1 / (1 + math.exp(-(alpha - 2 / 3 * math.log(0.1 / 1.1))))
        assert patched == pytest.approx(closed, abs=4 * math.sqrt(closed * (1 - closed) / 40_000))
        with torch.no_grad():
            mask.multipliers.copy_(torch.tensor([1.0, 0.0]))
        assert float(mask.penalty().detach()) == pytest.approx(closed - 0.3, abs=1e-5)


def test_gates_are_between_keeping_and_patching_and_reach_both() -> None:
    sample = gates([0.0] * 10_000).sample().detach()
    assert float(sample.min()) == 0 and float(sample.max()) == 1
    middle = ((sample > 0) & (sample < 1)).float().mean()
    assert 0.2 < float(middle) < 0.9
    assert gates([-5.0, 0.0, 5.0]).final().tolist() == pytest.approx([1.0, 0.5, 0.0])


def test_the_gates_penalty_is_the_lagrangian_by_hand() -> None:
    mask = gates([0.0, 2.0])
    with torch.no_grad():
        mask.multipliers.copy_(torch.tensor([2.0, 3.0]))
    shift = 2 / 3 * math.log(0.1 / 1.1)
    mean = (1 / (1 + math.exp(shift)) + 1 / (1 + math.exp(shift - 2))) / 2
    excess = mean - 0.3
    assert float(mask.penalty().detach()) == pytest.approx(2 * excess + 3 * excess**2, rel=1e-5)


@pytest.mark.parametrize(("alpha", "too_many"), [(3.0, True), (-6.0, False)])
def test_multipliers_climb_while_the_target_is_missed(alpha: float, too_many: bool) -> None:
    """The linear one rises when too many are patched and falls when too few; the square's always rises."""
    mask = gates([alpha] * 4)
    optimiser = torch.optim.Adam(mask.parameters, lr=0.1)
    for _ in range(3):
        mask.penalty().backward()
        mask.after_backward()
        optimiser.step()
        optimiser.zero_grad()
    linear, square = mask.multipliers.tolist()
    assert (linear > 0) == too_many and square > 0
    assert (float(mask.alpha[0].detach()) < alpha) == too_many, "alpha goes down the penalty while they climb"


def test_the_starting_point_decides_how_likely_a_gate_is_open() -> None:
    low, middle, high = HardConcreteMask(torch.tensor([0.0, 0.5, 1.0]), 0.3, 0).alpha.tolist()
    assert (low, middle, high) == pytest.approx((math.log(19), 0.0, -math.log(19)))


def test_seeds_draw_different_gates_and_one_seed_the_same() -> None:
    first, again, other = (gates([0.0] * 50, seed=seed).sample() for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.slow
def test_the_sparsity_target_is_reached() -> None:
    """Half the heads' worth of gates would do no harm on this problem; one in eight is asked for."""
    from patchkit.zoo.load import load

    model = load("handmade-llama")
    layout = Layout.build(("head",), model.dims)
    ready = prepare(model, layout, {"value": handmade_triples(8, seed=1)})
    target = 1 / 8
    plan = Schedule(lambdas=(target,), steps=150, lr=0.08, patience=0)
    path = train_path(layout, [ready], ready, Objective("cross-entropy", "hard-concrete"), plan, seed=0)
    (point,) = path.points
    assert abs(float((1 - point.values).mean()) - target) < 0.06
    assert [layout.names[i] for i in point.chosen] == ["a1.h2"]
    assert point.joint == 1.0


@pytest.mark.parametrize("lam", [0.0, 1.0, -0.1, 1.5])
def test_a_fraction_that_cannot_be_aimed_at_is_refused(lam: float) -> None:
    with pytest.raises(InputError, match="between 0 and 1"):
        Objective("cross-entropy", "hard-concrete").make(torch.ones(3), lam, 0)


def test_objectives_make_their_own_masks() -> None:
    start = torch.tensor([1.0, 0.25])
    for sparsity in ("l0.5", "l1"):
        mask = Objective("published", sparsity).make(start, 0.5, 0)
        assert isinstance(mask, DirectMask) and torch.equal(mask.final(), start)
    assert isinstance(Objective("published", "hard-concrete").make(start, 0.5, 0), HardConcreteMask)
    assert Objective("published").alternates_steps and not Objective("cross-entropy").alternates_steps
