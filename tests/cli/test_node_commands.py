"""`patchkit patch` and `patchkit attribute`: what they write and print, and how they end on bad input and on Ctrl-C."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.dataset
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

import patchkit
from patchkit import NodeOptions, Scores, tasks, write_pairs
from patchkit.cli import app
from patchkit.data import Pair
from patchkit.methods import attribution
from patchkit.results.manifest import read_manifest
from patchkit.results.verification import Bound
from tests.families import build


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def model() -> patchkit.PatchModel:
    return patchkit.load("varbind-llama")


def of_one_length(pairs: list[Pair], n: int) -> list[Pair]:
    """The first n pairs of the length that comes first."""
    return [pair for pair in pairs if len(pair.clean_ids) == len(pairs[0].clean_ids)][:n]


@pytest.fixture(scope="module")
def pairs(model: patchkit.PatchModel) -> list[Pair]:
    made = of_one_length(tasks.pairs("variable-binding", model.tokenizer, 60, 0), 3)
    assert len(made) == 3
    return made


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, pairs: list[Pair], model: patchkit.PatchModel) -> Path:
    """A directory with files of pairs: good ones, of two lengths, an empty one; and one of metrics."""
    directory = tmp_path_factory.mktemp("files")
    write_pairs(directory / "good.jsonl", pairs)
    mixed = tasks.pairs("variable-binding", model.tokenizer, 20, 1)
    assert len({len(pair.clean_ids) for pair in mixed}) > 1
    write_pairs(directory / "mixed.jsonl", mixed)
    (directory / "empty.jsonl").write_text("")
    (directory / "node_metrics.py").write_text(
        "import torch\n"
        "def mean(logits): return logits.mean()\n"
        "def nan(logits): return logits[:, 0] * float('nan')\n"
        "def nan_for_one(logits, answer):\n"
        "    return torch.where(logits[:, 0] == logits[:, 0].max(), torch.nan, logits[:, 0])\n"
        "def oops(logits): return logits[:, 0] / {}['missing']\n"
        "def hits(logits, answer): return (logits.argmax(-1) == answer).float()\n"
        "def root(logits): return (logits[:, 0] - logits[:, 0]).abs().sqrt()\n"
        "def first(logits): return logits[:, 0]\n"
    )
    return directory


@pytest.fixture
def here(files: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(files)
    monkeypatch.syspath_prepend(str(files))
    return files


@pytest.fixture(scope="module")
def patched(files: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    out = tmp_path_factory.mktemp("patch") / "run"
    result = run(
        "patch", "--model", "varbind-llama", "--pairs", files / "good.jsonl", "--nodes", "k,z,resid_mid",
        "--positions", "each", "--direction", "denoise", "--layers", "0,2-3", "--out", out,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    return out, result


@pytest.fixture(scope="module")
def attributed(files: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    out = tmp_path_factory.mktemp("attribute") / "run"
    result = run(
        "attribute", "--model", "varbind-llama", "--pairs", files / "good.jsonl", "--nodes", "q,z",
        "--verify", "5", "--sample", "3", "--bound", "0.1", "--bound-draws", "10",
        "--out", out, "--quiet",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    return out, result


def test_patch_writes_what_the_contract_says(
    patched: tuple[Path, Result], model: patchkit.PatchModel, pairs: list[Pair]
) -> None:
    out, result = patched
    assert {path.name for path in out.iterdir()} == {
        "manifest.json", "scores.json", "scores.safetensors", "scores_abs.safetensors", "pairs.parquet",
        "report.html", "scores.png",
    }  # fmt: skip
    options = NodeOptions(("k", "z", "resid_mid"), "each", "denoise", layers=(0, 2, 3))
    expected = patchkit.patch_nodes(model, pairs, options)
    found = load_file(out / "scores.safetensors")
    positions = len(pairs[0].clean_ids)
    assert {kind: tuple(values.shape) for kind, values in found.items()} == {
        "k": (4, positions, model.dims.n_kv_heads), "z": (4, positions, 8), "resid_mid": (4, positions),
    }  # fmt: skip
    for kind, values in found.items():
        assert values.dtype == torch.float32
        torch.testing.assert_close(values, expected.mean(kind), atol=1e-5, rtol=0, equal_nan=True)
        assert values[1].isnan().all() and not values[[0, 2, 3]].isnan().any()
    manifest = read_manifest(out)
    assert manifest.status == "done" and manifest.model is not None and manifest.model.id == "varbind-llama"
    assert (manifest.metric, manifest.direction, manifest.ablation) == ("logit-diff", "denoise", "resample")
    assert manifest.axes == {
        "resid_mid": ["layer", "position"],
        "k": ["layer", "position", "head"],
        "z": ["layer", "position", "head"],
    }
    assert manifest.base_metric == pytest.approx(float(expected.base_metric.mean()), abs=1e-5)
    assert manifest.source_metric == pytest.approx(float(expected.source_metric.mean()), abs=1e-5)
    # Denoising starts from the corrupt prompt.
    assert expected.base_metric.mean() < expected.source_metric.mean() and manifest.sign.startswith(
        "effect = metric(base"
    )
    assert manifest.cost == pytest.approx(expected.cost) and manifest.pairs is not None
    assert (manifest.pairs.total, manifest.pairs.used, manifest.pairs.failures) == (3, 3, [])
    assert manifest.options["layers"] == "0,2-3" and "pairs" in manifest.inputs
    best, mean, size = expected.top(1)[0]
    assert best in result.stdout and f"{mean:+.4f}" in result.stdout and f"{size:.4f}" in result.stdout
    assert str(out / "report.html") in result.stdout and "done: patching" in result.stderr


def test_attribute_prints_and_keeps_its_proof(attributed: tuple[Path, Result]) -> None:
    out, result = attributed
    assert result.stderr == ""
    scores = Scores.load(out)
    assert scores.method == "atp-star" and scores.verification is not None and scores.bound is not None
    assert (scores.verification.k, scores.verification.sampled) == (5, 3)
    assert "Patched exactly: the top 5 and 3 others" in result.stdout and "exact |effect|" in result.stdout
    for sentence in Bound.model_validate_json((out / "bound.json").read_text()).sentences:
        assert sentence in result.stdout
    assert "with confidence 90 %" in result.stdout
    assert (out / "calibration.png").exists()
    total = scores.cost + scores.verification.cost + scores.bound.cost
    assert read_manifest(out).cost == pytest.approx(total)


def test_rerun_gives_the_same_numbers(attributed: tuple[Path, Result], tmp_path: Path) -> None:
    result = run("rerun", attributed[0], "--out", tmp_path / "again")
    assert result.exit_code == 0, result.output
    assert "The numbers are the same" in result.stderr
    assert "pairs.parquet:effect.q" in result.stdout and "bound.json" in result.stdout


def test_pairs_of_a_task_and_the_options_of_the_ablations(here: Path, tmp_path: Path) -> None:
    small = ("--model", "ioi-gpt2", "--task", "ioi", "--n", 2, "--nodes", "mlp_out", "--layers", 1, "--quiet")
    for ablation in (["zero"], ["noise", "--noise-scale", "0.5"]):
        out = tmp_path / ablation[0]
        result = run("patch", *small, "--ablation", *ablation, "--out", out)
        assert result.exit_code == 0, result.output
        assert Scores.load(out).convention.ablation == ablation[0]
    good = ("--model", "varbind-llama", "--pairs", "good.jsonl", "--nodes", "a1.h0,m2", "--quiet")
    mean = run(
        "attribute",
        *good,
        "--ablation",
        "mean",
        "--reference",
        "good.jsonl",
        "--method",
        "atp",
        "--out",
        tmp_path / "m",
    )
    assert mean.exit_code == 0, mean.output
    scores = Scores.load(tmp_path / "m")
    assert int(scores.computed.sum()) == 2 and scores.method == "atp"
    assert {"pairs", "reference"} == read_manifest(tmp_path / "m").inputs.keys()
    own = run("attribute", *good, "--metric", "node_metrics:first", "--out", tmp_path / "own")
    assert own.exit_code == 0, own.output
    assert run("rerun", tmp_path / "own", "--quiet").exit_code == 0


def test_an_interrupted_run_goes_on_from_its_finished_batches(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    genuine, left = attribution.Attribution.run, [2]
    batches: list[int] = []

    def breaking(self: attribution.Attribution, *arguments: object) -> dict[str, torch.Tensor]:
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        batches.append(1)
        return genuine(self, *arguments)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(attribution.Attribution, "run", breaking)
    command = [
        "attribute", "--model", "varbind-llama", "--pairs", files / "good.jsonl", "--max-batch-tokens", "1",
        "--out", tmp_path / "out",
    ]  # fmt: skip
    broken = run(*command)
    assert broken.exit_code == 130 and "--resume" in broken.stderr and "Traceback" not in broken.stderr
    assert read_manifest(tmp_path / "out").status == "interrupted"
    shards = pyarrow.dataset.dataset(tmp_path / "out" / "journal").to_table()
    assert len(set(shards["key"].to_pylist())) == 2
    assert run(*command).exit_code == 2
    left[0] = 99
    resumed = run(*command, "--resume")
    assert resumed.exit_code == 0 and len(batches) == 3, resumed.output
    assert not (tmp_path / "out" / "journal").exists()
    whole = run(*command[:-1], tmp_path / "whole")
    assert whole.exit_code == 0 and len(batches) == 6
    assert torch.equal(Scores.load(tmp_path / "out").effects, Scores.load(tmp_path / "whole").effects)
    finished = run(*command, "--resume")
    assert finished.exit_code == 0 and "complete already" in finished.stderr and len(batches) == 6


BOTH = [
    ("--nodes brain", "'brain' is neither a node kind"),
    ("--nodes ,", "--nodes is empty"),
    ("--nodes a9.h0", "layer 9 is out of range, the model has layers 0 to 3"),
    ("--nodes a0.h99", "'a0.h99': index 99 is out of range, layer 0 has 0 to 7"),
    ("--nodes z.0", "'z.0' is not a node name"),
    ("--layers 9", "layer 9 is out of range"),
    ("--layers 2-x", "--layers 2-x: '2-x' is no number or range"),
    ("--layers 3-2", "'3-2' is no number or range"),
    ("--nodes a1.h0 --layers 2", "no node is left of a1.h0 at layers [2]"),
    ("--pairs mixed.jsonl --positions each", "positions 'each' need pairs of one length"),
    ("--positions subject", "has no span 'subject'"),
    ("--positions 99", "position 99 is outside pair"),
    ("--positions last,each", "stands alone"),
    ("--direction up", "--direction up: expected one of: noise, denoise"),
    ("--ablation knockout", "--ablation knockout: expected one of: resample"),
    ("--ablation mean", "needs a reference set"),
    ("--ablation mean --reference mixed.jsonl", "must all have one length"),
    ("--ablation mean --reference nowhere.jsonl", "nowhere.jsonl"),
    ("--reference good.jsonl", "a reference set is for the ablation 'mean'; found 'resample'"),
    ("--noise-scale 0", "noise_scale must be above 0"),
    ("--group 4", "a group needs the node kind 'neuron'"),
    ("--group 0", "expected at least 1"),
    ("--metric accuracy", "unknown metric 'accuracy'"),
    ("--metric node_metrics:absent", "has no function 'absent'"),
    ("--metric node_metrics:mean", "must return one float per row"),
    ("--metric node_metrics:nan", "'node_metrics:nan' is nan in row 0"),
    ("--metric node_metrics:nan_for_one --max-batch-tokens 40", "is nan in row"),
    ("--metric node_metrics:oops", "failed with KeyError: 'missing'"),
    ("--pairs empty.jsonl", "empty.jsonl"),
    ("--pairs nowhere.jsonl", "nowhere.jsonl"),
    ("--task ioi", "one of the two"),
    ("--max-batch-tokens few", "--max-batch-tokens few"),
    ("--dtype int4", "dtype 'int4' is not known"),
    ("--model no-such-model", "no-such-model"),
]
ATTRIBUTE = [
    ("--metric kl", "every estimate would be 0"),
    ("--metric node_metrics:hits", "'node_metrics:hits' has no gradient"),
    (
        "--metric node_metrics:root",
        "the gradient of metric 'node_metrics:root' is not finite at node 'a0.h0'",
    ),
    ("--method saliency", "--method saliency: expected one of: atp, atp-qk, atp-graddrop, atp-star"),
    ("--verify 0", "--verify 0: expected the number of top nodes"),
    ("--sample 5", "--sample 5: expected"),
    ("--verify 3 --sample -1", "--sample -1: expected"),
    ("--bound 1.5", "--bound 1.5: expected a risk between 0 and 1"),
    ("--bound nan", "--bound nan: expected"),
]


def refused(result: Result, words: str, out: Path) -> None:
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1 and words in result.stderr
    assert result.stdout == "" and not out.exists()


@pytest.mark.slow
@pytest.mark.parametrize("command", ["patch", "attribute"])
def test_bad_input_is_one_line_and_status_2(here: Path, tmp_path: Path, command: str) -> None:
    out = tmp_path / "out"
    for options, words in BOTH + (ATTRIBUTE if command == "attribute" else []):
        given = ["--model", "varbind-llama", "--pairs", "good.jsonl", "--quiet", *options.split()]
        refused(run(command, *given, "--out", out), words, out)
    good = run(command, "--model", "varbind-llama", "--pairs", "good.jsonl", "--nodes", "m1", "--out", out)
    assert good.exit_code == 0, good.output


@pytest.fixture(scope="module")
def by_ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One pair for models of a vocabulary of 37 that have no tokenizer."""
    file = tmp_path_factory.mktemp("ids") / "ids.jsonl"
    pair = {"clean_ids": [3, 4, 5], "corrupt_ids": [3, 6, 5], "answer_id": 7, "wrong_id": 8}
    file.write_text(json.dumps(pair) + "\n")
    return file


def test_neurons_of_experts_are_refused_and_the_rest_works(by_ids: Path, tmp_path: Path) -> None:
    build("mixtral-experts").save_pretrained(tmp_path / "mixtral")
    given = ("--model", tmp_path / "mixtral", "--pairs", by_ids, "--quiet", "--out", tmp_path / "out")
    for command in ("patch", "attribute"):
        for nodes in ("neuron", "m1.n3", "z,neuron"):
            words = "the MLP of family 'mixtral' cannot be split into neurons"
            refused(run(command, *given, "--nodes", nodes), words, tmp_path / "out")
    result = run("attribute", *given, "--nodes", "q,k,v,z,mlp_out", "--verify", 4)
    assert result.exit_code == 0, result.output


def test_an_attention_that_cannot_be_read_is_named_with_the_flag_that_helps(
    by_ids: Path, tmp_path: Path
) -> None:
    upcast = build("gpt2")
    upcast.config.reorder_and_upcast_attn = True
    upcast.save_pretrained(tmp_path / "gpt2")
    given = (
        "patch",
        "--model",
        tmp_path / "gpt2",
        "--pairs",
        by_ids,
        "--nodes",
        "q",
        "--out",
        tmp_path / "out",
    )
    words = "q, k and v cannot be read under the attention implementation 'eager'"
    bad = run(*given, "--quiet", "--attn-implementation", "eager")
    refused(bad, words, tmp_path / "out")
    assert "--attn-implementation sdpa" in bad.stderr
    assert run(*given, "--quiet", "--attn-implementation", "sdpa").exit_code == 0


def test_weights_with_nan_are_refused(by_ids: Path, tmp_path: Path) -> None:
    broken = build("llama-gqa")
    with torch.no_grad():
        broken.get_parameter("model.layers.1.mlp.down_proj.weight")[0, 0] = torch.nan
    broken.save_pretrained(tmp_path / "llama")
    result = run(
        "patch", "--model", tmp_path / "llama", "--pairs", by_ids, "--quiet", "--out", tmp_path / "out"
    )
    refused(result, "gives NaN or infinite logits", tmp_path / "out")
