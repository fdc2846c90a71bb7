"""Commands with `--backend ndif`, against a host in a process of its own: the same numbers, and what is kept and said."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from patchkit import zoo
from patchkit.results.compare import compare_runs
from patchkit.results.manifest import read_manifest
from tests.hosts import StandIn, stand_in
from tests.plain_commands import Commands, Ended, plain_commands, plain_environment

#: Processes of their own, and minutes.
pytestmark = pytest.mark.slow

MODEL = "varbind-llama"
CANARY = "canary-5f2c-key"
DATA = ("--model", MODEL, "--task", "variable-binding", "--n", "12")
#: Batches of so few tokens that there are several.
SMALL = ("--max-batch-tokens", "128")
PROBES = 3


@pytest.fixture(scope="module")
def host() -> Iterator[StandIn]:
    directory = zoo.find(MODEL)
    assert directory is not None
    with stand_in(directory) as made:
        yield made


@pytest.fixture(scope="module")
def command() -> Iterator[Commands]:
    with plain_commands(NDIF_API_KEY=CANARY) as made:
        yield made


@pytest.fixture(scope="module")
def circuit(command: Commands, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scores of edges, of a local run."""
    out = tmp_path_factory.mktemp("circuit") / "run"
    command.well("edges", *DATA, "--method", "eap", "--out", out)
    return out


def on(host: StandIn, *more: str) -> tuple[str, ...]:
    return ("--backend", "ndif", "--host", host.url, *more)


def without_key(*places: Path | Ended) -> None:
    """Nowhere in files, whole directories, or on the screen."""
    for place in places:
        if isinstance(place, Ended):
            assert CANARY not in place.stdout + place.stderr
            continue
        files = [file for file in place.rglob("*") if file.is_file()]
        assert files
        for file in files:
            assert CANARY.encode() not in file.read_bytes(), file


KINDS = {
    "patch": ("patch", "--nodes", "q,z,mlp_out"),
    "attribute": ("attribute", "--method", "atp-star", "--verify", "3"),
    "edges": ("edges", "--method", "eap-ig-inputs"),
    "exact": ("edges", "--method", "exact"),
    "paths": ("paths",),
    "evaluate": ("evaluate", "--top-n", "20,60", "--circuit"),
}


def words_of(kind: str, circuit: Path) -> tuple[object, ...]:
    name, *own = KINDS[kind]
    return (name, *DATA, *SMALL, *own, *([circuit] if kind == "evaluate" else []))


@pytest.mark.parametrize("kind", KINDS)
def test_a_plan_knows_the_jobs_and_the_bytes_and_the_numbers_are_those_of_a_local_run(
    kind: str, host: StandIn, command: Commands, circuit: Path, tmp_path: Path
) -> None:
    words = words_of(kind, circuit)
    # Of a model that has no weights here, at a place where no host is.
    shape = tmp_path / "shape"
    directory = zoo.find(MODEL)
    assert directory is not None
    shutil.copytree(directory, shape, ignore=shutil.ignore_patterns("*.safetensors"))
    weightless = [shape if word == MODEL else word for word in words]
    plan = command.well("plan", *weightless, "--backend", "ndif", "--host", "http://127.0.0.1:9").stdout
    jobs, sent, back = wire(plan)
    before = host.seen()
    command.well(*words, *on(host), "--out", tmp_path / "there")
    manifest = read_manifest(tmp_path / "there")
    traffic = manifest.traffic
    assert traffic is not None and traffic.jobs == host.seen()["request"] - before.get("request", 0)
    assert traffic.jobs == jobs > PROBES + 1
    assert sent == pytest.approx(traffic.sent, rel=0.25)
    assert sent + back == pytest.approx(traffic.sent + traffic.received, rel=0.25)
    assert 0.75 * traffic.received < back < 1.5 * traffic.received
    # The same again, here.
    command.well("rerun", tmp_path / "there", "--out", tmp_path / "here")
    assert max(compare_runs(tmp_path / "there", tmp_path / "here").values()) < 1e-5
    without_key(tmp_path)


def wire(plan: str) -> tuple[int, float, float]:
    """(jobs, bytes out, bytes back) of a printed plan."""
    found = re.search(
        r"over the wire\s+(\d+) jobs.*; ([\d.]+) (\w+) go out.*, ([\d.]+) (\w+) come back", plan
    )
    assert found is not None, plan
    unit = {"B": 1.0, "kB": 1e3, "MB": 1e6}
    sent, back = float(found[2]) * unit[found[3]], float(found[4]) * unit[found[5]]
    return int(found[1]), sent, back


def test_a_run_keeps_where_it_ran_and_a_log_but_no_key(
    host: StandIn, command: Commands, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    ended = command.well("patch", *DATA, *on(host, "--remote-concurrency", "3"), "--out", out)
    manifest = read_manifest(out)
    (model,) = manifest.hosted
    assert (manifest.options["backend"], model.host) == ("ndif", host.url) and MODEL in model.key
    assert model.facts["dtype"] == "float32" and model.facts["versions"]["python"]
    assert manifest.traffic is not None and manifest.traffic.jobs == PROBES + 1
    log = (out / "host.log").read_text()
    assert log.count(": sent, ") == log.count("bytes back") == PROBES + 1
    without_key(out, ended)


def test_a_job_that_fails_is_one_line_and_its_traceback_is_in_the_log(
    host: StandIn, command: Commands, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    host.fault("break", 1, after=PROBES)
    ended = command("patch", *DATA, *on(host), "--out", out)
    assert ended.exit_code == 1 and "the hosted module broke" in ended.stderr
    assert str(out / "host.log") in ended.stderr and "Traceback ...\n" not in ended.stderr
    assert "Traceback ...\nRuntimeError: the hosted module broke" in (out / "host.log").read_text()
    assert read_manifest(out).status == "failed" and read_manifest(out).traffic is not None
    ended = command.well("patch", *DATA, *on(host), "--out", out, "--resume")
    manifest = read_manifest(out)
    assert manifest.traffic is not None and manifest.traffic.jobs == 2 * (PROBES + 1), "of both attempts"
    without_key(out, ended)


def test_a_refused_key_is_bad_input_that_leaves_the_place_free(
    host: StandIn, command: Commands, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    host.fault("refuse-key", 1, after=1)
    ended = command("patch", *DATA, *on(host), "--out", out)
    assert ended.exit_code == 2 and "refuses the key" in ended.stderr and "'[key]'" in ended.stderr
    assert [file.name for file in out.iterdir()] == ["host.log"], "of the job before"
    without_key(out, ended)
    command.well("patch", *DATA, *on(host), "--out", out)


def test_a_host_that_is_away_is_asked_again_and_then_given_up(
    host: StandIn, command: Commands, tmp_path: Path
) -> None:
    host.fault("unavailable", 1)
    ended = command.well("patch", *DATA, *on(host), "--out", tmp_path / "back")
    assert ended.stderr.count("tried again") == 1 and "HTTP 503" in ended.stderr
    nowhere = ("--backend", "ndif", "--host", "http://127.0.0.1:9", "--patience", "0.2")
    ended = command("patch", *DATA, *nowhere, "--out", tmp_path / "away")
    assert ended.exit_code == 1 and "could not be reached" in ended.stderr and "--resume" in ended.stderr


def test_ctrl_c_ends_at_once_and_resume_takes_the_job_up(host: StandIn, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = [sys.executable, "-m", "patchkit", "patch", *DATA, *on(host), "--out", str(out)]
    host.fault("stall", 1, after=PROBES)
    environment = plain_environment() | {"NDIF_API_KEY": CANARY, "PATH": "/usr/bin:/bin"}
    process = subprocess.Popen(
        words, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 120
    while not list(out.glob("journal/**/jobs/*.json")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert time.monotonic() - began < 30 and "batch in hand" not in stderr and stdout == ""
    assert "1 job that was sent runs on at the host" in stderr and "--resume" in stderr
    assert read_manifest(out).status == "interrupted"
    host.go_on()
    before = host.seen()["request"]
    again = subprocess.run([*words, "--resume"], env=environment, text=True, capture_output=True, timeout=120)
    assert again.returncode == 0, again.stderr
    assert host.seen()["request"] - before == PROBES, "the job itself is not sent again"
    assert "taken up again" in (out / "host.log").read_text()
    without_key(out)


def test_the_doctor_asks_a_host_for_a_model(host: StandIn, command: Commands) -> None:
    ended = command.well("doctor", "--host", host.url, "--model", MODEL)
    for name in ("models up", "host Python", "host packages", "model there", "gradients there", "round trip"):
        assert re.search(rf"ok +{name} ", ended.stdout), ended.stdout
    assert "median of 3" in ended.stdout
    without_key(ended)
    host.fault("break", 1, after=2)
    ended = command.well("doctor", "--host", host.url, "--model", MODEL)
    assert re.search(r"warning +gradients there ", ended.stdout) and "acdc" in ended.stdout
