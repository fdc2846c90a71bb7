"""Evaluations of circuits whose metric is a known function of their edges: every number by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from patchkit.errors import InputError
from patchkit.methods._edge_options import EdgeOptions
from patchkit.methods._evaluate_bootstrap import PairBootstrap, faithfulness
from patchkit.methods._evaluate_completeness import random_subsets
from patchkit.methods._evaluate_random import p_value
from patchkit.methods._evaluate_sampler import edges_by_stratum, random_circuit
from patchkit.methods.evaluate import EvaluateOptions, evaluate
from patchkit.model.edges import EdgeGraph
from patchkit.results.circuit import Circuit
from patchkit.results.curves import FRACTIONS
from patchkit.results.evaluation import Evaluation
from tests.methods.standing_in import GRAPH, alive, chain, model, pairs, scores, stand_in

#: What each pair's metric is multiplied with.
SIZES = torch.tensor([1.0, 2.0, 3.0, 6.0])


def run(source: Any, count: int = 4, options: EdgeOptions | None = None, **asked: Any) -> Evaluation:
    outside = {name: asked.pop(name) for name in ("truth", "progress", "checkpoint") if name in asked}
    return evaluate(model(), pairs(count), source, options, EvaluateOptions(**asked), **outside)


def circuit(*names: str) -> Circuit:
    return Circuit.of_names(GRAPH, names)


def weights(*names: str, value: float = 1.0) -> Tensor:
    """Importances: `value` for these edges, falling by hundredths; small and different for the rest."""
    found = torch.linspace(0, 1e-3, GRAPH.real.numel()).reshape(GRAPH.real.shape)
    for place, name in enumerate(names):
        found[GRAPH.find_edge(name)] = value - place / 100
    return found


def heads_of(known: dict[str, float]) -> Any:
    """A metric that adds up what the living heads are worth, times the pair's size; 1 with none."""

    def metric(found: Circuit) -> Tensor:
        worth = sum(value for head, value in known.items() if alive(found, head))
        return 1 + SIZES * worth

    return metric


# Faithfulness.


def test_a_circuit_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, heads_of({"a0.h0": 3.0, "a1.h1": 1.0}))
    found = run(circuit(*chain("a0.h0")))
    assert found.clean_metric == 1 + 3 * 4 and found.corrupt_metric == 1
    assert found.clean_per_pair == [5, 9, 13, 25] and found.corrupt_per_pair == [1, 1, 1, 1]
    (only,) = found.circuits
    assert only.circuit_metric == 1 + 3 * 3 and only.per_pair == [4, 7, 10, 19]
    assert only.faithfulness == 0.75 and only.gap == 3
    assert (only.n_edges, only.n_nodes, only.requested, only.selection) == (2, 2, None, "given")
    # Every pair's own ratio is 3/4, and one draw of pairs serves all three means.
    assert only.faithfulness_interval == pytest.approx((0.75, 0.75))
    assert only.interval is not None and only.interval[0] < 10 < only.interval[1]
    assert found.graph_edges == GRAPH.n_edges and found.method == "given" and found.cost == 1
    assert found.notes == [] and found.tested is None
    assert found.pair_ids == ["p0", "p1", "p2", "p3"]


def test_faithfulness_is_a_ratio_of_means_not_a_mean_of_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    def metric(found: Circuit) -> Tensor:
        if found.n_edges == GRAPH.n_edges:
            return torch.tensor([1.0, 9.0])
        return torch.tensor([1.0, 0.0]) if alive(found, "a0.h0") else torch.tensor([0.0, 0.0])

    stand_in(monkeypatch, metric)
    found = run(circuit(*chain("a0.h0")), 2)
    assert found.circuits[0].faithfulness == pytest.approx(0.1)


def test_sizes_are_selected_pruned_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The third edge leads to a head without an edge out, so that it is a dead end until the fourth comes."""
    stand_in(monkeypatch, heads_of({"a0.h0": 3.0, "a1.h1": 1.0}))
    order = [*chain("a0.h0"), "input->a1.h1<v>", "a1.h1->logits"]
    found = run(scores(weights(*order)), sizes=(2, 3, 4))
    assert [each.requested for each in found.circuits] == [2, 3, 4]
    assert [each.n_edges for each in found.circuits] == [2, 2, 4]
    assert [each.faithfulness for each in found.circuits] == [0.75, 0.75, 1.0]
    assert [each.selection for each in found.circuits] == ["top"] * 3
    assert found.method == "eap"


def test_signed_and_absolute_selection(monkeypatch: pytest.MonkeyPatch) -> None:
    """An edge that hurts has the largest score."""
    stand_in(monkeypatch, heads_of({"a0.h0": 3.0, "a1.h1": -1.0}))
    importance = weights(*chain("a0.h0"))
    for edge in chain("a1.h1"):
        importance[GRAPH.find_edge(edge)] = -2.0
    signed, absolute = (
        run(scores(importance), sizes=(2,), absolute=absolute).circuits[0] for absolute in (False, True)
    )
    assert (signed.faithfulness, signed.absolute) == (1.5, False)
    assert (absolute.faithfulness, absolute.absolute) == (-0.5, True)


def test_threshold_and_greedy(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, heads_of({"a0.h0": 3.0, "a1.h1": 1.0}))
    order = [*chain("a0.h0"), *chain("a1.h1")]
    found = run(scores(weights(*order)), selection="threshold", tau=0.985).circuits[0]
    assert (found.n_edges, found.requested, found.selection) == (2, 2, "threshold")
    # The best edge by far leads nowhere: top takes it and keeps nothing.
    stray = ["input->a0.h2<q>", "input->a0.h2<k>", *chain("a0.h0")]
    top, greedy = (
        run(scores(weights(*stray)), sizes=(2,), selection=selection).circuits[0]
        for selection in ("top", "greedy")
    )
    assert top.empty and top.n_edges == 0
    assert greedy.n_edges == 2 and greedy.faithfulness == 0.75


def test_an_empty_circuit_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, heads_of({"a0.h0": 3.0}))
    stray = ["input->a0.h2<q>", "input->a0.h2<k>"]
    asked = {"sizes": (2,), "completeness": 3, "minimality": True, "random": 3}
    found = run(scores(weights(*stray)), **asked)
    (only,) = found.circuits
    assert only.empty and only.circuit_metric == found.corrupt_metric and only.faithfulness == 0
    assert (found.completeness, found.minimality, found.random) == (None, None, None)
    assert "is empty after pruning" in found.notes[0] and "2 edges asked for" in found.notes[0]
    assert "completeness, minimality, random" in found.notes[1]
    given = run(circuit("a0.h0->logits"))
    assert given.circuits[0].empty and "The circuit is empty" in given.notes[0]
    assert run(scores(weights()), sizes=(0,)).circuits[0].empty


def test_edges_of_a_given_circuit_that_lead_nowhere_are_pruned_and_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stand_in(monkeypatch, heads_of({"a0.h0": 3.0}))
    found = run(circuit(*chain("a0.h0"), "input->m1"))
    assert found.circuits[0].n_edges == 2
    assert "1 of the 3 edges that were given are dead ends" in found.notes[0]


def test_what_acdc_kept_is_a_circuit_already(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, heads_of({"a0.h0": 3.0, "a1.h1": 1.0}))
    kept = scores(weights(), circuit=circuit(*chain("a0.h0")))
    found = run(kept)
    assert found.circuits[0].faithfulness == 0.75 and found.circuits[0].selection == "eap"
    assert run(kept, sizes=(2,)).circuits[0].selection == "top"


def test_runs_that_do_not_differ_have_no_faithfulness(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, lambda found: torch.full((4,), 2.0))
    asked = {"completeness": 2, "minimality": True, "random": 3}
    found = run(circuit(*chain("a0.h0")), **asked)
    only = found.circuits[0]
    assert only.faithfulness is None and only.faithfulness_interval is None and only.gap == 0
    assert found.completeness is not None and found.completeness.worst_share is None
    assert found.minimality is not None and found.minimality.superfluous == ["a0.h0"]
    assert found.random is None
    assert any("same mean metric" in note for note in found.notes)
    assert any("Left out, because there is no faithfulness" in note for note in found.notes)
    assert faithfulness(1.0, 2.0, 2.0 + 1e-9) is None


def test_a_difference_that_may_as_well_be_zero_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def metric(found: Circuit) -> Tensor:
        return torch.tensor([5.0, -5.0, 4.0, -3.0]) * alive(found, "a0.h0")

    stand_in(monkeypatch, metric)
    found = run(circuit(*chain("a0.h0")))
    assert found.circuits[0].faithfulness == 1
    assert any("may as well be 0" in note for note in found.notes)


def test_one_pair_has_no_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, lambda found: torch.tensor([float(alive(found, "a0.h0"))]))
    found = run(circuit(*chain("a0.h0")), 1)
    assert found.circuits[0].interval is None and found.circuits[0].faithfulness_interval is None
    assert found.circuits[0].faithfulness == 1
    assert found.notes == ["One pair: there are no intervals."]


# Intervals.


def test_intervals_cover_as_they_say() -> None:
    """Of the mean and of the ratio of means, 30 pairs, 95 %: a percentile bootstrap falls a little short."""
    generator = torch.Generator().manual_seed(0)
    held, held_ratio, repeats, wide = 0, 0, 200, 0.0
    for repeat in range(repeats):
        clean = 4 + torch.randn(30, generator=generator)
        corrupt = torch.randn(30, generator=generator)
        circuit = corrupt + 0.7 * (clean - corrupt) + 0.5 * torch.randn(30, generator=generator)
        bootstrap = PairBootstrap(30, 300, repeat)
        low, high = bootstrap.interval(circuit) or (1.0, 0.0)
        held += low <= 2.8 <= high
        low, high = bootstrap.faithfulness_interval(circuit, clean, corrupt) or (1.0, 0.0)
        held_ratio += low <= 0.7 <= high
        wide += (high - low) / repeats
    assert 0.90 <= held / repeats <= 0.98
    assert 0.90 <= held_ratio / repeats <= 0.98
    # With a draw of its own for each of the three means it would be far wider than the noise of the ratio.
    assert wide < 2.5 * 1.96 * 0.5 / math.sqrt(30) / 4


def test_a_draw_without_a_difference_leaves_no_interval() -> None:
    """One pair of three differs: some draws miss it."""
    bootstrap = PairBootstrap(3, 200, 0)
    clean, corrupt = torch.tensor([1.0, 0.0, 0.0]), torch.zeros(3)
    assert bootstrap.faithfulness_interval(clean, clean, corrupt) is None
    assert bootstrap.interval(clean) is not None


# Curves.


def test_curves_have_mibs_sizes_and_both_rankings(monkeypatch: pytest.MonkeyPatch) -> None:
    """f is the share of edges: the areas are those of a straight line, and signed and absolute ones are told apart."""
    stand_in(monkeypatch, lambda found: found.edges.sum() / GRAPH.n_edges * SIZES)
    found = run(scores(weights()), curve=True, selection="greedy")
    assert found.circuits == [] and found.tested is None
    assert [line.absolute for line in found.curves] == [False, True]
    for line in found.curves:
        assert (
            line.fractions == list(FRACTIONS) == [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0]
        )
        assert line.requested == [0, 0, 1, 2, 5, 13, 26, 52, 131, 262]
        assert line.selection == "greedy" and line.patching == "edge" and line.ablation == "resample"
        assert line.n_edges[-1] == 262 and line.f[-1] == 1.0
        assert line.f == pytest.approx([n / GRAPH.n_edges for n in line.n_edges])
    assert any("circuits of 0.1%, 0.2%" in note and "signed" in note for note in found.notes)


@pytest.mark.parametrize(("late", "cpr", "cmd"), [(False, 0.999, 0.0), (True, 0.25, 0.749)])
def test_cpr_and_cmd_of_synthetic_curves(
    monkeypatch: pytest.MonkeyPatch, late: bool, cpr: float, cmd: float
) -> None:
    """A circuit that is perfect from the first size on, and one that recovers nothing until it is the model."""
    least = GRAPH.n_edges if late else 0

    def metric(found: Circuit) -> Tensor:
        whole = found.n_edges >= least and (late or found.n_edges > 0)
        return SIZES * whole

    stand_in(monkeypatch, metric)
    # The input's edge to the logits is the best, so that from one edge on no circuit is empty.
    found = run(scores(weights("input->logits")), curve=True)
    for line in found.curves:
        # Of 262 edges 0.1 and 0.2 % are none.
        f = [1.0 if not late else float(fraction == 1.0) for fraction in FRACTIONS]
        f[:2] = [0.0, 0.0]
        assert line.f == f
        lost = 0.0 if late else 0.001 + 0.5 * 0.003
        assert line.cpr == pytest.approx(cpr - lost) and line.cmd == pytest.approx(cmd + lost)


# Completeness.


def backups(found: Circuit) -> Tensor:
    """Either of two heads suffices; a third does nothing."""
    return SIZES * (alive(found, "a1.h0") or alive(found, "a1.h1"))


def test_completeness_finds_the_backup_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, backups)
    lacking = run(circuit(*chain("a1.h0", "a1.h3")), completeness=6, seed=3).completeness
    assert lacking is not None
    assert lacking.worst == 3 and lacking.worst_share == 1
    greedy = [each for each in lacking.removals if each.how == "greedy"]
    assert [each.nodes for each in greedy] == [[], ["a1.h0"]]
    assert [each.gap for each in greedy] == [0, 3]
    assert (greedy[1].circuit_metric, greedy[1].model_metric) == (0, 3)
    random = [each for each in lacking.removals if each.how == "random"]
    assert len(random) == 6 and all(set(each.nodes) <= {"a1.h0", "a1.h3"} for each in random)
    assert all(each.gap == (3 if "a1.h0" in each.nodes else 0) for each in random)


def test_with_both_backups_the_circuit_is_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, backups)
    whole = run(circuit(*chain("a1.h0", "a1.h1")), completeness=12).completeness
    assert whole is not None and whole.worst == 0 and whole.worst_share == 0
    assert [each.nodes for each in whole.removals if each.how == "greedy"] == [[]]


def test_the_greedy_set_grows_while_the_gap_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model makes up for each head that is taken away, the circuit for none."""

    def metric(found: Circuit) -> Tensor:
        lost = sum(not alive(found, head) for head in ("a0.h0", "a0.h1", "a0.h2"))
        full = alive(found, "a2.h3")
        return SIZES * (3.0 if full else 3.0 - lost)

    stand_in(monkeypatch, metric)
    found = run(circuit(*chain("a0.h0", "a0.h1", "a0.h2")), completeness=1).completeness
    assert found is not None
    greedy = [each.nodes for each in found.removals if each.how == "greedy"]
    assert greedy == [[], ["a0.h0"], ["a0.h0", "a0.h1"], ["a0.h0", "a0.h1", "a0.h2"]]
    assert found.worst == 9


def test_greedy_steps_try_no_more_than_they_may(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = stand_in(monkeypatch, backups)
    some = circuit(*chain("a1.h0", "a1.h2", "a1.h3", "a2.h0", "a2.h1"))
    found = run(some, completeness=1, candidates=2)
    assert "tried 2 of the circuit's 5 nodes a step" in " ".join(found.notes)
    # The circuit; random K; the empty K; then two candidates a step, each in circuit and model.
    assert calls[0] == 1 and max(calls[1:]) <= 4


def test_random_subsets_are_of_all_sizes_and_mostly_small() -> None:
    nodes = torch.zeros(100, dtype=torch.bool)
    nodes[10:74] = True
    found = random_subsets(nodes, 400, torch.Generator().manual_seed(1))
    sizes = torch.tensor([int(each.sum()) for each in found])
    assert all(bool((each & ~nodes).sum() == 0) for each in found)
    assert int(sizes.min()) == 1 and int(sizes.max()) > 50
    assert 0.4 < float((sizes <= 8).double().mean()) < 0.65
    assert len({tuple(each.nonzero()[:, 0].tolist()) for each in found}) > 200


# Minimality.


def test_minimality_sees_a_backup_and_calls_the_idle_node_superfluous(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stand_in(monkeypatch, backups)
    found = run(circuit(*chain("a1.h0", "a1.h1", "a1.h3")), minimality=True, removals=0).minimality
    assert found is not None and found.limit == 0.01
    assert [each.node for each in found.nodes] == ["a1.h0", "a1.h1", "a1.h3"]
    assert [(each.change, each.share) for each in found.nodes] == [(-3, -1), (-3, -1), (0, 0)]
    # Alone neither of the two is missed, only without the other.
    assert [each.removed for each in found.nodes] == [["a1.h1"], ["a1.h0"], []]
    assert found.superfluous == ["a1.h3"]


def test_an_idle_node_beside_a_needed_one(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, heads_of({"a1.h0": 3.0, "a2.h0": 1.0}))
    found = run(circuit(*chain("a1.h0", "a1.h3", "a2.h0")), minimality=True).minimality
    assert found is not None and found.superfluous == ["a1.h3"]
    assert [each.change for each in found.nodes] == [-9, 0, -3]


def test_partners_that_hide_a_node_together_are_taken_away_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any of three suffices, and each of two makes up for a half: neither alone shows the whole."""

    def metric(found: Circuit) -> Tensor:
        made_up = 0.5 * alive(found, "a0.h1") + 0.25 * alive(found, "a0.h2")
        return SIZES * (1.0 if alive(found, "a0.h0") else made_up)

    stand_in(monkeypatch, metric)
    heads = ["a0.h0", "a0.h1", "a0.h2", "a1.h0", "a1.h1", "a1.h2", "a1.h3", "a2.h0"]
    found = run(circuit(*chain(*heads)), minimality=True, removals=0).minimality
    assert found is not None
    first = found.nodes[0]
    # Of seven partners 30 % are two.
    assert first.removed == ["a0.h1", "a0.h2"] and first.change == -3
    assert found.superfluous == heads[3:]


def test_random_sets_are_tried_for_every_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes that share no receiver are no partners, so only a random K can show that one hides the other."""

    def metric(found: Circuit) -> Tensor:
        return SIZES * (alive(found, "a0.h0") or alive(found, "m2"))

    stand_in(monkeypatch, metric)
    edges = ["input->a0.h0<v>", "a0.h0->a1.h0<v>", "a1.h0->logits", "input->m2", "m2->logits"]
    none = run(circuit(*edges), minimality=True, removals=0).minimality
    some = run(circuit(*edges), minimality=True, removals=12).minimality
    assert none is not None and some is not None
    # Without a1.h0, and so without a0.h0, the MLP is missed: the two write to the logits.
    assert [each.node for each in none.nodes] == ["a0.h0", "a1.h0", "m2"]
    assert [each.share for each in none.nodes] == [0, -1, -1]
    assert [each.share for each in some.nodes] == [-1, -1, -1]
    assert "m2" in some.nodes[0].removed and "a0.h0" not in some.nodes[0].removed


def test_circuits_that_were_run_are_not_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = stand_in(monkeypatch, backups)
    found = run(circuit(*chain("a1.h0", "a1.h1", "a1.h3")), minimality=True, completeness=40, removals=3)
    # Of three heads there are eight sets, taken from the circuit and from the model.
    assert sum(calls) <= 16 and found.cost == sum(calls)


# Random circuits.


def test_random_circuits_have_no_dead_ends_and_the_very_size() -> None:
    graphs = (GRAPH, EdgeGraph(3, 4, 2, False, 8), EdgeGraph(2, 3, 1, True, 8))
    generator = torch.Generator().manual_seed(0)
    for graph in graphs:
        for n in (1, 2, 3, 7, 20, 40, graph.n_edges - 1, graph.n_edges):
            none = torch.zeros(4 * graph.n_layers + 1, dtype=torch.long)
            first = random_circuit(graph, n, none, generator)
            matched = random_circuit(graph, n, edges_by_stratum(first), generator)
            for found in (first, matched):
                assert found.n_edges == n
                assert torch.equal(found.pruned().edges, found.edges)
    small = [random_circuit(GRAPH, 6, torch.zeros(13, dtype=torch.long), generator) for _ in range(100)]
    # All senders and most receivers are reached by some.
    assert bool(torch.stack([each.nodes for each in small]).any(0).all())
    assert int(torch.stack([each.edges for each in small]).any(0).sum()) > 0.6 * GRAPH.n_edges


def test_random_circuits_go_into_the_same_receivers_as_far_as_they_can() -> None:
    graph, generator = EdgeGraph(6, 6, 6, False, 8), torch.Generator().manual_seed(2)
    none = torch.zeros(4 * graph.n_layers + 1, dtype=torch.long)
    given = random_circuit(graph, 150, none, generator)
    quotas = edges_by_stratum(given)

    def common(found: Circuit) -> float:
        return float(torch.minimum(quotas, edges_by_stratum(found)).sum()) / 150

    matched = [common(random_circuit(graph, 150, quotas, generator)) for _ in range(10)]
    free = [common(random_circuit(graph, 150, none, generator)) for _ in range(10)]
    assert min(matched) > 0.9 and sum(free) / 10 < 0.85


def check_uniform(repeats: int) -> None:
    """p of circuits that are random themselves: the metric adds up weights of edges, so that no two are as good."""
    generator = torch.Generator().manual_seed(4)
    worth = 1 + torch.randn(GRAPH.real.shape, generator=generator, dtype=torch.float64)
    none = torch.zeros(13, dtype=torch.long)
    values = []
    for _ in range(repeats):
        given = random_circuit(GRAPH, 24, none, generator)
        quotas = edges_by_stratum(given)
        others = [random_circuit(GRAPH, 24, quotas, generator) for _ in range(9)]
        f = [float(worth[each.edges].sum()) for each in (given, *others)]
        values.append(p_value(f[0], f[1:]))
    found = torch.tensor(values)
    assert abs(float(found.mean()) - 0.55) < 3 * 0.29 / math.sqrt(repeats)
    for tail in (0.1, 0.3, 0.5, 0.7, 0.9):
        share = float((found <= tail + 1e-9).double().mean())
        # Three standard errors.
        assert abs(share - tail) < 3 * math.sqrt(tail * (1 - tail) / repeats), (tail, share)


@pytest.mark.slow
def test_p_is_uniform_for_circuits_that_are_random_themselves() -> None:
    check_uniform(60)


def test_ties_count_against_the_circuit() -> None:
    assert p_value(1.0, [0.0] * 9) == 0.1
    assert p_value(0.9, [1.1 + 1e-9, 0.0, 0.5, 0.9]) == pytest.approx(3 / 5)
    assert p_value(0.0, [0.0] * 9) == 1.0
    # What is more than faithful is not faithful.
    assert p_value(0.9, [1.5]) == 0.5


def test_the_test_against_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, backups)
    found = run(circuit(*chain("a1.h0")), random=19)
    assert found.random is not None and found.random.count == 19 == len(found.random.faithfulness)
    assert set(found.random.n_edges) == {2} and "number of edges" in found.random.matched
    assert found.random.p_value == (1 + sum(f == 1 for f in found.random.faithfulness)) / 20
    again = run(circuit(*chain("a1.h0")), random=19, completeness=4)
    assert again.random == found.random, "what else is asked for changes what is drawn"
    assert run(circuit(*chain("a1.h0")), random=19, seed=1).random != found.random


# Node patching.


def test_node_patching_knows_a_circuit_by_its_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    def metric(found: Circuit) -> Tensor:
        nodes = found.nodes
        return SIZES * (bool(nodes[GRAPH.find_sender("a1.h0")]) or bool(nodes[GRAPH.find_sender("a1.h1")]))

    calls = stand_in(monkeypatch, metric)
    given = circuit("input->a0.h0<v>", "a0.h0->a1.h0<v>", "a1.h0->logits")
    found = run(given, patching="node", completeness=4, minimality=True, random=30)
    assert found.convention.patching == "node" and found.circuits[0].patching == "node"
    assert found.circuits[0].n_nodes == 3 and any(note.startswith("Node patching") for note in found.notes)
    assert found.completeness is not None and found.completeness.worst_share == 1
    # Taking away what it feeds does not take away the node itself.
    assert found.minimality is not None and found.minimality.superfluous == ["a0.h0"]
    assert found.random is not None and "2 heads and 0 MLPs" in found.random.matched
    close = sum(f == 1 for f in found.random.faithfulness)
    assert found.random.p_value == (1 + close) / 31 and 0 < close < 30
    # Sets of two heads: at most 66 differ, and random draws meet again.
    assert sum(calls) < 45


def test_node_patching_takes_away_the_node_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What wrote to a node that is gone still writes to all others."""

    def metric(found: Circuit) -> Tensor:
        a0, a1 = (bool(found.nodes[GRAPH.find_sender(name)]) for name in ("a0.h0", "a1.h0"))
        return SIZES * (2.0 * a0 + a1)

    stand_in(monkeypatch, metric)
    given = circuit("input->a0.h0<v>", "a0.h0->a1.h0<v>", "a1.h0->logits")
    by_nodes, by_edges = (
        run(given, patching=patching, minimality=True, removals=0).minimality for patching in ("node", "edge")
    )
    assert by_nodes is not None and [each.change for each in by_nodes.nodes] == [-6, -3]
    assert by_edges is not None and [each.change for each in by_edges.nodes] == [-6, -9]


# Comparisons.


def test_overlap_with_a_circuit_and_with_other_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, heads_of({"a0.h0": 3.0, "a1.h1": 1.0}))
    order = [*chain("a0.h0"), *chain("a1.h1")]
    truth = circuit(*chain("a0.h0", "a2.h2"), "input->m1")
    found = run(scores(weights(*order)), sizes=(2, 4), truth=truth).overlaps
    assert [(each.level, each.requested) for each in found] == [
        ("edge", 2),
        ("node", 2),
        ("edge", 4),
        ("node", 4),
    ]
    # The truth is pruned too: its edge into m1 is none.
    assert (found[0].found, found[0].truth, found[0].common) == (2, 4, 2)
    assert (found[0].precision, found[0].recall, found[0].jaccard) == (1.0, 0.5, 0.5)
    # The input is in all circuits and is not compared.
    assert (found[3].found, found[3].truth, found[3].common) == (2, 2, 1)
    assert found[0].auroc is not None and found[0].auroc > 0.5
    others = scores(weights(*chain("a1.h1"), *chain("a2.h2")))
    for each in run(scores(weights(*order)), sizes=(2, 4), truth=others).overlaps[::2]:
        assert each.truth == each.found == each.requested
        assert each.common == (0 if each.requested == 2 else 2)


def test_scores_that_were_made_otherwise_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, heads_of({"a0.h0": 3.0}))
    given = scores(weights(*chain("a0.h0")), convention=EdgeOptions(ablation="zero", metric="kl").convention)
    found = run(given, sizes=(2,))
    assert (
        "Edges were scored with metric kl, evaluated with logit-diff; ablation zero, evaluated with resample."
        in (found.notes)
    )
    base = scores(weights(*chain("a0.h0")), count=2, base_metric=torch.tensor([4.0, 99.0]))
    assert any(
        "1 of the 4 pairs are pairs that the edges were scored on" in note
        for note in run(base, sizes=(2,)).notes
    )


def test_a_distance_from_the_base_run_is_ranked_the_right_way_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """KL: cutting what matters raises it, so an effect is an importance as it is."""
    stand_in(monkeypatch, heads_of({"a0.h0": 3.0}))
    for direction in ("noise", "denoise"):
        by_kl = EdgeOptions(metric="kl", direction=direction).convention  # type: ignore[arg-type]
        raised = weights(*chain("a0.h0"))
        found = run(
            scores(raised, convention=by_kl, mean=raised), sizes=(2,), options=EdgeOptions(metric="kl")
        )
        assert found.circuits[0].faithfulness == 1


def test_the_direction_denoise_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, heads_of({"a0.h0": 3.0}))
    found = run(circuit(*chain("a0.h0")), options=EdgeOptions(direction="denoise"))
    assert any(note.startswith("Direction denoise") for note in found.notes)
    assert found.convention.direction == "denoise"


def test_tests_are_about_the_last_size(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, backups)
    order = [*chain("a1.h3"), *chain("a1.h0")]
    found = run(scores(weights(*order)), sizes=(2, 4), minimality=True)
    assert found.tested == 1 and found.minimality is not None
    assert [each.node for each in found.minimality.nodes] == ["a1.h0", "a1.h3"]
    assert any("the circuit of 4 edges, the last of the sizes: minimality" in note for note in found.notes)


def test_progress_names_its_part(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, backups)
    seen: list[str] = []
    run(
        circuit(*chain("a1.h0", "a1.h3")),
        completeness=2,
        minimality=True,
        random=2,
        progress=lambda label, done, total: seen.append(label),
    )
    assert {"circuits", "completeness random", "completeness greedy", "random circuits"} <= set(seen)


# Bad input.


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"sizes": (263,)}, "263 edges were asked for; the graph has 262"),
        ({}, "are not a circuit yet"),
        ({"curve": True, "minimality": True}, "minimality: a curve has no one circuit"),
        ({"sizes": (2,), "stability": 10}, "stability needs the scores of each of several pairs.*keep-pairs"),
        ({"sizes": (2,), "knockout": ("a9.h0",)}, "knockout: sender 'a9.h0'"),
        ({"sizes": (2,), "knockout": ("input",)}, "the input is not a node"),
        ({"sizes": (2,), "knockout": GRAPH.senders[1:]}, "all heads and MLPs"),
    ],
)
def test_what_cannot_be_evaluated(
    monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any], message: str
) -> None:
    calls = stand_in(monkeypatch, backups)
    with pytest.raises(InputError, match=message):
        run(scores(weights()), **asked)
    assert calls == [], "found only after circuits were run"


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"completeness": -1}, "completeness must be at least 0, found -1"),
        ({"draws": 0}, "draws must be at least 1"),
        ({"sizes": (3, -2)}, "sizes are numbers of edges"),
        ({"sizes": (3, 3)}, "one comes twice"),
        ({"knockout": ("m1", "m1")}, "comes twice"),
        ({"stability": 1}, "at least 2"),
        ({"selection": "threshold"}, "needs tau"),
        ({"tau": 0.1}, "tau is for selection 'threshold'"),
        ({"selection": "threshold", "tau": 0.1, "sizes": (3,)}, "has no sizes"),
    ],
)
def test_options_that_contradict_themselves(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        EvaluateOptions(**asked)


def test_circuits_and_scores_that_do_not_belong_here(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, backups)
    other = replace(GRAPH, n_layers=2)
    with pytest.raises(InputError, match="of another graph: expected 3 layers, .* found 2 layers"):
        run(Circuit.full(other))
    with pytest.raises(InputError, match=r"compared with \(reference\) is of another graph"):
        run(Circuit.full(GRAPH), truth=Circuit.full(other))
    placed = scores(
        weights(),
        placed=True,
        places=("s", "e"),
        mean=-weights().expand(2, -1, -1),
        mean_abs=weights().expand(2, -1, -1),
    )
    with pytest.raises(InputError, match="a score a position"):
        run(placed, sizes=(2,))
    with pytest.raises(InputError, match="no prompt pairs"):
        run(Circuit.full(GRAPH), 0)
    with pytest.raises(InputError, match="a circuit was given"):
        run(Circuit.full(GRAPH), sizes=(2,))
    with pytest.raises(InputError, match="a circuit was given"):
        run(Circuit.full(GRAPH), stability=5)
    unscored = weights()
    unscored[0, 0] = torch.nan
    with pytest.raises(InputError, match="has no score"):
        run(scores(unscored), sizes=(2,))
