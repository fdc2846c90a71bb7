"""Path patching equals two or three passes of plain hooks; stages choose what their plans say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from patchkit.data import Pair
from patchkit.errors import InputError
from patchkit.methods import _edge_rows, _edge_sweep, _path_program, path_patching
from patchkit.methods._edge_options import EdgeOptions
from patchkit.methods.edge_patching import patch_edges
from patchkit.methods.path_patching import StagePlan, patch_paths, trace_paths_back
from patchkit.model import EdgeGraph, PatchModel
from patchkit.results.paths import PathResult, as_circuit
from tests.comparisons import agree, pair
from tests.edge_oracle import PRECISE, check_paths, check_paths_of
from tests.handmade_pairs import handmade_pairs
from tests.linear_model import linear_model
from tests.node_oracle import DENSE, LONG, MIDDLE, SHORT, logit_diff
from tests.trained_pairs import trained

#: Of two lengths, so that one is padded.
PAIRS = [LONG, SHORT]
SENDERS = ("input", "a0.h1", "m0", "a1.h0", "m1", "a2.h3", "m2")
#: Receivers of which some are upstream of others, in heads and MLPs, before and behind an attention, and the logits.
SEVERAL = ("a1.h0<q>", "m1", "a2.h1<v>", "logits")


def effects_of(result: PathResult) -> Tensor:
    """`[senders, pairs]`."""
    (stage,) = result.stages
    return torch.tensor([effect.per_pair for effect in stage.effects], dtype=torch.float64)


# Against the oracle.


@pytest.mark.parametrize("family", DENSE)
def test_paths_to_several_receivers_in_every_family_beside_padding(family: str) -> None:
    check_paths(family, PAIRS, SENDERS[:5], SEVERAL)


@pytest.mark.parametrize("mlps", ["recomputed", "frozen"])
@pytest.mark.parametrize("family", ["llama-gqa", "neox-parallel", "gemma2-post-norms-softcap"])
@pytest.mark.parametrize(
    "receivers", [("logits",), ("a2.h0<k>", "a1.h1<v>", "m1"), ("m2",), ("a1.h0<q>", "m1", "logits")]
)
def test_paths_to_receivers_of_every_kind(family: str, receivers: tuple[str, ...], mlps: str) -> None:
    senders = ("input", "a0.h1", "m0", "a1.h2")
    check_paths(family, PAIRS, senders, receivers, mlps, positions="all", direction="denoise")


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("gpt2", {"positions": "last"}),
        ("llama-gqa", {"positions": "s", "direction": "denoise"}),
        ("gpt2", {"positions": "-2", "ablation": "zero"}),
        ("gemma2-post-norms-softcap", {"ablation": "mean"}),
        ("olmo2", {"positions": "s", "ablation": "zero"}),
    ],
)
def test_paths_from_a_place_and_other_ablations(family: str, options: dict[str, str]) -> None:
    receivers = (
        ("a2.h1<k>", "a2.h0<q>", "m2")
        if options.get("positions") == "last"
        else ("a1.h0<k>", "m1", "a2.h1<v>")
    )
    check_paths(family, PAIRS, SENDERS[:5], receivers, least=0.2, **options)


def test_paths_where_prompts_differ_in_the_middle_in_single_precision() -> None:
    check_paths("llama-gqa", [MIDDLE, SHORT], SENDERS, SEVERAL, dtype=torch.float32)


def test_paths_of_a_trained_model() -> None:
    """Effects are up to 30, and float32 loses a digit or two on the way."""
    model, twin, pairs = trained("ioi-gpt2", "ioi")
    senders = ["input", "a0.h3", "m0", "a1.h5", "a1.h0", "m1"]
    check_paths_of(
        model, twin, pairs, senders, ["logits", "a2.h2<q>", "a2.h6<v>"], "recomputed", logit_diff, 1e-4
    )


# Identities.


@pytest.mark.parametrize("family", ["gpt2", "neox-parallel", "gemma2-post-norms-softcap"])
def test_one_path_with_held_mlps_is_an_edge(family: str) -> None:
    """From every sender to receivers of every kind; and a sender that is not upstream has no effect at all."""
    model, _ = pair(family, torch.float64)
    options = EdgeOptions(positions="s" if family == "gpt2" else "all")
    receivers = ["a1.h1<q>", "a2.h0<k>", "a1.h0<v>", "m1", "logits"]
    graph = EdgeGraph.of(model.dims)
    mask = torch.zeros_like(graph.real)
    numbers = [graph.find_receiver(name) for name in receivers]
    mask[:, numbers] = graph.real[:, numbers]
    edges = patch_edges(model, PAIRS, options, edges=mask, keep_pairs=True)
    assert edges.per_pair is not None
    exact = edges.per_pair[:, 0] if edges.placed else edges.per_pair
    tolerance = 1e-12 if family in PRECISE else 1e-6
    for name, number in zip(receivers, numbers, strict=True):
        found = effects_of(patch_paths(model, PAIRS, ["all"], [name], options, mlps="frozen"))
        upstream = int(graph.upstream[number])
        agree(found[:upstream].T, exact[:, :upstream, number], f"paths to {name}", tolerance)
        assert bool((found[upstream:] == 0.0).all())


def test_no_mlp_between_nothing_to_recompute() -> None:
    """Between a head and its layer's MLP, or two neighbouring MLPs, there is one edge whatever is held."""
    model, _ = pair("llama-gqa", torch.float64)
    for senders, receiver in (
        (["a1.h2"], "m1"),
        (["m1"], "a2.h3<q>"),
        (["m2"], "logits"),
        (["m0"], "a1.h0<k>"),
    ):
        one, other = (
            effects_of(patch_paths(model, PAIRS, senders, [receiver], mlps=mlps))
            for mlps in ("recomputed", "frozen")
        )
        agree(one, other, f"{senders[0]} to {receiver}", 1e-12)
        assert bool((one.abs() > 1e-4).all())
    through = [
        effects_of(patch_paths(model, PAIRS, ["a0.h1"], ["logits"], mlps=mlps))
        for mlps in ("recomputed", "frozen")
    ]
    assert bool(((through[0] - through[1]).abs() > 1e-3).all())


def test_paths_of_a_linear_model_add_up() -> None:
    model, pairs = linear_model()

    def paths(receivers: list[str], mlps: str = "recomputed") -> Tensor:
        return effects_of(patch_paths(model, pairs, ["all"], receivers, mlps=mlps))

    graph = EdgeGraph.of(model.dims)
    direct = paths(["logits"])
    agree(paths(["a2.h1<v>", "logits"]), paths(["a2.h1<v>"]) + direct, "a value and the logits", 1e-5)
    # Everything that reaches the logits does so over an edge into them.
    whole = patch_edges(model, pairs, keep_pairs=True)
    held = paths(["logits"], "frozen")
    agree(held.sum(0), (whole.source_metric - whole.base_metric).double(), "edges into the logits", 1e-5)
    # Through an MLP that is recomputed: the direct edge, and the edge into each MLP with what leaves it.
    top = graph.mlp_sender(2)
    edge = whole.per_pair
    assert edge is not None
    last = graph.find_sender("a2.h0")
    passed = edge[:, last, graph.mlp_receiver(2)] + edge[:, last, graph.logits]
    agree(direct[last], passed.double(), "a head of the last layer, over its MLP and directly", 1e-5)
    agree(direct[top], edge[:, top, graph.logits].double(), "the last MLP", 1e-5)


def test_receivers_of_one_layer_of_a_linear_model_add_up() -> None:
    model, pairs = linear_model()
    parts = [
        effects_of(patch_paths(model, pairs, ["all"], receivers))
        for receivers in (["a1.h0<v>"], ["a1.h1<v>"], ["a1.h0<v>", "a1.h1<v>"])
    ]
    agree(parts[0] + parts[1], parts[2], "two values of one layer", 1e-5)
    assert bool((parts[0].abs().amax(1)[:6] > 1e-3).all()) and bool((parts[0][6:] == 0).all())


# Stages.


def test_the_handmade_circuit_is_traced_back_to_the_input() -> None:
    model, pairs = handmade_pairs()
    plans = [
        StagePlan("lookup", k=3, threshold=0.05, letters="qkv"),
        StagePlan("owners", k=5, threshold=0.05, letters="v", only="all"),
    ]
    result = trace_paths_back(model, pairs, stages=plans)
    lookup, owners = result.stages
    assert lookup.receivers == ["logits"] and lookup.chosen == ["a1.h2"]
    assert owners.receivers == ["a1.h2<q>", "a1.h2<k>", "a1.h2<v>"]
    assert set(owners.chosen) == {"input", "a0.h1"} and not result.notes
    # The lookup's output is read by the last MLP alone, which is recomputed.
    (found,) = [effect for effect in lookup.effects if effect.sender == "a1.h2"]
    assert found.share == pytest.approx(-1, abs=1e-4)
    edges = as_circuit(result, EdgeGraph.of(model.dims)).names()
    chosen = [f"{sender}->a1.h2<{letter}>" for sender in ("input", "a0.h1") for letter in "qkv"]
    assert sorted(edges) == sorted([*chosen, "a1.h2->logits"])
    only_the_input = [*plans, StagePlan("end", k=1, only="all"), StagePlan("beyond", k=1)]
    result = trace_paths_back(model, pairs, stages=only_the_input)
    assert result.stages[2].receivers == ["a0.h1<v>"] and result.stages[2].chosen == ["input"]
    assert result.notes == [
        "stage 'end': only the input was chosen, which nothing is upstream of",
        "not run: beyond",
    ]


def expected_choice(result: PathResult, stage: int, plan: StagePlan) -> list[str]:
    """By sorting everything."""
    total = result.base_metric - result.source_metric
    ranked = sorted(result.stages[stage].effects, key=lambda effect: -abs(effect.effect / total))
    turn = {"hurt": -1, "help": 1, "both": 0}[plan.sign]
    passing = [
        effect.sender
        for effect in ranked
        if (turn == 0 or effect.effect / total * turn > 0)
        and abs(effect.effect / total) >= (plan.threshold or 0)
    ]
    return passing[: plan.k]


@pytest.mark.parametrize("direction", ["noise", "denoise"])
def test_stages_choose_what_their_plans_say(direction: Any) -> None:
    model, _, pairs = trained("ioi-gpt2", "ioi")
    plans = [
        StagePlan("movers", k=3, letters="qv"),
        StagePlan("before", k=4, threshold=0.01, letters="kv", sign="both", only="all"),
        StagePlan("last", threshold=0.0001, sign="both", only="mlps"),
    ]
    result = trace_paths_back(model, pairs, EdgeOptions(direction=direction), stages=plans)
    assert result.iterative and [stage.name for stage in result.stages] == ["movers", "before", "last"]
    graph = EdgeGraph.of(model.dims)
    for number, plan in enumerate(plans):
        assert result.stages[number].chosen == expected_choice(result, number, plan)
    movers, before, last = result.stages
    assert movers.receivers == ["logits"] and 0 < len(movers.chosen) <= 3
    wanted = [f"{name}<{letter}>" for name in movers.chosen for letter in "qv"]
    assert before.receivers == sorted(wanted, key=graph.find_receiver)
    upstream = int(graph.upstream[[graph.find_receiver(name) for name in before.receivers]].max())
    assert [effect.sender for effect in before.effects] == list(graph.senders[:upstream])
    assert {effect.sender for effect in movers.effects} == {
        graph.sender_name(s)
        for layer in range(3)
        for s in range(graph.heads(layer).start, graph.heads(layer).stop)
    }
    wanted = [f"{name}<{letter}>" for name in before.chosen if name[0] == "a" for letter in "kv"]
    wanted += [name for name in before.chosen if name[0] == "m"]
    assert last.receivers == sorted(wanted, key=graph.find_receiver)
    # Each stage by itself is a plain run.
    again = patch_paths(model, pairs, ["all"], before.receivers, EdgeOptions(direction=direction))
    by_name = {effect.sender: effect for effect in again.stages[0].effects}
    for effect in before.effects:
        assert effect.effect == pytest.approx(by_name[effect.sender].effect, abs=1e-4)
    base, source = result.base_metric, result.source_metric
    assert (base > source) == (direction == "noise")
    # What is chosen as carrying the behaviour moves the base run towards the source run.
    for effect in movers.effects:
        if effect.sender in movers.chosen:
            assert effect.share is not None and effect.share < 0
            assert (effect.effect < 0) == (direction == "noise")
            assert effect.interval is not None and effect.interval[0] <= effect.effect <= effect.interval[1]


@pytest.mark.parametrize("sign", ["hurt", "help", "both"])
def test_effects_of_one_sign_or_of_both(sign: str) -> None:
    model, _ = pair("llama-gqa", torch.float64)
    plan = StagePlan("one", k=6, threshold=0.005, sign=sign, only="all")
    result = trace_paths_back(model, PAIRS, stages=[plan])
    (stage,) = result.stages
    assert stage.chosen == expected_choice(result, 0, plan) and len(stage.chosen) > 1
    shares = {effect.sender: effect.share for effect in stage.effects}
    signs = {"hurt": {True}, "help": {False}, "both": {True, False}}[sign]
    assert {(shares[name] or 0) < 0 for name in stage.chosen} == signs


def test_stages_end_early_and_say_so() -> None:
    model, _ = pair("llama-gqa", torch.float64)
    plans = [StagePlan("one", threshold=50.0), StagePlan("two", k=2)]
    result = trace_paths_back(model, PAIRS, stages=plans)
    assert result.stages[0].chosen == [] and len(result.stages) == 1
    assert result.notes == ["stage 'one': no sender passes, so the stages end here", "not run: two"]
    plans = [
        StagePlan("one", k=20, sign="both", letters="v"),
        StagePlan("two", k=1, only="mlps", sign="both"),
    ]
    plans += [StagePlan(name, k=1, sign="both", only="heads") for name in ("three", "four", "five")]
    result = trace_paths_back(model, PAIRS, stages=plans)
    assert "upstream of its receivers" in result.notes[0] or "input" in result.notes[0]
    assert result.notes[-1].startswith("not run: ")


def test_results_are_read_back(tmp_path: Path) -> None:
    model, _ = pair("llama-gqa", torch.float64)
    result = trace_paths_back(model, PAIRS, stages=[StagePlan("one", k=2, sign="both")])
    result.save(tmp_path)
    assert PathResult.load(tmp_path) == result
    plain = patch_paths(model, PAIRS, ["heads"], ["logits"])
    with pytest.raises(InputError, match="no stage of this result has chosen a sender"):
        as_circuit(plain, EdgeGraph.of(model.dims))
    assert plain.edges() == [] and not plain.iterative


# Running.


def test_batches_and_neighbours_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = pair("llama-gqa", torch.float64)
    pairs = [LONG, SHORT, MIDDLE]
    whole = effects_of(patch_paths(model, pairs, ["all"], SEVERAL))
    alone = effects_of(patch_paths(model, [MIDDLE], ["all"], SEVERAL))
    agree(alone[:, 0], whole[:, 2], "a pair alone", 1e-6)
    monkeypatch.setattr(path_patching, "SENDERS_AN_ITEM", 3)
    monkeypatch.setattr(_edge_rows, "SMALL_FORWARD", 0)
    monkeypatch.setattr(_edge_sweep, "CPU_FORWARD", 20)
    options = EdgeOptions(max_batch_tokens=40)
    agree(effects_of(patch_paths(model, pairs, ["all"], SEVERAL, options)), whole, "small batches", 1e-6)


def test_an_interrupted_run_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, pairs = trained("ioi-gpt2", "ioi")
    plans = [StagePlan("movers", k=2), StagePlan("before", k=2)]
    whole = trace_paths_back(model, pairs, stages=plans)

    class Stopped(Exception):
        pass

    def stop(label: str, done: int, total: int) -> None:
        if label == "before":
            raise Stopped

    with pytest.raises(Stopped):
        trace_paths_back(model, pairs, stages=plans, checkpoint=tmp_path, progress=stop)

    def forbidden(*_: Any) -> Any:
        raise AssertionError("run again")

    monkeypatch.setattr(_path_program.PatchPaths, "run", forbidden)
    assert trace_paths_back(model, pairs, stages=plans, checkpoint=tmp_path) == whole
    with pytest.raises(AssertionError, match="run again"):
        trace_paths_back(model, pairs, stages=plans, checkpoint=tmp_path, mlps="frozen")


def test_what_paths_cost() -> None:
    """To the logits, MLPs at the last position are all that is run."""
    model, _ = pair("llama-gqa")
    to_the_logits = patch_paths(model, PAIRS, ["all"], ["logits"]).cost
    assert 2 < to_the_logits < 4
    held = patch_paths(model, PAIRS, ["all"], ["logits"], mlps="frozen").cost
    assert 2 <= held < to_the_logits
    to_a_head = patch_paths(model, PAIRS, ["all"], ["a1.h0<q>"]).cost
    assert to_the_logits < to_a_head < 2 + EdgeGraph.of(model.dims).n_senders


@pytest.mark.parametrize("receivers", [("logits",), ("a1.h0<q>", "m2", "logits"), ("a2.h1<v>",)])
def test_what_is_planned_is_what_is_paid(receivers: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = pair("llama-gqa")
    planned: list[float] = []
    right = _path_program.PatchPaths.run

    def counted(program: Any, model: PatchModel, items: Any) -> Any:
        planned.append(program.cost(model.dims, items).forwards)
        return right(program, model, items)

    monkeypatch.setattr(_path_program.PatchPaths, "run", counted)
    paid = patch_paths(model, PAIRS, ["all"], receivers).cost
    assert sum(planned) / sum(len(pair.clean_ids) for pair in PAIRS) == pytest.approx(paid, rel=0.25)


# Bad input.


def refused(model: PatchModel, match: str, **changed: Any) -> None:
    given: dict[str, Any] = {"senders": ["heads"], "receivers": ["logits"], "options": None} | changed
    pairs = given.pop("pairs", PAIRS)
    senders, receivers, options = (given.pop(name) for name in ("senders", "receivers", "options"))
    with pytest.raises(InputError, match=match):
        patch_paths(model, pairs, senders, receivers, options, **given)


def test_bad_input_is_refused_by_name() -> None:
    model, _ = pair("llama-gqa")
    refused(model, "senders \\[\\]: expected a list of names", senders=[])
    refused(model, "senders 'a0.h1': expected a list of names", senders="a0.h1")
    refused(model, "receivers \\(\\): expected a list of names", receivers=())
    refused(model, "sender 'a0.h9': expected input, a", senders=["a0.h9"])
    refused(model, "sender 'logits': expected input", senders=["logits"])
    refused(model, "receiver 'a1.h0': expected logits, m", receivers=["a1.h0"])
    # Keys and values are the KV heads'.
    refused(model, "receiver 'a1.h3<k>': expected .* key and value heads 0 to 1", receivers=["a1.h3<k>"])
    refused(model, "mlps 'kept' is not known; expected one of: recomputed, frozen", mlps="kept")
    refused(
        model,
        "are 2 places, and path patching gives one effect a sender",
        options=EdgeOptions(positions="s,-1"),
    )
    refused(model, "positions 'each' need pairs of one length", options=EdgeOptions(positions="each"))
    refused(model, "are 7 places", options=EdgeOptions(positions="each"), pairs=[LONG])
    refused(model, "there are no prompt pairs", pairs=[])
    refused(model, "unknown metric 'loss'", options=EdgeOptions(metric="loss"))
    refused(model, "a reference set is for the ablations mean", reference=PAIRS)


def test_plans_are_refused_by_name() -> None:
    model, _ = pair("llama-gqa")
    for match, changed in (
        ("a stage has no name", {"name": ""}),
        ("expected k .* a threshold, or both; found neither", {"k": None}),
        ("k is 0; expected at least 1", {"k": 0}),
        ("threshold 0.0; expected a share above 0", {"threshold": 0.0}),
        ("letters 'qz'; expected q, k, v", {"letters": "qz"}),
        ("letters ''; expected q, k, v", {"letters": ""}),
        ("letters 'qq'; expected q, k, v", {"letters": "qq"}),
        ("sign 'up' is not known; expected one of: hurt, help, both", {"sign": "up"}),
        ("only 'neurons' is not known; expected one of: heads, mlps, all", {"only": "neurons"}),
    ):
        with pytest.raises(InputError, match=match):
            StagePlan(**({"name": "movers", "k": 1} | changed))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="there are no stages"):
        trace_paths_back(model, PAIRS, stages=[])
    with pytest.raises(InputError, match="two stages have one name, found one, one"):
        trace_paths_back(model, PAIRS, stages=[StagePlan("one", k=1), StagePlan("one", k=2)])
    same = Pair(LONG.clean_ids, LONG.clean_ids, 4, 6, {}, "same")
    with pytest.raises(InputError, match="base and source runs have the same mean metric"):
        trace_paths_back(model, [same], stages=[StagePlan("one", k=1)])


def test_a_sender_that_is_upstream_of_nothing_is_said() -> None:
    model, _ = pair("llama-gqa")
    result = patch_paths(model, PAIRS, ["a2.h0", "m1", "m2"], ["a1.h0<q>", "m1"])
    assert bool((effects_of(result) == 0.0).all())
    assert result.notes == ["no sender is upstream of any receiver, so every effect is 0 by construction"]
    some = patch_paths(model, PAIRS, ["a1.h3", "m2"], ["a1.h0<q>", "m1"])
    assert bool((effects_of(some)[0] != 0).all()) and bool((effects_of(some)[1] == 0.0).all())
    assert some.notes == []


def test_pairs_whose_prompts_are_one_have_no_share() -> None:
    model, _ = pair("llama-gqa")
    same = Pair(LONG.clean_ids, LONG.clean_ids, 4, 6, {}, "same")
    (stage,) = patch_paths(model, [same], ["all"], ["logits"]).stages
    assert all(effect.effect == 0.0 and effect.share is None for effect in stage.effects)
    assert all(effect.interval is None for effect in stage.effects)
