"""Means, orders and intervals of scores against hand-made numbers and slow loops; conventions that do not mix."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from patchkit.errors import InputError
from patchkit.model import Dims, NodeGrid
from patchkit.results.scores import Convention, Scores, check_same_convention

NAN = float("nan")
DIMS = Dims(n_layers=2, n_heads=4, n_kv_heads=2, d_head=3, d_model=12, d_mlp=5, vocab_size=20, parallel=False)
CONVENTION = Convention(metric="logit-diff", direction="noise", ablation="resample", positions="last")


def make(effects: Tensor, grid: NodeGrid | None = None, **changed: Any) -> Scores:
    """Scores of a grid of 8 heads unless another is given; magnitudes are |effects|."""
    pairs = len(effects)
    fields: dict[str, Any] = {
        "grid": grid or NodeGrid(DIMS, ("z",)),
        "method": "exact",
        "convention": CONVENTION,
        "pair_ids": tuple(f"p{i}" for i in range(pairs)),
        "effects": effects,
        "magnitudes": effects.abs(),
        "base_metric": torch.arange(pairs, dtype=torch.float32),
        "source_metric": torch.full((pairs,), -1.0),
        "cost": 2.5,
    }
    return Scores(**(fields | changed))


@pytest.fixture
def opposite() -> Scores:
    """Two pairs; node 3 is +2 and -2, node 5 was not asked for."""
    return make(
        torch.tensor(
            [
                [0.0, 1.0, -3.0, 2.0, 0.5, NAN, 0.25, 0.0],
                [0.0, 0.0, -1.0, -2.0, 0.5, NAN, 0.25, 0.0],
            ]
        )
    )


def test_the_absolute_value_is_inside_the_mean(opposite: Scores) -> None:
    assert opposite.mean().tolist()[:5] == [0.0, 0.5, -2.0, 0.0, 0.5]
    assert opposite.mean_abs().tolist()[:5] == [0.0, 0.5, 2.0, 2.0, 0.5]
    assert bool(opposite.mean()[5].isnan()) and bool(opposite.mean_abs()[5].isnan())


def test_magnitudes_are_what_is_ranked() -> None:
    effects = torch.tensor([[0.0, 1.0, 0.5, 0.0, 0.0, 0.0, 0.0, 0.0]])
    scores = make(effects, magnitudes=torch.tensor([[3.0, 1.0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0]]))
    assert scores.top(3) == [("a0.h0", 0.0, 3.0), ("a0.h2", 0.5, 2.0), ("a0.h1", 1.0, 1.0)]


def test_top_and_order_skip_what_was_not_asked_for(opposite: Scores) -> None:
    # Nodes 2 and 3 tie, as do 1 and 4: by number.
    assert opposite.order().tolist() == [2, 3, 1, 4, 6, 0, 7]
    assert opposite.top(3) == [("a0.h2", -2.0, 2.0), ("a0.h3", 0.0, 2.0), ("a0.h1", 0.5, 0.5)]
    assert opposite.top(9, "positive") == [("a0.h1", 0.5, 0.5), ("a1.h0", 0.5, 0.5), ("a1.h2", 0.25, 0.25)]
    assert opposite.top(9, "negative") == [("a0.h2", -2.0, 2.0)]
    assert len(opposite.top(100)) == 7
    assert opposite.top(0) == []
    with pytest.raises(InputError, match="top by 'size': expected abs, positive or negative"):
        opposite.top(3, "size")


@pytest.mark.parametrize(
    ("placed", "kind", "axes", "shape"),
    [
        (False, "z", ("layer", "head"), (2, 4)),
        (False, "k", ("layer", "head"), (2, 2)),
        (False, "neuron", ("layer", "neuron"), (2, 5)),
        (False, "mlp_out", ("layer",), (2,)),
        (True, "z", ("layer", "position", "head"), (2, 3, 4)),
        (True, "k", ("layer", "position", "head"), (2, 3, 2)),
        (True, "neuron", ("layer", "position", "neuron"), (2, 3, 5)),
        (True, "mlp_out", ("layer", "position"), (2, 3)),
    ],
)
def test_each_kind_has_the_contracts_axes(
    placed: bool, kind: str, axes: tuple[str, ...], shape: tuple[int, ...]
) -> None:
    places = ("0", "1", "2") if placed else ("last",)
    grid = NodeGrid(DIMS, ("z", "k", "neuron", "mlp_out"), places, placed)
    scores = make(torch.randn(3, len(grid)), grid)
    assert grid.axes(kind) == axes
    assert tuple(scores.mean(kind).shape) == tuple(scores.mean_abs(kind).shape) == shape


def test_a_name_leads_to_its_number() -> None:
    grid = NodeGrid(DIMS, ("z", "k", "neuron"), ("0", "1"), True)
    effects = torch.zeros(1, len(grid))
    effects[0, grid.find("a1.h2@1")] = 7.0
    effects[0, grid.find("k.0.h1@0")] = 6.0
    effects[0, grid.find("m1.n4@1")] = 5.0
    scores = make(effects, grid)
    assert [name for name, _, _ in scores.top(3)] == ["a1.h2@1", "k.0.h1@0", "m1.n4@1"]
    assert float(scores.mean("z")[1, 1, 2]) == 7.0
    assert float(scores.mean("k")[0, 0, 1]) == 6.0
    assert float(scores.mean("neuron")[1, 1, 4]) == 5.0
    with pytest.raises(InputError, match="node kind 'q': these scores have k, z, neuron"):
        scores.mean("q")


@pytest.mark.parametrize("of", [None, [6, 0, 5]])
def test_the_interval_is_a_bootstrap_over_pairs(of: list[int] | None) -> None:
    torch.manual_seed(0)
    effects = torch.randn(6, 8)
    effects[:, 5] = NAN
    scores = make(effects)
    low, high = scores.interval(0.9, 200, seed=3, of=None if of is None else torch.tensor(of))
    drawn = torch.randint(6, (200, 6), generator=torch.Generator().manual_seed(3)).tolist()
    for place, node in enumerate(range(8) if of is None else of):
        if node == 5:
            assert bool(low[place].isnan()) and bool(high[place].isnan())
            continue
        means = [sum(float(effects[pair, node]) for pair in sample) / 6 for sample in drawn]
        expected = np.quantile(means, [0.05, 0.95])
        np.testing.assert_allclose([float(low[place]), float(high[place])], expected, rtol=0, atol=1e-6)
        assert float(low[place]) < float(scores.mean()[node]) < float(high[place])


def test_one_pair_has_no_interval() -> None:
    low, high = make(torch.ones(1, 8)).interval()
    assert bool(low.isnan().all()) and bool(high.isnan().all())
    for level, draws in ((0.0, 10), (1.0, 10), (0.9, 0)):
        with pytest.raises(InputError, match="bootstrap at level"):
            make(torch.ones(1, 8)).interval(level, draws)


def test_the_order_of_pairs_does_not_matter() -> None:
    torch.manual_seed(1)
    # Sizes apart: a float32 sum would depend on the order.
    effects = torch.randn(500, 8) * torch.logspace(-3, 4, 500)[:, None]
    shuffled = make(effects[torch.randperm(500)])
    scale = float(effects.abs().mean())
    for name in ("mean", "mean_abs"):
        difference = (getattr(make(effects), name)() - getattr(shuffled, name)()).abs().max()
        assert float(difference) <= 1e-6 * scale


def test_tables_have_one_row_a_computed_node(opposite: Scores) -> None:
    table = opposite.to_pandas()
    assert list(table.columns) == ["node", "kind", "layer", "unit", "effect", "effect_abs"]
    assert table.index.tolist() == [0, 1, 2, 3, 4, 6, 7]
    assert table.loc[3].tolist() == ["a0.h3", "z", 0, 3, 0.0, 2.0]
    grid = NodeGrid(DIMS, ("neuron", "z"), ("x", "-1"), True, group=2)
    table = make(torch.arange(float(len(grid)))[None], grid).to_pandas()
    assert list(table.columns) == ["node", "kind", "layer", "position", "unit", "effect", "effect_abs"]
    assert table["node"].tolist() == grid.names()
    last = table.iloc[-1].tolist()
    assert last == ["m1.n4-4@-1", "neuron", 1, "-1", 2, float(len(grid) - 1), float(len(grid) - 1)]


def test_parts_that_do_not_fit_are_refused() -> None:
    words = r"effects of 1 pairs and 8 nodes: expected shape \[1, 8\], found \[1, 7\]"
    with pytest.raises(InputError, match=words):
        make(torch.zeros(1, 7))
    with pytest.raises(InputError, match=r"expected shape \[2, 8\], found \[1, 8\]"):
        make(torch.zeros(1, 8), pair_ids=("a", "b"))


def test_no_pairs_are_refused() -> None:
    with pytest.raises(InputError, match="at least one pair"):
        make(torch.zeros(0, 8))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("metric", "prob-diff"),
        ("direction", "denoise"),
        ("ablation", "zero"),
        ("positions", "all"),
        ("patching", "edge"),
    ],
)
def test_different_conventions_are_not_compared(field: str, value: str) -> None:
    other = CONVENTION.model_copy(update={field: value})
    check_same_convention(CONVENTION, CONVENTION.model_copy())
    mine = getattr(CONVENTION, field)
    with pytest.raises(InputError, match=f"{field} '{mine}' and '{value}'") as caught:
        check_same_convention(CONVENTION, other)
    assert all(name not in str(caught.value) for name in Convention.model_fields if name != field)


def test_results_are_compared_by_their_conventions() -> None:
    scores = make(torch.zeros(1, 8))
    check_same_convention(scores, make(torch.ones(1, 8)))
    other = make(
        torch.ones(1, 8), convention=CONVENTION.model_copy(update={"metric": "kl", "ablation": "mean"})
    )
    with pytest.raises(
        InputError, match="metric 'logit-diff' and 'kl'; ablation 'resample' and 'mean'; run both"
    ):
        check_same_convention(scores, other)
