"""Batches as jobs: what is sent again, what is halved, what ends a run. The host is faked; see `test_hosted.py` for one
that is none."""

from __future__ import annotations

import io
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import zstandard
from torch import Tensor

from patchkit.errors import InputError, RunError
from patchkit.model import PatchModel
from patchkit.model.patch_model import Hosted
from patchkit.runtime import Cost, Execution, ItemsFailed, Journal, hosted, run_program, use_execution
from patchkit.runtime.host import Answer, Host, hide
from patchkit.runtime.job_notes import JobNotes

URL = "http://127.0.0.1:9"


@dataclass(frozen=True)
class Doubled:
    """Items are numbers, as long as they are large."""

    backward: bool = False

    def tokens(self, item: int) -> int:
        return item

    def cost(self, dims: Any, items: Any) -> Cost:
        return Cost()

    def run(self, model: Any, items: Any) -> dict[str, Tensor]:
        return {"twice": torch.tensor([2.0 * item for item in items])}


@dataclass(frozen=True)
class Added:
    """The sum alone."""

    @property
    def summed(self) -> frozenset[str]:
        return frozenset({"sum"})

    def tokens(self, item: int) -> int:
        return item

    def cost(self, dims: Any, items: Any) -> Cost:
        return Cost()

    def run(self, model: Any, items: Any) -> dict[str, Tensor]:
        return {"sum": torch.tensor(float(sum(items)))}


class FakeModel(PatchModel):
    """As much of a model as the runner asks for."""

    def __init__(self) -> None:
        self.name = "elsewhere"
        self.hosted = Hosted(URL, "key", {}, {"gradients": True})
        self.opening = None
        self.lazy = False

    def content_key(self) -> str:
        return "content"


@dataclass
class FakeHost(Host):
    """Runs jobs where they are sent, unless `goes` says what becomes of the job with these items instead."""

    goes: Callable[[list[int], int], Answer | str | None] = lambda items, attempt: None
    sent: list[list[int]] = field(default_factory=list)
    slow: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.jobs: dict[str, tuple[Any, int]] = {}
        self.looks = 0

    def send(self, model_key: str, env: dict[str, Any], blob: Any) -> str:
        opener, step, items = blob
        self.sent.append(list(items))
        job = f"job{len(self.sent)}"
        self.jobs[job] = ((step, list(items)), self.sent.count(list(items)))
        return job

    def look(self, job: str) -> Answer | None:
        self.looks += 1
        if self.looks <= self.slow:
            return Answer("RUNNING")
        if job not in self.jobs:
            return None
        (step, items), attempt = self.jobs[job]
        said = self.goes(items, attempt)
        if said == "unknown":
            return None
        if isinstance(said, Answer):
            return said
        buffer = io.BytesIO()
        torch.save({"found": step.run(None, items)}, buffer)
        return Answer("COMPLETED", result=zstandard.ZstdCompressor().compress(buffer.getvalue()))

    def wait(self, seconds: float) -> None:
        """Nothing is waited for here."""


@pytest.fixture(autouse=True)
def unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosted, "pack_job", lambda model, work, opener, step, items: (opener, step, items))
    monkeypatch.setattr("patchkit.runtime.host.LOST_SECONDS", 0.0)


def run(
    host: FakeHost, items: list[int], program: Any = None, journal: Journal | None = None, **options: Any
) -> dict[str, Tensor]:
    execution = Execution(hosts={URL: host}, **options)
    with use_execution(execution):
        return run_program(program or Doubled(), FakeModel(), items, max_batch_tokens=20, journal=journal)


ITEMS = [3, 9, 4, 4, 10, 2, 7]


def test_numbers_come_back_in_the_order_of_the_items() -> None:
    for concurrency in (1, 2, 5):
        host = FakeHost(URL, slow=4)
        found = run(host, ITEMS, remote_concurrency=concurrency)
        assert found["twice"].tolist() == [2.0 * item for item in ITEMS]
        assert sorted(sum(host.sent, [])) == sorted(ITEMS)


def test_sums_are_added_up() -> None:
    assert float(run(FakeHost(URL), ITEMS, Added())["sum"]) == sum(ITEMS)


@pytest.mark.parametrize(
    "said",
    [
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB",
        "Your job exceeded the execution timeout of 20.0s.",
    ],
)
def test_what_is_too_large_there_is_halved(said: str) -> None:
    def goes(items: list[int], attempt: int) -> Answer | None:
        return Answer("ERROR", error=said) if len(items) > 1 else None

    host = FakeHost(URL, goes=goes)
    assert run(host, ITEMS)["twice"].tolist() == [2.0 * item for item in ITEMS]
    assert all(len(each) == 1 for each in host.sent[-3:])
    # Once it is known how much is too much, no batch of that size is sent.
    widths = [len(each) * max(each) for each in host.sent]
    assert sum(len(each) > 1 for each in host.sent) < len(ITEMS), widths


def test_an_item_that_is_too_large_alone_fails_and_the_rest_goes_on(tmp_path: Path) -> None:
    def goes(items: list[int], attempt: int) -> Answer | None:
        return Answer("ERROR", error="RuntimeError: CUDA error: out of memory") if 10 in items else None

    journal = Journal(tmp_path)
    with pytest.raises(ItemsFailed, match="the host ran out of memory with this item alone"):
        run(FakeHost(URL, goes=goes), ITEMS, journal=journal)
    host = FakeHost(URL)
    run(host, ITEMS, journal=Journal(tmp_path))
    assert host.sent == [[10]]


def test_an_error_there_names_the_items_and_is_one_line(tmp_path: Path) -> None:
    said = "Traceback (most recent call last):\n  File x\nValueError: no such site"
    with pytest.raises(
        RunError, match=r"failed on http://127.0.0.1:9, with .*: ValueError: no such site"
    ) as caught:
        run(FakeHost(URL, goes=lambda items, attempt: Answer("ERROR", error=said)), ITEMS)
    assert "Traceback" not in str(caught.value)
    with pytest.raises(RunError):
        run(
            FakeHost(URL, goes=lambda items, attempt: Answer("ERROR", error=said)),
            ITEMS,
            journal=Journal(tmp_path),
        )
    # A job that failed is not taken up again.
    run(FakeHost(URL), ITEMS, journal=Journal(tmp_path))


@pytest.mark.parametrize("fault", ["unknown", "cancelled"])
def test_a_job_that_is_lost_or_cancelled_is_sent_again(fault: str) -> None:
    cancelled = Answer("ERROR", error="Your job was cancelled or preempted by the server.")

    def once(items: list[int], attempt: int) -> Answer | str | None:
        return ("unknown" if fault == "unknown" else cancelled) if attempt == 1 else None

    host = FakeHost(URL, goes=once)
    assert run(host, ITEMS)["twice"].tolist() == [2.0 * item for item in ITEMS]
    with pytest.raises(RunError, match=r"3 times now.*--resume"):
        run(FakeHost(URL, goes=lambda items, attempt: once(items, 1)), ITEMS)


def test_a_job_that_its_host_forgot_while_it_was_away_is_sent_again() -> None:
    def goes(items: list[int], attempt: int) -> Answer | None:
        host.back = time.monotonic() if attempt == 1 else host.back
        # What a queue says of a job that died with it, for ever.
        return Answer("DISPATCHED") if attempt == 1 else None

    host = FakeHost(URL, goes=goes)
    assert run(host, ITEMS)["twice"].tolist() == [2.0 * item for item in ITEMS]
    assert len(host.sent) == 2 * len({tuple(each) for each in host.sent})


def test_a_job_that_never_ends_ends_the_run() -> None:
    with pytest.raises(RunError, match=r"longer than --job-timeout allows"):
        run(FakeHost(URL, goes=lambda items, attempt: Answer("RUNNING")), ITEMS, job_timeout=0.0)


def test_jobs_under_way_are_taken_up_again(tmp_path: Path) -> None:
    host = FakeHost(URL, slow=3)

    def stop() -> None:
        raise KeyboardInterrupt

    host.wait = lambda seconds: stop()  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        run(host, ITEMS, journal=Journal(tmp_path), remote_concurrency=3)
    first = list(host.sent)
    assert len(first) == 3 and len(list((tmp_path / "jobs").iterdir())) == 3
    # The host has finished them in the meantime; the client is another process.
    host.wait = lambda seconds: None  # type: ignore[method-assign]
    found = run(host, ITEMS, journal=Journal(tmp_path), remote_concurrency=3)
    assert found["twice"].tolist() == [2.0 * item for item in ITEMS]
    assert all(host.sent.count(each) == 1 for each in first)
    assert not list((tmp_path / "jobs").iterdir())


def test_jobs_of_another_host_are_not_asked_for(tmp_path: Path) -> None:
    JobNotes(tmp_path, "http://other").add("abc", ["k"])
    assert JobNotes(tmp_path, URL).take(["k"]) is None
    assert JobNotes(tmp_path, "http://other").take(["k"]) == "abc"


def test_a_damaged_note_is_named(tmp_path: Path) -> None:
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "abc.json").write_text("{")
    with pytest.raises(InputError, match=r"abc\.json: expected the note of a job"):
        JobNotes(tmp_path, URL)


def test_an_answer_that_is_no_numbers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (print, ("run on the client",))

    buffer = io.BytesIO()
    torch.save({"found": {"twice": Evil()}}, buffer)
    blob = zstandard.ZstdCompressor().compress(buffer.getvalue())
    for bad in (blob, b"nonsense", b""):
        with pytest.raises(RunError, match="answer of .* could not be read"):
            run(FakeHost(URL, goes=lambda items, attempt, bad=bad: Answer("COMPLETED", result=bad)), ITEMS)


def test_gradients_are_refused_where_there_are_none() -> None:
    model = FakeModel()
    model.hosted.facts.update(gradients=False, no_gradients="OutOfOrderError")
    with pytest.raises(InputError, match=r"takes gradients.*OutOfOrderError.*exact activation patching"):
        hosted.check_gradients(model, None, Doubled(backward=True))
    hosted.check_gradients(model, None, Doubled())


def test_a_host_that_is_not_there_is_tried_for_as_long_as_patience_lasts(
    caplog: pytest.LogCaptureFixture,
) -> None:
    host = Host(URL, patience=1.2)
    with caplog.at_level(logging.WARNING, "patchkit.host"):
        with pytest.raises(RunError, match=r"http://127.0.0.1:9 could not be reached for .*--resume"):
            host.look("job")
    assert "tried again" in caplog.text
    host.close()


def test_a_host_is_a_url() -> None:
    with pytest.raises(InputError, match="expected a URL such as"):
        Host("api.ndif.us")


def test_the_key_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nnsight.CONFIG.API.APIKEY", "canary-key")
    assert hide("Invalid API key format: 'canary-key'.") == "Invalid API key format: '[key]'."
