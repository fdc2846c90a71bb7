"""Measures of the ground-truth study against loops over definitions, and numbers worked out by hand."""

from __future__ import annotations

import itertools

import pytest
import torch

from patchkit.model import EdgeGraph
from patchkit.results.circuit import Circuit
from patchkit.results.scoreboard import Case, Interval, MethodOnCase, Missed, Ranking
from patchkit.studies._truth_circuits import choose
from patchkit.studies._truth_measures import Labels, floored, ranking
from patchkit.studies._truth_scores import MethodScores, attention_inputs, edges_of_nodes, from_nodes
from patchkit.studies._truth_words import recoveries
from patchkit.zoo.programs import failures

GRAPH = EdgeGraph(n_layers=2, n_heads=2, n_kv_heads=1, parallel=False, d_model=8)


def labels(
    true: list[bool], known: list[bool] | None = None, alone: list[list[bool]] | None = None
) -> Labels:
    names = tuple(f"n{i}" for i in range(len(true)))
    mask = torch.tensor(true)
    return Labels(
        names,
        mask,
        torch.ones_like(mask) if known is None else torch.tensor(known),
        {"n0": "cancellation"},
        mask[None].expand(2, -1) if alone is None else torch.tensor(alone),
    )


def test_auroc_is_the_share_of_pairs_in_order() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        true = torch.rand(9, generator=generator) < 0.4
        if not true.any() or true.all():
            continue
        scores = torch.randint(0, 4, (9,), generator=generator).double()
        found = ranking(labels(true.tolist()), scores, 3.0)
        hits = [
            1.0 if scores[a] > scores[b] else 0.5 if scores[a] == scores[b] else 0.0
            for a, b in itertools.product(range(9), range(9))
            if true[a] and not true[b]
        ]
        assert found is not None and found.auroc == pytest.approx(sum(hits) / len(hits), abs=1e-4)


def test_precision_and_what_is_missed() -> None:
    scores = torch.tensor([0.0, 5.0, 3.0, 4.0, 0.0])
    found = ranking(labels([True, True, True, False, False]), scores, 5.0)
    assert found is not None
    # Top three: n1, n3, n2; n0 has no score.
    assert found.precision == pytest.approx(2 / 3, abs=1e-4)
    assert found.missed == [
        Missed(kind="", missed=0, total=2, names=[]),
        Missed(kind="cancellation", missed=1, total=1, names=["n0"]),
    ]


def test_ties_at_the_cut_count_by_share() -> None:
    found = ranking(labels([True, True, False, False]), torch.tensor([2.0, 1.0, 1.0, 1.0]), 2.0)
    assert found is not None and found.precision == pytest.approx((1 + 1 / 3) / 2, abs=1e-4)
    assert [each.missed for each in found.missed] == [1, 0]


def test_a_score_that_is_rounding_is_no_score() -> None:
    assert floored(torch.tensor([1.0, 1e-8, -2.0, torch.nan]), 2.0).tolist() == [1.0, 0.0, 2.0, 0.0]
    found = ranking(labels([True, False, False]), torch.tensor([1e-9, 1.0, 0.0]), 1.0)
    assert found is not None and found.precision == 0.0 and found.auroc == 0.25
    # The largest of these inputs is rounding beside what the method says of nodes: it is not found by that.
    found = ranking(labels([True, False, False]), torch.tensor([3e-9, 1e-9, 0.0]), 1.0)
    assert found is not None and found.precision == 0.0 and found.auroc == 0.5


def test_unlabelled_items_are_left_out() -> None:
    scores = torch.tensor([1.0, 9.0, 2.0])
    found = ranking(labels([True, False, False], known=[True, False, True]), scores, 9.0)
    assert found is not None and found.auroc == 0.0
    assert ranking(labels([True, True, True]), scores, 9.0) is None
    assert ranking(labels([True, True, False], known=[True, True, False]), scores, 9.0) is None


def test_single_pairs_ask_only_for_what_does_something_there() -> None:
    per_pair = torch.tensor([[0.0, 3.0, 1.0], [3.0, 0.0, 1.0]])
    asked = labels([True, True, False], alone=[[False, True, False], [True, False, False]])
    found = ranking(asked, per_pair.mean(0), 3.0, per_pair)
    assert found is not None and found.single == 1.0
    asked = labels([True, True, False], alone=[[True, True, False], [True, True, False]])
    found = ranking(asked, per_pair.mean(0), 3.0, per_pair)
    assert found is not None and found.single == 0.5


def test_an_edge_has_its_weaker_ends_score() -> None:
    generator = torch.Generator().manual_seed(1)
    nodes = torch.rand(GRAPH.n_senders - 1, generator=generator).double()
    inputs = torch.rand(len(attention_inputs(GRAPH)), generator=generator).double()
    for given in (inputs, None):
        edges = edges_of_nodes(GRAPH, nodes, given)
        for sender, receiver in itertools.product(range(GRAPH.n_senders), range(GRAPH.n_receivers)):
            value = edges[sender, receiver]
            if not GRAPH.real[sender, receiver]:
                assert value.isnan()
                continue
            ends = [] if sender == 0 else [float(nodes[sender - 1])]
            name = GRAPH.receiver_name(receiver)
            if name.startswith("m"):
                ends.append(float(nodes[GRAPH.find_sender(name) - 1]))
            elif name != "logits" and given is not None:
                ends.append(float(given[attention_inputs(GRAPH).tolist().index(receiver)]))
            elif name != "logits":
                owners = GRAPH.owner[:, receiver].nonzero()[:, 0].tolist()
                ends.append(max(float(nodes[owner - 1]) for owner in owners))
            assert float(value) == (min(ends) if ends else 0.0)


def test_bootstraps_of_nodes_made_from_edges_are_made_from_bootstraps_of_edges() -> None:
    per_pair = torch.rand(3, *GRAPH.real.shape, generator=torch.Generator().manual_seed(2)).double()
    per_pair = per_pair.masked_fill(~GRAPH.real, torch.nan)
    nodes, inputs = torch.zeros(3, GRAPH.n_senders - 1), torch.zeros(3, len(attention_inputs(GRAPH)))
    scores = MethodScores("x", False, 1.0, nodes[0], inputs[0], per_pair.mean(0), nodes, inputs, per_pair)
    weights = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.5, 0.5]], dtype=torch.float64)
    drawn = scores.drawn(GRAPH, weights)
    assert drawn is not None
    for row, mixed in enumerate((per_pair[0], (per_pair[1] + per_pair[2]) / 2)):
        best = [float(mixed[s][GRAPH.real[s]].max()) for s in range(1, GRAPH.n_senders)]
        torch.testing.assert_close(drawn[0][row], torch.tensor(best, dtype=torch.float64))


def test_nodes_without_a_score_do_not_fill_up_a_circuit() -> None:
    nodes = torch.zeros(GRAPH.n_senders - 1)
    nodes[0] = 1.0
    chosen = choose(from_nodes("x", GRAPH, 1.0, nodes, None), GRAPH, 3, 4)
    assert chosen.at_size.nodes[1:].nonzero()[:, 0].tolist() == [0]
    empty = choose(from_nodes("x", GRAPH, 1.0, torch.zeros_like(nodes), None), GRAPH, 3, 4)
    assert isinstance(empty.at_size, Circuit) and not empty.at_size.nodes[1:].any()


def row(
    method: str, auroc: float | None, missed: list[Missed] | None = None, cost: float = 1.0
) -> MethodOnCase:
    interval: Interval | None = None
    made = (
        None if auroc is None else Ranking(auroc=auroc, interval=interval, precision=0.5, missed=missed or [])
    )
    return MethodOnCase(method=method, cost=cost, nodes=made, edges=None, faithfulness=0.5)


def case(family: str, name: str, *rows: MethodOnCase) -> Case:
    return Case(
        name=name,
        family=family,  # type: ignore[arg-type]
        title=name,
        model=name,
        architecture="llama",
        task="",
        shows="",
        layers=2,
        heads=2,
        kv_heads=1,
        pairs=2,
        test_pairs=2,
        n_nodes=6,
        n_edges=20,
        true_nodes=2,
        true_edges=3,
        silent=[],
        base_metric=1.0,
        source_metric=-1.0,
        truth_faithfulness=1.0,
        truth_rule="",
        methods=list(rows),
        seconds=0.0,
    )


def test_recoveries_name_what_is_left_and_why() -> None:
    def missed(*names: str) -> list[Missed]:
        return [Missed(kind=failures.ATTENTION, missed=len(names), total=2, names=list(names))]

    cases = [case("handmade", "a", row("atp", 0.5, missed("x", "y")), row("atp-star", 0.7, missed("y")))]
    (found,) = recoveries(cases)
    assert (found.missed, found.recovered, found.left) == (["x", "y"], ["x"], ["y"])
    assert found.why == failures.KINDS[failures.ATTENTION]
    assert recoveries([case("handmade", "a", row("atp", 0.5), row("atp-star", 0.5))]) == []
