"""A step as a job: the bytes that a host runs against its own model, and what comes back of them.

One session is one job. Its body is the same call that runs a step here; inside, the step opens its traces as it does
everywhere. The package's functions travel with it, by value, so that the host need not know of patchkit.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import nnsight
import torch
import zstandard
from nnsight.ndif import pull_env
from nnsight.schema.request import RequestModel
from nnsight.tracing.backend import Backend
from torch import Tensor

from patchkit.errors import RunError
from patchkit.model import PatchModel


class _Packing(Backend):
    """Where a session is packed instead of run."""

    blob = b""

    def __call__(self, tracer: Any = None) -> None:
        assert tracer is not None
        # What lies beside the user's script (a metric of their own) travels as well.
        pull_env()
        self.blob = RequestModel.serialize(tracer, compress=True)


def pack_job(model: PatchModel, work: Callable[..., dict[str, Any]], *given: Any) -> bytes:
    """The job `work(model, *given)`, whose result is made of tensors, numbers and texts."""
    nnsight.register("patchkit")
    packing = _Packing()
    there = model.travelling()
    with model.lm.session(backend=packing):
        # The host gives back what was saved, by its name.
        found = nnsight.save(run_there(work, there, given))  # noqa: F841
    return packing.blob


def run_there(
    work: Callable[..., dict[str, Any]], model: PatchModel, given: tuple[Any, ...]
) -> dict[str, Any]:
    """What a job runs."""
    # A host may compute in half precision by itself, also what a step reckons in float32.
    with torch.autocast(model.embed_device.type, enabled=False):
        found = work(model, *given)
    return {name: _plain(value) for name, value in found.items()}


def run_step(model: PatchModel, opener: Any, step: Any, items: Any) -> dict[str, Tensor]:
    """A step on items that are opened first, unless the step takes them as they are."""
    return step.run(model, items if opener is None else opener.open(model, items))


def unpack_result(blob: bytes) -> dict[str, Any]:
    """What a job gave. Nothing but tensors, numbers and texts is read: a host is not trusted with more.

    Raises:
        RunError: it is something else.
    """
    try:
        data = zstandard.ZstdDecompressor().decompress(blob)
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)["found"]
    except Exception as error:
        # Whatever a damaged answer makes zstandard, torch or zipfile raise.
        raise RunError(
            f"a host's answer of {len(blob):,} bytes could not be read: expected tensors, numbers and texts, found "
            f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else 'nothing'}"
        ) from error


def _plain(value: Any) -> Any:
    return value.detach().to("cpu").contiguous() if isinstance(value, Tensor) else value
