"""Comparing two models: identities, each part against a direct call of its method, groups, words, what is refused."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch

from patchkit import tasks
from patchkit.data import Pair, Triple, group, halves
from patchkit.errors import InputError
from patchkit.methods import (
    EdgeOptions,
    EvaluateOptions,
    NodeOptions,
    answers_with,
    attribute_edges,
    evaluate,
    patch_across,
)
from patchkit.model import Dims, EdgeGraph, PatchModel
from patchkit.report import comparison_page
from patchkit.results.circuit import Circuit
from patchkit.results.comparison import Comparison
from patchkit.results.edge_scores import EdgeScores
from patchkit.studies._comparison_groups import EVERYTHING, groups_of, random_groups
from patchkit.studies.comparison import CompareOptions, compare_models
from patchkit.zoo.load import load
from tests.across_oracle import stages
from tests.families import build
from tests.node_oracle import LONG, MIDDLE, SHORT

OPTIONS = CompareOptions(sizes=(20, 40), random=1, draws=100)
EARLY, LATE = "varbind-llama-gqa-early", "varbind-llama-gqa"


@functools.cache
def model(name: str) -> PatchModel:
    return load(name)


@functools.cache
def material() -> tuple[list[Pair], list[Pair], dict[str, list[Triple]]]:
    tokenizer = model(LATE).tokenizer
    found_on, held_out = halves(tasks.pairs("variable-binding", tokenizer, 8, 0), 0)
    names = tasks.get("variable-binding").trained
    made = tasks.desiderata("variable-binding", tokenizer, 0, 4, 0, names=names)
    return found_on, held_out, group(made.triples(), "test")


@functools.cache
def compared() -> Comparison:
    found_on, held_out, triples = material()
    return compare_models(
        model(EARLY), model(LATE), found_on, held_out, OPTIONS, desiderata=triples, task="variable-binding"
    )


def test_a_model_is_the_same_as_itself() -> None:
    (tiny, _), _ = stages("llama-gqa", torch.float32)
    found = compare_models(
        tiny, load(build("llama-gqa")), [MIDDLE], [LONG, SHORT], OPTIONS, groups={"some": ("a1.h0", "m2")}
    )
    assert all(each.jaccard == 1.0 and each.precision == 1.0 for each in found.overlaps)
    assert found.rank_correlation == pytest.approx(1.0) and found.rank_correlation_abs == pytest.approx(1.0)
    first, second = found.models
    assert (first.clean, first.accuracy) == (second.clean, second.accuracy)
    for across in found.across:
        # Rows of patched runs are batched otherwise than the base runs: rounding is left.
        assert max(abs(node.effect) for node in across.nodes) < 1e-4
        assert all(abs(each.effect) < 1e-4 and each.share is None for each in across.groups)
    assert any("no gap to close" in said for said in found.findings)
    by_size = {(each.found_in, each.run_in, each.run.requested): each.run for each in found.circuits}
    for size in OPTIONS.sizes:
        runs = [
            by_size[source, place, size] for source in ("first", "second") for place in ("first", "second")
        ]
        assert len({run.faithfulness for run in runs}) == 1
    comparison_page(found)


@pytest.mark.slow
def test_every_part_is_what_its_method_gives_by_itself() -> None:
    found, (found_on, held_out, triples) = compared(), material()
    scores = {
        which: attribute_edges(model(name), found_on, EdgeOptions())
        for which, name in (("first", EARLY), ("second", LATE))
    }
    assert found.scores is not None
    assert torch.allclose(found.scores[0].mean, scores["first"].mean, equal_nan=True, atol=1e-5)
    asked = EvaluateOptions(sizes=OPTIONS.sizes, absolute=True, draws=100)
    for place, name in (("first", EARLY), ("second", LATE)):
        for source in ("first", "second"):
            direct = evaluate(model(name), held_out, scores[source], EdgeOptions(), asked)
            mine = [each.run for each in found.circuits if (each.found_in, each.run_in) == (source, place)]
            assert [run.requested for run in mine] == list(OPTIONS.sizes)
            for run, wanted in zip(mine, direct.circuits, strict=True):
                assert run.n_edges == wanted.n_edges
                assert run.faithfulness == pytest.approx(wanted.faithfulness, abs=1e-4)
                assert run.faithfulness_interval == pytest.approx(wanted.faithfulness_interval, abs=1e-4)
    direct = evaluate(
        model(EARLY), held_out, scores["first"], EdgeOptions(), asked, truth=scores["second"]
    ).overlaps
    assert [(each.level, each.requested, each.jaccard) for each in found.overlaps] == [
        (each.level, each.requested, each.jaccard) for each in direct
    ]
    nodes = patch_across(model(EARLY), model(LATE), held_out, NodeOptions())
    into = found.into("first")
    assert [node.node for node in into.nodes] == nodes.grid.names()
    assert torch.tensor([node.effect for node in into.nodes]) == pytest.approx(
        nodes.effects.mean(0), abs=1e-4
    )
    gap = into.donor_metric - into.model_metric
    assert into.donor_metric == pytest.approx(found.models[1].clean, abs=1e-4) and gap > 1
    assert all(node.share == pytest.approx(node.effect / gap) for node in into.nodes)
    reverse = found.into("second")
    assert reverse.donor_metric == pytest.approx(into.model_metric, abs=1e-4)
    heads = next(each for each in into.groups if each.group == "heads of layer 1").nodes
    for place, name in (("first", EARLY), ("second", LATE)):
        own = next(
            each
            for each in found.desiderata
            if (each.group, each.model, each.donor) == ("heads of layer 1", place, place)
        )
        assert own.scores == answers_with(model(name), triples, heads)[0]


@pytest.mark.slow
def test_the_later_stage_does_better_with_the_fetch_that_the_earlier_one_has() -> None:
    """The stages differ in what MLPs make of the value, not in how heads of layer 1 fetch it."""
    tokenizer = model(LATE).tokenizer
    found_on, held_out = halves(tasks.pairs("variable-binding", tokenizer, 64, 0), 0)
    names = tasks.get("variable-binding").trained
    triples = group(tasks.desiderata("variable-binding", tokenizer, 0, 40, 0, names=names).triples(), "test")
    found = compare_models(model(EARLY), model(LATE), found_on, held_out, OPTIONS, desiderata=triples)
    assert found.models[0].accuracy < 0.9 < found.models[1].accuracy
    shares = {each.group: each.share or 0.0 for each in found.into("first").groups}
    assert shares["MLPs"] > 0.25 > shares["heads of layer 1"]
    fetched = next(
        each
        for each in found.desiderata
        if (each.group, each.model, each.donor) == ("heads of layer 1", "second", "first")
    )
    assert min(fetched.scores.values()) > 0.8
    assert any("MLPs closes most" in said for said in found.findings)


def test_it_is_saved_and_read_back(tmp_path: Path) -> None:
    found = compared()
    found.save(tmp_path)
    again = Comparison.load(tmp_path)
    assert again == found.model_copy(update={"scores": None})
    assert EdgeScores.load(tmp_path / "second").convention == found.convention


def test_what_is_refused() -> None:
    found_on, held_out, _ = material()

    def compare(options: CompareOptions = OPTIONS, **more: object) -> None:
        compare_models(model(EARLY), model(LATE), found_on, held_out, options, **more)  # type: ignore[arg-type]

    with pytest.raises(InputError, match="not of one architecture: n_kv_heads 2 and 8"):
        compare_models(model(LATE), load("varbind-llama"), found_on, held_out, OPTIONS)
    for options, words in (
        (CompareOptions(sizes=(9999,)), "9999 edges were asked for"),
        (CompareOptions(positions="each"), "positions 'each'"),
        (CompareOptions(method="acdc"), "does not score every edge"),
    ):
        with pytest.raises(InputError, match=words):
            compare(options)
    with pytest.raises(InputError, match="ascending"):
        CompareOptions(sizes=(50, 20))
    with pytest.raises(InputError, match="name is taken"):
        compare(groups={EVERYTHING: ("a0.h0",)})


DIMS = Dims(3, 4, 2, 8, 32, 40, 37, False)


def test_groups_are_of_circuits_or_of_names() -> None:
    graph = EdgeGraph.of(DIMS)
    first = Circuit.of_names(graph, ["input->a0.h1<q>", "a0.h1->m2", "m2->logits"])
    second = Circuit.of_names(graph, ["input->a1.h1<v>", "a1.h3->logits"])
    found = groups_of([first, second], None, DIMS)
    assert found == {
        "circuit of the first": ["a0.h1", "m2"],
        "circuit of the second": ["a1.h3"],
        "heads of layer 0": ["a0.h1"],
        "heads of layer 1": ["a1.h3"],
        "MLPs": ["m2"],
        EVERYTHING: found[EVERYTHING],
    }
    assert len(found[EVERYTHING]) == 15
    named = groups_of([first, second], {"mine": ("a2.h0", "m0", "a2.h0")}, DIMS)
    assert named["mine"] == ["a2.h0", "m0"] and "MLPs" not in named
    with pytest.raises(InputError, match="layer 9 is out of range"):
        groups_of([first, second], {"mine": ("a9.h0",)}, DIMS)
    with pytest.raises(InputError, match="has no nodes"):
        groups_of([first, second], {"mine": ()}, DIMS)


def test_random_groups_have_as_many_heads_and_mlps() -> None:
    drawn = random_groups(["a0.h1", "a2.h2", "m1"], DIMS, 5, 0)
    assert len(drawn) == 5 and len({tuple(each) for each in drawn}) > 1
    assert all([name[0] for name in each] == ["a", "a", "m"] and len(set(each)) == 3 for each in drawn)
    assert drawn == random_groups(["a0.h1", "a2.h2", "m1"], DIMS, 5, 0)
    # There is but one group of all MLPs, and but one of everything.
    assert random_groups(["m0", "m1", "m2"], DIMS, 5, 0) == []
