"""`patchkit.load`: one way in for embedded names, directories, hub names, HF modules and nnsight models."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from nnsight.modeling.transformers import TransformersModel
from torch import nn
from transformers import PreTrainedTokenizerBase

from patchkit import zoo
from patchkit.errors import InputError
from patchkit.model import PatchModel, open_model
from patchkit.model.load import move
from patchkit.tracing.validate import validate


def load(
    source: str | Path | nn.Module | TransformersModel,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    device_map: str | dict[str, Any] | None = None,
    max_memory: dict[int | str, int | str] | None = None,
    attn_implementation: str | None = None,
    lazy: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> PatchModel:
    """Opens a model and checks on a tiny input that it is read and written in the right places.

    Args:
        source: an embedded name (`patchkit models` lists them), a local directory with or without a tokenizer, a hub
            name, a Hugging Face causal LM, or an nnsight `TransformersModel`. A module is not modified; while it is
            wrapped nnsight's controllers stand in its place, and `PatchModel.release` takes them off.
        dtype: `float32`, `bfloat16`, ...; default: the checkpoint's own, float32 for embedded models.
        device: where to put the whole model; or `device_map`: how accelerate spreads it, with at most `max_memory` bytes
            on each device.
        attn_implementation: `eager`, `sdpa`, ...; default: transformers' choice.
        lazy: meta weights only, for plans on models that do not fit here.

    Raises:
        InputError: nothing has this name, the family is unknown, or the model fails validation.

    Example:
        >>> model = load("varbind-llama")
        >>> model.dims.n_heads
        8
    """
    options: dict[str, Any] = {
        "device_map": device_map,
        "max_memory": max_memory,
        "attn_implementation": attn_implementation,
        "lazy": lazy,
        "revision": revision,
        "trust_remote_code": trust_remote_code,
    }
    if not isinstance(source, nn.Module | TransformersModel) and zoo.embedded(os.fspath(source)):
        model = _embedded(os.fspath(source), dtype, device, tokenizer, options)
    else:
        model = open_model(source, dtype=dtype, device=device, tokenizer=tokenizer, **options)
    if not lazy:
        validate(model)
    if not isinstance(source, nn.Module | TransformersModel) and tokenizer is None:
        model.opening = {
            "source": os.fspath(source),
            "dtype": dtype,
            "device_map": device_map,
            "attn_implementation": attn_implementation,
            "revision": revision,
            "trust_remote_code": trust_remote_code,
        }
    return model


def load_sizes(name: str | Path, **options: Any) -> PatchModel:
    """Opens a model of which only sizes and sites are needed: without its weights.

    What is built in code is small, and has no checkpoint to leave out: it is opened whole.

    Args:
        options: of `load`.

    Raises:
        InputError: as of `load`.
    """
    written = zoo.embedded(os.fspath(name)) and zoo.find(os.fspath(name)) is None
    return load(name, lazy=not written, **options)


def _embedded(
    name: str,
    dtype: str | torch.dtype | None,
    device: str | torch.device | None,
    tokenizer: PreTrainedTokenizerBase | None,
    options: dict[str, Any],
) -> PatchModel:
    dtype = dtype or torch.float32
    path = zoo.find(name)
    if path is not None:
        return open_model(path, name=name, dtype=dtype, device=device, tokenizer=tokenizer, **options)
    given = [key for key, value in options.items() if value]
    if given or dtype not in (torch.float32, "float32"):
        raise InputError(
            f"{name} is built from its analytic weights, exact in float32 only; it takes no {', '.join(given) or 'dtype'}"
        )
    module, own_tokenizer = zoo.build(name)
    return open_model(
        move(module, device) if device else module, name=name, tokenizer=tokenizer or own_tokenizer
    )
