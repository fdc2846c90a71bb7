"""Overlap with a reference, counted with sets, and AUROC, counted pair by pair."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patchkit.errors import InputError
from patchkit.model import EdgeGraph
from patchkit.results.circuit import Circuit
from patchkit.results.overlap import auroc, overlap

GRAPH = EdgeGraph(2, 2, 2, False, 4)
GROUPED = EdgeGraph(2, 4, 2, False, 8)


def brute(scores: list[float], truth: list[bool]) -> float | None:
    """How often a true item is above a false one; half for a tie."""
    pairs = [
        (a, b)
        for a, is_a in zip(scores, truth, strict=True)
        if is_a
        for b, is_b in zip(scores, truth, strict=True)
        if not is_b
    ]
    if not pairs:
        return None
    return sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs) / len(pairs)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), max_size=14))
def test_auroc_is_what_counting_pairs_gives(items: list[tuple[int, bool]]) -> None:
    scores = torch.tensor([float(score) for score, _ in items])
    truth = torch.tensor([flag for _, flag in items], dtype=torch.bool)
    expected, found = brute(scores.tolist(), truth.tolist()), auroc(scores, truth)
    assert (found is None) == (expected is None)
    if found is not None and expected is not None:
        assert found == pytest.approx(expected, abs=1e-12)
        assert auroc(-scores, truth) == pytest.approx(1 - found, abs=1e-12)


def test_auroc_knows_right_from_wrong() -> None:
    truth = torch.tensor([True, True, False, False, False])
    assert auroc(torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0]), truth) == 1.0
    assert auroc(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]), truth) == 0.0
    assert auroc(torch.full((5,), 7.0), truth) == 0.5
    assert auroc(torch.tensor([2.0, 1.0, 1.0, 0.0, 0.0]), truth) == pytest.approx(5.5 / 6)
    assert auroc(torch.rand(5), torch.ones(5, dtype=torch.bool)) is None
    # A million items of one score: ranks do not run out of digits.
    many = torch.arange(1_000_000) % 3 == 0
    assert auroc(torch.zeros(1_000_000), many) == 0.5


def test_auroc_of_what_is_not_scored_is_refused() -> None:
    with pytest.raises(InputError, match="expected a number for every item, found NaN"):
        auroc(torch.tensor([1.0, float("nan")]), torch.tensor([True, False]))


masks = st.lists(st.booleans(), min_size=GRAPH.n_edges, max_size=GRAPH.n_edges)


def circuit(flags: list[bool]) -> Circuit:
    edges = torch.zeros_like(GRAPH.real)
    edges[GRAPH.real] = torch.tensor(flags)
    return Circuit(GRAPH, edges)


@settings(deadline=None, max_examples=50)
@given(masks, masks)
def test_shares_are_those_of_sets(ours: list[bool], theirs: list[bool]) -> None:
    found, truth = circuit(ours), circuit(theirs)
    size = torch.rand(GRAPH.real.shape, generator=torch.Generator().manual_seed(sum(ours))) - 0.5
    for level in ("edge", "node"):
        if level == "edge":
            left, right = set(found.names()), set(truth.names())
            keys = {
                GRAPH.edge_name(*edge): abs(float(size[tuple(edge)]))
                for edge in GRAPH.real.nonzero().tolist()
            }
        else:
            left, right = ({n.split("->")[0] for n in each.names()} - {"input"} for each in (found, truth))
            keys = {
                name: max(abs(float(size[GRAPH.find_edge(f"{name}->{end}")])) for end in GRAPH.receivers
                          if bool(GRAPH.real[GRAPH.find_sender(name), GRAPH.find_receiver(end)]))
                for name in GRAPH.senders[1:]
            }  # fmt: skip
        result = overlap(found, truth, "truth", importance=size, level=level)
        assert (result.found, result.truth, result.common) == (len(left), len(right), len(left & right))
        assert result.precision == (len(left & right) / len(left) if left else None)
        assert result.recall == (len(left & right) / len(right) if right else None)
        assert result.jaccard == (len(left & right) / len(left | right) if left | right else None)
        names = sorted(keys)
        expected = brute([keys[name] for name in names], [name in right for name in names])
        assert result.auroc == (None if expected is None else pytest.approx(expected, abs=1e-6))
        assert (result.reference, result.level) == ("truth", level)


def test_the_truth_is_the_second() -> None:
    small, large = Circuit.of_names(GRAPH, ["input->logits"]), Circuit.full(GRAPH)
    assert overlap(small, large, "all").precision == 1.0
    assert overlap(small, large, "all").recall == pytest.approx(1 / GRAPH.n_edges)
    assert overlap(large, small, "one").precision == pytest.approx(1 / GRAPH.n_edges)
    assert overlap(large, small, "one").recall == 1.0


def test_auroc_takes_sizes_and_nothing_that_is_no_edge() -> None:
    truth = Circuit.of_names(GRAPH, ["m0->logits"])
    size = torch.full(GRAPH.real.shape, 0.1).where(GRAPH.real, 9.0)
    size[GRAPH.find_edge("m0->logits")] = -5.0
    assert overlap(truth, truth, "itself", importance=size).auroc == 1.0
    assert overlap(truth, truth, "itself").auroc is None
    size[GRAPH.find_edge("input->logits")] = float("nan")
    assert overlap(truth, truth, "itself", importance=size).auroc is None


def test_graphs_by_query_head_and_native_ones_are_compared_by_query_head() -> None:
    native = Circuit.of_names(GROUPED, ["input->a0.h0<k>", "a0.h0->logits"])
    wide = native.by_query_head()
    for ours, theirs in itertools.permutations((native, wide)):
        result = overlap(ours, theirs, "wide", importance=torch.rand(ours.edges.shape))
        assert (result.found, result.common, result.jaccard) == (3, 3, 1.0)
        # Scores of shared keys are not split up.
        assert (result.auroc is None) == (ours is native)
    assert overlap(native, native, "same").found == 2


def test_circuits_of_other_models_are_refused() -> None:
    with pytest.raises(
        InputError, match="reference 'other' is of another model: expected 2 sequential layers of 2"
    ):
        overlap(Circuit.empty(GRAPH), Circuit.empty(GROUPED), "other")
    with pytest.raises(InputError, match=r"importances of the circuit's graph: expected shape \[7, 15\]"):
        overlap(Circuit.empty(GRAPH), Circuit.empty(GRAPH), "same", importance=torch.zeros(3, 3))
