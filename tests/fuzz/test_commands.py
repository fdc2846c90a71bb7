"""Damaged files on the command line: exit status 2, one line on stderr, nothing on stdout, and nothing left behind."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from patchkit.cli import app
from patchkit.results.manifest import open_run_dir
from patchkit.zoo.load import load
from tests.fuzz import specimens as kept
from tests.fuzz.damages import BINARY, DOCUMENTS, SAFETENSORS, TEXT, Damage
from tests.fuzz.specimens import Specimen
from tests.fuzz.test_files import GONE, UNSEEN, kinds_for

#: Beside `make test`, in a lane of its own.
pytestmark = pytest.mark.slow

SCRIPT = Path(sys.executable).with_name("patchkit")


@pytest.fixture(autouse=True)
def one_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every name of a model is that of one tiny model, loaded once."""
    monkeypatch.setattr("patchkit.zoo.load.load", lambda name, **options: tiny_model())


_LOADED: list[Any] = []


def tiny_model() -> Any:
    if not _LOADED:
        _LOADED.append(load(kept.tiny(), tokenizer=kept.TOY))
    return _LOADED[0]


def tree(directory: Path) -> dict[str, bytes | str]:
    """Everything below a directory."""
    found: dict[str, bytes | str] = {}
    for path in sorted(directory.rglob("*")):
        name = str(path.relative_to(directory))
        found[name] = "link" if path.is_symlink() else "directory" if path.is_dir() else path.read_bytes()
    return found


def complaint(arguments: list[str], directory: Path) -> str | None:
    """What is wrong with how a command ends that was given something damaged."""
    before = tree(directory)
    result = CliRunner().invoke(app, arguments)
    lines = result.stderr.splitlines()
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        return f"{type(result.exception).__name__}: {str(result.exception)[:300]}"
    if result.exit_code != 2:
        return f"exit status {result.exit_code}: {result.output[-300:]}"
    if len(lines) != 1 or not lines[0].startswith("Error: ") or "Traceback" in result.stderr:
        return f"stderr: {result.stderr[:500]!r}"
    if result.stdout:
        return f"stdout: {result.stdout[:300]!r}"
    left = {name for name, content in tree(directory).items() if before.get(name) != content}
    return f"left behind: {left}" if left else None


def harmful(specimen: Specimen, file: str, content: bytes) -> Iterator[Damage]:
    for damage in kinds_for(file):
        gone = damage.name in GONE and file in specimen.optional
        unseen = (specimen.name, damage.name) in UNSEEN
        if not (damage.harmless or gone or unseen) and damage.applies(content):
            yield damage


def try_all(
    specimen: Specimen, command: Callable[[Path], list[str]], directory: Path, *, every: int = 1
) -> None:
    """Every damage to every file of a specimen, before a command; or each so-manyth, where reading takes long."""
    sound, found = directory / "sound", {}
    sound.mkdir()
    specimen.make(sound)
    for file in specimen.files:
        for damage in islice(
            harmful(specimen, file, specimen.path(sound, file).read_bytes()), 0, None, every
        ):
            work = directory / "work"
            shutil.copytree(sound, work)
            damage.do(specimen.path(work, file))
            said = complaint(command(work), work)
            if said is not None:
                found[f"{file}: {damage.name}"] = said
            shutil.rmtree(work)
    assert found == {}


def with_out(*arguments: str) -> Callable[[Path], list[str]]:
    """A command on files of a directory, whose results would go two directories deep."""
    return lambda directory: [
        *(word.replace("DIR", str(directory)) for word in arguments),
        "--out",
        str(directory / "new" / "out"),
    ]


@pytest.mark.parametrize(
    ("specimen", "file"),
    [(kept.PAIRS_IDS, "data.jsonl"), (kept.PAIRS_TEXT, "data.jsonl"), (kept.PAIRS_CSV, "data.csv")],
    ids=lambda value: getattr(value, "name", ""),
)
def test_pairs(specimen: Specimen, file: str, tmp_path: Path) -> None:
    every = 1 if specimen is kept.PAIRS_IDS else 3
    given = with_out("patch", "--model", "tiny", "--pairs", f"DIR/{file}")
    try_all(specimen, given, tmp_path, every=every)


@pytest.mark.parametrize("specimen", [kept.TRIPLES_IDS, kept.TRIPLES_TEXT], ids=lambda value: value.name)
def test_desiderata(specimen: Specimen, tmp_path: Path) -> None:
    given = with_out("mask", "--model", "tiny", "--desiderata", "DIR/data.jsonl")
    try_all(specimen, given, tmp_path, every=3)


@pytest.mark.parametrize("command", ["attribute", "edges", "paths", "evaluate"])
def test_every_command_that_takes_pairs(command: str, tmp_path: Path) -> None:
    more = {
        "paths": ["--senders", "a0.h0", "--receivers", "logits"],
        "evaluate": ["--circuit", "DIR/names.txt"],
    }
    (tmp_path / "names.txt").write_text("input->logits\n")
    kept.PAIRS_IDS.make(tmp_path)
    (tmp_path / "data.jsonl").write_bytes((tmp_path / "data.jsonl").read_bytes()[:-9])
    given = with_out(command, "--model", "tiny", "--pairs", "DIR/data.jsonl", *more.get(command, []))
    assert complaint(given(tmp_path), tmp_path) is None


@pytest.mark.parametrize(
    ("specimen", "circuit"),
    [
        (kept.GRAPH_JSON, "graph.json"),
        (kept.GRAPH_PT, "graph.pt"),
        (kept.CIRCUIT, "."),
        (kept.CIRCUIT_NAMES, "circuit.txt"),
        (kept.EDGES, "."),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_circuits(specimen: Specimen, circuit: str, tmp_path: Path) -> None:
    given = ["evaluate", "--model", "tiny", "--circuit", f"DIR/{circuit}", "--task", "ioi", "--top-n", "3"]
    try_all(specimen, with_out(*given), tmp_path, every=4)


@pytest.mark.parametrize(
    "specimen", [kept.EDGES, kept.SCORES, kept.MASK, *kept.JSON_RESULTS], ids=lambda value: value.name
)
def test_reports(specimen: Specimen, tmp_path: Path) -> None:
    """An `absent` header is a directory without results, which is refused too."""
    every = 7 if len(specimen.files) > 1 else 2
    try_all(specimen, lambda directory: ["report", str(directory)], tmp_path, every=every)


def test_manifests(tmp_path: Path) -> None:
    try_all(kept.MANIFEST, lambda directory: ["rerun", str(directory)], tmp_path)


# Runs that exist already.


def run_of_patch(directory: Path, **changed: Any) -> Path:
    """A finished `patch` on a file of pairs, without its results; `changed` replaces fields of the manifest."""
    kept.PAIRS_IDS.make(directory)
    options = {"model": "tiny", "pairs": directory / "data.jsonl", "nodes": "z", "n": 100, "group": 1}
    with open_run_dir(directory / "run", "patch", options):
        pass
    file = directory / "run" / "manifest.json"
    data = json.loads(file.read_text())
    for key, value in changed.items():
        data[key] = {**data[key], **value} if isinstance(value, dict) else value
    file.write_text(json.dumps(data))
    return directory / "run"


RERUN: dict[str, dict[str, Any]] = {
    "a command that there is not": {"command": "dance"},
    "a command that makes no run": {"command": "models"},
    "an empty command": {"command": ""},
    "another status": {"status": "paused"},
    "a status of a run in work": {"status": "running"},
    "another schema version": {"schema_version": 2},
    "a schema version that is a boolean": {"schema_version": True},
    "an option that there is not": {"options": {"colour": "blue"}},
    "text for a number in options": {"options": {"n": "many"}},
    "a number out of range in options": {"options": {"n": 0}},
    "a boolean for a number in options": {"options": {"n": True}},
    "a fraction for a whole number in options": {"options": {"group": 1.5}},
    "a list for a number in options": {"options": {"n": [100, 200]}},
    "an object for text in options": {"options": {"nodes": {"z": 1}}},
    "a list for text in options": {"options": {"nodes": ["z", "q"]}},
    "a number for text in options": {"options": {"nodes": 3}},
    "null for an option that must be": {"options": {"model": None}},
    "an option that looks like another": {"options": {"nodes": "--quiet"}},
    "an input that has gone": {"inputs": {"pairs": {"path": "/nowhere/pairs.jsonl", "sha256": "0"}}},
    "an input with another hash": {"inputs": {"pairs": {"path": __file__, "sha256": "0"}}},
    "an input whose path is too long": {"inputs": {"pairs": {"path": "p" * 5000, "sha256": "0"}}},
    "an input whose path has a zero byte": {"inputs": {"pairs": {"path": "a\0b", "sha256": "0"}}},
    "an input that is a directory": {"inputs": {"pairs": {"path": "/", "sha256": "0"}}},
    "an input of an option that there is not": {"inputs": {"paint": {"path": __file__, "sha256": "0"}}},
    "an input without a hash": {"inputs": {"pairs": {"path": __file__}}},
}
RESUME: dict[str, dict[str, Any]] = {
    "another command's run": {"command": "edges"},
    "other options": {"options": {"nodes": "q"}},
    "options of another type": {"options": {"n": "100"}},
    "an option more": {"options": {"colour": "blue"}},
    "other versions": {"versions": {"torch": "1.0"}},
    "inputs of another content": {"inputs": {"pairs": {"path": __file__, "sha256": "0"}}},
    "another schema": {"schema_version": 7},
}
NAMES = (*RERUN, *RESUME)


@pytest.mark.parametrize("name", RERUN)
def test_a_manifest_that_cannot_be_followed(name: str, tmp_path: Path) -> None:
    run = run_of_patch(tmp_path, **RERUN[name])
    assert complaint(["rerun", str(run), "--quiet"], tmp_path) is None


@pytest.mark.parametrize("name", RESUME)
def test_a_run_that_cannot_be_gone_on_with(name: str, tmp_path: Path) -> None:
    run = run_of_patch(tmp_path, **RESUME[name])
    given = ["patch", "--model", "tiny", "--pairs", str(tmp_path / "data.jsonl"), "--nodes", "z"]
    assert complaint([*given, "--out", str(run), "--resume"], tmp_path) is None


def test_a_damaged_manifest_is_not_resumed(tmp_path: Path) -> None:
    for damage in (*BINARY[::2], *TEXT[::2], *DOCUMENTS[::2]):
        work = tmp_path / "work"
        work.mkdir()
        file = run_of_patch(work) / "manifest.json"
        if not damage.harmless and damage.applies(file.read_bytes()):
            damage.do(file)
            given = [
                "patch",
                "--model",
                "tiny",
                "--pairs",
                str(work / "data.jsonl"),
                "--nodes",
                "z",
                "--resume",
            ]
            said = complaint([*given, "--out", str(work / "run")], work)
            assert said is None, f"{damage.name}: {said}"
        shutil.rmtree(work)


# As a person runs it.


@pytest.mark.parametrize("damage", [SAFETENSORS[2], BINARY[2]], ids=lambda damage: damage.name)
def test_damaged_weights_in_a_process_of_its_own(damage: Damage, tmp_path: Path) -> None:
    """What transformers writes to stderr by itself counts too."""
    kept.MODEL.make(tmp_path / "model")
    damage.do(tmp_path / "model" / "model.safetensors")
    kept.PAIRS_IDS.make(tmp_path)
    before = tree(tmp_path)
    given = ["patch", "--model", "model", "--pairs", "data.jsonl", "--out", "new/out"]
    done = subprocess.run([SCRIPT, *given], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("Error: ") and len(done.stderr.splitlines()) == 1
    assert tree(tmp_path) == before
