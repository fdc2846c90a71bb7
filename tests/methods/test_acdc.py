"""ACDC against one edge at a time by hand; where it must end; budgets, interruptions, what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from patchkit import tasks
from patchkit.data import Pair
from patchkit.errors import InputError
from patchkit.methods import _acdc_runs
from patchkit.methods._acdc_order import known_at, receivers_in_order, senders_in_order
from patchkit.methods._acdc_trials import Trials
from patchkit.methods._edge_options import EdgeOptions
from patchkit.methods.acdc import acdc
from patchkit.methods.circuits import run_circuits
from patchkit.model.edges import EdgeGraph
from patchkit.zoo import handmade
from patchkit.zoo.load import load
from tests.acdc_oracle import PAIRS, check_acdc, tiny
from tests.circuit_oracle import kl
from tests.comparisons import agree
from tests.node_oracle import LONG, MIDDLE, SHORT

# Against the oracle.


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama-gqa", {"tau": 0.02}),
        ("llama-gqa", {"tau": 0.05, "direction": "denoise"}),
        ("llama-gqa", {"tau": 0.1, "metric": "kl", "score": kl}),
        ("gemma2", {"tau": 0.1, "metric": "kl", "score": kl}),
        ("gemma2", {"tau": 0.05, "ablation": "mean", "order": "by-size"}),
        ("gpt2", {"tau": 0.1, "ablation": "zero", "metric": "kl", "score": kl}),
        ("gpt2", {"tau": 0.05, "order": "by-size"}),
        ("neox-parallel", {"tau": 0.05, "absolute": True}),
    ],
)
def test_decisions_and_effects_are_the_oracles(name: str, options: dict[str, Any]) -> None:
    found, expected = check_acdc(name, **options)
    tried, skipped = len(expected.effects), len(expected.skipped)
    assert tried + skipped == found.graph.n_edges
    assert found.method.threshold == options["tau"] and found.method.untried == 0
    assert found.method.order == options.get("order", "reverse")
    assert found.method.absolute == options.get("absolute", False)


def test_the_known_circuit_is_found() -> None:
    """Every edge of the handmade model that carries what differs between prompts, and no other."""
    model = load("handmade-llama")
    prompts = handmade.sample_prompts(24, 0)
    pairs = []
    for number, (one, other) in enumerate(zip(prompts[:12], prompts[12:], strict=True)):
        ids = [
            tuple(handmade.TOKEN_IDS[word] for word in ("<s>", *each.text.split())) for each in (one, other)
        ]
        answers = [handmade.TOKEN_IDS[each.answer] for each in (one, other)]
        if answers[0] != answers[1]:
            pairs.append(Pair(*ids, *answers, {}, str(number)))
    assert len(pairs) > 8
    for ablation in ("resample", "mean"):
        found = acdc(model, pairs, EdgeOptions(metric="kl", ablation=ablation), tau=0.01)  # type: ignore[arg-type]
        assert found.circuit is not None
        assert set(found.circuit.names()) == set(handmade.TRUE_EDGES), ablation


def test_what_is_cut_adds_up() -> None:
    """On a trained model: the circuit's metric is the base run's, and the effects of all edges that were cut."""
    model = load("varbind-llama-gqa")
    drawn = tasks.pairs("variable-binding", model.tokenizer, 12, 0)
    pairs = sorted(drawn, key=lambda each: len(each.clean_ids))[:3]
    found = acdc(model, pairs, EdgeOptions(metric="kl"), tau=0.2)
    circuit = found.circuit
    assert circuit is not None and 5 < circuit.n_edges < 100
    # An edge is kept for its damage alone, so that those of less are cut; dead ends were cut or are none.
    cut = found.mean.nan_to_num(0.0) * (found.mean < 0.2)
    runs = run_circuits(model, pairs, [circuit, circuit.pruned()], EdgeOptions(metric="kl"))
    agree(runs.metric[:, 0].mean(), found.base_metric.mean() + cut.sum(), "kl", 1e-3)
    agree(runs.metric[:, 1], runs.metric[:, 0], "dead ends", 1e-5)
    assert runs.metric.mean() < runs.corrupt.mean() / 4


# Orders.


def test_every_receiver_is_visited_once_behind_those_it_leads_to() -> None:
    graph = EdgeGraph(3, 4, 2, False, 8)
    order = list(receivers_in_order(graph))
    assert sorted(order) == list(range(graph.n_receivers))
    names = [graph.receiver_name(receiver) for receiver in order]
    assert names[:8] == [
        "logits",
        "m2",
        "a2.h0<v>",
        "a2.h0<k>",
        "a2.h0<q>",
        "a2.h1<q>",
        "a2.h1<v>",
        "a2.h1<k>",
    ]
    layers = [graph.layer_of_receiver(receiver) for receiver in order]
    assert layers == sorted(layers, reverse=True)
    for place, receiver in enumerate(order):
        # All that is still to be visited lies below what is known, or in the same layer's attention.
        known = known_at(graph, receiver)
        assert known >= int(graph.upstream[receiver]), graph.receiver_name(receiver)
        assert all(int(graph.upstream[later]) <= known for later in order[place:])
    assert known_at(graph, graph.logits) == graph.n_senders


def test_the_latest_sender_comes_first_or_the_smallest() -> None:
    graph = EdgeGraph(2, 2, 2, False, 8)
    assert senders_in_order(graph, graph.mlp_receiver(1), None) == [5, 4, 3, 2, 1, 0]
    sizes = torch.tensor([3.0, 1.0, 2.0, 1.0, 9.0, 0.5, 0.0])
    assert senders_in_order(graph, graph.mlp_receiver(1), sizes) == [5, 3, 1, 2, 0, 4]


# How edges are tried says nothing of what is found.


def decided(found: Any) -> tuple[set[str], torch.Tensor]:
    return set(found.circuit.names()), found.mean.nan_to_num(7.0)


@pytest.mark.slow
def test_groups_and_batches_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = tiny("llama-gqa")
    pairs = [SHORT, MIDDLE]
    options = EdgeOptions(metric="kl")
    sizes: list[int] = []
    right = Trials.metrics

    def counted(trials: Trials, circuits: Any, known: int) -> Any:
        sizes.append(len(circuits))
        return right(trials, circuits, known)

    monkeypatch.setattr(Trials, "metrics", counted)
    together = acdc(model, pairs, options, tau=0.02)
    assert max(sizes) > 2 and 0 < together.circuit.n_edges < 36  # type: ignore[union-attr]
    tried = int(together.scored.sum())
    assert sum(sizes) > tried
    for name, changed in (("alone", 1), ("in large groups", 64)):
        init = Trials.__init__

        def limited(trials: Trials, *args: Any, init: Any = init, changed: int = changed) -> None:
            init(trials, *args)
            trials.at_once = changed

        monkeypatch.setattr(Trials, "__init__", limited)
        found = acdc(model, pairs, options, tau=0.02)
        monkeypatch.setattr(Trials, "__init__", init)
        assert decided(found)[0] == decided(together)[0], name
        agree(decided(found)[1], decided(together)[1], name, 1e-6)
        if changed == 1:
            # Nothing is tried in vain then.
            assert found.cost < together.cost
    by_pair = acdc(model, pairs, EdgeOptions(metric="kl", max_batch_tokens=1), tau=0.02)
    assert decided(by_pair)[0] == decided(together)[0]
    agree(decided(by_pair)[1], decided(together)[1], "pair by pair", 1e-6)
    agree(by_pair.base_metric, together.base_metric, "base runs", 1e-6)
    agree(by_pair.source_metric, together.source_metric, "source runs", 1e-6)


def test_thresholds_that_leave_nothing_or_everything() -> None:
    model, _ = tiny("llama-gqa")
    graph = EdgeGraph.of(model.dims)
    nothing = acdc(model, PAIRS, tau=math.inf)
    assert nothing.circuit is not None and nothing.circuit.is_empty
    # The logits' edges are tried, and then nothing leads anywhere.
    assert int(nothing.scored.sum()) == graph.n_senders
    assert nothing.mean[:, graph.logits].isfinite().all()
    everything = acdc(model, PAIRS, tau=-math.inf)
    assert torch.equal(everything.circuit.edges, graph.real)  # type: ignore[union-attr]
    assert torch.equal(everything.scored, graph.real)
    # At 0 what helps by nothing is kept: an edge is cut only where that is no loss at all.
    at_zero = acdc(model, PAIRS, tau=0.0)
    assert torch.equal(at_zero.circuit.edges, at_zero.mean <= 0)  # type: ignore[union-attr]


# Budgets and interruptions.


def test_a_budget_ends_it_with_what_is_left_in_the_circuit() -> None:
    model, _ = tiny("llama-gqa")
    graph = EdgeGraph.of(model.dims)
    whole = acdc(model, PAIRS, tau=0.02)
    untried = []
    for budget in (2.0, 4.0, whole.cost - 1, 1000.0):
        found = acdc(model, PAIRS, tau=0.02, max_forwards=budget)
        circuit, tried = found.circuit, found.scored
        assert circuit is not None and found.cost <= budget
        untried.append(found.method.untried)
        agree(found.mean[tried], whole.mean[tried], "effects of those it reached", 1e-6)
        if found.method.untried:
            left = graph.real & ~tried
            assert circuit.edges[left].any() and int(left.sum()) >= found.method.untried
            assert torch.equal(circuit.pruned().edges, circuit.edges)
    assert untried == sorted(untried, reverse=True) and untried[0] > untried[2] > untried[3] == 0
    assert decided(found)[0] == decided(whole)[0]


def test_an_interrupted_search_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = tiny("llama-gqa")
    whole, ran = trials_of(monkeypatch, lambda: acdc(model, PAIRS, tau=0.02))
    right, calls = _acdc_runs.circuit_logits, []

    def counted(*given: Any) -> Any:
        calls.append(len(given[3]))
        if len(calls) == 9:
            raise KeyboardInterrupt
        return right(*given)

    monkeypatch.setattr(_acdc_runs, "circuit_logits", counted)
    with pytest.raises(KeyboardInterrupt):
        acdc(model, PAIRS, tau=0.02, checkpoint=tmp_path)
    seen: list[tuple[str, int, int]] = []
    found = acdc(model, PAIRS, tau=0.02, checkpoint=tmp_path, progress=lambda *each: seen.append(each))
    assert torch.equal(found.circuit.edges, whole.circuit.edges)  # type: ignore[union-attr]
    for name in ("mean", "mean_abs", "base_metric", "source_metric"):
        assert torch.equal(getattr(found, name).nan_to_num(7.0), getattr(whole, name).nan_to_num(7.0)), name
    assert seen[-1] == ("acdc", 11, 11) and len(seen) == 11
    # The whole search's cost is said, and only what was interrupted was run twice.
    assert found.cost == whole.cost
    before = len(calls)
    assert before == ran + 1
    # A finished search is only read: not even the pairs are opened.
    monkeypatch.setattr(_acdc_runs, "capture_senders", None)
    again = acdc(model, PAIRS, tau=0.02, checkpoint=tmp_path)
    assert len(calls) == before and decided(again)[0] == decided(whole)[0] and again.cost == whole.cost
    monkeypatch.undo()
    # Another threshold is another search, which has what both try from this one.
    monkeypatch.setattr(_acdc_runs, "circuit_logits", counted)
    acdc(model, PAIRS, tau=0.03, checkpoint=tmp_path)
    assert before < len(calls) < before + ran


def test_a_search_whose_budget_ended_goes_on_with_a_larger_one(tmp_path: Path) -> None:
    model, _ = tiny("llama-gqa")
    whole = acdc(model, PAIRS, tau=0.02)
    part = acdc(model, PAIRS, tau=0.02, max_forwards=5.0, checkpoint=tmp_path)
    assert part.method.untried > 0
    found = acdc(model, PAIRS, tau=0.02, checkpoint=tmp_path)
    assert found.method.untried == 0 and decided(found)[0] == decided(whole)[0]


def trials_of(monkeypatch: pytest.MonkeyPatch, search: Callable[[], Any]) -> tuple[Any, int]:
    """What a search finds, and how many groups of circuits it runs."""
    right, calls = _acdc_runs.circuit_logits, []
    with monkeypatch.context() as patched:
        patched.setattr(_acdc_runs, "circuit_logits", lambda *given: calls.append(1) or right(*given))
        return search(), len(calls)


# What is refused.


def test_bad_input() -> None:
    model, _ = tiny("llama-gqa")
    cases: list[tuple[str, dict[str, Any]]] = [
        ("tau is NaN", {"tau": math.nan}),
        ("order 'forward' is not known; expected one of: reverse, by-size", {"order": "forward"}),
        ("max_forwards is 1.5: the base and the source run alone take 2", {"max_forwards": 1.5}),
        ("max_forwards is nan", {"max_forwards": math.nan}),
        (
            "positions 'each': a circuit cuts its edges at all tokens",
            {"options": EdgeOptions(positions="each")},
        ),
        ("unknown metric", {"options": EdgeOptions(metric="loss")}),
        ("no prompt pairs", {"pairs": []}),
        ("a reference set is for", {"reference": [LONG]}),
    ]
    for message, changed in cases:
        given: dict[str, Any] = {"pairs": PAIRS, "options": None, "tau": 0.1} | changed
        pairs, options = given.pop("pairs"), given.pop("options")
        with pytest.raises(InputError, match=message):
            acdc(model, pairs, options, **given)
