"""`patchkit edges`, `evaluate`, `paths`, `plan` and `study circuits`: what they write and print, and bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import LlamaConfig
from typer.testing import CliRunner, Result

import patchkit
from patchkit import EdgeScores, tasks, write_pairs
from patchkit.cli import app
from patchkit.model import EdgeGraph
from patchkit.results.circuit_study import CircuitStudy
from patchkit.results.evaluation import Evaluation
from patchkit.results.manifest import read_manifest
from patchkit.results.paths import PathResult
from patchkit.studies.circuits import CircuitStudyOptions

MODEL = "varbind-llama-gqa"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("edges")
    model = patchkit.load(MODEL)
    write_pairs(directory / "pairs.jsonl", tasks.pairs("variable-binding", model.tokenizer, 3, 0))
    write_pairs(directory / "others.jsonl", tasks.pairs("variable-binding", model.tokenizer, 3, 1))
    return directory


@pytest.fixture(scope="module")
def scored(files: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    out = tmp_path_factory.mktemp("scored") / "run"
    result = run(
        *("edges", "--model", MODEL, "--pairs", files / "pairs.jsonl", "--method", "eap"),
        *("--keep-pairs", "--out", out),
    )
    return out, result


def test_edges_writes_the_files_of_the_contract(scored: tuple[Path, Result], files: Path) -> None:
    out, result = scored
    assert result.exit_code == 0, result.stderr
    graph = EdgeGraph.of(patchkit.load(MODEL).dims)
    with safe_open(out / "edges.safetensors", framework="pt") as file:
        names = {key: json.loads(file.metadata()[key]) for key in ("senders", "receivers")}
        scores = file.get_tensor("scores")
    assert names == {"senders": list(graph.senders), "receivers": list(graph.receivers)}
    assert scores.dtype == torch.float32 and torch.equal(scores.isnan(), ~graph.real)
    manifest = read_manifest(out)
    assert (manifest.status, manifest.direction, manifest.ablation) == ("done", "noise", "resample")
    assert manifest.axes["scores"] == ["sender", "receiver"] and manifest.pairs is not None
    assert manifest.cost is not None and 3 < manifest.cost < 10
    loaded = EdgeScores.load(out)
    expected = patchkit.attribute_edges(
        patchkit.load(MODEL),
        patchkit.read_pairs(files / "pairs.jsonl", None, graph.d_model * 10),
        method="eap",
    )
    torch.testing.assert_close(loaded.mean, expected.mean, equal_nan=True, rtol=0, atol=1e-5)
    assert loaded.top(1)[0][0] in result.stdout
    # By query head, as the EAP-IG repository counts: 8 query heads share 2 KV heads.
    exported = json.loads((out / "graph.json").read_text())
    assert "a0.h0->a1.h7<k>" in exported["edges"] and (out / "graph.pt").exists()
    assert (out / "report.html").exists() and "edges" in (out / "report.html").read_text()


def test_a_finished_run_is_not_run_again(scored: tuple[Path, Result], files: Path) -> None:
    out, _ = scored
    again = run(
        *("edges", "--model", MODEL, "--pairs", files / "pairs.jsonl", "--method", "eap"),
        *("--keep-pairs", "--out", out, "--resume"),
    )
    assert again.exit_code == 0 and "complete already" in again.stderr
    other = run("edges", "--model", MODEL, "--pairs", files / "pairs.jsonl", "--out", out)
    assert other.exit_code == 2 and "already holds a run" in other.stderr


def test_rerun_gives_the_same_numbers(scored: tuple[Path, Result], tmp_path: Path) -> None:
    result = run("rerun", scored[0], "--out", tmp_path / "again", "--quiet")
    assert result.exit_code == 0, result.stderr
    assert "edges.safetensors:scores" in result.stdout


def test_evaluate_runs_what_edges_scored(scored: tuple[Path, Result], files: Path, tmp_path: Path) -> None:
    result = run(
        *("evaluate", "--model", MODEL, "--pairs", files / "others.jsonl", "--circuit", scored[0]),
        *("--top-n", "1,60", "--absolute", "--truth", scored[0], "--knockout", "a1.h0"),
        *("--stability", 3, "--out", tmp_path / "tested"),
    )
    assert result.exit_code == 0, result.stderr
    found = Evaluation.load(tmp_path / "tested")
    one, many = found.circuits
    assert one.empty and one.requested == 1 and "(empty)" in result.stdout
    assert many.faithfulness is not None and many.faithfulness > 0.8 and many.n_edges <= 60
    assert {each.jaccard for each in found.overlaps if each.requested == 60 or each.jaccard == 1.0} >= {1.0}
    assert found.stability is not None and found.repair is not None
    assert (tmp_path / "tested" / "report.html").exists()


def test_evaluate_reads_the_exported_graph(scored: tuple[Path, Result], files: Path, tmp_path: Path) -> None:
    runs = []
    for name in ("graph.json", "graph.pt", ""):
        result = run(
            *("evaluate", "--model", MODEL, "--pairs", files / "others.jsonl"),
            *("--circuit", scored[0] / name if name else scored[0], "--top-n", 60, "--absolute"),
            *("--out", tmp_path / (name or "own")),
        )
        assert result.exit_code == 0, result.stderr
        runs.append(Evaluation.load(tmp_path / (name or "own")).circuits[0].circuit_metric)
    assert runs == pytest.approx([runs[0]] * 3, abs=1e-4)


def test_paths_once_and_stage_by_stage(files: Path, tmp_path: Path) -> None:
    pairs = ("--model", MODEL, "--pairs", files / "pairs.jsonl")
    once = run("paths", *pairs, "--senders", "a1.h0,m0", "--receivers", "m1", "--out", tmp_path / "once")
    assert once.exit_code == 0, once.stderr
    assert [each.sender for each in PathResult.load(tmp_path / "once").stages[0].effects] == ["m0", "a1.h0"]
    back = run(
        *("paths", *pairs, "--iterative", "--stage", "name=last,k=2,only=all,letters=qkv"),
        *("--stage", "name=before,k=2", "--out", tmp_path / "back"),
    )
    assert back.exit_code == 0, back.stderr
    assert PathResult.load(tmp_path / "back").stages[0].name == "last" and "chosen" in back.stdout
    assert (tmp_path / "back" / "report.html").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("edges",), "give either --pairs FILE or --task NAME"),
        (("edges", "--method", "eap-ig"), "--method eap-ig: expected one of: eap, "),
        (("edges", "--method", "acdc"), "--method acdc needs --tau"),
        (("edges", "--method", "exact", "--qk-fix"), "--qk-fix is for --method eap; found --method exact"),
        (("edges", "--tau", "0.1"), "--tau is for --method acdc; found --method eap-ig-inputs"),
        (("edges", "--ig-rule", "left"), "expected one of: repo, midpoint"),
        (("edges", "--ablation", "noise"), "--ablation noise: expected one of: resample, mean"),
        (("edges", "--method", "eap", "--metric", "kl"), "every estimate would be 0"),
        (("edges", "--positions", "nowhere"), "no span 'nowhere'"),
        (("edges", "--method", "acdc", "--tau", "1", "--positions", "last"), "positions"),
        (("paths", "--iterative", "--senders", "a0.h0"), "leave --senders and --receivers out"),
        (("paths", "--stage", "name=x,k=1"), "--stage belongs to --iterative"),
        (("paths", "--iterative", "--stage", "k=1"), "expected a name="),
        (("paths", "--iterative", "--stage", "name=x,k=many"), "k is 'many', expected a number"),
        (("paths", "--senders", "a9.h0"), "a9.h0"),
        (("paths", "--receivers", "a1.h7<k>"), "a1.h7<k>"),
        (("paths", "--mlps", "gone"), "--mlps gone: expected one of: recomputed, frozen"),
        (("evaluate", "--circuit", "nowhere.json"), "nowhere.json"),
        (("evaluate", "--circuit", "pairs.jsonl", "--top-n", "many"), "'many' is no number of edges"),
        (("evaluate", "--circuit", "pairs.jsonl"), "pairs.jsonl, line 1"),
    ],
)
def test_bad_input_is_one_message(
    words: tuple[str, ...], message: str, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(files)
    source = () if words == ("edges",) else ("--pairs", "pairs.jsonl")
    result = run(*words, "--model", MODEL, *source, "--out", "bad")
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("Error: ") and result.stderr.count("\n") <= 2
    assert message in result.stderr
    assert not (files / "bad").exists(), "bad input leaves nothing behind"


@pytest.mark.slow
def test_a_plan_needs_no_weights(tmp_path: Path) -> None:
    """LLaMA-13B's shape: a config is all there is."""
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=5120,
        intermediate_size=13824,
        num_hidden_layers=40,
        num_attention_heads=40,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(tmp_path)
    for words in (("edges", "--method", "eap"), ("edges", "--method", "exact"), ("paths",)):
        result = run("plan", "--tokens", 40, *words, "--model", tmp_path, "--n", 10, "--dtype", "bfloat16")
        assert result.exit_code == 0, result.output
        assert "3,877,661 edges" in result.stdout and "26.0 GB" in result.stdout
    result = run(*("plan", "evaluate", "--model", tmp_path, "--circuit", "x", "--top-n", "5000", "--n", 10))
    assert result.exit_code == 0 and "forwards" in result.stdout
    assert run("plan", "edges", "--model", tmp_path, "--method", "acdc").exit_code == 2


@pytest.mark.slow
def test_the_study_of_circuits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def small(seed: int) -> CircuitStudyOptions:
        return CircuitStudyOptions(pairs=2, test_pairs=3, sizes=(20, 60), tau=0.05, seed=seed)

    monkeypatch.setattr("patchkit.studies.circuits.CircuitStudyOptions", small)
    result = run("study", "circuits", "--model", MODEL, "--out", tmp_path / "study")
    assert result.exit_code == 0, result.stderr
    found = CircuitStudy.load(tmp_path / "study")
    rows = {row.method: row for row in found.methods}
    assert {"exact", "eap", "eap-ig-inputs", "eap-ig-activations", "acdc", "ifr", "random"} <= rows.keys()
    assert rows["exact"].rank_correlation is None and (rows["eap"].rank_correlation or 0) > 0.8
    best, chance = (rows[name].runs[-1].faithfulness or 0.0 for name in ("eap-ig-inputs", "random"))
    assert best > 0.8 > chance + 0.5
    assert rows["exact"].cost > 5 * rows["eap"].cost
    assert (tmp_path / "study" / "report.html").exists() and found.findings[0] in result.stdout
