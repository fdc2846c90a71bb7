"""A run directory holds one run: refused, resumed or cleaned up by what it holds and how the run ended."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path

import pytest

from patchkit import files
from patchkit.errors import InputError, RunError
from patchkit.results import formats
from patchkit.results.manifest import (
    Failure,
    Manifest,
    ModelRef,
    PairCounts,
    file_sha256,
    open_run_dir,
    package_versions,
    read_manifest,
)

OPTIONS = {"model": "varbind-llama", "seed": 3, "lam": 0.03, "components": ("head", "mlp"), "resume": False}


def finished_run(path: Path, **changes: object) -> None:
    with open_run_dir(path, "mask", {**OPTIONS, **changes}) as run:
        run.record(seed=3, metric="logit-diff")


@pytest.mark.parametrize("exists", [True, False])
def test_an_empty_or_absent_directory_starts_a_run(tmp_path: Path, exists: bool) -> None:
    out = tmp_path / "runs" / "a"
    if exists:
        out.mkdir(parents=True)
    with open_run_dir(out, "mask", OPTIONS) as run:
        assert not run.resumed and not run.done
        assert read_manifest(out).status == "running"
        run.record(
            model=ModelRef(id="varbind-llama", fingerprint="abc"),
            axes={"head": ["layer", "head"]},
            cost=12.5,
            pairs=PairCounts(total=4, used=4),
        )
    manifest = read_manifest(out)
    assert manifest.status == "done" and manifest.cost == 12.5 and manifest.seconds > 0
    assert manifest.model is not None and manifest.model.fingerprint == "abc"
    assert manifest.options == {**OPTIONS, "components": ["head", "mlp"]}
    assert manifest.directory == os.getcwd()
    on_disk = json.loads((out / "manifest.json").read_text())
    assert {"patchkit", "nnsight", "torch", "transformers"} <= on_disk["versions"].keys()


def test_nothing_is_written_before_the_block_is_entered(tmp_path: Path) -> None:
    open_run_dir(tmp_path / "a", "mask", OPTIONS)
    assert not (tmp_path / "a").exists()


def test_another_run_is_refused_by_name_and_kept(tmp_path: Path) -> None:
    finished_run(tmp_path)
    before = (tmp_path / "manifest.json").read_bytes()
    with pytest.raises(InputError, match=r"already holds a run: `patchkit mask`.*done.*--resume"):
        open_run_dir(tmp_path, "mask", OPTIONS)
    assert (tmp_path / "manifest.json").read_bytes() == before


def test_resume_goes_on_with_the_same_run(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), open_run_dir(tmp_path, "mask", OPTIONS) as run:
        run.record(seconds=100.0)
        raise KeyboardInterrupt
    interrupted = read_manifest(tmp_path)
    assert interrupted.status == "interrupted"
    with open_run_dir(tmp_path, "mask", {**OPTIONS, "resume": True, "quiet": True}, resume=True) as run:
        assert run.resumed and not run.done
        assert read_manifest(tmp_path).status == "running"
    again = read_manifest(tmp_path)
    assert again.status == "done" and again.seconds >= 100.0 and again.started == interrupted.started
    with open_run_dir(tmp_path, "mask", OPTIONS, resume=True) as run:
        assert run.done
    assert read_manifest(tmp_path) == again


def test_resume_in_an_empty_directory_starts_a_run(tmp_path: Path) -> None:
    with open_run_dir(tmp_path, "mask", OPTIONS, resume=True) as run:
        assert not run.resumed


@pytest.mark.parametrize(
    ("command", "changes", "words"),
    [
        ("mask", {"lam": 0.05}, r"--lam 0\.03 there, 0\.05 here"),
        ("mask", {"components": ["head"]}, r"--components \['head', 'mlp'\] there, \['head'\] here"),
        ("mask", {"max_steps": 5}, "--max-steps None there, 5 here"),
        ("edges", {}, "command 'mask' there, 'edges' here"),
    ],
)
def test_resume_with_other_options_names_the_difference(tmp_path: Path, command, changes, words) -> None:
    finished_run(tmp_path)
    with pytest.raises(InputError, match=words):
        open_run_dir(tmp_path, command, {**OPTIONS, **changes}, resume=True)


def test_resume_with_another_version_names_it(tmp_path: Path) -> None:
    finished_run(tmp_path)
    file = tmp_path / "manifest.json"
    data = json.loads(file.read_text())
    data["versions"]["torch"] = "1.0"
    file.write_text(json.dumps(data))
    with pytest.raises(InputError, match=r"version of torch '1\.0' there"):
        open_run_dir(tmp_path, "mask", OPTIONS, resume=True)


def test_resume_after_an_input_file_changed_is_refused(tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("one\n")
    finished_run(tmp_path / "out", pairs=pairs)
    recorded = read_manifest(tmp_path / "out").inputs["pairs"]
    assert recorded.path == str(pairs) and recorded.sha256 == hashlib.sha256(b"one\n").hexdigest()
    with open_run_dir(tmp_path / "out", "mask", {**OPTIONS, "pairs": pairs}, resume=True) as run:
        assert run.done
    pairs.write_text("two\n")
    with pytest.raises(InputError, match="content of --pairs"):
        open_run_dir(tmp_path / "out", "mask", {**OPTIONS, "pairs": pairs}, resume=True)


def test_bad_input_found_late_leaves_no_trace_unless_the_run_had_been_interrupted(tmp_path: Path) -> None:
    """What was finished until then is of the bad input; a run that is gone on with keeps what it had."""
    out = tmp_path / "out"

    def fails(error: BaseException, resume: bool = False) -> None:
        with pytest.raises(type(error)), open_run_dir(out, "mask", OPTIONS, resume) as run:
            run.checkpoint.mkdir(exist_ok=True)
            (run.checkpoint / "batch.safetensors").write_bytes(b"x")
            raise error

    fails(InputError("metric is nan"))
    assert not out.exists()
    fails(KeyboardInterrupt())
    fails(InputError("metric is nan"), resume=True)
    assert (out / "journal" / "batch.safetensors").exists() and read_manifest(out).status == "failed"


@pytest.mark.parametrize("failures", [[], [Failure(id="p3", reason="out of memory")]])
def test_what_was_kept_goes_when_all_of_it_is_in_the_results(tmp_path: Path, failures: list[Failure]) -> None:
    """Pairs that failed are tried again by --resume, and find what the others gave."""
    with open_run_dir(tmp_path, "mask", OPTIONS) as run:
        run.checkpoint.mkdir()
        (run.checkpoint / "shard").write_text("x")
        run.record(pairs=PairCounts(total=4, used=4 - len(failures), failures=failures))
        assert run.checkpoint.name == "journal" and run.checkpoint.exists()
    assert read_manifest(tmp_path).status == "done"
    assert (tmp_path / "journal" / "shard").exists() == bool(failures)
    with open_run_dir(tmp_path, "mask", OPTIONS, resume=True) as run:
        assert run.done == (not failures)
        if failures:
            assert read_manifest(tmp_path).status == "running"
            run.record(pairs=PairCounts(total=4, used=4))
    assert read_manifest(tmp_path).status == "done" and not (tmp_path / "journal").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RunError("disk full"), SystemExit(1)])
def test_what_was_kept_stays_when_a_run_does_not_end(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)), open_run_dir(tmp_path, "mask", OPTIONS) as run:
        run.checkpoint.mkdir()
        raise error
    assert (tmp_path / "journal").exists()


@pytest.mark.parametrize(
    ("name", "there", "here"),
    [
        ("max_batch_tokens", "auto", "512"),
        ("backend", None, "accelerate"),
        ("num_processes", None, 8),
        ("gpus_per_replica", None, 2),
        ("max_failures", 3, None),
        ("device_map", "auto", "balanced"),
        ("quiet", False, True),
    ],
)
def test_a_run_may_go_on_elsewhere_and_in_other_batches(tmp_path: Path, name: str, there, here) -> None:
    with pytest.raises(KeyboardInterrupt), open_run_dir(tmp_path, "mask", {**OPTIONS, name: there}):
        raise KeyboardInterrupt
    with open_run_dir(tmp_path, "mask", {**OPTIONS, name: here}, resume=True) as run:
        assert run.resumed


MODEL = ModelRef(id="varbind-llama", fingerprint="abc", content="def", revision="r1")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"content": "xyz"}, "fingerprint of the weights' values 'def' there, 'xyz' here"),
        ({"fingerprint": "xyz"}, "fingerprint of the weights' names, shapes and dtypes and of the config 'abc' there"),
        ({"revision": "r2"}, "revision of the model 'r1' there, 'r2' here"),
        ({"id": "other", "content": "xyz"}, "model 'varbind-llama' there, 'other' here; fingerprint of the weights' v"),
    ],
)  # fmt: skip
def test_resume_with_another_model_names_the_difference_and_changes_nothing(
    tmp_path: Path, changes: dict[str, str], words: str
) -> None:
    with pytest.raises(KeyboardInterrupt), open_run_dir(tmp_path, "mask", OPTIONS) as run:
        run.record_model(MODEL)
        run.checkpoint.mkdir()
        raise KeyboardInterrupt
    before = (tmp_path / "manifest.json").read_bytes()
    with pytest.raises(InputError) as caught, open_run_dir(tmp_path, "mask", OPTIONS, resume=True) as run:
        run.record_model(MODEL.model_copy(update=changes))
    message = str(caught.value)
    assert words in message and message.startswith(f"{tmp_path} holds another run (`patchkit mask`")
    assert "interrupted), which --resume cannot go on with" in message and "Give the same model" in message
    assert (tmp_path / "manifest.json").read_bytes() == before and (tmp_path / "journal").exists()
    with open_run_dir(tmp_path, "mask", OPTIONS, resume=True) as run:
        run.record_model(MODEL)
    assert read_manifest(tmp_path).status == "done" and read_manifest(tmp_path).model == MODEL


def test_what_was_not_known_of_a_model_is_no_difference(tmp_path: Path) -> None:
    """A run that was interrupted before the model was open, or that noted less of it."""
    for known in (None, MODEL.model_copy(update={"content": None})):
        out = tmp_path / str(known is None)
        with pytest.raises(KeyboardInterrupt), open_run_dir(out, "mask", OPTIONS) as run:
            if known is not None:
                run.record_model(known)
            raise KeyboardInterrupt
        with open_run_dir(out, "mask", OPTIONS, resume=True) as run:
            run.record_model(MODEL)
        assert read_manifest(out).model == MODEL


def test_a_directory_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(InputError, match=r"not empty.*thesis\.tex"):
        open_run_dir(tmp_path, "mask", OPTIONS, resume=True)
    assert [item.name for item in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_hidden_file_left_by_a_killed_process_is_not_in_the_way(tmp_path: Path) -> None:
    (tmp_path / ".manifest.json.0a.tmp").write_text("half")
    finished_run(tmp_path)
    assert read_manifest(tmp_path).status == "done"


def test_a_file_as_out_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    with pytest.raises(InputError, match="expected a directory"):
        open_run_dir(tmp_path / "a", "mask", OPTIONS)


@pytest.mark.parametrize("exists", [True, False])
def test_bad_input_found_early_leaves_no_trace(tmp_path: Path, exists: bool) -> None:
    out = tmp_path / "out"
    if exists:
        out.mkdir()
    with pytest.raises(InputError, match="bad pairs"), open_run_dir(out, "mask", OPTIONS):
        raise InputError("bad pairs")
    assert out.exists() == exists
    finished_run(out)


def test_bad_input_found_after_results_is_a_failed_run(tmp_path: Path) -> None:
    with pytest.raises(InputError), open_run_dir(tmp_path, "mask", OPTIONS):
        (tmp_path / "mask.json").write_text("{}")
        raise InputError("bad pairs")
    manifest = read_manifest(tmp_path)
    assert manifest.status == "failed" and manifest.error == "InputError: bad pairs"


def test_a_failed_run_says_why_and_can_be_resumed(tmp_path: Path) -> None:
    with pytest.raises(RunError), open_run_dir(tmp_path, "mask", OPTIONS):
        raise RunError("loss is NaN at step 3")
    assert read_manifest(tmp_path).error == "RunError: loss is NaN at step 3"
    with open_run_dir(tmp_path, "mask", OPTIONS, resume=True):
        pass
    assert read_manifest(tmp_path).status == "done" and read_manifest(tmp_path).error is None


def test_the_first_error_is_shown_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(RunError, match="mask.json"), open_run_dir(tmp_path, "mask", OPTIONS):
        monkeypatch.setattr(files.os, "fsync", full)
        formats.write_json(tmp_path / "mask.json", {})
    monkeypatch.undo()
    assert [item.name for item in tmp_path.iterdir()] == ["manifest.json"]
    assert read_manifest(tmp_path).status == "running"


def test_a_directory_without_a_manifest_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"manifest\.json: no such file"):
        read_manifest(tmp_path)


def test_unknown_fields_are_refused(tmp_path: Path) -> None:
    with open_run_dir(tmp_path, "mask", OPTIONS) as run, pytest.raises(ValueError, match="colour"):
        run.record(colour="blue")


def test_versions_are_of_what_is_installed() -> None:
    import torch
    import transformers

    found = package_versions()
    assert (found["torch"], found["transformers"]) == (torch.__version__, transformers.__version__)


def test_hash_reads_whole_files(tmp_path: Path) -> None:
    content = os.urandom((1 << 20) + 17)
    (tmp_path / "a").write_bytes(content)
    assert file_sha256(tmp_path / "a") == hashlib.sha256(content).hexdigest()


def test_every_field_of_the_contract_is_there() -> None:
    needed = {"versions", "model", "command", "options", "seed", "metric", "direction", "sign", "ablation"}
    needed |= {"axes", "base_metric", "source_metric", "cost", "seconds", "pairs"}
    assert needed <= Manifest.model_fields.keys()
