"""The README's remote section, command by command, and the flagship's script, on a real server."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from patchkit.results.manifest import read_manifest
from patchkit.results.mask import MaskResult
from patchkit.results.scores import Scores
from tests.remote.conftest import ROOT, Server

pytestmark = pytest.mark.remote

_SECONDS = 600
_BIN = Path(sys.executable).parent
_TITLE = "## On a model that stays where it is"


def environment(server: Server) -> dict[str, str]:
    return os.environ | {
        "NDIF_HOST": server.url,
        "NDIF_API_KEY": "canary-key",
        "PATH": f"{_BIN}:{os.environ['PATH']}",
    }


def section() -> str:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return text.partition(_TITLE)[2].partition("\n## ")[0]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", section(), re.DOTALL)


def keyless(*texts: str) -> None:
    assert "canary" not in "".join(texts)


def test_the_commands_of_the_readme(server: Server, tmp_path: Path) -> None:
    (block,) = blocks("bash")
    commands = [line for line in block.splitlines() if line.startswith("patchkit ")]
    assert len(commands) == 4
    for command in commands:
        words = shlex.split(command.replace("$NDIF_HOST", server.url), comments=True)
        ended = subprocess.run(
            words, cwd=tmp_path, env=environment(server), capture_output=True, text=True, timeout=_SECONDS
        )
        assert ended.returncode == 0, f"{command}\n{ended.stdout}{ended.stderr}"
        keyless(ended.stdout, ended.stderr)
    for name in ("patch", "edges"):
        run = tmp_path / "runs" / name
        manifest = read_manifest(run)
        assert manifest.status == "done" and (run / "report.html").exists()
        assert [each.host for each in manifest.hosted] == [server.url]
        keyless(*(path.read_text(errors="replace") for path in run.rglob("*") if path.is_file()))
    again = subprocess.run(
        ["patchkit", "rerun", "runs/patch", "--backend", "local"],
        cwd=tmp_path,
        env=environment(server),
        capture_output=True,
        text=True,
        timeout=_SECONDS,
    )
    assert again.returncode == 0, again.stdout + again.stderr


def test_the_python_of_the_readme(server: Server, tmp_path: Path) -> None:
    (block,) = blocks("python")
    code = block.replace("http://127.0.0.1:8001", server.url) + f"\nscores.save({str(tmp_path / 'out')!r})\n"
    ended = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment(server),
        capture_output=True,
        text=True,
        timeout=_SECONDS,
    )
    assert ended.returncode == 0, ended.stderr
    assert len(Scores.load(tmp_path / "out").pair_ids) == 100


def test_the_flagship_goes_on_after_the_laptop_slept(server: Server, tmp_path: Path) -> None:
    more = ["--model", "varbind-llama", "--samples", "18", "--iterations", "4"]
    remote = [sys.executable, str(ROOT / "scripts" / "remote_variable_binding.py"), *more]
    words = [*remote, "--out", str(tmp_path / "there"), "--job-seconds", "2"]
    process = subprocess.Popen(
        words, env=environment(server), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    sent = 0
    for line in process.stderr:
        sent += bool(re.match(r"job \S+: sent", line))
        if sent == 6:
            process.send_signal(signal.SIGINT)
            break
    rest = process.stderr.read()
    process.stdout.close()  # type: ignore[union-attr]
    process.stderr.close()
    assert process.wait(timeout=_SECONDS) == 130, rest
    assert "--resume" in rest
    again = subprocess.run(
        [*words, "--resume"], env=environment(server), capture_output=True, text=True, timeout=_SECONDS
    )
    assert again.returncode == 0, again.stderr
    keyless(rest, again.stdout, again.stderr)
    here = [sys.executable, str(ROOT / "scripts" / "reproduce_variable_binding.py"), *more]
    local = subprocess.run(
        [*here, "--out", str(tmp_path / "here")], capture_output=True, text=True, timeout=_SECONDS
    )
    assert local.returncode == 0, local.stderr
    found, expected = (MaskResult.load(tmp_path / name) for name in ("there", "here"))
    assert found.chosen == expected.chosen and found.joint == expected.joint
    assert all(
        float((found.values[name] - value).abs().max()) <= 1e-6 for name, value in expected.values.items()
    )
