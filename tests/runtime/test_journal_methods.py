"""Methods that are interrupted go on where they were, and no other run's numbers are taken for theirs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from patchkit import load
from patchkit.data import Pair
from patchkit.methods import activation_patching
from patchkit.methods._node_options import NodeOptions
from patchkit.methods.activation_patching import PatchSets, patch_nodes
from patchkit.methods.attribution import Attribution, attribute
from patchkit.model import PatchModel
from patchkit.results.scores import Scores
from tests.comparisons import pair
from tests.families import build
from tests.node_oracle import LONG, MIDDLE, SHORT

#: Beside `make test`, in a lane of its own.
pytestmark = pytest.mark.slow

PAIRS = [LONG, SHORT, MIDDLE]
ONE_PAIR_A_BATCH = NodeOptions(nodes=("z", "mlp_out"), positions="s,-1", max_batch_tokens=1)
Method = Callable[..., Scores]
METHODS: dict[str, tuple[Method, type]] = {
    "patch": (patch_nodes, PatchSets),
    "attribute": (attribute, Attribution),
}


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many batches every run of a method's program has; with a number put in first, it is interrupted there."""
    runs: list[int] = []
    for _, kind in METHODS.values():

        def counting(
            program: object, model: PatchModel, items: Sequence[object], right=kind.run
        ) -> dict[str, Tensor]:
            if runs and runs[0] < 0:
                runs[0] += 1
                if not runs[0]:
                    raise KeyboardInterrupt
            runs.append(len(items))
            return right(program, model, items)

        monkeypatch.setattr(kind, "run", counting)
    return runs


@pytest.mark.parametrize("name", METHODS)
def test_an_interrupted_method_gives_the_same_numbers(
    name: str, tmp_path: Path, counted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    method, _ = METHODS[name]
    monkeypatch.setattr(activation_patching, "NODES_AN_ITEM", 16)
    model, _ = pair("llama-gqa")
    undisturbed = method(model, PAIRS, ONE_PAIR_A_BATCH)
    whole = len(counted)
    assert whole >= 3
    counted[:] = [-3]
    with pytest.raises(KeyboardInterrupt):
        method(model, PAIRS, ONE_PAIR_A_BATCH, checkpoint=tmp_path)
    assert len(counted) == 1 + 2
    counted.clear()
    resumed = method(model, PAIRS, ONE_PAIR_A_BATCH, checkpoint=tmp_path)
    assert len(counted) == whole - 2
    for field_name in ("effects", "magnitudes", "base_metric", "source_metric"):
        assert torch.equal(getattr(resumed, field_name), getattr(undisturbed, field_name)), field_name
    assert (resumed.cost, resumed.layer_backwards) == (undisturbed.cost, undisturbed.layer_backwards)


OTHER_PAIR = Pair(SHORT.clean_ids, (4, 6, 18, 12, 9), SHORT.answer_id, SHORT.wrong_id, SHORT.spans, SHORT.id)
OTHER_ANSWER = Pair(SHORT.clean_ids, SHORT.corrupt_ids, 9, SHORT.wrong_id, SHORT.spans, SHORT.id)
OTHER_SPAN = Pair(SHORT.clean_ids, SHORT.corrupt_ids, 5, 7, {"s": (2, 4)}, SHORT.id)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    "what",
    ["prompt", "answer", "span", "metric", "direction", "ablation", "seed", "nodes", "positions", "model"],
)
def test_another_run_in_the_same_directory_is_not_mistaken(
    name: str, what: str, tmp_path: Path, counted: list[int]
) -> None:
    method, _ = METHODS[name]
    model, _ = pair("llama-gqa")
    options, pairs = replace(ONE_PAIR_A_BATCH, ablation="noise"), [SHORT]
    method(model, pairs, options, checkpoint=tmp_path)
    changed = {
        "metric": {"metric": "prob-diff"},
        "direction": {"direction": "denoise"},
        "ablation": {"ablation": "zero"},
        "seed": {"seed": 1},
        "nodes": {"nodes": ("z", "attn_out")},
        "positions": {"positions": "s,0"},
    }
    options = replace(options, **changed.get(what, {}))
    pairs = {"prompt": [OTHER_PAIR], "answer": [OTHER_ANSWER], "span": [OTHER_SPAN]}.get(what, pairs)
    model = pair("qwen2-biases")[0] if what == "model" else model
    expected = method(model, pairs, options)
    counted.clear()
    found = method(model, pairs, options, checkpoint=tmp_path)
    assert counted, "a batch of the other run was taken"
    assert torch.equal(found.effects, expected.effects)
    assert torch.equal(found.source_metric, expected.source_metric)


@pytest.mark.parametrize("name", METHODS)
def test_another_reference_set_is_not_mistaken(name: str, tmp_path: Path, counted: list[int]) -> None:
    method, _ = METHODS[name]
    model, _ = pair("llama-gqa")
    options = replace(ONE_PAIR_A_BATCH, ablation="mean")
    one = method(model, [LONG], options, reference=[LONG], checkpoint=tmp_path)
    counted.clear()
    other = method(model, [LONG], options, reference=[MIDDLE], checkpoint=tmp_path)
    assert counted and not torch.equal(one.effects, other.effects)
    counted.clear()
    method(model, [LONG], options, reference=[MIDDLE], checkpoint=tmp_path)
    assert not counted


def test_methods_of_attribution_are_not_mistaken_for_one_another(tmp_path: Path, counted: list[int]) -> None:
    model, _ = pair("llama-gqa")
    for method in ("atp", "atp-qk", "atp-graddrop", "atp-star"):
        counted.clear()
        attribute(model, [SHORT], ONE_PAIR_A_BATCH, method, checkpoint=tmp_path)
        assert counted == [1], method


@pytest.mark.parametrize("name", METHODS)
def test_other_batches_and_fewer_pairs_take_what_was_finished(
    name: str, tmp_path: Path, counted: list[int]
) -> None:
    """Neither the batch that an item was in, nor its place among the others, is a part of what it is."""
    method, _ = METHODS[name]
    model, _ = pair("llama-gqa")
    whole = method(model, PAIRS, ONE_PAIR_A_BATCH, checkpoint=tmp_path)
    counted.clear()
    again = method(model, PAIRS, replace(ONE_PAIR_A_BATCH, max_batch_tokens=4096), checkpoint=tmp_path)
    fewer = method(model, PAIRS[1:], ONE_PAIR_A_BATCH, checkpoint=tmp_path)
    assert not counted
    assert torch.equal(again.effects, whole.effects) and torch.equal(fewer.effects, whole.effects[1:])


@pytest.mark.parametrize("name", METHODS)
def test_another_training_stage_is_not_mistaken(name: str, tmp_path: Path, counted: list[int]) -> None:
    method, _ = METHODS[name]
    before = method(load(build("llama-gqa")), [SHORT], ONE_PAIR_A_BATCH, checkpoint=tmp_path)
    trained = build("llama-gqa")
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter *= 1.01
    counted.clear()
    after = method(load(trained), [SHORT], ONE_PAIR_A_BATCH, checkpoint=tmp_path)
    assert counted and not torch.equal(after.effects, before.effects)
