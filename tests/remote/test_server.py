"""The server itself, without patchkit: what is on it, that it answers as nnsight does here, that it comes and goes."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nnsight
import pytest
import torch
from nnsight.modeling import huggingface
from nnsight.modeling.transformers import TransformersModel
from transformers import AutoTokenizer

from tests.remote.conftest import MODELS, Server
from tests.remote.server import control, processes

pytestmark = pytest.mark.remote

TOKENS = torch.tensor([[1, 5, 9, 13, 2, 7]])


@pytest.fixture
def at_server(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """nnsight's `remote=True` goes to our server, without a word on the terminal."""
    monkeypatch.setattr(nnsight.CONFIG.API, "HOST", server.url)
    monkeypatch.setattr(nnsight.CONFIG.APP, "REMOTE_LOGGING", False)
    yield server


def load(folder: Path, **options: Any) -> TransformersModel:
    # The Hub is not asked about a directory of this machine's.
    huggingface._ID_CACHE[str(folder)] = str(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return TransformersModel(str(folder), task="text-generation", tokenizer=tokenizer, **options)


def logits(model: TransformersModel, remote: bool) -> torch.Tensor:
    with model.trace(TOKENS, remote=remote):
        found = model.lm_head.output.save()
    return found.detach()


def gradient(model: TransformersModel, remote: bool) -> torch.Tensor:
    """Of the last logits' sum, by the first layer's output; the parameters of a hosted model do not ask for one."""
    with model.trace(TOKENS, remote=remote):
        model.model.embed_tokens.output.requires_grad_(True)
        hidden = model.model.layers[0].output
        total = model.lm_head.output[0, -1].sum()
        with total.backward():
            found = hidden.grad.save()
    return found


def test_the_server_does_not_have_patchkit(server: Server) -> None:
    asked = subprocess.run(
        [
            server.python,
            "-c",
            "import importlib.util as u; print(u.find_spec('ndif'), u.find_spec('patchkit'))",
        ],
        cwd=server.state,
        capture_output=True,
        text=True,
        check=True,
    )
    ndif, patchkit = asked.stdout.rsplit(" ", 1)
    assert ndif.startswith("ModuleSpec") and patchkit.strip() == "None"


@pytest.mark.parametrize("folder", MODELS, ids=lambda folder: folder.name)
@pytest.mark.parametrize("asked", [logits, gradient])
def test_it_answers_as_the_model_does_here(at_server: Server, folder: Path, asked: Any) -> None:
    here = asked(load(folder, dispatch=True, dtype=torch.float32), remote=False)
    assert here.abs().max() > 0
    assert torch.equal(asked(load(folder), remote=True), here)


def test_the_api_comes_back(at_server: Server) -> None:
    model = load(MODELS[0])
    before = logits(model, remote=True)
    at_server.kill_api()
    with pytest.raises(Exception, match="(?i)connect|refused"):
        logits(model, remote=True)
    at_server.restart_api()
    assert torch.equal(logits(model, remote=True), before)


def test_nothing_listens_beyond_this_machine(server: Server) -> None:
    listening = {
        connection.laddr.ip
        for record in server.processes().values()
        for process in processes.session(record)
        for connection in process.net_connections("inet")
        if connection.status == "LISTEN"
    }
    assert listening and listening <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


def test_what_a_session_started_ends_with_it(tmp_path: Path) -> None:
    """The rule by which `down` ends the server, on a program whose child outlives it."""
    script = tmp_path / "parent.py"
    script.write_text(
        "import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])"
    )
    record = processes.start(
        ["python3", str(script)], {"PATH": "/usr/bin:/bin:/usr/local/bin"}, tmp_path / "log", tmp_path
    )
    while processes.alive(record):
        time.sleep(0.05)
    assert len(processes.session(record)) == 1
    processes.stop([record])
    assert processes.session(record) == []


@pytest.mark.parametrize("text", ["nowhere", f"{MODELS[0]},speed=3"])
def test_a_deployment_that_makes_no_sense_is_refused(text: str) -> None:
    with pytest.raises(control.ServerError, match="no model directory|none of dtype"):
        control.deployment(text)
