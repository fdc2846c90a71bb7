"""Evaluations of circuits of real models: one known exactly, one with a backup written into its weights, trained ones."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from patchkit import tasks
from patchkit.data import Pair
from patchkit.methods import circuits as running
from patchkit.methods._edge_options import EdgeOptions
from patchkit.methods._evaluate_bootstrap import PairBootstrap
from patchkit.methods._evaluate_repair import find_group, self_repair
from patchkit.methods.edge_attribution import attribute_edges
from patchkit.methods.evaluate import EvaluateOptions, evaluate
from patchkit.model import PatchModel
from patchkit.model.edges import EdgeGraph
from patchkit.results.circuit import Circuit, top_n
from patchkit.results.edge_scores import EdgeScores
from patchkit.results.evaluation import Evaluation
from patchkit.zoo import handmade
from patchkit.zoo.load import load
from tests.circuit_oracle import kl
from tests.node_oracle import LONG, SHORT
from tests.repair_oracle import SUPPLIED, check_repair, handmade_pairs, with_backup

Ablation = Literal["resample", "mean", "mean-positional", "zero"]
#: What the true circuit's nodes read beside what differs between prompts: the same for every token.
CONSTANTS = ("input->a0.h1<q>", "input->a0.h1<k>", "input->m2")


@functools.cache
def known() -> tuple[PatchModel, tuple[Pair, ...], EdgeGraph]:
    model = load("handmade-llama")
    return model, tuple(handmade_pairs(model, 3)), EdgeGraph.of(model.dims)


def check_true_circuit(
    ablation: Ablation, patching: Literal["edge", "node"], direction: Any = "noise"
) -> Evaluation:
    """Faithful, complete, needed node by node, better than every random circuit; what is left does nothing."""
    model, pairs, graph = known()
    constants = CONSTANTS if ablation == "zero" else ()
    true = Circuit.of_names(graph, (*handmade.TRUE_EDGES, *constants))
    options = EdgeOptions(ablation=ablation, direction=direction)
    asked = EvaluateOptions(
        patching=patching, completeness=3, minimality=True, random=9, removals=1, draws=50
    )
    found = evaluate(model, pairs, true, options, asked)
    run = found.circuits[0]
    assert run.faithfulness == pytest.approx(1, abs=1e-6), "the true circuit is not faithful"
    assert run.faithfulness_interval == pytest.approx((1, 1), abs=1e-6)
    assert found.clean_metric != pytest.approx(found.corrupt_metric, abs=1)
    assert found.completeness is not None and found.completeness.worst_share == pytest.approx(0, abs=1e-6)
    assert len(found.completeness.removals) == 4
    assert found.minimality is not None and found.minimality.superfluous == []
    assert [node.node for node in found.minimality.nodes] == ["a0.h1", "a1.h2", "m2"]
    shares = [abs(node.share or 0) for node in found.minimality.nodes]
    assert shares[1:] == pytest.approx([1, 1]), "without the lookup or the successor something is left"
    assert found.random is not None and found.random.p_value == 1 / 10, "a random circuit is as faithful"
    rest = Circuit(graph, graph.real & ~true.edges)
    left = evaluate(model, pairs, rest, options, EvaluateOptions(patching=patching)).circuits[0]
    assert left.faithfulness == pytest.approx(0, abs=1e-6), "what is left of the model still does it"
    return found


@pytest.mark.parametrize(
    ("ablation", "patching", "direction"),
    [
        ("resample", "edge", "noise"),
        ("mean", "edge", "denoise"),
        ("mean-positional", "edge", "noise"),
        ("zero", "edge", "denoise"),
        ("resample", "node", "denoise"),
        ("mean", "node", "noise"),
        ("zero", "node", "noise"),
    ],
)
def test_the_true_circuit(ablation: Ablation, patching: Literal["edge", "node"], direction: str) -> None:
    found = check_true_circuit(ablation, patching, direction)
    assert {each.ablation for each in found.circuits} == {ablation}
    assert found.convention.ablation == ablation and found.convention.direction == direction


def test_cut_to_zero_the_constants_are_missed() -> None:
    """The edges that carry what differs are enough where a cut edge carries a prompt, not where it carries nothing."""
    model, pairs, graph = known()
    true = Circuit.of_names(graph, handmade.TRUE_EDGES)
    found = evaluate(model, pairs, true, EdgeOptions(ablation="zero"), EvaluateOptions(completeness=1))
    assert found.circuits[0].faithfulness == pytest.approx(0, abs=1e-6)
    assert found.completeness is not None and found.completeness.worst_share == pytest.approx(1)


def test_the_backup_is_found_missing() -> None:
    """Node patching to zero: m1 supplies 0.6 of what a1.h2 leaves undone, and the circuit has no m1."""
    model = with_backup()
    graph, pairs = EdgeGraph.of(model.dims), handmade_pairs(model, 3, successor=False)
    nodes = torch.zeros(graph.n_senders, dtype=torch.bool)
    for name in ("a0.h1", "a1.h2"):
        nodes[graph.find_sender(name)] = True
    without = Circuit.of_nodes(graph, nodes)
    for name in ("m1", "a1.h3"):
        nodes[graph.find_sender(name)] = True
    asked = EvaluateOptions(patching="node", completeness=2, minimality=True)
    options = EdgeOptions(ablation="zero")
    lacking, whole = (
        evaluate(model, pairs, each, options, asked) for each in (without, Circuit.of_nodes(graph, nodes))
    )
    assert lacking.circuits[0].faithfulness == whole.circuits[0].faithfulness == 1
    assert lacking.completeness is not None and whole.completeness is not None
    assert lacking.completeness.worst_share == pytest.approx(SUPPLIED)
    assert [each.nodes for each in lacking.completeness.removals if each.how == "greedy"][-1] == ["a1.h2"]
    assert whole.completeness.worst_share == pytest.approx(0, abs=1e-6)
    # The backups are needed only where a1.h2 is gone.
    assert whole.minimality is not None and whole.minimality.superfluous == []
    by_name = {each.node: each for each in whole.minimality.nodes}
    assert by_name["m1"].share == pytest.approx(-SUPPLIED) and "a1.h2" in by_name["m1"].removed


def test_the_amount_of_self_repair_is_the_one_written_into_the_weights() -> None:
    model = with_backup()
    pairs = handmade_pairs(model, 3, successor=False)
    true = Circuit.full(EdgeGraph.of(model.dims))
    asked = EvaluateOptions(knockout=("a1.h2",), draws=50)
    found = evaluate(model, pairs, true, EdgeOptions(ablation="zero"), asked).repair
    assert found is not None and found.group == ["a1.h2"]
    assert (found.clean, found.knocked_out, found.expected) == pytest.approx((10, 10 * SUPPLIED, 0))
    assert found.repaired == pytest.approx(SUPPLIED)
    first, *others = found.nodes
    assert first.node == "m1" and first.before == 0 and first.after == pytest.approx(-10 * SUPPLIED)
    assert first.interval == pytest.approx((first.change, first.change))
    assert all(each.change == 0 for each in others)
    # With another prompt's digit in its place nothing is missing, so that the backup keeps still.
    kept = evaluate(model, pairs, true, EdgeOptions(), asked).repair
    assert kept is not None and kept.repaired == pytest.approx(0) and kept.knocked_out == pytest.approx(-10)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("gpt2", {}),
        ("llama-gqa", {"ablation": "mean", "direction": "denoise"}),
        ("gemma2-post-norms-softcap", {"ablation": "zero"}),
        ("neox-parallel", {"direction": "denoise"}),
    ],
)
def test_direct_effects_are_the_oracles(family: str, options: dict[str, Any]) -> None:
    """The group has two heads of one layer, which behind a norm of their own do not add up, and an MLP."""
    pairs = [LONG, SHORT] if family == "gpt2" else [SHORT]
    check_repair(family, pairs, ["a0.h1", "a1.h0", "a1.h2", "m1"], **options)


def test_direct_effects_in_float32_and_on_another_metric() -> None:
    check_repair("olmo2", [SHORT], ["a0.h3", "m0"], torch.float32)
    check_repair("gpt2", [LONG], ["a0.h3", "m0"], score=kl, metric="kl")


def test_a_knock_out_is_node_patching_of_the_group() -> None:
    model, pairs, graph = known()
    group = find_group(graph, ["a1.h2", "a0.h0"])
    found = self_repair(model, pairs, group, EdgeOptions(ablation="mean"), PairBootstrap(3, 10, 0))
    kept = Circuit.of_nodes(graph, ~group)
    expected = running.run_circuits(model, pairs, [kept], EdgeOptions(ablation="mean"), patching="node")
    assert found.repair.knocked_out == pytest.approx(float(expected.metric.mean()), abs=1e-5)
    assert found.repair.clean == pytest.approx(float(expected.clean.mean()), abs=1e-5)
    # a1.h2 acts through m2 alone.
    assert any("may as well be 0" in note for note in found.notes)


def test_knock_outs_do_not_depend_on_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load("ioi-gpt2")
    pairs = tasks.pairs("ioi", model.tokenizer, 5, 0)
    group = find_group(EdgeGraph.of(model.dims), ["a2.h1", "m1"])

    def run(budget: int) -> list[float]:
        options = EdgeOptions(max_batch_tokens=budget)
        repair = self_repair(model, pairs, group, options, PairBootstrap(5, 10, 0)).repair
        by_name = sorted(repair.nodes, key=lambda each: each.node)
        return [
            repair.knocked_out,
            repair.expected,
            *(x for each in by_name for x in (each.before, each.after)),
        ]

    together = run(16384)
    monkeypatch.setattr("patchkit.methods._evaluate_repair._AT_ONCE", 1000)
    assert run(30) == pytest.approx(together, abs=1e-4)


# Trained models.


@functools.cache
def scored() -> tuple[PatchModel, list[Pair], EdgeScores]:
    model = load("varbind-llama-gqa")
    pairs = tasks.pairs("variable-binding", model.tokenizer, 8, 0)
    return (
        model,
        pairs[5:],
        attribute_edges(model, pairs[:5], EdgeOptions(), "eap-ig-inputs", keep_pairs=True),
    )


def test_a_whole_curve_of_a_trained_model() -> None:
    model, pairs, scores = scored()
    asked = EvaluateOptions(curve=True, selection="greedy", sizes=(60,), stability=4, random=9)
    exact = top_n(scores.graph, scores.importance, 60, absolute=True)
    found = evaluate(
        model, pairs, scores, EdgeOptions(), asked, truth=exact, truth_name="largest", origin="eap"
    )
    signed, absolute = found.curves
    for line in (signed, absolute):
        assert line.f[-1] == pytest.approx(1, abs=1e-5)
        assert line.f[:2] == [0, 0] and line.n_edges[:2] == [0, 0]
        assert line.cpr is not None and 0.25 < line.cpr < 1.1
        assert line.cmd is not None and 0 <= line.cmd < 0.7
    assert found.circuits[0].faithfulness is not None and found.circuits[0].faithfulness > 0.7
    assert found.random is not None and found.random.p_value == 0.1
    assert found.stability is not None and 0 < found.stability.jaccard <= 1
    assert [each.reference for each in found.overlaps] == ["largest", "largest"]
    assert found.source == "eap" and found.method == "eap-ig-inputs" and found.model == "varbind-llama-gqa"
    # The pairs are others than those that edges were scored on.
    assert not any("scored on" in note for note in found.notes)
    again = evaluate(model, pairs, scores, EdgeOptions(), EvaluateOptions(sizes=(60,), selection="greedy"))
    assert again.circuits[0].per_pair == pytest.approx(found.circuits[0].per_pair, abs=1e-4)
    assert again.circuits[0].interval == pytest.approx(found.circuits[0].interval, abs=1e-4)


def test_a_circuit_by_query_head() -> None:
    """The graph of the EAP-IG repository: with every copy of a shared edge in or out it is the same circuit."""
    model, pairs, scores = scored()
    native = top_n(scores.graph, scores.importance, 80, absolute=False).pruned()
    wide = native.by_query_head()
    assert wide.graph != native.graph
    one, two = (
        evaluate(model, pairs[:2], each, EdgeOptions(), EvaluateOptions(), truth=native)
        for each in (native, wide)
    )
    assert two.circuits[0].per_pair == pytest.approx(one.circuits[0].per_pair, abs=1e-4)
    assert two.graph_edges > one.graph_edges
    assert [each.jaccard for each in (*one.overlaps, *two.overlaps)] == [1.0] * 4


def test_a_finished_part_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, pairs, graph = known()
    true = Circuit.of_names(graph, handmade.TRUE_EDGES)
    asked = EvaluateOptions(completeness=2, random=3, knockout=("a0.h1",))

    def run(**changes: Any) -> Evaluation:
        return evaluate(model, pairs, true, EdgeOptions(), asked, checkpoint=tmp_path, **changes)

    class Stopped(Exception):
        pass

    def stop(label: str, done: int, total: int) -> None:
        if label == "random circuits":
            raise Stopped

    genuine, calls = running.circuit_logits, list[int]()

    def counted(*args: Any, **given: Any) -> Any:
        calls.append(1)
        return genuine(*args, **given)

    monkeypatch.setattr(running, "circuit_logits", counted)
    whole = evaluate(model, pairs, true, EdgeOptions(), asked)
    undisturbed = len(calls)
    calls.clear()
    with pytest.raises(Stopped):
        run(progress=stop)
    before = len(calls)
    first = run()
    assert first == whole and len(calls) == undisturbed and before > 1

    def never(*args: Any, **given: Any) -> Any:
        raise AssertionError("run again")

    monkeypatch.setattr(running, "circuit_logits", never)
    monkeypatch.setattr("patchkit.methods._evaluate_repair.run_to_end", never)
    assert run() == first


def test_means_are_those_of_the_reference_set() -> None:
    model, pairs, graph = known()
    true = Circuit.of_names(graph, handmade.TRUE_EDGES[:-1])
    options, asked = EdgeOptions(ablation="mean"), EvaluateOptions(knockout=("a1.h2",))
    one = evaluate(model, pairs[:2], true, options, asked, reference=pairs[1:])
    two = evaluate(model, pairs[:2], true, options, asked, reference=pairs[2:])
    assert one.corrupt_metric != two.corrupt_metric
    assert one.repair is not None and two.repair is not None
    assert one.repair.knocked_out != two.repair.knocked_out
