"""Programs that run on after us: started in a session each, found again after a crash, ended with all they started."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil

# Where `ray start` puts its workers by default: another Ray on this machine may come to want any of them.
RAY_PORTS = range(10002, 20000)
GRACE_S = 3.0

# Those that this process started, which it must also bury.
_children: dict[int, subprocess.Popen[bytes]] = {}


def free_ports(count: int) -> list[int]:
    """Ports on loopback that nothing has now. All are held at once, so that they differ."""
    ports: list[int] = []
    with ExitStack() as held:
        while len(ports) < count:
            taken = held.enter_context(socket.socket())
            taken.bind(("127.0.0.1", 0))
            port = taken.getsockname()[1]
            if port not in RAY_PORTS:
                ports.append(port)
    return ports


def program(name: str, beside: Path) -> str | None:
    """A program of the system's, else the one in a folder of programs."""
    return shutil.which(name) or shutil.which(name, path=str(beside))


def start(command: list[str], environment: dict[str, str], log: Path, folder: Path) -> dict[str, Any]:
    """Start a program in a session of its own; what to know to find it and its descendants again."""
    with log.open("ab") as out:
        process = subprocess.Popen(
            command,
            env=environment,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    _children[process.pid] = process
    return {"pid": process.pid, "started": psutil.Process(process.pid).create_time(), "log": str(log)}


def session(record: dict[str, Any]) -> list[psutil.Process]:
    """The living processes of the session that a program led, itself among them or dead already.

    While one of them lives, the system gives the leader's number to nobody else; if it has given it to another program
    since, then none of ours lives.
    """
    members = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) != record["pid"] or process.status() == psutil.STATUS_ZOMBIE:
                continue
            if process.pid == record["pid"] and abs(process.create_time() - record["started"]) > 1:
                return []
            members.append(process)
        except (OSError, psutil.Error):
            continue
    return members


def alive(record: dict[str, Any]) -> bool:
    """Whether the program itself runs, whatever became of those it started."""
    return any(process.pid == record["pid"] for process in session(record))


def stop(records: list[dict[str, Any]], at_once: bool = False) -> int:
    """End sessions whole, all at the same time; how many processes that were."""
    members = [process for record in records for process in session(record)]
    if not at_once:
        send(members, signal.SIGTERM)
        psutil.wait_procs(members, timeout=GRACE_S)
    # What is left, and what was started meanwhile.
    deadline = time.monotonic() + GRACE_S
    while left := [process for record in records for process in session(record)]:
        send(left, signal.SIGKILL)
        psutil.wait_procs(left, timeout=0.5)
        if time.monotonic() > deadline:
            raise RuntimeError(f"processes that cannot be killed: {[process.pid for process in left]}")
    for record in records:
        if child := _children.pop(record["pid"], None):
            child.wait(GRACE_S)
    return len(members)


def send(members: list[psutil.Process], number: int) -> None:
    for process in members:
        try:
            process.send_signal(number)
        except psutil.Error:
            continue
