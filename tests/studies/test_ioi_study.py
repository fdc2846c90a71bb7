"""The IOI study end to end: on a model whose heads are known, on the embedded one, and where there is nothing to find."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from patchkit import load
from patchkit.data import Pair
from patchkit.errors import InputError
from patchkit.model import PatchModel
from patchkit.model.edges import EdgeGraph
from patchkit.results.circuit import Circuit
from patchkit.results.ioi import IoiStudy, Rule, read_stage, stage_name
from patchkit.results.paths import PathEffect, PathResult, Stage
from patchkit.studies import _ioi_published as published
from patchkit.studies import _ioi_work as work
from patchkit.studies import ioi
from patchkit.studies._ioi_circuit import head_circuit, head_edges, traced_circuit
from patchkit.studies._ioi_paths import chosen_heads, groups_of, inputs_of, movers, trace_heads
from patchkit.studies.ioi import IoiOptions, run_ioi
from patchkit.tasks.ioi import NAMES, OBJECTS, PLACES, TEMPLATES, Sentence
from tests.studies import ioi_handmade
from tests.toy_tokenizers import byte_pairs

#: Beside `make test`, in a lane of its own.
pytestmark = pytest.mark.slow

TINY = IoiOptions(
    pairs=6,
    sequences=8,
    tokens=8,
    most=2,
    groups=2,
    evaluated=4,
    completeness=1,
    removals=0,
    random=3,
    candidates=2,
    templates=2,
    per_template=4,
)


@pytest.fixture(scope="module")
def model() -> PatchModel:
    return load("ioi-gpt2")


@pytest.fixture(scope="module")
def study(model: PatchModel, tmp_path_factory: pytest.TempPathFactory) -> tuple[IoiStudy, Path]:
    out = tmp_path_factory.mktemp("ioi")
    return run_ioi(model, out, TINY, command="patchkit study ioi --out DIR"), out


def test_everything_is_there_and_reads_back(study: tuple[IoiStudy, Path]) -> None:
    found, out = study
    assert IoiStudy.load(out) == found
    assert [row.head for row in found.heads] == [
        f"a{layer}.h{head}" for layer in range(3) for head in range(8)
    ]
    assert list(found.paths) == ["s2-flip", "abc"] and found.accuracy.prefers_io == 1.0
    for result in found.paths.values():
        assert result.stages[0].name == "on the logits" and result.iterative
        assert [read_stage(stage.name) for stage in result.stages[1:]][:3] == [("q", 1), ("k", 1), ("v", 1)]
        for stage in result.stages:
            assert len(stage.chosen) <= TINY.most
            for one in stage.effects:
                assert one.share is not None
                assert one.sender not in stage.chosen or abs(one.share) >= TINY.share
    kept = {row.head for row in found.heads if row.in_circuit}
    assert kept == {head for group in found.groups for head in group} and kept
    assert set(found.circuit_nodes) == kept | {"m0", "m1", "m2"}
    for name in found.traced_edges:
        sender, receiver = name.split("->")
        assert sender in kept and (receiver == "logits" or receiver.partition("<")[0] in kept)
    evaluation = found.evaluation
    assert evaluation.convention.patching == "node" and evaluation.random is not None
    assert evaluation.completeness is not None and evaluation.minimality is not None
    assert evaluation.repair is not None and set(evaluation.repair.group) <= set(found.groups[0])
    protocols = [(one.circuit, one.corruption, one.ablation, one.patching) for one in found.protocols]
    assert protocols[:4] == [
        ("all edges", "abc", "resample", "node"),
        ("traced edges", "abc", "resample", "edge"),
        ("all edges", "s2-flip", "resample", "node"),
        ("traced edges", "s2-flip", "resample", "edge"),
    ]
    assert {one[1:] for one in protocols[4:]} == {("abc", "mean-positional", "node")}
    assert sum(one.pairs for one in found.protocols[4:]) == TINY.templates * TINY.per_template
    # The same circuit under the protocol of the tests is the same number.
    assert found.protocols[0].circuit_metric == pytest.approx(evaluation.circuits[0].circuit_metric, abs=1e-5)
    assert found.comparison == {}
    assert [example["clean"] == example["abc"] for example in found.examples] == [False, False]


def test_the_embedded_model_is_not_said_to_have_the_published_heads(study: tuple[IoiStudy, Path]) -> None:
    """What its card measured by other means: nobody attends from the end to IO; layer 2 attends to S2."""
    found, _ = study
    for name in ("name mover", "negative name mover", "S-inhibition", "induction"):
        assert found.of_class(name) == []
    direct = found.groups[0]
    assert direct and all(head.startswith("a2.") for head in direct)
    for head in direct:
        row = found.head(head)
        assert row.behaviour.attention["last"]["s2"] > 0.9 > row.behaviour.attention["last"]["io"]
        assert (row.looks.query, row.looks.target) == ("last", "s2")
    said = "\n".join(found.findings)
    assert "No head meets the rule of: name mover (nearest " in said
    spoken = [
        line for line in found.findings if line.startswith("Heads without a class that act on the logits: ")
    ]
    assert spoken and all(
        re.search(r"; attention from END to S2 (0\.9\d|1\.00).* .even attention 0\.0", line)
        for line in spoken
    )
    assert all(any(head in line for line in spoken) for head in direct)
    assert "none is a name mover" in said


def test_an_interrupted_study_goes_on_and_a_seed_repeats(
    study: tuple[IoiStudy, Path], model: PatchModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, out = study

    def interrupted(*_: object, **__: object) -> object:
        raise KeyboardInterrupt

    # All heads and paths are there when it ends; the circuit is not.
    with monkeypatch.context() as patched:
        patched.setattr(work, "evaluate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_ioi(model, tmp_path, TINY, command=found.command)
    assert not (tmp_path / "ioi.json").exists()
    monkeypatch.setattr(work, "patch_paths", interrupted)
    monkeypatch.setattr(work, "measure_behaviour", interrupted)
    stages: list[tuple[str, int, int]] = []
    again = run_ioi(
        model, tmp_path, TINY, command=found.command, progress=lambda *stage: stages.append(stage)
    )
    assert again.model_copy(update={"seconds": found.seconds}) == found
    assert any(stage.startswith("the circuit: ") for stage, _, _ in stages)
    assert stages[-1] == ("the circuit under other protocols", 6, 6)
    monkeypatch.setattr(work, "evaluate", interrupted)
    assert run_ioi(model, out, TINY).findings == found.findings
    with pytest.raises(
        InputError, match=r"heads\.json: the checkpoint of a study of another model or with other"
    ):
        run_ioi(model, out, replace(TINY, seed=1))


def test_a_model_whose_heads_are_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def prompts(
        _: PatchModel, n: int, seed: int, corruption: str, templates: int | None = None
    ) -> list[Pair]:
        return ioi_handmade.prompts(n, seed)

    monkeypatch.setattr(ioi, "study_pairs", prompts)
    monkeypatch.setattr(work, "study_pairs", prompts)
    weights, tokenizer = ioi_handmade.build()
    made = load(weights, tokenizer=tokenizer)
    options = replace(TINY, pairs=8, evaluated=8, sequences=48, tokens=12, corruptions=("s2-flip",), most=4)
    found = run_ioi(made, tmp_path, options)
    # The one that acts on the movers' queries is known to do so by path patching alone.
    assert {rule.name: rule.heads for rule in found.rules} == ioi_handmade.TRUE
    assert found.groups == [["a2.h0", "a2.h1"], ["a1.h1"]]
    assert found.evaluation.repair is not None and found.evaluation.repair.group == ["a2.h0"]
    assert found.knocked_out == "the name movers that act on the logits"
    inhibits = {one.stage: one.share for one in found.head("a1.h1").stages}
    # Without the mark both movers look at all nine tokens alike: at IO once, at S twice, or not at all once it is gone.
    base, source = found.paths["s2-flip"].base_metric, found.paths["s2-flip"].source_metric
    once = 10 * (1 - 0.25) / 9
    assert source == pytest.approx(once, abs=1e-3)
    assert inhibits["on the queries of group 1"] == pytest.approx((-once - base) / (base - source), abs=1e-3)
    assert inhibits["on the values of group 1"] == pytest.approx(0, abs=1e-4)
    assert found.head("a2.h1").stages[0].share > 0
    assert set(found.traced_edges) == {"a1.h1->a2.h0<q>", "a1.h1->a2.h1<q>", "a2.h0->logits", "a2.h1->logits"}
    assert found.evaluation.circuits[0].faithfulness == pytest.approx(1, abs=1e-3)
    said = "\n".join(found.findings)
    assert "Name mover: a2.h0." in said and "Induction: a1.h0 (not in the circuit: a1.h0)." in said
    assert "Heads without a class" not in said


def test_a_model_of_english_in_which_no_head_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Post-norms, grouped KV heads, soft-caps, and sentences of the other kind."""
    monkeypatch.setattr(
        work, "patch_paths", lambda _, __, senders, receivers, *___, **____: patched(senders, receivers, {})
    )
    sizes = {
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "hidden_size": 16,
    }
    special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    tokenizer = byte_pairs(
        Sentence(template, a, b, a, place, item).parts()[0]
        for a, b in zip(NAMES, NAMES[1:] + NAMES[:1], strict=True)
        for template in range(len(TEMPLATES))
        for place, item in zip(PLACES, OBJECTS, strict=True)
    )
    config = Gemma2Config(
        vocab_size=len(tokenizer), intermediate_size=16, sliding_window=4, **sizes, **special
    )
    torch.manual_seed(0)
    options = replace(
        TINY,
        pairs=2,
        evaluated=2,
        random=1,
        corruptions=("third",),
        groups=1,
        templates=1,
        per_template=2,
    )
    found = run_ioi(load(Gemma2ForCausalLM(config).eval(), tokenizer=tokenizer), tmp_path, options)
    assert len(found.heads) == 4 and 0 <= found.accuracy.prefers_io <= 1
    assert all(rule.heads == [] for rule in found.rules)
    assert (
        found.groups == found.traced_edges == []
        and found.evaluation.repair is None
        and found.knocked_out == ""
    )
    assert "Path patching keeps no head, so the circuit is the MLPs alone." in found.findings
    assert IoiStudy.load(tmp_path) == found


def test_what_cannot_be_studied_is_refused(model: PatchModel, tmp_path: Path) -> None:
    bare = load(model.hf)
    with pytest.raises(InputError, match="has no tokenizer, and the IOI study writes prompts"):
        run_ioi(bare, tmp_path, TINY)
    with pytest.raises(InputError, match="at least 6 names"):
        run_ioi(load("induction-2l"), tmp_path, TINY)
    assert list(tmp_path.iterdir()) == []
    for wrong, message in (
        ({"pairs": 1}, "pairs must be at least 2, found 1"),
        ({"share": 0.0}, "share must be above 0 and at most 1, found 0.0"),
        ({"corruptions": ()}, "expected at least one corruption of s2-flip, third, abc"),
        ({"corruptions": ("swap",)}, "corruption 'swap' is not one of s2-flip, third, abc"),
        ({"corruptions": ("abc", "abc")}, "a corruption comes twice in abc, abc"),
    ):
        with pytest.raises(InputError, match=f"IOI study: {message}"):
            replace(TINY, **wrong)


def patched(senders: list[str], receivers: list[str], shares: dict[str, float]) -> PathResult:
    from patchkit.results.convention import Convention

    effects = [
        PathEffect(
            sender=s, effect=10 * shares.get(s, 0.0), effect_abs=0, share=shares.get(s, 0.0), per_pair=[]
        )
        for s in senders
    ]
    return PathResult(
        convention=Convention(metric="logit-diff", direction="noise", ablation="resample", positions="all"),
        model="m", mlps="recomputed", positions="all", pair_ids=["0"], base_metric=1, source_metric=0, iterative=False,
        stages=[Stage(name="paths", receivers=receivers, effects=effects, chosen=[])], cost=1.0,
    )  # fmt: skip


#: Heads that act on what, in a model of 3 layers with 4 heads and 2 KV heads: share by corruption and stage.
ACTS = {
    ("flip", "on the logits"): {"a2.h1": -0.5, "a2.h0": 0.1, "a1.h0": -0.01},
    ("abc", "on the logits"): {"a2.h3": -0.3},
    ("abc", "on the keys of group 1"): {"a1.h2": -0.2, "a0.h0": -0.15, "a1.h1": -0.1},
    ("flip", "on the queries of group 1"): {"a1.h2": -0.4},
    ("flip", "on the values of group 2"): {"a0.h3": -0.6},
}


def test_groups_are_traced_from_the_logits_back(model: PatchModel) -> None:
    dims = replace(model.dims, n_heads=4, n_kv_heads=2)
    graph = EdgeGraph.of(dims)
    asked: dict[str, tuple[list[str], list[str]]] = {}

    def run(corruption: str, stage: str, senders: list[str], receivers: list[str]) -> PathResult:
        asked[stage] = senders, receivers
        return patched(senders, receivers, ACTS.get((corruption, stage), {}))

    found = trace_heads(dims, run, ("flip", "abc"), most=2, share=0.05, groups=5)
    names = [stage.name for stage in found["flip"].stages]
    assert names == [stage.name for stage in found["abc"].stages]
    expected = [stage_name(letter, group) for group in (1, 2) for letter in "qkv"]
    # Group 3 is of layer 0, which has nothing below.
    assert names == ["on the logits", *expected]
    assert groups_of(found.values()) == [["a2.h1", "a2.h0", "a2.h3"], ["a1.h2", "a0.h0"], ["a0.h3"]]
    assert asked["on the keys of group 1"] == (
        [f"a{layer}.h{head}" for layer in (0, 1) for head in range(4)],
        ["a2.h0<k>", "a2.h1<k>"],
    )
    assert asked["on the values of group 2"] == ([f"a0.h{head}" for head in range(4)], ["a1.h1<v>"])
    assert chosen_heads(found.values()) == ["a0.h3", "a2.h1", "a1.h2", "a2.h3", "a0.h0", "a2.h0"]
    assert found["flip"].cost == 7.0
    assert inputs_of(graph, ["a1.h0", "a1.h1", "a0.h1"], "v") == ["a1.h0<v>"]
    # Whoever works against the behaviour is no mover.
    assert movers(found.values(), [])[0] == ["a2.h1", "a2.h3"]
    assert movers(found.values(), ["a2.h3", "a1.h0"]) == (["a2.h3"], "the name movers that act on the logits")
    assert movers([], []) == ([], "")

    whole, traced = (
        head_circuit(dims, chosen_heads(found.values())),
        traced_circuit(dims, list(found.values())),
    )
    assert set(head_edges(traced)) == {
        "a2.h1->logits", "a2.h0->logits", "a2.h3->logits", "a1.h2->a2.h0<q>", "a1.h2->a2.h1<q>", "a1.h2->a2.h3<q>",
        "a1.h2->a2.h0<k>", "a1.h2->a2.h1<k>", "a0.h0->a2.h0<k>", "a0.h0->a2.h1<k>", "a0.h3->a1.h1<v>",
    }  # fmt: skip
    assert isinstance(whole, Circuit) and not bool((traced.edges & ~whole.edges).any())
    between = set(head_edges(whole)) - set(head_edges(traced))
    assert len(between) == whole.n_edges - traced.n_edges > 0
    assert {"m0", "m1", "m2", "a0.h3"} <= set(whole.node_names) and "a0.h1" not in whole.node_names


def test_published_figures_stand_beside_their_own_model_only(
    model: PatchModel, study: tuple[IoiStudy, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    found, _ = study
    heads = published.published_heads()
    assert sum(map(len, heads.values())) == len({head for group in heads.values() for head in group}) == 26
    rules = [Rule(name=name, criterion="", heads=group[:1]) for name, group in heads.items()]
    assert published.compare(model, rules, found.evaluation, found.protocols) == {}
    monkeypatch.setattr(published, "is_gpt2_small", lambda _: True)
    rows = published.compare(model, rules, found.evaluation, found.protocols)
    assert rows["previous token heads: a2.h2, a4.h11"] == "a2.h2 (1 of the published 2)"
    means = [one.faithfulness for one in found.protocols[4:] if one.faithfulness is not None]
    assert f"{sum(means) / len(means):.0%} (mean over {len(means)} templates)" in rows.values()


def test_stages_have_names_that_read_back() -> None:
    assert read_stage("on the logits") is None and read_stage("stage 1") is None
    for letter in "qkv":
        assert read_stage(stage_name(letter, 12)) == (letter, 12)
