"""Exact edges equal plain hooks, one receiver's own stream at a time, whatever is restarted and batched together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from patchkit.data import Pair, kl
from patchkit.errors import InputError
from patchkit.methods import _edge_sweep, edge_patching
from patchkit.methods._edge_options import EdgeOptions
from patchkit.methods._node_options import NodeOptions
from patchkit.methods.activation_patching import patch_nodes
from patchkit.methods.edge_patching import patch_edges
from patchkit.model import EdgeGraph, PatchModel
from patchkit.results.edge_scores import EdgeScores
from patchkit.zoo import handmade
from patchkit.zoo.load import load
from tests.comparisons import agree, pair
from tests.edge_oracle import PRECISE, check_edges, check_edges_of, some_edges
from tests.families import build
from tests.handmade_pairs import handmade_pairs
from tests.linear_model import linear_model
from tests.node_oracle import DENSE, LONG, MIDDLE, SHORT, logit_diff
from tests.trained_pairs import trained

#: Of two lengths, so that one is padded.
PAIRS = [LONG, SHORT]
SOME = ("input->a0.h1<k>", "a0.h1->a1.h0<v>", "m0->a2.h3<q>", "a1.h2->m1", "input->m2", "m1->logits")
#: Those that the promise names; of every other one half as many edges are compared.
NAMED = ("llama-gqa", "gpt2", "neox-parallel", "gemma2-post-norms-softcap", "qwen3-qk-norm", "olmo2")


# Against the oracle.


@pytest.mark.parametrize("family", DENSE)
def test_edges_of_every_type_in_every_family_beside_padding(family: str) -> None:
    """By query head too, where a key or value is shared by several."""
    names = some_edges(EdgeGraph.of(pair(family, torch.float64)[0].dims), 1)
    scores = check_edges(family, PAIRS, names if family in NAMED else names[::2], by_query=True)
    assert (scores.by_query is not None) == (pair(family, torch.float64)[0].dims.group > 1)


@pytest.mark.parametrize(
    ("family", "positions", "direction"),
    [
        ("llama-gqa", "last", "denoise"),
        ("gpt2", "s,-1", "noise"),
        ("neox-parallel", "0,s", "denoise"),
        ("gemma2-post-norms-softcap", "last", "noise"),
        # Keys out of a window's sight when restarting in the middle.
        ("mistral-window", "-3", "noise"),
        ("gemma3-two-thetas", "-3", "denoise"),
    ],
)
def test_edges_at_places_in_both_directions(family: str, positions: str, direction: str) -> None:
    check_edges(family, PAIRS, positions=positions, direction=direction)


def test_edges_at_each_position_where_prompts_differ_in_the_middle() -> None:
    scores = check_edges("llama-gqa", [MIDDLE], SOME, positions="each")
    assert scores.placed and scores.mean.shape[0] == 7
    # Nothing differs before the fourth token: not nearly, but not at all.
    effects = scores.mean[:, scores.graph.find_edges(SOME)]
    assert bool((effects[:3] == 0).all()) and bool((effects[3:] != 0).any())


@pytest.mark.parametrize(
    ("family", "ablation"),
    [
        ("gpt2", "mean"),
        ("gpt2", "zero"),
        ("gemma2-post-norms-softcap", "mean-positional"),
        ("gemma2-post-norms-softcap", "mean"),
    ],
)
def test_edges_cut_by_a_mean_or_by_nothing(family: str, ablation: str) -> None:
    check_edges(family, [LONG, MIDDLE] if ablation == "mean-positional" else PAIRS, ablation=ablation)


@pytest.mark.parametrize("family", ["llama-gqa", "gpt2"])
def test_single_precision(family: str) -> None:
    check_edges(family, PAIRS, dtype=torch.float32)


def kl_of(logits: Tensor, reference: Tensor, _: Pair) -> Tensor:
    return kl(logits[None], reference[None])[0]


def test_the_distance_from_the_base_run_as_the_metric() -> None:
    check_edges("llama-gqa", PAIRS, score=kl_of, metric="kl")


def test_layers_of_experts() -> None:
    """The oracle knows nothing of them, but runs their modules as they are."""
    check_edges("mixtral-experts", PAIRS, dtype=torch.float32)


# Identities.


def incoming(model: PatchModel, receiver: str) -> Tensor:
    graph = EdgeGraph.of(model.dims)
    edges = torch.zeros_like(graph.real)
    number = graph.find_receiver(receiver)
    edges[:, number] = graph.real[:, number]
    return edges


def test_edges_into_the_logits_of_a_linear_model_add_up_to_the_whole() -> None:
    model, pairs = linear_model()
    scores = patch_edges(model, pairs, edges=incoming(model, "logits"), keep_pairs=True)
    assert scores.per_pair is not None
    into = scores.per_pair[:, :, scores.graph.logits]
    agree(into.sum(1), scores.source_metric - scores.base_metric, "sum of edges into the logits", 1e-5)
    assert bool((into.abs() > 1e-3).all())


def test_edges_out_of_a_sender_of_a_linear_model_add_up_to_the_node() -> None:
    model, pairs = linear_model()
    scores = patch_edges(model, pairs)
    nodes = patch_nodes(model, pairs, NodeOptions(nodes=("z", "mlp_out")))
    means = nodes.mean()
    for sender, name in enumerate(scores.graph.senders[1:], start=1):
        (number,) = nodes.grid.find(name).tolist()
        total = scores.mean[sender][scores.graph.real[sender]].sum()
        agree(total, means[number], f"edges out of {name}", 1e-5)
    # Of the input, all that differs between the prompts goes out.
    total = scores.mean[0].sum()
    agree(total, (scores.source_metric - scores.base_metric).mean(), "edges out of the input", 1e-5)


def test_the_handmade_circuit_is_found_to_the_edge() -> None:
    """Nothing else has any effect: what other edges carry is the same for all prompts, or is never read."""
    model, pairs = handmade_pairs()
    scores = patch_edges(model, pairs)
    truth = scores.graph.find_edges(handmade.TRUE_EDGES)
    assert bool((scores.mean_abs[truth] > 0.5).all())
    others = scores.graph.real & ~truth
    assert bool((scores.mean_abs[others] < 1e-4).all())
    assert {name for name, *_ in scores.top(len(handmade.TRUE_EDGES))} == set(handmade.TRUE_EDGES)


# Trained models.


@pytest.mark.parametrize(("name", "task"), [("varbind-llama-gqa", "variable-binding"), ("ioi-gpt2", "ioi")])
def test_edges_of_trained_models(name: str, task: str) -> None:
    """Effects are up to 30, and float32 loses a digit or two on the way: 1e-4 of the metric's unit."""
    model, twin, pairs = trained(name, task)
    names = some_edges(EdgeGraph.of(model.dims), 1)[::2]
    check_edges_of(model, twin, pairs, names, logit_diff, 1e-4)


# Running.


def test_batches_and_neighbours_change_nothing() -> None:
    model, _ = pair("llama-gqa", torch.float64)
    mask = EdgeGraph.of(model.dims).find_edges(some_edges(EdgeGraph.of(model.dims), 1, seed=1)[::2])
    pairs = [LONG, SHORT, MIDDLE]
    whole = patch_edges(model, pairs, EdgeOptions(positions="s,-1"), edges=mask, keep_pairs=True)
    options = EdgeOptions(positions="s,-1", max_batch_tokens=1)
    small = patch_edges(model, pairs, options, edges=mask, keep_pairs=True)
    assert small.per_pair is not None and whole.per_pair is not None
    agree(small.per_pair[..., mask], whole.per_pair[..., mask], "one row at a time", 1e-6)
    alone = patch_edges(model, [MIDDLE], EdgeOptions(positions="s,-1"), edges=mask)
    agree(alone.mean[:, mask], whole.per_pair[2][:, mask], "a pair alone", 1e-6)


def test_small_slices_and_every_column_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    from patchkit.methods import _edge_rows

    monkeypatch.setattr(edge_patching, "ROWS_AN_ITEM", 5)
    monkeypatch.setattr(_edge_rows, "SMALL_FORWARD", 0)
    monkeypatch.setattr(_edge_sweep, "CPU_FORWARD", 20)
    check_edges("llama-gqa", [SHORT, MIDDLE], SOME, positions="s,-1")


def test_an_interrupted_sweep_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = pair("gpt2")
    mask = EdgeGraph.of(model.dims).find_edges(some_edges(EdgeGraph.of(model.dims), 2))
    monkeypatch.setattr(edge_patching, "ROWS_AN_ITEM", 8)
    # Every batch is written when it is finished.
    monkeypatch.setattr("patchkit.runtime.journal.PATIENCE", 0.0)
    options = EdgeOptions(max_batch_tokens=30)
    whole = patch_edges(model, PAIRS, options, edges=mask)

    class Stopped(Exception):
        pass

    def stop(label: str, done: int, total: int) -> None:
        assert label == "patching edges" and 0 < done <= total
        if done > total // 2:
            raise Stopped

    with pytest.raises(Stopped):
        patch_edges(model, PAIRS, options, edges=mask, checkpoint=tmp_path, progress=stop)
    assert len(list(tmp_path.iterdir())) > 1
    ran: list[int] = []
    right = _edge_sweep.PatchEdges.run

    def counted(program: Any, model: PatchModel, items: Any) -> Any:
        ran.append(len(items))
        return right(program, model, items)

    monkeypatch.setattr(_edge_sweep.PatchEdges, "run", counted)
    resumed = patch_edges(model, PAIRS, options, edges=mask, checkpoint=tmp_path)
    first = len(ran)
    assert torch.equal(resumed.mean[mask], whole.mean[mask])
    patch_edges(model, PAIRS, options, edges=mask, checkpoint=tmp_path)
    assert len(ran) == first
    # Other edges are another run.
    other = EdgeGraph.of(model.dims).find_edges(["input->m0"])
    patch_edges(model, PAIRS, options, edges=other, checkpoint=tmp_path)
    assert len(ran) > first


def test_what_a_sweep_costs() -> None:
    """Counted in whole forwards: more than the base and source runs, less than a forward for every edge and pair."""
    model, _ = pair("llama-gqa")
    graph = EdgeGraph.of(model.dims)
    scores = patch_edges(model, PAIRS)
    assert 2 < scores.cost < 0.6 * graph.n_edges
    few = patch_edges(model, PAIRS, edges=incoming(model, "logits"))
    # An edge into the logits runs the last position through the end of the last layer.
    assert few.cost < 2 + 0.2 * int(graph.upstream[graph.logits])
    both = patch_edges(model, PAIRS, by_query=True)
    assert both.cost > scores.cost
    assert both.by_query is not None and both.per_pair is None
    wide = EdgeGraph.of(model.dims, by_query_head=True)
    assert torch.equal(~both.by_query[0].isnan(), wide.real)


@pytest.mark.parametrize("positions", ["all", "last", "s"])
def test_what_is_planned_is_what_is_paid(positions: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for what the pairs' common beginnings save, which a plan does not know."""
    model, _ = pair("llama-gqa")
    planned: list[float] = []
    right = _edge_sweep.PatchEdges.run

    def counted(program: Any, model: PatchModel, items: Any) -> Any:
        planned.append(program.cost(model.dims, items).forwards)
        return right(program, model, items)

    monkeypatch.setattr(_edge_sweep.PatchEdges, "run", counted)
    paid = patch_edges(model, PAIRS, EdgeOptions(positions=positions)).cost
    assert sum(planned) / sum(len(pair.clean_ids) for pair in PAIRS) == pytest.approx(paid, rel=0.2)


def test_the_result_is_whole() -> None:
    model, _ = pair("gpt2")
    scores = patch_edges(model, PAIRS)
    assert isinstance(scores, EdgeScores) and scores.method.name == "exact"
    assert torch.equal(~scores.mean.isnan(), scores.graph.real)
    assert scores.by_query is None and scores.per_pair is None and scores.places == ("all",)
    assert torch.equal(torch.nan_to_num(scores.importance), torch.nan_to_num(-scores.mean))


def test_prompts_without_difference_and_of_one_token() -> None:
    model, _ = pair("llama-gqa")
    same = Pair(LONG.clean_ids, LONG.clean_ids, 4, 6, {}, "same")
    scores = patch_edges(model, [same])
    assert bool((scores.mean_abs[scores.graph.real] == 0).all()) and scores.cost == pytest.approx(2)
    one = Pair((5,), (9,), 4, 6, {}, "one")
    alone = patch_edges(model, [one])
    beside = patch_edges(model, [one, LONG], keep_pairs=True)
    assert beside.per_pair is not None
    real = scores.graph.real
    agree(beside.per_pair[0][real], alone.mean[real], "a prompt of one token", 1e-5)


def test_half_precision_is_scored_in_single() -> None:
    scores = patch_edges(load(build("llama-gqa", dtype=torch.bfloat16)), PAIRS)
    precise = patch_edges(pair("llama-gqa")[0], PAIRS)
    assert scores.mean.dtype == torch.float32
    real = scores.graph.real
    both = torch.stack([scores.mean[real], precise.mean[real]])
    assert float(torch.corrcoef(both)[0, 1]) > 0.99


def test_query_heads_where_no_key_or_value_was_asked_for() -> None:
    model, _ = pair("llama-gqa")
    mask = EdgeGraph.of(model.dims).find_edges(["input->m0"])
    by_query = patch_edges(model, [LONG], edges=mask, by_query=True).by_query
    assert by_query is not None and int((~by_query[0].isnan()).sum()) == 1


# Bad input.


def test_bad_input_is_refused_by_name() -> None:
    model, _ = pair("llama-gqa")
    graph = EdgeGraph.of(model.dims)
    nothing = torch.zeros_like(graph.real)
    with pytest.raises(InputError, match="the mask is empty, so there is nothing to patch"):
        patch_edges(model, PAIRS, edges=nothing)
    with pytest.raises(InputError, match="boolean mask of shape"):
        patch_edges(model, PAIRS, edges=graph.real[:-1])
    unreal = nothing.clone()
    unreal[graph.find_sender("m2"), graph.find_receiver("a0.h1<q>")] = True
    with pytest.raises(
        InputError, match="edge m2->a0.h1<q> is in the circuit, but the graph has no such edge"
    ):
        patch_edges(model, PAIRS, edges=unreal)
    with pytest.raises(InputError, match="there are no prompt pairs"):
        patch_edges(model, [])
    with pytest.raises(InputError, match="positions 'each' need pairs of one length"):
        patch_edges(model, PAIRS, EdgeOptions(positions="each"))
    with pytest.raises(InputError, match="has no span 'subject'"):
        patch_edges(model, PAIRS, EdgeOptions(positions="subject"))
    with pytest.raises(InputError, match="position 9 is outside pair 'long'"):
        patch_edges(model, PAIRS, EdgeOptions(positions="9"))
    with pytest.raises(InputError, match="unknown metric 'loss'"):
        patch_edges(model, PAIRS, EdgeOptions(metric="loss"))
    with pytest.raises(InputError, match="a reference set is for the ablations mean"):
        patch_edges(model, PAIRS, reference=PAIRS)
    with pytest.raises(InputError, match="must all have one length"):
        patch_edges(model, PAIRS, EdgeOptions(ablation="mean-positional"))
    with pytest.raises(InputError, match="max_batch_tokens must be at least 1"):
        patch_edges(model, PAIRS, EdgeOptions(max_batch_tokens=0))


def test_a_model_without_weights_is_refused(tmp_path: Path) -> None:
    hf = LlamaForCausalLM(handmade.config())
    hf.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="has no weights; load it without lazy"):
        patch_edges(load(str(tmp_path), lazy=True), [LONG])


def test_the_model_is_left_as_it_was() -> None:
    model, twin = pair("gpt2", torch.float64)
    before = {name: value.clone() for name, value in model.hf.state_dict().items()}
    patch_edges(model, PAIRS, edges=incoming(model, "m2"))
    assert all(torch.equal(value, before[name]) for name, value in model.hf.state_dict().items())
    ids = torch.tensor([LONG.clean_ids])
    with torch.no_grad():
        agree(model.hf(ids).logits, twin(ids).logits, "a plain forward afterwards", 1e-12)
    assert "gpt2" in PRECISE
