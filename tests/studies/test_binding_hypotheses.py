"""The scrubbing study on the embedded model: true hypotheses recover the behaviour, false ones do not."""

from __future__ import annotations

from pathlib import Path

import pytest

from patchkit import InputError, load
from patchkit.model import EdgeGraph, PatchModel
from patchkit.results.scrubbing import Scrubbing
from patchkit.studies.binding_hypotheses import (
    NAMES,
    VALUE_HEADS,
    BindingOptions,
    binding_inputs,
    hypotheses,
    operation_and_constant,
    queried_binding,
    queried_name,
    queried_place,
    queried_value,
    run_scrubbing,
)

#: Beside `make test`, in a lane of its own.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model() -> PatchModel:
    return load("varbind-llama")


@pytest.fixture(scope="module")
def study(model: PatchModel, tmp_path_factory: pytest.TempPathFactory) -> tuple[Scrubbing, Path]:
    out = tmp_path_factory.mktemp("scrubbing")
    return run_scrubbing(model, out, BindingOptions(n=100)), out


def test_the_numbers_tell_true_from_false(study: tuple[Scrubbing, Path]) -> None:
    found, _ = study
    share = {result.hypothesis: result.recovered for result in found.results}
    low = {result.hypothesis: (result.recovered_interval or (0, 0))[0] for result in found.results}
    high = {result.hypothesis: (result.recovered_interval or (0, 0))[1] for result in found.results}
    assert list(share) == list(NAMES)
    assert share["value"] is not None and share["value"] > 0.85 and low["value"] > 0.8
    assert high["name"] < 0.3 and high["place"] < 0.3
    # A clause put into another list meets that list's own bindings.
    assert low["lookup"] > 0.65 and high["lookup without names"] < 0.5
    assert share["everything"] == pytest.approx(1, abs=1e-5) and share["nothing"] == 0
    assert any("lie apart" in finding for finding in found.findings)


def test_the_claims_were_tested(study: tuple[Scrubbing, Path]) -> None:
    """What the heads are said to carry is drawn from other prompts, never from the same."""
    for name in ("value", "name", "place"):
        carried = next(node for node in study[0].result(name).nodes if node.name == "carried")
        assert carried.vacuous <= 0.03 * carried.draws and carried.bucket_sizes[1] > 3
        assert set(carried.nodes) == {f"{head}@last" for head in VALUE_HEADS["varbind-llama"]}
    assert study[0].result("everything").vacuous == 1


def test_what_is_written_is_what_was_returned(study: tuple[Scrubbing, Path]) -> None:
    found, out = study
    assert Scrubbing.load(out) == found
    assert [node.key for node in found.result("value").nodes] == [
        "the answer",
        "the value of the queried variable",
        "the operation and its constant",
    ]


def test_an_interrupted_study_goes_on(model: PatchModel, study: tuple[Scrubbing, Path]) -> None:
    found, out = study
    options = BindingOptions(n=100, hypotheses=("name",))
    again = run_scrubbing(model, out, options)
    assert again.results == [found.result("name")]


def test_value_name_and_place_vary_independently(model: PatchModel) -> None:
    pairs = binding_inputs(model, BindingOptions(n=80))
    tokenizer = model.tokenizer
    assert tokenizer is not None
    assert len({len(pair.clean_ids) for pair in pairs}) == 1
    for pair in pairs[:20]:
        words = pair.meta["clean"].split()
        name, place = words[-1], (int(str(queried_place(pair))) - 1) // 4
        assert tokenizer.convert_ids_to_tokens([queried_name(pair)]) == [name]
        assert words[4 * place] == name
        assert tokenizer.convert_ids_to_tokens([queried_value(pair)]) == [words[4 * place + 2]]
        assert queried_binding(pair) == (queried_name(pair), queried_value(pair))
        said = operation_and_constant(pair)
        assert isinstance(said, tuple) and tokenizer.convert_ids_to_tokens(list(said)) == words[-3:-1]
    values = {queried_value(pair) for pair in pairs if queried_name(pair) == queried_name(pairs[0])}
    assert len(values) > 1 and len({queried_place(pair) for pair in pairs}) == 4


def test_the_skeleton_splits_the_last_token(model: PatchModel) -> None:
    graph = EdgeGraph.of(model.dims)
    heads = VALUE_HEADS["varbind-llama"]
    known = hypotheses(graph, heads)["value"]
    parts = {node.name: {name.partition("@")[0] for name in node.nodes} for node in known.nodes}
    assert parts["carried"] == set(heads)
    assert parts["answer"] == {
        name for name in graph.senders if name[0] in "am" and name >= "a2" and name[1] in "23"
    } | {"m1"}
    assert parts["carried"] | parts["answer"] | parts["question"] == set(graph.senders)


def test_what_cannot_be_studied(model: PatchModel) -> None:
    with pytest.raises(InputError, match="hypothesis 'colour' is not known"):
        BindingOptions(hypotheses=("colour",))
    with pytest.raises(InputError, match="sender 'a9.h0'"):
        run_scrubbing(model, None, BindingOptions(n=4, heads=("a9.h0",)))
    with pytest.raises(InputError, match="not known which heads"):
        run_scrubbing(load("varbind-llama-gqa"), None, BindingOptions(n=4))
    with pytest.raises(InputError, match="needs their tokenizer"):
        run_scrubbing(load("ioi-gpt2"), None, BindingOptions(n=4, heads=("a0.h0",)))
