"""One model's activations in another equal plain hooks; identities; what is refused; mistakes that must be caught."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

from patchkit.data import Pair, Triple
from patchkit.errors import InputError, RunError
from patchkit.methods import NodeOptions, patch_across, patch_sets_across, scores_of_sets
from patchkit.methods._replacements import Replacement
from patchkit.methods.cross_model import check_alike
from patchkit.model import NodeGrid
from patchkit.model.patch_model import Hosted
from patchkit.runtime import SecondModel, content_digest, second_model
from patchkit.tracing import capture
from patchkit.zoo.load import load
from tests.across_oracle import across, answers, check_across, stages
from tests.comparisons import agree
from tests.families import build
from tests.node_oracle import LONG, MIDDLE, SHORT, logit_diff

#: Of two lengths, so that one is padded.
PAIRS = [LONG, SHORT]
FAMILIES = ("llama-gqa", "gpt2", "gemma2-post-norms-softcap")


# Against the loop.


@pytest.mark.parametrize("family", FAMILIES)
def test_every_node_put_across_beside_padding(family: str) -> None:
    check_across(family, PAIRS, ("z", "mlp_out"))


@pytest.mark.parametrize("positions", ["last", "s"])
def test_kinds_and_positions(positions: str) -> None:
    check_across("llama-gqa", PAIRS, ("resid_pre", "k", "q", "z", "neuron"), positions)


@pytest.mark.parametrize("family", ["llama-gqa", "gpt2"])
def test_whole_sets_at_once(family: str) -> None:
    (model, twin), (donor, other) = stages(family)
    sets = [["a0.h1", "a2.h3", "m1"], ["z"], ["m0"]]
    found = patch_sets_across(model, donor, PAIRS, sets)
    grid = NodeGrid(model.dims, ("z", "mlp_out"))
    numbers = [grid.select(names).tolist() for names in sets]
    for row, pair in enumerate(PAIRS):
        expected = across(twin, other, pair, grid, numbers, [range(len(pair.clean_ids))])
        agree(found.effects[row], expected, pair.id, 1e-9)
    assert found.cost > 0


@pytest.mark.parametrize("family", ["llama-gqa", "gpt2"])
def test_answers_with_another_models_alternates(family: str) -> None:
    (model, twin), (donor, other) = stages(family)
    originals = [pair.clean_ids for pair in (LONG, MIDDLE, SHORT)] * 2
    alternates = [SHORT.corrupt_ids, LONG.corrupt_ids, MIDDLE.corrupt_ids, *originals[:3]]
    grid = NodeGrid(model.dims, ("z", "mlp_out"))
    sets = [[], ["a1.h0", "m1"], ["a0.h2", "a2.h1", "m2"], ["m0", "m1", "m2"]]
    expected = []
    made = [
        Triple("x", tuple(o), tuple(a), 1, split="test") for o, a in zip(originals, alternates, strict=True)
    ]
    for names in sets:
        expected.append(answers(twin, other, made, names, grid))
    assert len({tuple(each) for each in expected}) > 1, "no set changed an answer: the comparison says little"
    for names, wanted in zip(sets, expected, strict=True):
        triples = [
            Triple("x", tuple(o), tuple(a), target, split="test")
            for o, a, target in zip(originals, alternates, wanted, strict=True)
        ]
        (found,) = scores_of_sets(model, {"x": triples}, [names], donor=donor)
        assert found == {"x": 1.0}
        wrong = [Triple("x", t.original_ids, t.alternate_ids, (t.target_id + 1) % 37) for t in triples]
        assert scores_of_sets(model, {"x": wrong}, [names], donor=donor) == [{"x": 0.0}]


# Identities.


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_put_into_itself_changes_nothing(family: str) -> None:
    (model, _), _ = stages(family)
    scores = patch_across(model, load(build(family, dtype=torch.float64)), PAIRS)
    assert float(scores.effects.abs().max()) < 1e-11
    assert torch.equal(scores.base_metric, scores.source_metric)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kinds", [("attn_out", "mlp_out"), ("resid_post",)])
def test_with_equal_ends_all_of_the_stream_is_the_other_model(family: str, kinds: tuple[str, ...]) -> None:
    (model, _), (donor, other) = stages(family, same_ends=True)
    grid = NodeGrid(model.dims, kinds)
    names = grid.names() if len(kinds) > 1 else grid.names()[-1:]
    found = patch_sets_across(model, donor, PAIRS, [names], NodeOptions(nodes=kinds))
    scores = patch_across(model, donor, PAIRS, NodeOptions(nodes=kinds))
    assert float((scores.source_metric - scores.base_metric).abs().min()) > 1e-3
    agree(found.effects[:, 0], scores.source_metric - scores.base_metric, family, 1e-9)


# Mistakes.


def test_a_swapped_direction_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def swapped(self: Replacement, model: Any, batch: Any, sites: Any, own: Any) -> Any:
        assert self.donor is not None
        run = capture(model, batch.base, sites)
        return dict(run.values), run.logits

    monkeypatch.setattr(Replacement, "values", swapped)
    with pytest.raises(AssertionError, match="effects in pair"):
        check_across("llama-gqa", PAIRS, ("z",))


def test_the_corrupt_prompt_put_in_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def corrupt(self: Replacement, model: Any, batch: Any, sites: Any, own: Any) -> Any:
        assert self.donor is not None
        run = capture(self.donor.open(model), batch.source, sites)
        return dict(run.values), run.logits

    monkeypatch.setattr(Replacement, "values", corrupt)
    with pytest.raises(AssertionError, match="effects in pair"):
        check_across("llama-gqa", PAIRS, ("z",))


# The donor as it travels.


def test_a_program_knows_its_donor_by_content() -> None:
    (model, _), (donor, _) = stages("llama-gqa")
    there, again = Replacement("cross-model", donor=SecondModel.of(donor)), SecondModel.of(donor)
    assert content_digest(there) == content_digest(Replacement("cross-model", donor=again))
    assert content_digest(there) != content_digest(Replacement("cross-model", donor=SecondModel.of(model)))


def test_another_process_opens_the_donor_by_name_and_checks_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (model, _), _ = stages("llama-gqa")
    build("llama-gqa", 1).save_pretrained(tmp_path / "donor")
    donor = load(tmp_path / "donor")
    carried = SecondModel.of(donor)
    del donor
    # As in a process that never had it.
    monkeypatch.setattr(second_model, "_HERE", {})
    gc.collect()
    opened = carried.open(model)
    assert opened.content_key() == carried.content and carried.open(model) is opened
    build("llama-gqa", 2).save_pretrained(tmp_path / "donor")
    monkeypatch.setattr(second_model, "_OPENED", {})
    with pytest.raises(RunError, match="another model lies under the name"):
        carried.open(model)
    with pytest.raises(InputError, match="made in the main process"):
        SecondModel("0" * 32, "mine", None).open(model)


# What is refused.


def test_models_that_differ_in_more_than_their_weights() -> None:
    (model, _), (donor, _) = stages("llama-gqa")
    check_alike(model, donor)
    for family, words in (("gpt2", "n_kv_heads 2 and 4"), ("qwen2-biases", "family llama and qwen2")):
        with pytest.raises(InputError, match=words):
            patch_across(model, stages(family)[0][0], PAIRS)
    first, second = load("varbind-llama"), load("varbind-llama")
    check_alike(first, second)
    assert second.tokenizer is not None
    second.tokenizer.add_tokens(["unheard"])
    with pytest.raises(InputError, match="'unheard' is no token of the first and token 63 of the second"):
        check_alike(first, second)


def test_options_that_mean_nothing_and_empty_sets() -> None:
    (model, _), (donor, _) = stages("llama-gqa")
    for options in (NodeOptions(direction="denoise"), NodeOptions(ablation="zero")):
        with pytest.raises(InputError, match="means nothing there"):
            patch_across(model, donor, PAIRS, options)
    for sets in ([], [[]]):
        with pytest.raises(InputError, match="no sets of nodes"):
            patch_sets_across(model, donor, PAIRS, sets)


def test_hosted_models(monkeypatch: pytest.MonkeyPatch) -> None:
    (model, _), (donor, _) = stages("llama-gqa")
    hosted = Hosted("http://127.0.0.1:1", "key", {})
    monkeypatch.setattr(donor, "hosted", hosted)
    with pytest.raises(InputError, match="load both models here"):
        patch_across(model, donor, PAIRS)
    with pytest.raises(InputError, match="is hosted"):
        patch_across(donor, model, PAIRS)


def test_the_metric_of_both_runs_is_of_clean_prompts() -> None:
    (model, twin), (donor, other) = stages("llama-gqa")
    scores = patch_across(model, donor, [LONG], NodeOptions(nodes=("mlp_out",)))
    assert scores.convention.ablation == "cross-model"
    clean = Pair(LONG.clean_ids, LONG.clean_ids, LONG.answer_id, LONG.wrong_id, {}, "same")
    with torch.no_grad():
        for metric, hf in ((scores.base_metric, twin), (scores.source_metric, other)):
            logits = hf(torch.tensor([clean.clean_ids])).logits[0, -1]
            agree(metric[0], logit_diff(logits, logits, clean), "metric", 1e-9)
