"""What goes wrong with a real server ends in the right numbers, or in one line that says what to do."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nnsight
import pytest
import torch

from patchkit import tasks
from patchkit.data import Pair
from patchkit.errors import InputError, RunError
from patchkit.methods import NodeOptions, attribute, patch_nodes
from patchkit.model import PatchModel
from patchkit.runtime import Execution, load_hosted, use_execution
from patchkit.runtime.probe import run_alone
from patchkit.zoo.load import load
from tests.remote.conftest import MODELS, Server

pytestmark = pytest.mark.remote

NAME = "varbind-llama-gqa"
OPTIONS = NodeOptions(nodes=("z", "mlp_out"), max_batch_tokens=64)
KEY = "11111111-2222-3333-4444-555555555555"


@pytest.fixture(scope="module")
def here() -> PatchModel:
    return load(NAME)


@pytest.fixture(scope="module")
def pairs(here: PatchModel) -> list[Pair]:
    return list(tasks.pairs("variable-binding", here.tokenizer, 12, 0))


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory, server: Server) -> dict[str, Path]:
    """The model in directories of their own, each deployed in a way of its own."""
    found = {}
    for name, how in (("short", "timeout=2"), ("half", "dtype=bfloat16"), ("sandboxed", "sandbox")):
        found[name] = tmp_path_factory.mktemp("models") / name
        shutil.copytree(MODELS[1], found[name])
        server.deploy(f"{found[name]},{how}")
    return found


@pytest.fixture
def restarted(server: Server) -> Iterator[Server]:
    yield server
    server.restart_api()


def test_an_api_that_is_killed_in_the_middle_and_comes_back(
    here: PatchModel, pairs: list[Pair], server: Server, tmp_path: Path
) -> None:
    there = load_hosted(NAME, server.url)
    reached = threading.Event()

    def interrupt() -> None:
        assert reached.wait(120)
        server.kill_api()
        time.sleep(3)
        server.restart_api()

    helper = threading.Thread(target=interrupt)
    helper.start()

    def progress(label: str, done: int, total: int) -> None:
        if done and not reached.is_set():
            assert done < total
            reached.set()
            # So that the next jobs meet the API's end.
            time.sleep(1)

    try:
        with use_execution(Execution(patience=240.0)):
            found = patch_nodes(there, pairs, OPTIONS, progress=progress)
    finally:
        reached.set()
        helper.join()
    assert torch.equal(found.effects.nan_to_num(), patch_nodes(here, pairs, OPTIONS).effects.nan_to_num())


def test_a_host_that_stays_away_ends_the_run_which_goes_on_later(
    here: PatchModel, pairs: list[Pair], restarted: Server, tmp_path: Path
) -> None:
    there = load_hosted(NAME, restarted.url)
    finished: list[int] = []

    def progress(label: str, done: int, total: int) -> None:
        finished.append(done)
        if len(finished) == 2:
            restarted.kill_api()

    with use_execution(Execution(patience=2.0)):
        with pytest.raises(RunError, match=r"could not be reached for .* go on with --resume"):
            patch_nodes(there, pairs, OPTIONS, checkpoint=tmp_path, progress=progress)
    restarted.restart_api()
    execution = Execution()
    with use_execution(execution):
        found = patch_nodes(there, pairs, OPTIONS, checkpoint=tmp_path)
    assert torch.equal(found.effects.nan_to_num(), patch_nodes(here, pairs, OPTIONS).effects.nan_to_num())
    again = execution.hosts[restarted.url].traffic.jobs
    with use_execution(Execution()) as whole:
        patch_nodes(there, pairs, OPTIONS)
    assert again < whole.hosts[restarted.url].traffic.jobs


def test_a_job_over_its_time_limit_is_halved(
    here: PatchModel, pairs: list[Pair], server: Server, copies: dict[str, Path]
) -> None:
    there = load_hosted(copies["short"], server.url)
    # Every neuron at every position, of all pairs at once: far more than two seconds.
    options = NodeOptions(nodes=("neuron",), layers=(0, 1, 2, 3), max_batch_tokens=1 << 14)
    few = pairs[:8]
    execution = Execution()
    with use_execution(execution):
        found = patch_nodes(there, few, options)
    expected = patch_nodes(here, few, options)
    assert execution.hosts[server.url].traffic.jobs > 1
    gap = (found.effects - expected.effects).nan_to_num().abs().max()
    # Other batches round otherwise: an effect is the difference of two metrics of this size.
    assert gap <= 1e-6 * expected.base_metric.abs().max()


def test_a_model_that_is_not_deployed(server: Server, tmp_path: Path) -> None:
    shutil.copytree(MODELS[1], tmp_path / "elsewhere")
    with pytest.raises(RunError, match=r"Could not deploy this model|not deployed") as caught:
        load_hosted(tmp_path / "elsewhere", server.url)
    assert "\n" not in str(caught.value)


def test_keys(restarted: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    # With accounts, in a database that is not there: what is no key is refused before it is asked.
    restarted.restart_api(NDIF_POSTGRES_URL="postgresql://127.0.0.1:9/none")
    monkeypatch.setattr(nnsight.CONFIG.API, "APIKEY", None)
    with pytest.raises(InputError, match=r"refuses the key \(HTTP 401.*NDIF_API_KEY.*none is set"):
        load_hosted(NAME, restarted.url)
    monkeypatch.setattr(nnsight.CONFIG.API, "APIKEY", "canary-key-of-the-user")
    with (
        caplog.at_level(0, "patchkit.host"),
        pytest.raises(InputError, match=r"\[key\].*one is set") as caught,
    ):
        load_hosted(NAME, restarted.url)
    assert "canary" not in str(caught.value) + caplog.text


def test_a_server_that_wants_another_version(restarted: Server) -> None:
    restarted.restart_api(NDIF_MIN_NNSIGHT_VERSION="99.0")
    with pytest.raises(InputError, match=r"refuses the request \(HTTP 400.*below the minimum supported 99"):
        load_hosted(NAME, restarted.url)


def large(model: PatchModel, given: torch.Tensor) -> dict[str, Any]:
    """Job: gives back what it was given."""
    return {"same": given + 0.0}


def test_payloads_and_results_above_the_inline_limit(server: Server) -> None:
    nnsight.register("tests")
    there = load_hosted(NAME, server.url)
    # 20 MB that do not compress; the server's own limit is 8 MiB.
    given = torch.rand(5_000_000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(run_alone(there, large, given)["same"], given)


def test_bfloat16_there_is_bfloat16_here(pairs: list[Pair], server: Server, copies: dict[str, Path]) -> None:
    there = load_hosted(copies["half"], server.url)
    here = load(copies["half"], dtype="bfloat16")
    assert there.dtype == torch.bfloat16 and there.content_key() == here.content_key()
    found, expected = (attribute(model, pairs[:3], OPTIONS, "atp-star") for model in (there, here))
    assert torch.equal(found.effects.nan_to_num(), expected.effects.nan_to_num())
    with pytest.raises(InputError, match=r"deployed in bfloat16, expected float32.*leave --dtype out"):
        load_hosted(copies["half"], server.url, dtype="float32")


def test_eager_attention_is_asked_for_and_checked(pairs: list[Pair], server: Server) -> None:
    there = load_hosted(NAME, server.url, attn_implementation="eager")
    assert there.hosted is not None and there.hosted.facts["attn_implementation"] == "eager"
    here = load(NAME, attn_implementation="eager")
    found, expected = (attribute(model, pairs[:3], OPTIONS, "atp-star") for model in (there, here))
    assert torch.equal(found.effects.nan_to_num(), expected.effects.nan_to_num())


def test_a_sandbox_patches_and_says_that_it_takes_no_gradients(
    here: PatchModel, pairs: list[Pair], server: Server, copies: dict[str, Path]
) -> None:
    there = load_hosted(copies["sandboxed"], server.url)
    assert there.hosted is not None and not there.hosted.gradients
    options = NodeOptions(nodes=("z",))
    found, expected = (patch_nodes(model, pairs[:3], options) for model in (there, here))
    gap = (found.effects - expected.effects).nan_to_num().abs().max()
    assert gap <= 1e-6 * expected.effects.nan_to_num().abs().max()
    with pytest.raises(InputError, match=r"takes gradients, and http.*gives none.*exact activation patching"):
        attribute(there, pairs[:3], options, "atp")
