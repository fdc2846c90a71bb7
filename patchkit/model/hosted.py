"""Opening a model that lies elsewhere: its sizes and sites are known here, its weights stay where it is hosted."""

from __future__ import annotations

import copy
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from nnsight.modeling import huggingface
from nnsight.modeling.transformers import TransformersModel
from transformers import PreTrainedTokenizerBase

from patchkit.errors import InputError
from patchkit.model.architectures import architecture_for
from patchkit.model.dims import check_paths, read_dims
from patchkit.model.load import in_short, parse_dtype, placeholder_tokenizer, read_source
from patchkit.model.patch_model import Hosted, PatchModel


def open_hosted(
    source: str | Path,
    url: str,
    *,
    name: str | None = None,
    attn_implementation: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> PatchModel:
    """A model as its host has it: config and tokenizer are read here, no weights are.

    Args:
        source: a hub name, or a directory that the host has at the same absolute path.
        attn_implementation: that jobs run with; default: transformers' choice.

    Raises:
        InputError: there is no such model, or its family is unknown.
    """
    path, options, config, tokenizer = read_source(source, tokenizer, revision, trust_remote_code)
    if Path(path).is_dir():
        path = os.path.abspath(path)
        # nnsight asks the hub for the right spelling of a name; a directory has none.
        huggingface._ID_CACHE[path] = path
    own = placeholder_tokenizer(config.vocab_size) if tokenizer is None else copy.deepcopy(tokenizer)
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    try:
        lm = TransformersModel(path, task="text-generation", tokenizer=own, **options)
        key = lm.to_model_key()
    except Exception as error:
        raise InputError(f"model '{path}' could not be described for {url}: {in_short(error)}") from error
    module: Any = lm._module
    module.eval().requires_grad_(False)
    arch = architecture_for(config)
    check_paths(module, arch)
    hosted = Hosted(url, key, lm._remoteable_get_env())
    return PatchModel(
        lm,
        arch,
        read_dims(module, module.config, arch),
        name=name or os.fspath(source),
        tokenizer=tokenizer,
        revision=revision,
        hosted=hosted,
    )


def settle(model: PatchModel, facts: dict[str, Any]) -> None:
    """Takes over what the host said of its model: its dtype, its gradients, the digest of its weights."""
    assert model.hosted is not None
    dtype = parse_dtype(facts["dtype"])
    assert isinstance(dtype, torch.dtype)
    module: Any = model.hf
    model.lm._module = module = module.to(dtype)
    model.dims = replace(read_dims(module, module.config, model.arch), on_cpu=facts["device"] == "cpu")
    model.hosted.facts.update(facts)
    model.set_content_key(facts["content"])
