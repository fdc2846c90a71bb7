"""Ray, NDIF's controller and the deploying of models, in one process. Runs in the server's environment.

NDIF starts these with four programs that each import torch, and Ray's own `ray start` with a dashboard and a proxy for
clients elsewhere, which nothing on this machine needs. All of Ray's processes end with this one.

    python head.py STATE      writes STATE/ray.json; then takes STATE/orders/N.json and answers in N.done
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import ray

NAMESPACE = "NDIF"
GIGABYTE = 10**9


def write_whole(path: Path, content: Any) -> None:
    """A reader that polls for the file never sees half of it."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1), encoding="utf-8")
    os.replace(part, path)


def start_ray(temporary: str) -> str:
    """A cluster on loopback with one GPU that is not there: NDIF only manages nodes that report one."""
    context = ray.init(
        address="local",
        namespace=NAMESPACE,
        num_cpus=1,
        num_gpus=1,
        resources={"head": 10, "cuda_memory_bytes": 8 * GIGABYTE, "cpu_memory_bytes": 8 * GIGABYTE},
        object_store_memory=GIGABYTE // 4,
        include_dashboard=False,
        log_to_driver=False,
        _node_ip_address="127.0.0.1",
        _temp_dir=temporary,
    )
    return context.address_info["gcs_address"]


def start_controller() -> Any:
    from ndif.services.ray.deployments.controller.controller import app

    app()
    controller = ray.get_actor("Controller", namespace=NAMESPACE)
    ray.get(controller.__ray_ready__.remote())
    return controller


def deploy(controller: Any, models: list[dict[str, Any]]) -> dict[str, str | None]:
    """Deploy models and wait until each serves: what went wrong by model key, None where nothing did."""
    from ndif.cli.lib.models import wait_for_replica_ready
    from ndif.common.schema.controller import DeploymentConfig

    configs = {model["model_key"]: DeploymentConfig(**model["config"]) for model in models}
    # `_deploy` and not `deploy`, which would size the models through an argument that nnsight 0.8.1 does not have.
    response = ray.get(controller._deploy.remote(deployments=configs))
    problems: dict[str, str | None] = {}
    for key in configs:
        result = response.results.get(key)
        problems[key] = result.error if result else "the controller did not answer for it"
        for replica in result.replicas if result and not result.error else []:
            try:
                wait_for_replica_ready(key, replica)
            except Exception as problem:
                problems[key] = str(problem)
    return problems


def main(state: Path) -> None:
    settings = json.loads((state / "server.json").read_text(encoding="utf-8"))
    orders = state / "orders"
    orders.mkdir(exist_ok=True)
    write_whole(state / "ray.json", {"address": start_ray(settings["ray_temporary"])})
    controller = start_controller()
    while True:
        for order in sorted(orders.glob("*.json")):
            try:
                answer: dict[str, Any] = {
                    "problems": deploy(controller, json.loads(order.read_text(encoding="utf-8")))
                }
            except Exception:
                answer = {"failed": traceback.format_exc()}
            order.unlink()
            write_whole(order.with_suffix(".done"), answer)
        time.sleep(0.1)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
