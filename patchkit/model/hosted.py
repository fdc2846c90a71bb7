"""Opening a model that lies elsewhere: its sizes and sites are known here, its weights stay where it is hosted."""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from nnsight.modeling import huggingface
from nnsight.modeling.transformers import TransformersModel
from transformers import PreTrainedTokenizerBase

from patchkit.errors import InputError
from patchkit.model.architectures import architecture_for
from patchkit.model.dims import check_paths, read_dims
from patchkit.model.load import in_short, parse_dtype, placeholder_tokenizer, read_config, read_tokenizer
from patchkit.model.patch_model import PatchModel


@dataclass(frozen=True)
class Hosted:
    """Where a model is hosted, and what is known of it there.

    Attributes:
        url: of the host.
        key: by which the host knows the model.
        env: what the host sets up before a job: the attention implementation.
        facts: what it said of itself; see `patchkit.runtime.probe`.
    """

    url: str
    key: str
    env: dict[str, Any] = field(compare=False)
    facts: dict[str, Any] = field(default_factory=dict, compare=False)

    @property
    def gradients(self) -> bool:
        """Whether jobs there can differentiate."""
        return bool(self.facts.get("gradients"))


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
    path = os.path.expanduser(os.fspath(source))
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if revision is not None:
        options["revision"] = revision
    config = read_config(path, options)
    arch = architecture_for(config)
    tokenizer = tokenizer or read_tokenizer(path, options)
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
