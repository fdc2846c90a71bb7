"""Two runs in one directory: the second is refused by name while the first is there, however it ends."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from patchkit.errors import InputError, RunError
from patchkit.results import _run_lock
from patchkit.results.manifest import open_run_dir, read_manifest
from tests.runtime.journals import ended, fork

OPTIONS = {"model": "varbind-llama", "seed": 3}


def run_until_told(
    out: Path, inside: Callable[[], object] = lambda: None, resume: bool = False
) -> tuple[int, int]:
    """A process with an open run: its number, and a pipe whose end it waits for."""
    ready, told = os.pipe()
    wait, tell = os.pipe()

    def work() -> None:
        os.close(tell)
        with open_run_dir(out, "mask", OPTIONS, resume):
            inside()
            os.write(told, b".")
            os.read(wait, 1)

    child = fork(work)
    os.close(told)
    os.close(wait)
    assert os.read(ready, 1) == b"."
    os.close(ready)
    return child, tell


def refused(out: Path, resume: bool = True) -> str:
    with pytest.raises(InputError) as caught, open_run_dir(out, "mask", OPTIONS, resume):
        pytest.fail("two runs in one directory")
    return str(caught.value)


def goes_on(out: Path) -> None:
    with open_run_dir(out, "mask", OPTIONS, resume=True) as run:
        assert run.resumed and not run.done
    assert read_manifest(out).status == "done"
    assert not (out / ".lock").exists()


def test_a_second_run_is_refused_by_the_firsts_name(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    child, tell = run_until_told(out)
    before = (out / "manifest.json").read_bytes()
    message = refused(out)
    assert message.startswith(
        f"{out}: process {child} on {socket.gethostname()} is working in this directory."
    )
    assert "choose another --out directory" in message
    assert "already holds a run" in refused(out, resume=False)
    assert (out / "manifest.json").read_bytes() == before and (out / ".lock").exists()
    os.close(tell)
    assert ended(child) == 0
    assert [item.name for item in out.iterdir()] == ["manifest.json"]
    with open_run_dir(out, "mask", OPTIONS, resume=True) as run:
        assert run.done


def test_in_one_process_too(tmp_path: Path) -> None:
    with open_run_dir(tmp_path, "mask", OPTIONS):
        assert f"process {os.getpid()} on" in refused(tmp_path)
    assert read_manifest(tmp_path).status == "done"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_run_is_in_nobodys_way(tmp_path: Path, number: int) -> None:
    child, tell = run_until_told(tmp_path)
    os.kill(child, number)
    assert ended(child) == -number
    os.close(tell)
    # What it left is still there, and says nothing any more.
    assert (tmp_path / ".lock").exists() and read_manifest(tmp_path).status == "running"
    goes_on(tmp_path)


@pytest.mark.parametrize("way", ["fork", "exec"])
def test_a_child_that_outlives_a_killed_run_does_not_hold_its_lock(tmp_path: Path, way: str) -> None:
    number = tmp_path / "number"

    def start() -> None:
        if way == "fork":
            child = fork(lambda: time.sleep(600))
        else:
            child = subprocess.Popen(
                [sys.executable, "-c", "import time; time.sleep(600)"], close_fds=False
            ).pid
        number.write_text(str(child))

    out = tmp_path / "out"
    child, tell = run_until_told(out, start)
    try:
        os.kill(child, signal.SIGKILL)
        assert ended(child) == -signal.SIGKILL
        os.close(tell)
        os.kill(int(number.read_text()), 0)
        goes_on(out)
    finally:
        os.kill(int(number.read_text()), signal.SIGKILL)


def test_a_child_that_ends_does_not_let_go_of_its_parents_lock(tmp_path: Path) -> None:
    with open_run_dir(tmp_path, "mask", OPTIONS):
        assert ended(fork(lambda: None)) == 0
        assert "is working in this directory" in refused(tmp_path)


def test_of_many_at_once_one_gets_it(tmp_path: Path) -> None:
    """All begin with the file of a killed run in place, and each takes it away at its end."""
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt), open_run_dir(out, "mask", OPTIONS):
        raise KeyboardInterrupt
    (out / ".lock").write_text("1 elsewhere")
    together = tmp_path / "together"

    def work() -> None:
        while not together.exists():
            pass
        with open_run_dir(out, "mask", OPTIONS, resume=True) as run:
            if not run.done:
                descriptor = os.open(tmp_path / "one", os.O_CREAT | os.O_EXCL)
                time.sleep(0.02)
                os.close(descriptor)
                # Interrupted, so that the others find it as it was.
                (tmp_path / "one").unlink()
                raise KeyboardInterrupt

    children = [fork(lambda: _quietly(work)) for _ in range(8)]
    together.write_text("")
    assert [ended(child) for child in children] == [0] * 8
    assert not (tmp_path / "one").exists()
    goes_on(out)


def _quietly(work: Callable[[], None]) -> None:
    try:
        work()
    except KeyboardInterrupt:
        pass
    except InputError as error:
        assert "is working in this directory" in str(error), error


def test_a_file_that_its_holder_takes_away_meanwhile_is_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    genuine, taken_away = fcntl.flock, list[int]()

    def late(descriptor: int, how: int) -> None:
        if not taken_away:
            taken_away.append(descriptor)
            (tmp_path / ".lock").unlink()
        genuine(descriptor, how)

    monkeypatch.setattr(_run_lock.fcntl, "flock", late)
    lock = _run_lock.RunLock(tmp_path)
    with pytest.raises(InputError, match=f"process {os.getpid()} on"):
        _run_lock.RunLock(tmp_path)
    lock.release()
    _run_lock.RunLock(tmp_path).release()


def test_what_happened_between_the_first_look_and_the_lock_is_seen(tmp_path: Path) -> None:
    late = open_run_dir(tmp_path, "mask", OPTIONS)
    with pytest.raises(KeyboardInterrupt), open_run_dir(tmp_path, "mask", OPTIONS):
        raise KeyboardInterrupt
    with pytest.raises(InputError, match="already holds a run: `patchkit mask`.*interrupted"), late:
        pytest.fail("two runs in one directory")
    resumed = open_run_dir(tmp_path, "mask", OPTIONS, resume=True)
    goes_on(tmp_path)
    with resumed as run:
        assert run.done
    assert not (tmp_path / ".lock").exists()


def test_a_lock_alone_does_not_fill_a_directory(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("123 elsewhere")
    with open_run_dir(tmp_path, "mask", OPTIONS) as run:
        assert not run.resumed


def test_bad_input_leaves_no_lock(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with pytest.raises(InputError, match="bad pairs"), open_run_dir(out, "mask", OPTIONS):
        raise InputError("bad pairs")
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunError, match="a file is where a directory should be"):
        _run_lock.RunLock(tmp_path / "file" / "out")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(_run_lock.os, "write", full)
    with pytest.raises(RunError, match=re.escape(f"{tmp_path}/.lock: could not be written: no space left")):
        _run_lock.RunLock(tmp_path)
    monkeypatch.undo()
    _run_lock.RunLock(tmp_path).release()


def test_a_file_system_without_locks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(_run_lock.fcntl, "flock", none)
    with pytest.warns(UserWarning, match="no lock could be had here .*do not start two runs"):
        lock = _run_lock.RunLock(tmp_path)
    lock.release()
    assert not (tmp_path / ".lock").exists()
