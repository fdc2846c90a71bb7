"""`recommend`: the scoreboard decides and nothing else; costs are the plans'; what is missed and left out is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

import patchkit
from patchkit.errors import InputError
from patchkit.methods import EdgeOptions, NodeOptions
from patchkit.methods.edge_plans import attribution_stages as edge_stages
from patchkit.methods.edge_plans import synthetic_pairs
from patchkit.methods.node_plans import patching_stages
from patchkit.model import PatchModel
from patchkit.results.recommendation import Recommendation
from patchkit.results.scoreboard import SCOREBOARD, Scoreboard
from patchkit.runtime.plan import make_plan
from patchkit.studies import recommend as home
from patchkit.studies._recommend_ways import CONTROLS, WAYS
from patchkit.studies._truth_methods import METHODS
from patchkit.studies.recommend import RecommendOptions, evidence_lines, lead_lines, recommend
from patchkit.zoo.load import load
from patchkit.zoo.programs.failures import BACKUP, MLP, REDUNDANCY
from tests.report import scoreboard_example as made
from tests.studies.recommend_boards import board

NODES = {
    "exact": 0.99,
    "atp": 0.8,
    "atp-qk": 0.85,
    "atp-star": 0.95,
    "blocks": 0.6,
    "mask": 0.9,
    "random nodes": 0.5,
}
EDGES = {"exact edges": 0.99, "eap": 0.8, "eap-ig-inputs": 0.95, "acdc": 0.7, "ifr": 0.6, "random edges": 0.5}
BOTH = board(NODES | EDGES)


@pytest.fixture(scope="module")
def gqa() -> PatchModel:
    return load("varbind-llama-gqa", lazy=True)


def asked(model: Any, scoreboard: Scoreboard = BOTH, **options: Any) -> Recommendation:
    return recommend(model, RecommendOptions(**options), scoreboard=scoreboard)


def said(found: Recommendation) -> str:
    return "\n".join([*lead_lines(found), *evidence_lines(found)])


def test_the_best_is_recommended_whatever_it_takes(gqa: PatchModel) -> None:
    found = asked(gqa)
    assert found.chosen == found.best == "exact"
    assert [each.method for each in found.choices] == ["exact", "atp-star", "mask", "atp-qk", "atp", "blocks"]
    assert found.choice.command == (
        "patchkit patch --model varbind-llama-gqa --pairs pairs.jsonl --nodes z,mlp_out --out DIR"
    )
    assert [(each.method, each.reason) for each in found.not_compared] == [
        ("random nodes", "a control, which knows nothing")
    ]
    assert asked(gqa, nodes=None).chosen == "exact edges"


@pytest.mark.parametrize("best", ["atp", "atp-qk", "mask", "blocks"])
def test_another_scoreboard_changes_the_recommendation(gqa: PatchModel, best: str) -> None:
    found = asked(gqa, board(NODES | {best: 1.0, "exact": 0.9}))
    assert found.chosen == found.best == best


@pytest.mark.parametrize("best", [method for method in made.EDGE_METHODS if method not in CONTROLS])
def test_every_method_of_edges_can_be_recommended(gqa: PatchModel, best: str) -> None:
    qualities = dict.fromkeys(made.EDGE_METHODS, 0.7) | {best: 0.9}
    found = asked(gqa, board(qualities), nodes=None)
    assert found.chosen == best and f"patchkit edges --model {gqa.name}" in found.choice.command


@pytest.mark.parametrize("best", [method for method in made.NODE_METHODS if method not in CONTROLS])
def test_every_method_of_nodes_can_be_recommended(gqa: PatchModel, best: str) -> None:
    found = asked(gqa, board(dict.fromkeys(made.NODE_METHODS, 0.7) | {best: 0.9}))
    assert found.chosen == best


def test_every_method_of_the_study_has_a_way_or_is_a_control() -> None:
    assert METHODS.keys() == WAYS.keys() | CONTROLS == made.NODE_METHODS.keys() | made.EDGE_METHODS.keys()


def test_costs_are_those_of_the_plans(gqa: PatchModel) -> None:
    pairs = synthetic_pairs(1, 32, gqa.dims.vocab_size)

    def planned(stages: Any) -> float:
        return make_plan(gqa.dims, stages, [32], max_batch_tokens=16384, results=0.0).forward_equivalents

    exact = planned(patching_stages(gqa, pairs, NodeOptions(nodes=("z", "mlp_out"))))
    assert asked(gqa).of_method("exact").cost == pytest.approx(exact)
    inputs = planned(patching_stages(gqa, pairs, NodeOptions(nodes=("q", "k", "v"))))
    found = asked(gqa, nodes=("q", "k", "v"))
    assert found.of_method("exact").cost == pytest.approx(inputs) and found.of_method(
        "atp"
    ).cost == pytest.approx(3, rel=0.1)
    eap = planned(edge_stages(gqa, pairs, EdgeOptions(), "eap"))
    assert asked(gqa, nodes=None).of_method("eap").cost == pytest.approx(eap)


def test_a_budget_excludes_and_says_what_that_loses(gqa: PatchModel) -> None:
    found = asked(gqa, budget=10.0)
    assert found.chosen == "atp-star" and {each.method for each in found.over_budget} == {"exact", "mask"}
    first = found.over_budget[0]
    assert (first.method, first.gain) == ("exact", pytest.approx(0.04))
    assert "exact" in said(found) and "would gain 0.040" in said(found)
    # The check of the top nodes would be above it.
    assert found.choice.cost_with_proof is None and "--verify" not in found.choice.command
    roomy = asked(gqa, budget=20.0)
    assert roomy.choice.cost_with_proof is not None and roomy.choice.cost < roomy.choice.cost_with_proof <= 20
    assert (
        "--method atp-star --pairs pairs.jsonl --nodes z,mlp_out --verify 10 --out DIR"
        in roomy.choice.command
    )


def test_a_budget_below_all_says_what_the_cheapest_costs(gqa: PatchModel) -> None:
    with pytest.raises(
        InputError, match=r"budget of 1 .* below the cheapest method, atp, which takes 3\.0 .*--budget 3$"
    ):
        asked(gqa, budget=1.0)
    # Of heads and MLPs alone the QK fix costs nothing.
    assert {each.method for each in asked(gqa, budget=3.0).choices} == {"atp", "atp-qk"}


def test_of_those_that_cannot_be_told_from_the_best_the_cheapest_is_taken(gqa: PatchModel) -> None:
    found = asked(gqa, board(NODES | {"atp": 0.985}, wobble={"atp": 0.03}))
    assert (found.best, found.chosen) == ("exact", "atp")
    assert [each.method for each in found.choices if each.like_best] == ["exact", "atp"]
    assert "these cases do not tell the two apart" in said(found)
    assert found.runner_up is not None and found.runner_up.method == "exact"
    # Always a little worse is worse.
    assert asked(gqa, board(NODES | {"atp": 0.985})).chosen == "exact"


def test_a_single_pair_is_another_question(gqa: PatchModel) -> None:
    singles = {"exact": 0.6, "atp-star": 0.9, "mask": None}
    found = asked(gqa, board(NODES, singles=singles), pairs=1)
    assert found.chosen == "atp-star" and "from one pair" in found.measure and "a single pair" in said(found)
    assert "mask" in {each.method for each in found.not_compared}
    other = asked(gqa, board(NODES, singles=singles), pairs=1, question="top")
    assert any("Of one pair alone only ranks were measured" in note for note in other.notes)


def test_questions_have_measures_of_their_own(gqa: PatchModel) -> None:
    over = board(EDGES | {"exact edges": 1.3, "eap": 0.97})
    # A circuit that does more than the model is as far from it as one that does less.
    assert asked(gqa, over, nodes=None, question="circuit").chosen == "eap"
    assert asked(gqa, over, nodes=None, question="top").chosen == "exact edges"
    sizes = asked(gqa, nodes=None, question="sizes")
    assert sizes.chosen == "exact edges" and not sizes.higher
    with pytest.raises(
        InputError, match=r"has no distance from the model over all sizes \(CMD\) of any method"
    ):
        asked(gqa, question="sizes")


def test_kinds_of_nodes_decide_what_counts(gqa: PatchModel) -> None:
    inputs = asked(gqa, nodes=("q", "k"))
    assert inputs.measure == "AUROC of queries, keys and values"
    assert "mask" in {each.method for each in inputs.not_compared}
    both = asked(gqa, nodes=("q", "z"))
    assert both.measure == "AUROC of nodes and AUROC of queries, keys and values"
    assert any("kind neuron" in note for note in asked(gqa, nodes=("neuron",)).notes)
    assert "--nodes a1.h3" in asked(gqa, nodes=("a1.h3",)).choice.command
    with pytest.raises(InputError, match="'nonsense' is neither a node kind"):
        asked(gqa, nodes=("nonsense",))


def test_what_nothing_within_the_budget_sees_is_said_with_what_to_do(gqa: PatchModel) -> None:
    misses = {
        "exact": (BACKUP, REDUNDANCY), "atp": (BACKUP, REDUNDANCY, MLP), "atp-star": (BACKUP, REDUNDANCY, MLP),
        "mask": (BACKUP,),
    }  # fmt: skip
    qualities = {method: NODES[method] for method in misses}
    whole = asked(gqa, board(qualities, misses=misses))
    assert [each.kind for each in whole.unseen] == [BACKUP]
    cheap = asked(gqa, board(qualities, misses=misses), budget=5.0)
    assert [each.kind for each in cheap.unseen] == [MLP, REDUNDANCY, BACKUP]
    told = said(cheap)
    assert "`patchkit mask`" in told and "--knockout" in told and "misses 16 of 16" in told
    assert [(each.kind, each.missed, each.total) for each in whole.choice.missed] == [
        (MLP, 0, 16), (REDUNDANCY, 16, 16), (BACKUP, 16, 16), ("", 0, 16),
    ]  # fmt: skip


def test_methods_without_a_command_and_without_families_are_left_out(gqa: PatchModel) -> None:
    odd = board(NODES | {"of tomorrow": 1.0})
    found = asked(gqa, odd)
    assert found.chosen == "exact"
    assert ("of tomorrow", "no command of this version runs it") in {
        (e.method, e.reason) for e in found.not_compared
    }
    cut = [
        case
        if case.family == "handmade"
        else case.model_copy(update={"methods": [row for row in case.methods if row.method != "exact"]})
        for case in BOTH.cases
    ]
    partial = asked(gqa, made.board(cut, BOTH.methods))
    assert partial.chosen == "atp-star" and any("exact" in note for note in partial.notes)


@pytest.fixture(scope="module")
def thirteen_b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("13b")
    LlamaConfig(
        hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40, vocab_size=32000,
        dtype="float16",
    ).save_pretrained(path)  # fmt: skip
    return path


def test_a_config_is_enough(thirteen_b: Path) -> None:
    found = patchkit.recommend(thirteen_b, patchkit.RecommendOptions(budget=50.0), scoreboard=board(NODES))
    assert (
        found.chosen == "atp-star"
        and "40 layers x 40 heads" in found.shape
        and "1,640 heads and MLPs" in found.shape
    )
    # GradDrop is half a backward a layer.
    assert found.choice.cost == pytest.approx(3 + 39 / 2, rel=0.1)
    (exact,) = [each for each in found.over_budget if each.method == "exact"]
    assert exact.cost is not None and 400 < exact.cost < 1640
    assert f"--model {thirteen_b}" in found.choice.command
    quick = {method: quality for method, quality in EDGES.items() if method not in ("exact edges", "acdc")}
    assert asked(thirteen_b, board(quick), nodes=None, budget=20.0).chosen == "eap-ig-inputs"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"budget": 0.0}, "budget 0"),
        ({"budget": float("nan")}, "budget nan"),
        ({"pairs": 0}, "pairs 0"),
        ({"tokens": 1}, "tokens 1"),
        ({"nodes": ()}, "no nodes"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        RecommendOptions(**options)


def test_without_a_shipped_scoreboard_it_is_said_how_to_make_one(
    gqa: PatchModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(home, "__file__", str(tmp_path / "recommend.py"))
    with pytest.raises(
        InputError, match=r"has no scoreboard\.json; make one with `patchkit study ground-truth"
    ):
        recommend(gqa)
    BOTH.save(tmp_path)
    assert recommend(gqa).chosen == "exact"


def test_what_is_shipped_can_be_read_and_answers(gqa: PatchModel) -> None:
    if not (Path(home.__file__).parent / SCOREBOARD).exists():
        pytest.skip("no scoreboard is in the package yet")
    for nodes in (("z", "mlp_out"), ("q", "k", "v"), None):
        for pairs in (1, 100):
            assert recommend(gqa, RecommendOptions(nodes=nodes, pairs=pairs)).choices
