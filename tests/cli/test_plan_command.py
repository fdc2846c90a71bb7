"""`patchkit plan`: every command, on models with and without weights; what is refused, in one line."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig
from typer.testing import CliRunner, Result

from patchkit.cli import app
from patchkit.cli.plan import weights_here
from patchkit.studies import StudyOptions

#: Beside `make test`, in a lane of its own.
pytestmark = pytest.mark.slow

EIGHT_B = dict(
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
    dtype="bfloat16",
)
THIRTEEN_B = dict(
    hidden_size=5120,
    intermediate_size=13824,
    num_hidden_layers=40,
    num_attention_heads=40,
    vocab_size=32000,
    dtype="float16",
)


def run(*words: object) -> Result:
    return CliRunner().invoke(app, ["plan", *map(str, words)])


def config(directory: Path, sizes: dict[str, Any]) -> Path:
    LlamaConfig(**sizes).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Shapes without weights."""
    made = {"13b": THIRTEEN_B, "8b": EIGHT_B}
    return {name: config(tmp_path_factory.mktemp(name), sizes) for name, sizes in made.items()}


@pytest.fixture(scope="module")
def circuit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("circuit") / "circuit.txt"
    path.write_text("input->a0.h1<q>\na0.h1->m2\nm2->logits\n", encoding="utf-8")
    return path


def fact(result: Result, label: str) -> str:
    """The value beside a label."""
    (line,) = [each for each in result.stdout.splitlines() if each.split("  ")[0].strip() == label]
    return line.strip().removeprefix(label).strip()


@pytest.mark.parametrize(
    "words",
    [
        ("patch", "--positions", "each"),
        ("attribute", "--method", "atp-star", "--verify", 5, "--bound", 0.05),
        ("attribute", "--method", "atp", "--nodes", "neuron"),
        ("mask",),
        ("edges", "--method", "eap"),
        ("edges", "--method", "eap-ig-activations", "--keep-pairs"),
        ("edges", "--method", "exact", "--by-query"),
        ("edges", "--method", "acdc", "--tau", 0.1),
        ("edges", "--ablation", "mean"),
        ("paths",),
        ("paths", "--receivers", "a2.h1<q>", "--mlps", "frozen"),
        ("paths", "--iterative", "--stages", 3),
    ],
    ids=lambda words: " ".join(map(str, words[:3])),
)
def test_every_command_has_a_plan(words: tuple[object, ...]) -> None:
    result = run(*words, "--model", "varbind-llama-gqa", "--n", 6, "--tokens", 12, "--no-measure")
    assert result.exit_code == 0, result.stderr
    assert "made up" in fact(result, "prompts") and "forwards" in result.stdout
    assert "GB" in fact(result, "memory of a device") or "MB" in fact(result, "memory of a device")


def test_a_circuit_is_read_for_its_plan(circuit: Path) -> None:
    words = ("evaluate", "--model", "varbind-llama", "--circuit", circuit, "--n", 6, "--no-measure")
    plain = run(*words)
    assert plain.exit_code == 0, plain.stderr
    tested = run(*words, "--completeness", 3, "--minimality", "--random", 5, "--knockout", "a1.h0")
    assert tested.exit_code == 0, tested.stderr
    for part in ("completeness", "minimality", "random", "knockout"):
        assert part in tested.stdout and part not in plain.stdout


@pytest.fixture
def few_triples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Making them is most of the time."""
    small = functools.partial(StudyOptions, n_train=12, n_test=20)
    monkeypatch.setattr("patchkit.studies.plans.StudyOptions", small)


@pytest.mark.usefixtures("few_triples")
@pytest.mark.parametrize("name", ["variable-binding", "circuits", "ioi", "scrubbing", "attribution-recall"])
def test_every_study_has_a_plan(name: str) -> None:
    result = run("study", name, "--no-measure")
    assert result.exit_code == 0, result.stderr
    assert "made up" not in result.stdout


@pytest.mark.usefixtures("few_triples")
def test_the_demo_has_a_plan() -> None:
    assert run("demo", "--no-measure").exit_code == 0


def test_a_circuit_that_is_not_there_yet_is_planned_by_its_size() -> None:
    words = ("evaluate", "--model", "varbind-llama", "--circuit", "nowhere", "--n", 6, "--no-measure")
    result = run(*words, "--top-n", "50,100", "--curve", "--random", 5)
    assert result.exit_code == 0, result.stderr
    assert "random" in result.stdout and "edges" in fact(result, "graph")


def test_tasks_and_files_are_read(tmp_path: Path) -> None:
    told = run("patch", "--model", "ioi-gpt2", "--task", "ioi", "--n", 7, "--no-measure")
    assert told.exit_code == 0 and fact(told, "prompts").startswith("7, ")
    rows = [{"clean_ids": [1, 2, 3], "corrupt_ids": [1, 4, 3], "answer_id": 5, "wrong_id": 6}] * 4
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    read = run("patch", "--model", "ioi-gpt2", "--pairs", file, "--no-measure")
    assert read.exit_code == 0 and fact(read, "prompts") == "4, 12 tokens"


@pytest.mark.parametrize("shape", ["13b", "8b"])
def test_models_without_weights(large: dict[str, Path], shape: str) -> None:
    assert not weights_here(str(large[shape]))
    weights = {"13b": "26.0 GB", "8b": "16.1 GB"}[shape]
    for words in (("attribute", "--nodes", "q,k,v,z,mlp_out"), ("edges", "--method", "eap"), ("mask",)):
        result = run(*words, "--model", large[shape], "--n", 50, "--tokens", 20)
        assert result.exit_code == 0, result.stderr
        assert fact(result, "weights") == weights
        assert "not a measurement" in result.stdout and "measured" not in result.stdout.replace(
            "measurement", ""
        )


def test_weights_are_spread_over_devices(large: dict[str, Path]) -> None:
    result = run(
        "mask", "--model", large["13b"], "--gpus-per-replica", 2, "--num-processes", 4, "--memory", 40
    )
    assert result.exit_code == 0, result.stderr
    assert "over 2 devices" in fact(result, "weights") and "4 processes" in result.stdout
    assert fact(result, "fits").startswith("40 GB: ")


def test_time_is_measured_where_the_weights_are() -> None:
    result = run(
        "patch", "--model", "induction-2l", "--n", 4, "--tokens", 8, "--nodes", "z", "--positions", "last"
    )
    assert result.exit_code == 0, result.stderr
    assert "measured on this CPU" in fact(result, "time")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("probe", "--model", "ioi-gpt2"), "plan probe: expected one of: demo, patch"),
        (("patch", "--model", "ioi-gpt2", "--flops", "-1"), "--flops -1: expected a number above 0"),
        (("patch", "--model", "ioi-gpt2", "--memory", "0"), "--memory 0: expected a number above 0"),
        (("patch", "--model", "no-such/model"), "no-such/model"),
        (("patch", "--model", "ioi-gpt2", "--nodes", "zz"), "'zz' is neither a node kind"),
        (("attribute", "--model", "ioi-gpt2", "--sample", "3"), "--sample 3"),
        (("attribute", "--model", "ioi-gpt2", "--metric", "kl"), "metric 'kl'"),
        (("edges", "--model", "ioi-gpt2", "--method", "acdc"), "needs --tau"),
        (("edges", "--model", "ioi-gpt2", "--method", "eap", "--tau", "1"), "--tau is for --method acdc"),
        (("paths", "--model", "ioi-gpt2", "--stage", "name=a"), "--stage belongs to --iterative"),
        (("mask", "--model", "ioi-gpt2", "--components", "expert"), "component kind 'expert'"),
        (("study", "nothing"), "study nothing: expected one of"),
        (("patch", "--model", "ioi-gpt2", "--max-batch-tokens", "0"), "--max-batch-tokens 0"),
        (("patch", "--model", "ioi-gpt2", "--num-processes", "0"), "--num-processes 0: expected at least 1"),
        (("patch", "--model", "ioi-gpt2", "--task", "ioi", "--pairs", "x.jsonl"), "one of the two"),
    ],
    ids=lambda value: " ".join(value[:1]) if isinstance(value, tuple) else "",
)
def test_bad_input_is_one_line(words: tuple[str, ...], said: str) -> None:
    result = run(*words)
    assert result.exit_code == 2, (result.exit_code, result.output)
    assert result.stdout == "" and said in result.stderr and result.stderr.count("\n") == 1, result.stderr


def test_an_unknown_option_is_refused() -> None:
    assert run("patch", "--model", "ioi-gpt2", "--no-such-option", "3").exit_code == 2


def test_a_circuit_of_no_known_size_is_refused() -> None:
    result = run("evaluate", "--model", "ioi-gpt2", "--circuit", "nowhere.txt")
    assert result.exit_code == 2 and "nowhere.txt is not there" in result.stderr
