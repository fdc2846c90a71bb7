"""What a host's deployment of a model is: asked by small jobs before any work is sent."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from nnsight import CONFIG
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from patchkit import zoo
from patchkit.data.batch import Batch
from patchkit.errors import InputError, RunError
from patchkit.model import PatchModel, Site
from patchkit.model.hosted import open_hosted, settle
from patchkit.model.load import parse_dtype
from patchkit.runtime.content import content_digest
from patchkit.runtime.lone_job import run_job
from patchkit.tracing.capture import capture
from patchkit.tracing.gradients import LayerGradients, reduce_gradients
from patchkit.tracing.validate import validate


def probe(model: PatchModel, *, dtype: str | torch.dtype | None = None) -> None:
    """Asks the host what it has under this name, and notes it in the model: `hosted.facts`, its dtype, its content key.

    Args:
        dtype: that the user expects; a host's dtype cannot be chosen.

    Raises:
        InputError: it is another model than its config says, or of another dtype, or is read in the wrong places there.
        RunError: the host cannot be reached, or has no such model.
    """
    assert model.hosted is not None
    facts = run_alone(model, described)
    where = f"{model.name} on {model.hosted.url}"
    if facts["vocab_size"] != model.dims.vocab_size:
        raise InputError(
            f"{where} has a vocabulary of {facts['vocab_size']:,}, and its config here says {model.dims.vocab_size:,}"
        )
    asked = parse_dtype(dtype)
    if isinstance(asked, torch.dtype) and str(asked) != f"torch.{facts['dtype']}":
        raise InputError(
            f"{where} is deployed in {facts['dtype']}, expected {str(asked).removeprefix('torch.')}: a host's dtype "
            "cannot be chosen; leave --dtype out"
        )
    wanted = model.hosted.env.get("attn_implementation")
    if facts["attn_implementation"] != wanted:
        raise InputError(
            f"{where} runs attention as '{facts['attn_implementation']}' and did not change to '{wanted}', which was "
            f"asked for; give --attn-implementation {facts['attn_implementation']}, or ask for a newer nnsight there "
            f"(found {facts['nnsight']})"
        )
    try:
        run_alone(model, checked)
    except RunError as error:
        raise InputError(f"{where} cannot be used: {error}") from error
    try:
        good = run_alone(model, differentiated)["ok"]
        facts |= {"gradients": good, "no_gradients": "" if good else "they are zero or not finite"}
    except RunError as error:
        facts |= {"gradients": False, "no_gradients": str(error)}
    if not facts["content"]:
        # Weights that nobody may read are told apart by where they are.
        facts["content"] = content_digest(model.hosted.url, model.hosted.key, model.fingerprint())
    settle(model, facts)


def load_hosted(
    source: str | Path,
    host: str | None = None,
    *,
    dtype: str | torch.dtype | None = None,
    attn_implementation: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> PatchModel:
    """A model that stays where an NDIF server hosts it; every method runs on it as on one that was loaded here.

    Its config and tokenizer are read here, its weights never are. A few small jobs ask the host what it has, check that
    it is read and written in the right places, and whether it can differentiate.

    Args:
        source: an embedded name, a hub name, or a directory that the host has at the same path.
        host: URL; default: nnsight's own setting (NDIF_HOST). The key is nnsight's as well (NDIF_API_KEY).
        dtype: that is expected there; a host's dtype cannot be chosen.
        attn_implementation: that jobs run with.

    Raises:
        InputError: there is no such model, or the host's is another one than is expected here.
        RunError: the host cannot be reached, or a job failed.

    Example:
        >>> model = load_hosted("meta-llama/Llama-3.1-8B", "https://api.ndif.us")  # doctest: +SKIP
    """
    name = os.fspath(source)
    path = zoo.find(name) if zoo.embedded(name) else name
    if path is None:
        raise InputError(
            f"{name} is built from its analytic weights and lies in no directory that a host could have"
        )
    model = open_hosted(
        path,
        host or CONFIG.API.HOST,
        name=name,
        attn_implementation=attn_implementation,
        tokenizer=tokenizer,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    probe(model, dtype=dtype)
    return model


def run_alone(model: PatchModel, work: Any, *given: Any) -> dict[str, Any]:
    """Sends one job and waits for it; see `run_job`."""
    assert model.hosted is not None
    return run_job(model, work, *given, about=f"asking {model.hosted.url}")


# What runs there.


def described(model: PatchModel) -> dict[str, Any]:
    """Job: what the deployment is."""
    if not model.reachable:
        return _seen(model)
    parameter = next(model.hf.parameters())
    return {
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "device": parameter.device.type,
        "attn_implementation": getattr(model.config, "_attn_implementation", None),
        "vocab_size": int(model.config.vocab_size),
        "weights": not parameter.is_meta,
        "content": model.content_key(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "nnsight": version("nnsight"),
        "transformers": version("transformers"),
    }


def _seen(model: PatchModel) -> dict[str, Any]:
    """What a sandbox shows: activations, and that only."""
    run = capture(model, Batch.from_ids([[1, 2, 3]], pad_id=model.pad_id), [Site("resid_pre", 0)])
    stream = run.values[Site("resid_pre", 0)]
    return {
        "dtype": str(stream.dtype).removeprefix("torch."),
        "device": stream.device.type,
        # Sent with the job, and refused there if it cannot be had.
        "attn_implementation": getattr(model.config, "_attn_implementation", None),
        "vocab_size": run.logits.shape[-1],
        "weights": False,
        "content": "",
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "nnsight": version("nnsight"),
        "transformers": version("transformers"),
    }


def checked(model: PatchModel) -> dict[str, Any]:
    """Job: the check that every model gets on load."""
    if model.reachable:
        validate(model)
    return {"ok": True}


def differentiated(model: PatchModel) -> dict[str, Any]:
    """Job: whether a gradient comes back from the logits to the stream."""
    batch = Batch.from_ids([[1, 2, 3]], pad_id=model.pad_id)
    found = reduce_gradients(model, batch, [Site("resid_pre", 0)], _largest, _gradient)
    gradient = found.layers[0]["gradient"]
    return {"ok": bool(torch.isfinite(gradient).all()) and bool((gradient != 0).any())}


def _largest(logits: Tensor) -> Tensor:
    return logits.max(-1).values


def _gradient(layer: LayerGradients) -> dict[str, Tensor]:
    return {"gradient": layer.gradients["resid_pre"][0][1]}
