"""The options that every run shares: the same in every command, refused in one line where they do not go together."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch
import typer
from typer.main import get_command
from typer.testing import CliRunner, Result

from patchkit import tasks, write_pairs, zoo
from patchkit.cli import app
from patchkit.cli.app import CommandGroup
from patchkit.cli.run_options import RunOptions, runs
from patchkit.errors import InputError
from patchkit.methods import attribution
from patchkit.results.manifest import read_manifest
from patchkit.results.scores import Scores
from patchkit.runtime import current_execution

SHARED = (
    "dtype device_map attn_implementation backend num_processes gpus_per_replica host remote_concurrency job_timeout "
    "job_seconds patience max_batch_tokens max_failures seed resume quiet"
).split()
RUNS = ("patch", "attribute", "mask", "edges", "paths", "evaluate", "compare", "generalise", "study", "demo")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No process group around the tests, whatever has started them."""
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("name", RUNS)
def test_every_command_that_runs_a_model_has_them_last_and_in_one_order(name: str) -> None:
    group: Any = get_command(app)
    found = [parameter.name for parameter in group.commands[name].params]
    shared = [each for each in SHARED if each in found]
    assert set(SHARED) - set(shared) <= (
        {"max_batch_tokens", "max_failures"} if name in ("study", "demo") else set()
    )
    assert found[-len(shared) :] == shared and len(set(found)) == len(found)
    assert "shared" not in found


def test_a_command_gets_its_own_options_and_the_shared_ones_as_one() -> None:
    made, seen = typer.Typer(cls=CommandGroup), list[Any]()

    @made.command()
    @runs(without=["max_failures"])
    def work(
        ctx: typer.Context, shared: RunOptions, number: Annotated[int, typer.Option("--number")] = 3
    ) -> None:
        """Says what it got."""
        seen.append((number, shared, dict(ctx.params), current_execution()))

    made.command("other")(lambda: None)
    result = CliRunner().invoke(made, ["work", "--seed", "5", "--number", "4", "--max-batch-tokens", "77"])
    assert result.exit_code == 0, result.output
    number, shared, params, execution = seen[0]
    assert (number, shared.seed, shared.batch_tokens, shared.quiet) == (4, 5, 77, False)
    assert params.keys() == {"number", *SHARED} - {"max_failures"}
    assert execution.fit_memory is False and execution.group is None
    assert current_execution().fit_memory is True, "what the command set up ends with it"
    assert "Says what it got." in CliRunner().invoke(made, ["work", "--help"]).stdout
    assert CliRunner().invoke(made, ["work", "--max-failures", "1"]).exit_code == 2
    assert inspect.signature(work).parameters.keys() == {"ctx", "number", *SHARED} - {"max_failures"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--backend cluster", "--backend cluster: expected one of: local, accelerate, ndif"),
        ("--host http://127.0.0.1:1", "--host http://127.0.0.1:1 belongs to --backend ndif; give both"),
        ("--backend accelerate --remote-concurrency 3", "--remote-concurrency 3 belongs to --backend ndif"),
        ("--job-timeout 5", "--job-timeout 5.0 belongs to --backend ndif; give both"),
        ("--patience 5", "--patience 5.0 belongs to --backend ndif; give both"),
        ("--backend ndif --device-map cpu", "--device-map cpu: a hosted model stays"),
        ("--backend ndif --num-processes 2", "with --backend ndif give --remote-concurrency"),
        ("--backend ndif --gpus-per-replica 2", "belongs to --backend accelerate, found --backend ndif"),
        ("--backend ndif --remote-concurrency 0", "--remote-concurrency 0: expected at least 1"),
        ("--backend ndif --job-timeout 0", "--job-timeout 0: expected a number of seconds above 0"),
        ("--backend ndif --patience -1", "--patience -1: expected a number of seconds of at least 0"),
        ("--backend ndif --host 127.0.0.1:8001", "--host 127.0.0.1:8001: expected a URL such as"),
        (
            "--backend ndif --host http://me:secret@127.0.0.1",
            "--host http://127.0.0.1: found a user, password",
        ),
        ("--num-processes 2", "--num-processes 2 belongs to --backend accelerate"),
        ("--backend local --num-processes 2", "belongs to --backend accelerate"),
        ("--gpus-per-replica 2", "--gpus-per-replica 2 belongs to --backend accelerate"),
        ("--backend accelerate --num-processes 0", "--num-processes 0: expected at least 1"),
        ("--backend accelerate --num-processes -3", "--num-processes -3: expected at least 1"),
        ("--backend accelerate --num-processes 2 --gpus-per-replica 0", "--gpus-per-replica 0: expected"),
        ("--backend accelerate", "there is no process group to join"),
        ("--max-failures -1", "--max-failures -1: expected at least 0"),
        ("--max-batch-tokens none", "--max-batch-tokens none"),
    ],
)
@pytest.mark.parametrize("command", [("patch", "--task", "ioi"), ("mask", "--task", "variable-binding")])
def test_wrong_combinations_are_one_line(
    options: str, words: str, command: tuple[str, ...], tmp_path: Path
) -> None:
    result = run(*command, "--model", "varbind-llama", "--out", tmp_path / "out", *options.split())
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1 and words in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "gpus", "words"),
    [
        ({"num_processes": 9}, 8, "needs 9 GPUs; found 8. Give at most --num-processes 8"),
        ({"num_processes": 5, "gpus_per_replica": 2}, 8, "needs 10 GPUs; found 8. Give at most --num-processes 4"),
        ({"num_processes": 2, "gpus_per_replica": 3}, 8, "--gpus-per-replica 3: expected a number that divides the GPUs"),
        ({"gpus_per_replica": 2}, 0, "and it has 0"),
    ],
)  # fmt: skip
def test_processes_and_gpus_must_be_there(given: dict[str, int], gpus: int, words: str) -> None:
    with pytest.raises(InputError) as refused:
        RunOptions(backend="accelerate", **given).check(in_group=False, gpus=gpus)
    assert words in str(refused.value)


@pytest.mark.parametrize(("processes", "each", "gpus"), [(8, 1, 8), (4, 2, 8), (1, 8, 8), (3, None, 0)])
def test_what_fits_is_let_through(processes: int, each: int | None, gpus: int) -> None:
    options = RunOptions(backend="accelerate", num_processes=processes, gpus_per_replica=each)
    options.check(in_group=False, gpus=gpus)


@pytest.mark.parametrize("given", [{"backend": "local"}, {"backend": "ndif"}, {"num_processes": 2}])
def test_one_of_several_processes_starts_no_others_and_is_not_alone(given: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="one of several that were started together"):
        RunOptions(**given).check(in_group=True, gpus=0)
    RunOptions().check(in_group=True, gpus=0)
    RunOptions(backend="accelerate").check(in_group=True, gpus=0)


def test_only_the_main_process_says_that_options_are_wrong(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    result = run(
        "patch", "--model", "varbind-llama", "--task", "ioi", "--backend", "local", "--out", tmp_path / "o"
    )
    assert (result.exit_code, result.output) == (2, "")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    write_pairs(file, tasks.pairs("variable-binding", zoo.build("varbind-llama")[1], 6, 0))
    return file


@pytest.fixture
def scarce(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Ids of pairs that memory is not enough for."""
    genuine, too_large = attribution.Attribution.run, set[str]()

    def short_of_memory(self: attribution.Attribution, model: Any, items: Any) -> dict[str, torch.Tensor]:
        if too_large & {item.pair.id for item in items}:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return genuine(self, model, items)

    monkeypatch.setattr(attribution.Attribution, "run", short_of_memory)
    return too_large


def ids(file: Path) -> list[str]:
    from patchkit import read_pairs

    module, tokenizer = zoo.build("varbind-llama")
    return [str(pair.id) for pair in read_pairs(file, tokenizer, module.config.vocab_size)]


def test_pairs_that_do_not_fit_are_left_out_and_said_everywhere(
    pairs: Path, scarce: set[str], tmp_path: Path
) -> None:
    names = ids(pairs)
    scarce |= {names[1], names[4]}
    out = tmp_path / "out"
    result = run("attribute", "--model", "varbind-llama", "--pairs", pairs, "--out", out)
    assert result.exit_code == 0, result.output
    assert (
        "Warning: 2 of 6 gave no numbers" in result.stderr and f"  {names[1]}: out of memory" in result.stderr
    )
    assert "--max-batch-tokens" in result.stderr and "2 failed" in result.stderr
    manifest = read_manifest(out)
    assert manifest.pairs is not None and (manifest.pairs.total, manifest.pairs.used) == (6, 4)
    assert [failure.id for failure in manifest.pairs.failures] == [names[1], names[4]]
    assert list(Scores.load(out).pair_ids) == [name for name in names if name not in scarce]
    assert "2 of 6 gave no numbers" in (out / "report.html").read_text().replace("\u00a0", " ")


def test_more_failures_than_allowed_end_the_run_which_can_go_on(
    pairs: Path, scarce: set[str], tmp_path: Path
) -> None:
    names = ids(pairs)
    scarce |= {names[0], names[2], names[5]}
    command = (
        "attribute",
        "--model",
        "varbind-llama",
        "--pairs",
        pairs,
        "--out",
        tmp_path / "out",
        "--quiet",
    )
    result = run(*command, "--max-failures", 2)
    assert (result.exit_code, result.stdout) == (1, ""), result.output
    assert "3 of 6" in result.stderr and "--max-failures 2" in result.stderr and "--resume" in result.stderr
    assert read_manifest(tmp_path / "out").status == "failed"
    scarce.clear()
    resumed = run(*command, "--resume", "--max-batch-tokens", 100)
    assert resumed.exit_code == 0 and resumed.stderr == "", resumed.output
    assert len(Scores.load(tmp_path / "out").pair_ids) == 6


def test_when_all_fail_there_is_no_result(pairs: Path, scarce: set[str], tmp_path: Path) -> None:
    scarce |= set(ids(pairs))
    result = run("attribute", "--model", "varbind-llama", "--pairs", pairs, "--out", tmp_path / "out")
    assert (result.exit_code, result.stdout) == (1, ""), result.output
    assert "6 of 6 could not be run, all" in result.stderr and "out of memory" in result.stderr
    assert not (tmp_path / "out" / "scores.json").exists()
