"""The recall study on the embedded models: complete, reproducible from its file, and right by a loop of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from patchkit import load
from patchkit.errors import InputError
from patchkit.methods._node_options import NodeOptions
from patchkit.methods.activation_patching import patch_nodes
from patchkit.methods.attribution import attribute
from patchkit.model import PatchModel
from patchkit.results.convention import Convention
from patchkit.results.recall import MethodRecall, RecallSetting, RecallStudy
from patchkit.studies import attribution_recall
from patchkit.studies._recall_material import random_text_pairs, task_of, task_pairs
from patchkit.studies._recall_settings import SearchOptions
from patchkit.studies.attribution_recall import MODELS, RecallOptions, findings, run_recall

#: Beside `make test`, in a lane of its own.
pytestmark = pytest.mark.slow

OPTIONS = RecallOptions(
    pairs=2,
    distribution=3,
    pool=12,
    random_tokens=5,
    group=24,
    searches=SearchOptions(
        subsampling=((0.1, 40), (0.03, 20)), block_sizes=(16,), branchings=(8,), random_orders=3
    ),
)


@pytest.fixture(scope="module")
def models() -> list[PatchModel]:
    return [load(name) for name in MODELS]


@pytest.fixture(scope="module")
def study(models: list[PatchModel], tmp_path_factory: pytest.TempPathFactory) -> tuple[RecallStudy, Path]:
    out = tmp_path_factory.mktemp("recall")
    return run_recall(models, out, OPTIONS, command="patchkit study attribution-recall"), out


def test_every_setting_has_every_method(study: tuple[RecallStudy, Path]) -> None:
    found, out = study
    assert RecallStudy.load(out) == found
    expected = {
        f"{model}, {material}, {evidence}, {node_class}"
        for model, task in (("varbind-llama", "variable-binding"), ("ioi-gpt2", "ioi"))
        for material in (task, "random-text")
        for evidence in ("pair", "distribution")
        for node_class in ("attention nodes", "neuron nodes")
    }
    assert {setting.name for setting in found.settings} == expected
    searches = {"atp", "atp-star", "subsampling", "blocks", "hierarchical", "iterative", "random"}
    for setting in found.settings:
        attention = setting.node_class == "attention nodes"
        names = [method.name for method in setting.methods]
        assert len(set(names)) == len(names)
        assert set(names) == searches | ({"atp-qk", "atp-graddrop"} if attention else set())
        single = setting.evidence == "pair"
        assert (setting.pairs, len(setting.recalled)) == ((2, 2) if single else (3, 1))
        assert setting.convention.positions == ("each" if single else "all")
        assert max(setting.recalled) <= setting.nodes


def test_no_method_beats_the_oracle_and_gradients_beat_chance(study: tuple[RecallStudy, Path]) -> None:
    for setting in study[0].settings:
        for method in setting.methods:
            assert method.ranks[0] == 1 and method.ranks[-1] == min(setting.recalled)
            assert len(method.per_pair) == len(setting.recalled)
            assert min(method.relative) >= 1 and 1 <= method.unprepared <= method.aggregate
            assert method.cost == sorted(method.cost)
            logs = [math.log(value) for value in method.per_pair]
            assert method.aggregate == pytest.approx(math.exp(sum(logs) / len(logs)))
        assert setting.aggregate("atp") < setting.aggregate("random")
        # Two forwards and a backward; GradDrop adds (L - 1) / 2 backwards: 1.5 and 1.
        assert setting.method("atp").preparation == 3.0
        extra = {"varbind-llama": 1.5, "ioi-gpt2": 1.0}[setting.model]
        if setting.node_class == "neuron nodes":
            assert setting.method("atp-star").preparation == pytest.approx(3 + extra)
        assert setting.method("iterative").preparation == setting.method("hierarchical").preparation == 0
        # The parameters that served best are named; draws are paid by all pairs together.
        draws = {"p 0.1, 40 draws": 40, "p 0.03, 20 draws": 20}[setting.method("subsampling").parameters]
        per_pair = draws / (1 if setting.evidence == "pair" else setting.pairs)
        assert setting.method("subsampling").preparation == pytest.approx(per_pair)


def loop(truth: Sequence[float], scores: Sequence[float], prep: float, floor: float) -> float:
    """Aggregate of verified recall as the handbook's section 1.8 writes it."""
    true_order = sorted((n for n in range(len(truth)) if truth[n] > floor), key=lambda n: -truth[n])
    method_order = sorted(range(len(truth)), key=lambda n: -scores[n])
    place = {node: index + 1 for index, node in enumerate(method_order)}
    worst, total, weights = 0, 0.0, 0.0
    for x, node in enumerate(true_order, start=1):
        worst = max(worst, place[node])
        total += math.log((prep + worst) / x) / x
        weights += 1 / x
    return math.exp(total / weights)


@pytest.mark.parametrize("evidence", ["pair", "distribution"])
def test_figures_are_those_of_a_loop(
    evidence: str, study: tuple[RecallStudy, Path], models: list[PatchModel]
) -> None:
    model = models[0]
    setting = next(
        s
        for s in study[0].settings
        if s.name == f"varbind-llama, variable-binding, {evidence}, attention nodes"
    )
    single = evidence == "pair"
    pairs = task_pairs(model, 2, 0, 12) if single else task_pairs(model, 3, 1)
    options = NodeOptions(nodes=("q", "k", "v", "z"), positions="each" if single else "all")
    for number, group in enumerate([[pair] for pair in pairs] if single else [pairs]):
        truth = patch_nodes(model, group, options).effects.abs().mean(0).tolist()
        for name in ("atp", "atp-star"):
            scores = attribute(model, group, options, name)  # type: ignore[arg-type]
            expected = loop(truth, scores.magnitudes.mean(0).tolist(), scores.cost, 1e-5)
            assert setting.method(name).per_pair[number] == pytest.approx(expected, rel=0.02)


def test_an_interrupted_study_goes_on(
    study: tuple[RecallStudy, Path], models: list[PatchModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    found, out = study

    def again(*_: object) -> RecallSetting:
        raise AssertionError("this setting was finished before")

    monkeypatch.setattr(attribution_recall, "measure", again)
    stages: list[tuple[str, int, int]] = []
    resumed = run_recall(
        models, out, OPTIONS, command=found.command, progress=lambda *stage: stages.append(stage)
    )
    assert resumed.settings == found.settings and resumed.findings == found.findings
    assert stages[0] == ("varbind-llama, variable-binding, attention nodes", 0, 16)
    assert stages[-1] == ("done", 16, 16)
    with pytest.raises(
        InputError, match=r"setting-0\.json: the checkpoint of a study with other models or opt"
    ):
        run_recall(models, out, RecallOptions(seed=5))


@pytest.mark.parametrize("which", [0, 1])
def test_random_text_asks_what_carries_the_difference(which: int, models: list[PatchModel]) -> None:
    model = models[which]
    pairs = random_text_pairs(model, 5, 9, seed=2)
    assert pairs == random_text_pairs(model, 5, 9, seed=2)
    assert pairs != random_text_pairs(model, 5, 9, seed=3)
    assert len({pair.id for pair in pairs}) == 5
    opening = task_pairs(model, 1, 0)[0].clean_ids[0]
    words = {token for pair in task_pairs(model, 32, 2) for token in pair.clean_ids}
    for pair in pairs:
        assert len(pair.clean_ids) == len(pair.corrupt_ids) == 9
        assert pair.clean_ids[0] == pair.corrupt_ids[0] == opening
        assert opening not in pair.clean_ids[1:]
        assert {*pair.clean_ids, *pair.corrupt_ids} <= words
        with torch.no_grad():
            logits = model.hf(torch.tensor([pair.clean_ids, pair.corrupt_ids])).logits[:, -1]
        assert logits.argmax(-1).tolist() == [pair.answer_id, pair.wrong_id]
        assert pair.answer_id != pair.wrong_id


def test_single_pairs_are_the_shortest_of_the_pool(models: list[PatchModel]) -> None:
    assert [task_of(model) for model in models] == ["variable-binding", "ioi"]
    drawn = task_pairs(models[1], 40, 7)
    chosen = task_pairs(models[1], 3, 7, 40)
    assert [len(p.clean_ids) for p in chosen] == sorted(len(p.clean_ids) for p in drawn)[:3]
    assert task_pairs(models[1], 40, 7, 40) == drawn


def test_what_cannot_be_studied_is_refused(models: list[PatchModel], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="recall study: pairs must be at least 1, found 0"):
        RecallOptions(pairs=0)
    bare = load(models[1].hf)
    with pytest.raises(InputError, match="has no tokenizer, and the recall study writes prompts"):
        run_recall([bare], tmp_path)
    silent = SearchOptions(floor=1e9)
    with pytest.raises(InputError, match="no attention node has an effect above 1e.09 in any of the pairs"):
        run_recall(models[1:], tmp_path, RecallOptions(pairs=1, pool=4, searches=silent))


def made(evidence: str, node_class: str, **aggregates: float) -> RecallSetting:
    convention = Convention(metric="logit-diff", direction="noise", ablation="resample", positions="each")
    return RecallSetting(
        model="m",
        material="ioi",
        evidence=evidence,  # type: ignore[arg-type]
        node_class=node_class,  # type: ignore[arg-type]
        kinds=["q"],
        convention=convention,
        nodes=2,
        recalled=[2],
        pairs=1,
        methods=[
            MethodRecall(
                name=name.replace("_", "-"),
                preparation=0,
                aggregate=value,
                unprepared=value / 2,
                per_pair=[value],
                ranks=[1],
                cost=[value],
            )
            for name, value in aggregates.items()
        ],
    )


def test_findings_say_where_atp_beats_atp_star() -> None:
    better = made("pair", "attention nodes", atp=4, atp_qk=3, atp_graddrop=5, atp_star=2, random=9)
    worse = made("distribution", "neuron nodes", atp=4, atp_star=6, random=9, blocks=3.5)
    said = findings([better, worse])
    star = next(line for line in said if line.startswith("Attention nodes, single pairs: AtP* costs"))
    assert "AtP* costs 0.50 times AtP" in star and "0.50 times (geometric means over 1" in star
    assert "AtP beats AtP* in 1 of 2 settings:" in said
    assert [line for line in said if line.startswith("AtP beats AtP* on")] == [
        "AtP beats AtP* on m, ioi, distribution, neuron nodes: 4.00 against 6.00; the order alone, without preparation, "
        "2.00 against 3.00."
    ]
    assert [line for line in said if "beaten by" in line] == [
        "AtP is beaten by blocks on m, ioi, distribution, neuron nodes: 3.50 against AtP's 4.00."
    ]
    assert "AtP beats AtP* in 0 of 1 settings." in findings([better])
