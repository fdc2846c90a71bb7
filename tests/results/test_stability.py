"""Bootstraps of a selection, against the same draws done one by one with sets."""

from __future__ import annotations

import itertools
from typing import Literal

import pytest
import torch
from torch import Tensor

from patchkit.errors import InputError
from patchkit.model import EdgeGraph
from patchkit.results import stability as module
from patchkit.results.circuit import greedy, top_n
from patchkit.results.stability import stability

GRAPH = EdgeGraph(2, 2, 1, False, 4)
SELECTIONS = {"top": top_n, "greedy": greedy}


def importances(pairs: int, noise: float, seed: int = 0) -> Tensor:
    """The same for all pairs, and noise of each one's own."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(GRAPH.real.shape, generator=generator)
    own = torch.randn(pairs, *GRAPH.real.shape, generator=generator)
    return (common + noise * own).where(GRAPH.real, float("nan"))


def naive(per_pair: Tensor, n: int, selection: str, absolute: bool, draws: int, seed: int) -> list[set[str]]:
    """The circuit of every draw, one after the other."""
    drawn = torch.randint(
        len(per_pair), (draws, len(per_pair)), generator=torch.Generator().manual_seed(seed)
    )
    found = []
    for row in drawn:
        mean = torch.stack([per_pair[pair] for pair in row.tolist()]).double().mean(0)
        found.append(set(SELECTIONS[selection](GRAPH, mean, n, absolute=absolute).pruned().names()))
    return found


@pytest.mark.parametrize("selection", ["top", "greedy"])
@pytest.mark.parametrize("absolute", [False, True])
def test_draws_are_what_doing_them_one_by_one_gives(
    selection: Literal["top", "greedy"], absolute: bool
) -> None:
    per_pair = importances(7, noise=1.5)
    result = stability(per_pair, GRAPH, 15, selection=selection, absolute=absolute, draws=12, seed=3)
    draws = naive(per_pair, 15, selection, absolute, 12, 3)
    jaccards = [len(a & b) / len(a | b) if a | b else 1.0 for a, b in itertools.combinations(draws, 2)]
    assert len(set(jaccards)) > 5, "all draws are alike, so nothing is tested"
    assert result.jaccard == pytest.approx(sum(jaccards) / len(jaccards))
    assert result.interval == pytest.approx(
        torch.quantile(
            torch.tensor(jaccards, dtype=torch.float64), torch.tensor([0.025, 0.975]).double()
        ).tolist()
    )
    whole = SELECTIONS[selection](GRAPH, per_pair.double().mean(0), 15, absolute=absolute).pruned()
    assert [name for name, _ in result.frequency] == whole.names()
    for name, share in result.frequency:
        assert share == pytest.approx(sum(name in draw for draw in draws) / 12)
    assert (result.draws, result.requested) == (12, 15)


def test_memory_does_not_change_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    per_pair = importances(5, noise=1.0)
    whole = stability(per_pair, GRAPH, 15, draws=9)
    monkeypatch.setattr(module, "_AT_ONCE", 60)
    assert stability(per_pair, GRAPH, 15, draws=9) == whole
    assert stability(per_pair, GRAPH, 15, draws=9, seed=1) != whole


def test_pairs_that_agree_give_one_circuit() -> None:
    result = stability(importances(4, noise=0.0), GRAPH, 15, draws=5)
    assert result.jaccard == 1.0 and result.interval == (1.0, 1.0)
    assert {share for _, share in result.frequency} == {1.0}


def test_noise_makes_a_selection_less_stable() -> None:
    means = [stability(importances(6, noise), GRAPH, 20, draws=20).jaccard for noise in (0.05, 0.5, 5.0)]
    assert means == sorted(means, reverse=True) and means[0] > means[2] + 0.2


def test_signs_count_unless_they_are_left_out() -> None:
    """An edge whose sign changes from pair to pair is never among the largest by size of the mean."""
    per_pair = importances(2, noise=0.0).nan_to_num(0.0).abs()
    edge = GRAPH.find_edge("input->logits")
    per_pair[0][edge], per_pair[1][edge] = 50.0, -50.0
    result = stability(per_pair, GRAPH, 25, absolute=True, draws=40)
    # In half of the draws both pairs are there and it is 0.
    assert not any(name == "input->logits" for name, _ in result.frequency)


def test_what_cannot_be_resampled_is_refused() -> None:
    per_pair = importances(3, noise=1.0)
    unscored = per_pair.clone()
    unscored[1][GRAPH.find_edge("m0->logits")] = float("nan")
    for values, changed, words in (
        (per_pair[:1], {}, "at least 2 pairs and 2 draws, found 1 and 100"),
        (per_pair, {"draws": 1}, "found 3 and 1"),
        (per_pair, {"n": 0}, "0 edges by selection 'top' leave nothing after pruning"),
        (per_pair, {"n": 1000}, "1000 edges were asked for; the graph has"),
        (per_pair[:, 1:], {}, "importances of single pairs: expected shape"),
        (unscored, {}, r"edge m0->logits has no score"),
    ):
        with pytest.raises(InputError, match=words):
            stability(values, GRAPH, **({"n": 15} | changed))
