"""Generalisation: each cell is a direct evaluation, the whole model is 1 everywhere, sets without a difference say so."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from patchkit import tasks
from patchkit.data import Pair, halves
from patchkit.errors import InputError
from patchkit.methods import EdgeOptions, EvaluateOptions, attribute_edges, evaluate
from patchkit.model import EdgeGraph, PatchModel
from patchkit.report import generalisation_page
from patchkit.results.generalisation import Generalisation
from patchkit.studies.generalisation import GeneraliseOptions, generalise, together
from patchkit.tasks.templates import default_templates, template_pairs, templates
from patchkit.zoo.load import load

SETS = ("symbol", "plus")
OPTIONS = GeneraliseOptions(sizes=(10, 30), random=2, draws=100)


@functools.cache
def model() -> PatchModel:
    return load("varbind-llama-gqa")


@functools.cache
def sets() -> dict[str, list[Pair]]:
    return template_pairs("variable-binding", model().tokenizer, SETS, 6, 0)


@functools.cache
def found() -> Generalisation:
    return generalise(model(), sets(), OPTIONS, task="variable-binding")


@pytest.mark.slow
def test_every_cell_is_a_direct_evaluation() -> None:
    split = {name: halves(pairs, 0) for name, pairs in sets().items()}
    scores = {
        name: attribute_edges(model(), found_on, EdgeOptions()) for name, (found_on, _) in split.items()
    }
    every = [pair for found_on, _ in split.values() for pair in found_on]
    scores["all sets"] = attribute_edges(model(), every, EdgeOptions())
    asked = EvaluateOptions(sizes=OPTIONS.sizes, absolute=True, draws=100)
    for column, (name, (_, held_out)) in enumerate(split.items()):
        for row, source in enumerate((*SETS, "all sets")):
            direct = evaluate(model(), held_out, scores[source], EdgeOptions(), asked)
            for matrix, wanted in zip(found().sizes, direct.circuits, strict=True):
                assert matrix.rows[row].circuit == source
                cell = matrix.rows[row].runs[column]
                assert (cell.requested, cell.n_edges) == (wanted.requested, wanted.n_edges)
                assert cell.faithfulness == pytest.approx(wanted.faithfulness, abs=1e-4)
                assert cell.faithfulness_interval == pytest.approx(wanted.faithfulness_interval, abs=1e-4)
        assert found().sets[column].name == name
        assert found().sets[column].clean == pytest.approx(direct.clean_metric, abs=1e-4)
        assert found().sets[column].held_out == [pair.id for pair in held_out]


def test_together_is_scoring_all_pairs_at_once() -> None:
    parts = [attribute_edges(model(), pairs[:n]) for n, pairs in zip((2, 3), sets().values(), strict=True)]
    whole = attribute_edges(model(), [*sets()["symbol"][:2], *sets()["plus"][:3]])
    mean = together(parts)
    for name in ("mean", "mean_abs", "base_metric"):
        assert torch.allclose(getattr(mean, name), getattr(whole, name), atol=1e-5, equal_nan=True)
    assert mean.pair_ids == whole.pair_ids
    other = attribute_edges(load("varbind-llama"), sets()["symbol"][:2], method="eap")
    with pytest.raises(InputError, match="different graphs"):
        together([*parts, other])


def test_the_whole_model_is_faithful_everywhere_and_shares_everything() -> None:
    edges = EdgeGraph.of(model().dims).n_edges
    whole = generalise(model(), sets(), replace(OPTIONS, sizes=(edges,), random=1))
    (matrix,) = whole.sizes
    for row in matrix.rows:
        assert [run.faithfulness for run in row.runs] == pytest.approx([1.0, 1.0], abs=1e-5)
    assert all(cell.jaccard == 1.0 for row in (*matrix.overlaps, *matrix.node_overlaps) for cell in row)
    assert matrix.random is not None
    assert [cell[0] for cell in matrix.random.faithfulness] == pytest.approx([1.0, 1.0], abs=1e-5)


def test_random_circuits_are_of_one_size_and_the_seed_gives_them_again() -> None:
    matrix = found().sizes[-1]
    assert matrix.random is not None and matrix.random.count == 2
    assert matrix.random.n_edges == matrix.rows[-1].runs[0].n_edges
    assert [len(cell) for cell in matrix.random.faithfulness] == [2, 2]
    own = [matrix.rows[place].runs[place].faithfulness for place in range(2)]
    assert all(
        value is not None and value < (best or 0.0)
        for cell, best in zip(matrix.random.faithfulness, own, strict=True)
        for value in cell
    )
    again = generalise(model(), sets(), OPTIONS, task="variable-binding")
    assert again.model_copy(update={"seconds": found().seconds}) == found()


def test_where_both_prompts_are_one_there_is_no_share(tmp_path: Path) -> None:
    flat = [replace(pair, corrupt_ids=pair.clean_ids) for pair in sets()["plus"]]
    # Edges of such pairs have no effect at all: what ranks them is rounding.
    given = {"symbol": sets()["symbol"], "flat": flat}
    result = generalise(model(), given, replace(OPTIONS, sizes=(10,)))
    assert [each.defined for each in result.sets] == [True, False]
    assert all(row.runs[1].faithfulness is None for row in result.sizes[0].rows)
    assert any("On flat clean prompts" in note and "says nothing" in note for note in result.notes)
    result.save(tmp_path)
    assert Generalisation.load(tmp_path) == result
    generalisation_page(result)


def test_what_is_refused() -> None:
    with pytest.raises(InputError, match="at least two sets of pairs; found 1 \\(symbol\\)"):
        generalise(model(), {"symbol": sets()["symbol"]})
    with pytest.raises(InputError, match="'all sets'"):
        generalise(model(), {"all sets": sets()["symbol"], "plus": sets()["plus"]})
    with pytest.raises(InputError, match="at least two different clean prompts"):
        generalise(model(), {"one": sets()["symbol"][:1], "plus": sets()["plus"]})
    with pytest.raises(InputError, match="824 edges were asked for"):
        generalise(model(), sets(), GeneraliseOptions(sizes=(824,)))


# Templates.


def test_templates_of_the_binding_language() -> None:
    tokenizer = model().tokenizer
    assert default_templates("variable-binding", tokenizer) == ("symbol", "question", "order", "tell")
    made = template_pairs("variable-binding", tokenizer, ("tell+minus", "recall"), 6, 1)
    assert {(pair.meta["form"], pair.meta["operation"]) for pair in made["tell+minus"]} == {("tell", "minus")}
    assert {pair.meta["operation"] for pair in made["recall"]} == {"recall"}
    assert [len(pairs) for pairs in made.values()] == [6, 6]
    for names, words in (
        (("symbols",), "has no template 'symbols'; it has symbol"),
        (("symbol+tell",), "exclude each other"),
        (("tell", "tell"), "comes twice"),
    ):
        with pytest.raises(InputError, match=words):
            template_pairs("variable-binding", tokenizer, names, 4, 0)
    with pytest.raises(InputError, match="one template only"):
        templates("arithmetic", tokenizer)


def test_templates_of_stories() -> None:
    tokenizer = load("ioi-gpt2").tokenizer
    names = default_templates("ioi", tokenizer)
    assert names == ("ABBA", "BABA", "1-pairs", "2-pairs", "3-pairs")
    made = template_pairs("ioi", tokenizer, (*names, "BABA+2-pairs"), 5, 0)
    assert {pair.meta["order"] for pair in made["BABA"]} == {"BABA"}
    for count in (1, 2, 3):
        for pair in made[f"{count}-pairs"]:
            # Each pair of people is joined by `and` once.
            assert str(pair.meta["clean"]).split().count("and") == count
    assert made["BABA+2-pairs"] == [
        pair for pair in tasks.pairs("ioi", tokenizer, 80, 0) if pair in made["BABA"] + made["BABA+2-pairs"]
        and str(pair.meta["clean"]).split().count("and") == 2 and pair.meta["order"] == "BABA"
    ][:5]  # fmt: skip
