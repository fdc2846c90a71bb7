"""A real NDIF server on loopback, without a GPU: up, deploy, status, kill-api, restart-api, down.

    python tests/remote/server/control.py up --venv .server-venv [DIR[,dtype=bfloat16][,timeout=5][,sandbox] ...]
    python tests/remote/server/control.py deploy DIR[,...] ... | status | kill-api | restart-api | down

All take `--state DIR`. What runs is in DIR/server.json: the address, the ports, the processes; their output in DIR/logs.
It needs the standard library and psutil; what it starts runs in the server's environment (requirements.txt).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from tests.remote.server import environment, processes

HERE = Path(__file__).resolve().parent
DEFAULT_STATE = Path(tempfile.gettempdir()) / "patchkit-server"
DEFAULT_VENV = HERE.parents[2] / ".server-venv"
# Enough for a machine whose two cores are busy with something else.
START_S = 300.0
DEPLOY_S = 300.0
JOB_S = 60.0


class ServerError(Exception):
    """What is wrong with the server, and what to do."""


def read(state: Path) -> dict[str, Any]:
    try:
        return json.loads((state / "server.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ServerError(f"no server was started with --state {state}: start one with `up`") from None


def write(state: Path, server: dict[str, Any]) -> None:
    part = state / "server.part"
    part.write_text(json.dumps(server, indent=1), encoding="utf-8")
    os.replace(part, state / "server.json")


def deployment(text: str) -> dict[str, Any]:
    """DIR[,dtype=NAME][,timeout=SECONDS][,sandbox], as the controller wants it."""
    name, *options = text.split(",")
    folder = Path(name).resolve()
    if not (folder / "config.json").is_file():
        raise ServerError(f"{folder} is no model directory: there is no config.json in it")
    given = dict(option.partition("=")[::2] for option in options)
    if unknown := given.keys() - {"dtype", "timeout", "sandbox"}:
        raise ServerError(f"{text!r}: {', '.join(sorted(unknown))} is none of dtype, timeout, sandbox")
    identity = {"repo_id": str(folder), "revision": None, "task": "text-generation"}
    return {
        "model_key": f"nnsight.modeling.transformers.TransformersModel:{json.dumps(identity)}",
        "config": {
            "pinned": True,
            "trusted": True,
            "dtype": given.get("dtype", "float32"),
            # Given, as NDIF's own estimate fails with nnsight 0.8.1.
            "size_bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
            "execution_timeout_seconds": float(given.get("timeout", JOB_S)),
            "actor_class": f"cpu_actor.{'Sandboxed' if 'sandbox' in given else 'Trusted'}",
        },
    }


def up(state: Path, venv: Path, models: list[str]) -> dict[str, Any]:
    """Start everything, deploy the models, and wait until a request would be taken."""
    orders = [deployment(text) for text in models]
    if problems := environment.problems(venv):
        raise ServerError("\n".join(problems))
    if (state / "server.json").exists():
        if running(read(state)):
            raise ServerError(
                f"the server of --state {state} is up already: `status` tells where, `down` ends it"
            )
        down(state)
    (state / "logs").mkdir(parents=True, exist_ok=True)
    api, redis, store = processes.free_ports(3)
    server: dict[str, Any] = {
        "url": f"http://127.0.0.1:{api}",
        "ports": {"api": api, "redis": redis, "store": store},
        "venv": str(venv.absolute()),
        # A short name, since a socket below it may have a hundred letters in all.
        "ray_temporary": tempfile.mkdtemp(prefix="pk-ray-", dir="/tmp"),
        "processes": {},
        "deployments": [],
    }
    write(state, server)
    try:
        python = str(venv / "bin" / "python")
        shop = environment.redis_server(venv)
        spawn(state, server, "redis", [shop, "--bind", "127.0.0.1", "--port", str(redis), "--save", ""])
        spawn(state, server, "store", [python, str(HERE / "objects.py"), str(store)])
        spawn(state, server, "head", [python, str(HERE / "head.py"), str(state.absolute())])
        # Taken up as soon as the controller is there.
        taken = order(state, orders) if orders else None
        wait(state, server, "Ray", lambda: (state / "ray.json").exists(), START_S)
        server["ray"] = json.loads((state / "ray.json").read_text(encoding="utf-8"))["address"]
        start_api(state, server)
        if taken:
            finish(state, server, taken, orders)
        wait(state, server, "the API", lambda: connected(server), START_S)
    except BaseException:
        down(state)
        raise
    return server


def spawn(state: Path, server: dict[str, Any], name: str, command: list[str], **more: str) -> None:
    settings = environment.variables(server, HERE) | more
    log = state / "logs" / f"{name}.log"
    # Not in the repository: Python would then find patchkit there, and the server must not have it.
    server["processes"][name] = processes.start(command, settings, log, state)
    write(state, server)


def start_api(state: Path, server: dict[str, Any], **more: str) -> None:
    # nnsight puts `.save` on `object`, which breaks anyio's late import of its backend, and with it every request over
    # 1 MiB. The API has no use for `.save`.
    settings = state / "api-nnsight.yaml"
    settings.write_text("APP:\n  PYMOUNT: false\n", encoding="utf-8")
    gunicorn = str(Path(server["venv"]) / "bin" / "gunicorn")
    options = ["--bind", f"127.0.0.1:{server['ports']['api']}", "--no-control-socket"]
    configured = ["--config", "python:ndif.services.api.gunicorn_conf", "ndif.services.api.app:app"]
    spawn(state, server, "api", [gunicorn, *options, *configured], NNSIGHT_CONFIG=str(settings), **more)


def connected(server: dict[str, Any]) -> bool:
    """Whether the API answers and has its connection to Ray."""
    try:
        # No proxy of the environment's for an address on this machine.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"{server['url']}/connected", timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


def running(server: dict[str, Any]) -> list[str]:
    return [name for name, record in server["processes"].items() if processes.session(record)]


def wait(state: Path, server: dict[str, Any], what: str, come: Any, seconds: float) -> None:
    """Wait for something, unless a program that it needs has ended."""
    deadline = time.monotonic() + seconds
    while not come():
        for name, record in server["processes"].items():
            if not processes.alive(record):
                raise ServerError(f"{name} ended while {what} was awaited.\n{tail(Path(record['log']))}")
        if time.monotonic() > deadline:
            raise ServerError(f"{what} was not there after {seconds:.0f} s; the logs are in {state / 'logs'}")
        time.sleep(0.2)


def tail(log: Path, lines: int = 20) -> str:
    return "\n".join([f"The end of {log}:", *log.read_text(errors="replace").splitlines()[-lines:]])


def order(state: Path, models: list[dict[str, Any]]) -> Path:
    """Hand an order to head.py; where its answer will be."""
    folder = state / "orders"
    folder.mkdir(exist_ok=True)
    name = f"{time.time_ns()}"
    part = folder / f"{name}.part"
    part.write_text(json.dumps(models), encoding="utf-8")
    os.replace(part, folder / f"{name}.json")
    return folder / f"{name}.done"


def finish(state: Path, server: dict[str, Any], answer: Path, models: list[dict[str, Any]]) -> None:
    wait(state, server, "a deployment", answer.exists, DEPLOY_S)
    outcome = json.loads(answer.read_text(encoding="utf-8"))
    if "failed" in outcome:
        raise ServerError(f"the deployment failed:\n{outcome['failed']}")
    if wrong := [f"{key}: {problem}" for key, problem in outcome["problems"].items() if problem]:
        raise ServerError("could not be deployed:\n" + "\n".join(wrong))
    server["deployments"] += models
    write(state, server)


def deploy(state: Path, models: list[str]) -> None:
    server = read(state)
    orders = [deployment(text) for text in models]
    keys = {known["model_key"] for known in server["deployments"]}
    for wanted in orders:
        if wanted["model_key"] in keys:
            raise ServerError(
                f"{wanted['model_key']} is deployed already; a directory is deployed once: copy it for a second"
            )
        keys.add(wanted["model_key"])
    finish(state, server, order(state, orders), orders)


def kill_api(state: Path) -> None:
    """End the API and the queue behind it as a crash would, with the models left standing."""
    server = read(state)
    processes.stop([server["processes"]["api"]], at_once=True)
    # Left by the dispatcher, which died: the next one's API would say that it is connected before it is.
    with socket.create_connection(("127.0.0.1", server["ports"]["redis"]), timeout=5) as redis:
        redis.sendall(b"DEL ray:connected\r\n")
        redis.recv(64)


def restart_api(state: Path, **more: str) -> None:
    """With more settings of the environment, which the next restart does not have."""
    kill_api(state)
    server = read(state)
    start_api(state, server, **more)
    wait(state, server, "the API", lambda: connected(server), START_S)


def status(state: Path) -> str:
    server = read(state)
    lines = [f"{server['url']}: {'connected' if connected(server) else 'not connected'}"]
    for name, record in server["processes"].items():
        lines.append(f"{name}: {len(processes.session(record))} processes, {record['log']}")
    for known in server["deployments"]:
        settings = known["config"]
        lines.append(f"{known['model_key']}: {settings['dtype']}, {settings['actor_class']}")
    return "\n".join(lines)


def down(state: Path) -> int:
    """End what `up` started, also what a crash of ours left; how many processes that were."""
    server = read(state)
    count = processes.stop(list(server["processes"].values()))
    for logs in Path(server["ray_temporary"]).glob("session_2*/logs"):
        shutil.copytree(logs, state / "logs" / "ray", symlinks=True, dirs_exist_ok=True)
    shutil.rmtree(server["ray_temporary"], ignore_errors=True)
    shutil.rmtree(state / "orders", ignore_errors=True)
    for name in ("server.json", "ray.json", "api-nnsight.yaml"):
        (state / name).unlink(missing_ok=True)
    return count


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("verb", choices=["up", "deploy", "status", "kill-api", "restart-api", "down"])
    parser.add_argument("models", nargs="*", metavar="DIR[,...]")
    parser.add_argument("--state", type=Path, default=DEFAULT_STATE, help=f"default: {DEFAULT_STATE}")
    parser.add_argument("--venv", type=Path, default=DEFAULT_VENV, help=f"default: {DEFAULT_VENV}")
    given = parser.parse_intermixed_args()
    started = time.monotonic()
    try:
        if given.verb == "up":
            print(up(given.state, given.venv, given.models)["url"])
        elif given.verb == "deploy":
            deploy(given.state, given.models)
        elif given.verb == "status":
            print(status(given.state))
        elif given.verb == "down":
            print(f"ended {down(given.state)} processes")
        else:
            {"kill-api": kill_api, "restart-api": restart_api}[given.verb](given.state)
    except (ServerError, subprocess.SubprocessError, RuntimeError) as problem:
        print(f"control: {problem}", file=sys.stderr)
        return 2
    if given.verb != "status":
        print(f"{given.verb}: {time.monotonic() - started:.1f} s", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
