"""An interrupted run goes on where it was: finished batches are not run again, and no other run's are taken for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from patchkit.data import Pair
from patchkit.methods import activation_patching
from patchkit.methods._node_options import NodeOptions
from patchkit.methods.activation_patching import PatchSets, patch_nodes
from patchkit.methods.attribution import Attribution, attribute
from patchkit.model import Dims, PatchModel
from patchkit.results.scores import Scores
from patchkit.runtime import Cost, Journal, run_program
from tests.comparisons import pair
from tests.node_oracle import LONG, MIDDLE, SHORT

PAIRS = [LONG, SHORT, MIDDLE]
ONE_PAIR_A_BATCH = NodeOptions(nodes=("z", "mlp_out"), positions="s,-1", max_batch_tokens=1)
Method = Callable[..., Scores]
METHODS: dict[str, tuple[Method, type]] = {
    "patch": (patch_nodes, PatchSets),
    "attribute": (attribute, Attribution),
}


@dataclass
class Squares:
    """Squares of numbers, one tensor of each dtype; `runs` notes the batches, and one too many is an interruption."""

    last_run: int = 99
    runs: list[list[int]] = field(default_factory=list)

    def tokens(self, item: int) -> int:
        return item

    def run(self, model: PatchModel, items: Sequence[int]) -> dict[str, Tensor]:
        if len(self.runs) == self.last_run:
            raise KeyboardInterrupt
        self.runs.append(list(items))
        square = torch.tensor(items, dtype=torch.float64) ** 2 / 3
        return {
            "square": square,
            "item": torch.tensor(items),
            "half": square.bfloat16()[:, None].expand(-1, 2),
        }

    def cost(self, dims: Dims, items: Sequence[int]) -> Cost:
        return Cost()


ITEMS = [5, 3, 9, 4, 8]
BATCHES = [[3, 4], [5], [8], [9]]


def run(program: Squares, directory: Path, key: str = "squares", tokens: int = 9) -> dict[str, Tensor]:
    journal = Journal(directory, key)
    return run_program(program, pair("gpt2")[0], ITEMS, max_batch_tokens=tokens, journal=journal)


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[name], other[name]) and one[name].dtype == other[name].dtype for name in one
    )


def test_a_run_goes_on_after_the_batches_that_were_finished(tmp_path: Path) -> None:
    undisturbed = run(Squares(), tmp_path / "undisturbed")
    directory = tmp_path / "journal"
    first = Squares(last_run=2)
    with pytest.raises(KeyboardInterrupt):
        run(first, directory)
    assert first.runs == BATCHES[:2] and len(list(directory.iterdir())) == 2
    second = Squares()
    assert equal(run(second, directory), undisturbed)
    assert second.runs == BATCHES[2:]
    third = Squares()
    assert equal(run(third, directory), undisturbed) and third.runs == []


def test_numbers_keep_their_precision_and_order(tmp_path: Path) -> None:
    run(Squares(), tmp_path)
    again = run(Squares(), tmp_path)
    assert again["square"].tolist() == [item**2 / 3 for item in ITEMS]
    assert again["item"].tolist() == ITEMS
    assert again["half"].dtype == torch.bfloat16 and again["half"].shape == (5, 2)


@pytest.mark.parametrize("left", [0, 7, 60, -1])
def test_a_file_that_was_cut_short_is_a_batch_that_was_not_finished(tmp_path: Path, left: int) -> None:
    undisturbed = run(Squares(), tmp_path)
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:left])
    again = Squares()
    assert equal(run(again, tmp_path), undisturbed) and again.runs == BATCHES
    # And is whole now.
    after = Squares()
    assert equal(run(after, tmp_path), undisturbed) and after.runs == []


def test_other_keys_and_other_batches_are_not_mistaken(tmp_path: Path) -> None:
    run(Squares(), tmp_path)
    other_key, other_batches = Squares(), Squares()
    run(other_key, tmp_path, key="cubes")
    assert other_key.runs == BATCHES
    run(other_batches, tmp_path, tokens=1)
    # The other three were batches of their own before, with the same numbers.
    assert other_batches.runs == [[3], [4]]


# The journals of the methods.


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
