"""Verification of an attribution: who is patched, what exact patching says about them, and what cannot be verified."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from patchkit.errors import InputError
from patchkit.methods._node_options import NodeOptions
from patchkit.methods.activation_patching import patch_nodes
from patchkit.methods.attribution import attribute
from patchkit.methods.verification import _compare, strata_of, stratified_sample, verify
from patchkit.model import Dims, NodeGrid
from patchkit.results.scores import Convention, Scores
from tests.comparisons import agree, pair
from tests.node_oracle import LONG, MIDDLE, SHORT, check_scores

PAIRS = [LONG, SHORT]
OPTIONS = NodeOptions(nodes=("q", "k", "z", "mlp_out"), positions="s,-1")


# The sample.


@settings(deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(0, 40), st.integers(0, 99))
def test_a_sample_is_spread_over_the_strata_as_evenly_as_their_sizes_allow(
    sizes: list[int], n: int, seed: int
) -> None:
    strata = [f"q.{stratum}" for stratum, size in enumerate(sizes) for _ in range(size)]
    drawn = stratified_sample(strata, n, torch.Generator().manual_seed(seed)).tolist()
    assert len(drawn) == len(set(drawn)) == min(n, len(strata))
    counts = Counter(strata[place] for place in drawn)
    # No stratum could take one more while another has two fewer.
    for one, size in enumerate(sizes):
        for other in range(len(sizes)):
            if counts[f"q.{one}"] < size:
                assert counts[f"q.{other}"] <= counts[f"q.{one}"] + 1
    if n >= len(sizes):
        assert len(counts) == len(sizes), "every stratum is hit"


def test_a_sample_is_uniform_within_and_among_strata() -> None:
    strata = ["a"] * 4 + ["b"] * 4 + ["c"] * 4
    drawn = Counter(
        place
        for seed in range(600)
        for place in stratified_sample(strata, 2, torch.Generator().manual_seed(seed)).tolist()
    )
    # 100 are expected of each, with a standard deviation of 9.
    assert len(drawn) == 12 and all(60 < count < 140 for count in drawn.values())
    again = stratified_sample(strata, 5, torch.Generator().manual_seed(1))
    assert torch.equal(again, stratified_sample(strata, 5, torch.Generator().manual_seed(1)))


def test_strata_are_kinds_and_layers() -> None:
    grid = NodeGrid(pair("llama-gqa")[0].dims, ("q", "mlp_out"), ("0", "-1"), True)
    names = strata_of(grid, grid.select(["q.1.h3", "m2@-1", "q.0.h0@0"]))
    assert names == ["q.0", "q.1", "q.1", "mlp_out.2"]


# By hand.


def by_hand(estimates: Sequence[Sequence[float]], exact: Sequence[Sequence[float]]) -> tuple[Scores, Scores]:
    """Scores of one MLP a layer, pairs by layers."""
    dims = Dims(len(estimates[0]), 1, 1, 4, 4, 4, 10, parallel=False)
    convention = Convention(metric="logit-diff", direction="noise", ablation="resample", positions="all")

    def scores(method: str, effects: Tensor) -> Scores:
        none = torch.zeros(len(effects))
        ids = tuple(str(row) for row in range(len(effects)))
        return Scores(
            *(NodeGrid(dims, ("mlp_out",)), method, convention, ids, effects, effects.abs(), none, none, 1.5)
        )

    return scores("atp", torch.tensor(estimates)), scores("exact", torch.tensor(exact))


def test_rank_correlation_and_signs_by_hand() -> None:
    estimated, exact = by_hand(
        # Means of |.|: 4, 3, 2.5, 1, 0.5, 0.25; signed: 4, -3, 0, 1, -0.5, 0.25.
        [[4.0, -3.0, 2.5, 1.0, -0.5, 0.25], [4.0, -3.0, -2.5, 1.0, -0.5, 0.25]],
        # Means of |.|: 2, 5, 1, 0, 3, 3; signed: 2, -5, 1, 0, 3, 3.
        [[1.0, -5.0, 1.0, 0.0, 3.0, 3.0], [3.0, -5.0, 1.0, 0.0, 3.0, 3.0]],
    )
    found = _compare(estimated, exact, torch.tensor([0, 1, 2]), torch.tensor([3, 4, 5]), computed=8)
    assert (found.k, found.sampled, found.unverified, found.cost) == (3, 3, 2, 1.5)
    # Top: ranks 3 2 1 against 2 3 1: 1 - 6 * 2 / (3 * 8) = 1/2.
    assert found.rank_correlation["top"] == pytest.approx(0.5, rel=1e-12)
    # Sample: ranks 3 2 1 against 1, 2.5, 2.5: covariance -1.5 over sqrt(2 * 1.5).
    assert found.rank_correlation["sample"] == pytest.approx(-1.5 / 3**0.5, rel=1e-12)
    # All: ranks 6 5 4 3 2 1 against 3, 6, 2, 1, 4.5, 4.5: d = 3, -1, 2, 2, -2.5, -3.5.
    covariance = 17.5 - (9 + 1 + 4 + 4 + 6.25 + 12.25) / 2 - (17.5 - 17.0) / 2
    assert found.rank_correlation["all"] == pytest.approx(covariance / (17.5 * 17.0) ** 0.5, rel=1e-12)
    # Node 2 is 0 signed, which agrees with no sign; node 3 has no exact effect, and so no sign.
    assert found.sign_agreement == {"top": 2 / 3, "sample": 1 / 2, "all": 3 / 5}
    # The least exact effect of the top is 1.
    assert found.missed == ["m4", "m5"]
    assert [node.node for node in found.nodes] == ["m0", "m1", "m2", "m3", "m4", "m5"]
    assert [node.group for node in found.nodes] == ["top"] * 3 + ["sample"] * 3
    node = found.nodes[1]
    assert (node.number, node.estimate, node.signed, node.exact, node.exact_signed, node.stratum) == (
        *(1, 3.0, -3.0, 5.0, -5.0),
        "mlp_out.1",
    )


def test_correlations_and_signs_of_nothing_are_none() -> None:
    estimated, exact = by_hand([[2.0, 1.0]], [[0.0, 0.0]])
    found = _compare(estimated, exact, torch.tensor([0, 1]), torch.tensor([], dtype=torch.long), computed=2)
    assert set(found.rank_correlation.values()) == {None} and set(found.sign_agreement.values()) == {None}
    assert found.missed == [] and found.sampled == 0


# On a model.


@pytest.mark.parametrize("method", ["atp", "atp-star"])
def test_the_top_and_the_sample_are_patched_exactly(method: str) -> None:
    model, twin = pair("llama-gqa", torch.float64)
    scores = attribute(model, PAIRS, OPTIONS, method)  # type: ignore[arg-type]
    found = verify(model, PAIRS, scores, OPTIONS, k=5, sample=14)
    exact = patch_nodes(model, PAIRS, OPTIONS)
    check_scores(twin, PAIRS, exact, per_layer=1)
    assert (found.k, found.sampled, found.unverified) == (5, 14, len(scores.grid) - 19)
    assert [node.number for node in found.nodes[:5]] == scores.order()[:5].tolist()
    assert len({node.number for node in found.nodes}) == 19
    # Four kinds at three layers, and 14 are enough for all of them.
    assert len({node.stratum for node in found.nodes[5:]}) == 12
    for node in found.nodes:
        assert scores.grid.name(node.number) == node.node
        assert node.exact == pytest.approx(float(exact.mean_abs()[node.number]), abs=1e-10)
        assert node.exact_signed == pytest.approx(float(exact.mean()[node.number]), abs=1e-10)
        assert node.estimate == pytest.approx(float(scores.mean_abs()[node.number]), abs=1e-12)
        assert node.signed == pytest.approx(float(scores.mean()[node.number]), abs=1e-12)
    least = min(node.exact for node in found.nodes[:5])
    assert found.missed == [node.node for node in found.nodes[5:] if node.exact > least]
    assert 0 < found.cost < exact.cost


def test_as_many_are_drawn_as_are_on_top_and_the_seed_says_which() -> None:
    model, _ = pair("llama-gqa")
    scores = attribute(model, PAIRS, OPTIONS)
    first, second = (verify(model, PAIRS, scores, OPTIONS, k=6) for _ in range(2))
    assert first == second and first.sampled == 6
    other_options = NodeOptions(nodes=OPTIONS.nodes, positions=OPTIONS.positions, seed=1)
    other = verify(model, PAIRS, scores, other_options, k=6)
    assert [node.node for node in other.nodes] != [node.node for node in first.nodes]
    assert other.nodes[:6] == first.nodes[:6]


def test_more_than_there_are_is_all_of_them() -> None:
    model, _ = pair("llama-gqa")
    options = NodeOptions(nodes=("a1.h0", "a1.h2", "mlp_out"))
    scores = attribute(model, PAIRS, options)
    for k, sample, sampled in ((99, None, 0), (3, 99, 2), (5, 0, 0)):
        found = verify(model, PAIRS, scores, options, k=k, sample=sample)
        assert (found.k, found.sampled, found.unverified) == (min(k, 5), sampled, 0)
        assert {node.node for node in found.nodes} == {"a1.h0", "a1.h2", "m0", "m1", "m2"}


@pytest.mark.parametrize("ablation", ["zero", "mean", "noise"])
def test_what_is_put_in_is_what_the_estimate_put_in(ablation: str) -> None:
    model, _ = pair("llama-gqa", torch.float64)
    pairs = [LONG, MIDDLE]
    reference = pairs if ablation == "mean" else None
    options = NodeOptions(nodes=("mlp_out",), ablation=ablation, seed=5)  # type: ignore[arg-type]
    scores = attribute(model, pairs, options, reference=reference)
    found = verify(model, pairs, scores, options, k=3, reference=reference)
    exact = patch_nodes(model, pairs, options, reference=reference)
    agree(
        torch.tensor([node.exact for node in found.nodes]).double(),
        exact.mean_abs()[[node.number for node in found.nodes]],
        ablation,
        1e-6,
    )


def test_scores_of_something_else_are_refused() -> None:
    model, _ = pair("llama-gqa")
    scores = attribute(model, PAIRS, OPTIONS)
    says = "the scores to check are of other pairs or nodes, or of another convention"
    with pytest.raises(InputError, match=says):
        verify(model, PAIRS[::-1], scores, OPTIONS, k=3)
    for other in (
        NodeOptions(nodes=OPTIONS.nodes, positions="s,0"),
        NodeOptions(nodes=OPTIONS.nodes, positions="s,-1", direction="denoise"),
        NodeOptions(nodes=OPTIONS.nodes, positions="s,-1", metric="prob-diff"),
        NodeOptions(nodes=OPTIONS.nodes, positions="s,-1", ablation="zero"),
        # The same convention and another grid, whose numbers mean other nodes.
        NodeOptions(nodes=("q", "k", "z"), positions="s,-1"),
        NodeOptions(nodes=("q", "k", "z", "attn_out"), positions="s,-1"),
    ):
        with pytest.raises(InputError, match=says):
            verify(model, PAIRS, scores, other, k=3)
    grouped = NodeOptions(nodes=("neuron",), group=8)
    with pytest.raises(InputError, match=says):
        verify(model, PAIRS, attribute(model, PAIRS, grouped), NodeOptions(nodes=("neuron",), group=4), k=3)


def test_numbers_of_nodes_that_mean_nothing_are_refused() -> None:
    model, _ = pair("llama-gqa")
    scores = attribute(model, PAIRS, OPTIONS)
    with pytest.raises(InputError, match="verify: expected at least 1 node to patch, found 0"):
        verify(model, PAIRS, scores, OPTIONS, k=0)
    with pytest.raises(InputError, match="sample: expected at least 0 nodes, found -1"):
        verify(model, PAIRS, scores, OPTIONS, k=1, sample=-1)
