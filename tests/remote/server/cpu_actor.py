"""NDIF's controller and model actors on a machine without a GPU. Runs in the server's environment, inside Ray's workers.

Only what touches a GPU, or Ray's dashboard, is replaced; a request goes through NDIF's own code. The base classes are no
public interface of ndif, so requirements.txt pins its version.
"""

from __future__ import annotations

import gc
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ray
from ndif.services.ray.deployments.controller import controller
from ndif.services.ray.deployments.controller.cluster import cluster
from ndif.services.ray.deployments.modeling.base import BaseModelDeployment
from ndif.services.ray.sandbox.model import SandboxModelDeployment
from nnsight.modeling.huggingface import HuggingFaceModel

RUNNER_SITE = Path(__file__).resolve().parent / "runner_site"


def living_nodes(**_: Any) -> list[SimpleNamespace]:
    """What `ray.util.state.list_nodes` says of the living nodes, asked of Ray's core instead of its dashboard."""
    return [
        SimpleNamespace(
            node_id=node["NodeID"],
            node_name=node["NodeName"],
            resources_total=node["Resources"],
            labels=node.get("Labels", {}),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


class CPUController(controller._ControllerActor):
    """The controller, in a cluster without the dashboard's ten processes."""

    def __init__(self, **settings: Any) -> None:
        cluster.list_nodes = living_nodes
        super().__init__(**settings)


class OnCPU:
    """Load to the CPU with frozen parameters, and clean up without `torch.cuda`."""

    CACHEABLE = False

    def load_from_disk(self) -> HuggingFaceModel:
        model = HuggingFaceModel.from_model_key(
            self.model_key, dispatch=True, dtype=self.dtype_name, device="cpu", **self.kwargs
        )
        model._module.requires_grad_(False)
        return model

    def forget_request(self) -> None:
        self.kill_switch.clear()
        self.kill_reason = None
        self.execution_ident = None
        self.model.interleaver.cancel()
        gc.collect()


class CPUDeployment(OnCPU, BaseModelDeployment):
    """Every request is trusted: it runs in the model's own process."""

    def cleanup(self) -> None:
        self.forget_request()


class CPUSandboxDeployment(OnCPU, SandboxModelDeployment):
    """No request is trusted: each runs in a process of its own, as for a user without the `trusted` tag.

    Authentication is off here, which trusts everybody; so the model does the distrusting.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        os.environ["PYTHONPATH"] = os.pathsep.join([str(RUNNER_SITE), os.environ.get("PYTHONPATH", "")])
        super().__init__(*args, **kwargs)

    async def run(self, request: Any) -> Any:
        request.trusted = False
        return await super().run(request)

    def cleanup(self) -> None:
        self.discard_sandbox()
        self.forget_request()


ControllerActor = ray.remote(num_cpus=1, max_restarts=-1, resources={"head": 1})(CPUController)
Trusted = ray.remote(num_cpus=0, max_restarts=-1)(CPUDeployment)
Sandboxed = ray.remote(num_cpus=0, max_restarts=-1)(CPUSandboxDeployment)
