"""`doctor` against a server of its own that behaves well, badly, or not at all."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path

import pytest
from typer.testing import CliRunner

from patchkit import zoo
from patchkit.cli import app, checks
from patchkit.cli.checks import Check, Status, local_checks
from patchkit.cli.host_checks import host_checks
from patchkit.errors import InputError

GOOD_ENV = {
    "python_version": sys.version,
    "packages": {name: version(name) for name in ("nnsight", "torch", "transformers")},
}
RUNNING = {"repo_id": "org/small", "application_state": "RUNNING"}


class Server(ThreadingHTTPServer):
    """Answers from `answers`: path -> (status, body); a status of 0 waits until the test is over."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: dict[str, tuple[int, str]] = {
            "/ping": (200, "pong"),
            "/connected": (200, "{}"),
            "/env": (200, json.dumps(GOOD_ENV)),
            "/whoami": (200, json.dumps({"email": None, "tags": []})),
            "/status": (200, json.dumps({"deployments": {"a": RUNNING}})),
        }
        self.over = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        status, body = self.server.answers.get(self.path, (404, ""))
        if status == 0:
            self.server.over.wait(30)
            return
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing on stderr, where the test looks."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.delenv("NDIF_API_KEY", raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server() as made:
        thread = threading.Thread(target=made.serve_forever, args=(0.05,))
        thread.start()
        yield made
        made.over.set()
        made.shutdown()
        thread.join()


def by_name(found: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in found}


def test_a_good_server_passes(server: Server) -> None:
    found = host_checks(server.url + "/")
    assert [check.status for check in found] == ["ok"] * 6
    assert by_name(found)["models up"].found == "org/small"
    assert f"nnsight {version('nnsight')}" in by_name(found)["host packages"].found


def test_a_key_is_reported_and_never_shown(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "not set" in by_name(host_checks(server.url))["host key"].found
    monkeypatch.setenv("NDIF_API_KEY", "s3cr3t")
    result = CliRunner().invoke(app, ["doctor", "--host", server.url])
    assert "NDIF_API_KEY is set" in result.output and "s3cr3t" not in result.output
    assert "does not know it" in by_name(host_checks(server.url))["host key"].found
    server.answers["/whoami"] = (200, json.dumps({"email": "me@here", "tags": []}))
    assert by_name(host_checks(server.url))["host key"].found == "NDIF_API_KEY is set, and the host knows it"


def test_a_python_of_another_version_fails(server: Server) -> None:
    server.answers["/env"] = (200, json.dumps({**GOOD_ENV, "python_version": "3.9.1 (main)"}))
    check = by_name(host_checks(server.url))["host Python"]
    assert (
        check.status == "failed"
        and check.found.startswith("3.9.1; here 3.")
        and "Python 3.9 here" in check.todo
    )


@pytest.mark.parametrize("body", ["[]", "{}", "<html>", json.dumps({"deployments": {}})])
def test_a_host_that_lists_no_model_may_have_some(server: Server, body: str) -> None:
    server.answers["/status"] = (200, body)
    check = by_name(host_checks(server.url))["models up"]
    assert check.status == "warning" and "--model NAME" in check.todo


def test_a_model_is_asked_for_on_a_host_only() -> None:
    result = CliRunner().invoke(app, ["doctor", "--model", "varbind-llama"])
    assert result.exit_code == 2 and "belongs to --host URL" in result.stderr


def test_another_nnsight_is_named_with_the_fix(server: Server) -> None:
    packages = {name: version(name) for name in ("torch", "transformers")} | {"nnsight": "0.7.0"}
    server.answers["/env"] = (200, json.dumps({"packages": packages}))
    check = by_name(host_checks(server.url))["host packages"]
    assert check.status == "warning" and check.todo == "To match it here: pip install nnsight==0.7.0"


def test_the_build_of_torch_does_not_matter(server: Server) -> None:
    packages = {"nnsight": version("nnsight"), "torch": version("torch").split("+")[0] + "+cu130"}
    server.answers["/env"] = (200, json.dumps({"packages": packages}))
    assert by_name(host_checks(server.url))["host packages"].status == "ok"


@pytest.mark.parametrize("body", ["<html>", "[]", "{}", '{"packages": {}}'])
def test_an_environment_that_says_nothing_is_a_warning(server: Server, body: str) -> None:
    server.answers["/env"] = (200, body)
    found = host_checks(server.url)[-1]
    assert found.name in ("host packages", "host versions")
    assert found.status == "warning" and "operator" in found.todo


def test_a_server_without_workers_fails(server: Server) -> None:
    server.answers["/connected"] = (503, "")
    check = by_name(host_checks(server.url))["host workers"]
    assert check.status == "failed" and "503" in check.found and "Wait" in check.todo


def test_something_else_at_the_address_fails(server: Server) -> None:
    del server.answers["/ping"]
    (check,) = host_checks(server.url)
    assert check.status == "failed" and "404" in check.found and "Something else" in check.todo


def test_a_server_that_never_answers_fails_in_time(server: Server) -> None:
    server.answers["/ping"] = (0, "")
    (check,) = host_checks(server.url, timeout=0.2)
    assert check.status == "failed" and "timed out" in check.found and "firewall" in check.todo


def test_no_server_at_all_fails_with_the_fix(server: Server) -> None:
    url = server.url
    server.server_close()
    (check,) = host_checks(url)
    assert check.status == "failed" and url in check.found and "--backend local" in check.todo


@pytest.mark.parametrize("host", ["127.0.0.1:8001", "ftp://x", "http://", "api.ndif.us"])
def test_an_address_that_is_no_url_is_bad_input(host: str) -> None:
    with pytest.raises(InputError, match="expected a URL"):
        host_checks(host)


def test_everything_here_passes() -> None:
    found = local_checks()
    assert [check for check in found if check.status == "failed"] == []
    names = {check.name for check in found}
    assert {"Python", "nnsight", "torch", "device", "this directory", *zoo.names()} <= names


@pytest.mark.parametrize(
    ("gpus", "cores", "advice"),
    [
        (8, 16, "--num-processes 8"),
        (1, 16, ""),
        (0, 1, ""),
        (0, 2, "--num-processes 2"),
        (0, 64, "--num-processes 8"),
    ],
)
def test_processes_are_advised_by_what_is_there(
    gpus: int, cores: int, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks.torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(checks, "_cores", lambda: cores)
    check = checks._processes()
    assert check.status == "ok" and version("accelerate") in check.found
    assert (advice in check.todo) if advice else check.todo == ""


def test_processes_that_cannot_meet_are_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*arguments: object, **options: object) -> object:
        raise RuntimeError("The client socket has failed to connect to 127.0.0.1\n[stack]")

    monkeypatch.setattr(checks.dist, "TCPStore", refused)
    check = checks._processes()
    assert check.status == "warning" and check.found.endswith("failed to connect to 127.0.0.1")
    assert "127.0.0.1" in check.todo


@pytest.mark.parametrize(("installed", "words"), [("0.7.9", "0.7.9"), (None, "not installed")])
def test_a_package_out_of_range_or_absent_is_named(
    monkeypatch: pytest.MonkeyPatch, installed: str | None, words: str
) -> None:
    def pretended(name: str) -> str:
        if name != "nnsight":
            return version(name)
        if installed is None:
            raise checks.PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(checks, "version", pretended)
    check = by_name(checks._packages())["nnsight"]
    assert (check.status, check.found) == ("failed", words)
    assert check.todo.startswith("pip install 'nnsight") and "0.8.1" in check.todo


def test_damaged_weights_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(name: str) -> object:
        raise OSError("file ends too early")

    monkeypatch.setattr(checks.zoo, "build", damaged)
    found = checks._models()
    assert found and all(check.status == "failed" and "Reinstall" in check.todo for check in found)


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(dir: Path) -> object:
        raise PermissionError(13, "Permission denied")

    assert checks._writable("here", tmp_path / "not" / "yet").status == "ok"
    monkeypatch.setattr(checks.tempfile, "TemporaryFile", refuse)
    check = checks._writable("here", tmp_path)
    assert check.status == "failed" and str(tmp_path) in check.found and "Permission denied" in check.found


def test_the_exit_status_follows_the_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    ends: list[tuple[Status, int]] = [("ok", 0), ("warning", 0), ("failed", 1)]
    for status, code in ends:
        monkeypatch.setattr(
            checks, "local_checks", lambda status=status: [Check("disk", status, "x [y]", "do")]
        )
        result = CliRunner().invoke(app, ["doctor"])
        assert result.exit_code == code and "x [y]" in result.stdout
