"""Opening a model: a directory, a hub name, an HF module or an nnsight model becomes a `PatchModel`.

Embedded names and the validation on load are added one floor up (`patchkit.load`).
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from nnsight.modeling.transformers import TransformersModel
from tokenizers import Tokenizer, models
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from patchkit.errors import InputError
from patchkit.model.architectures import architecture_for
from patchkit.model.dims import check_paths, find_module, read_dims
from patchkit.model.patch_model import PatchModel, own_forwards
from patchkit.reading import exists

_DTYPES = {
    "auto": "auto",
    "float32": torch.float32,
    "float64": torch.float64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "spiece.model",
)


def parse_dtype(dtype: str | torch.dtype | None) -> torch.dtype | str | None:
    """A dtype from its name; None stays None (the checkpoint's own, see `open_model`)."""
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in _DTYPES:
        raise InputError(f"dtype '{dtype}' is not known; expected one of: {', '.join(_DTYPES)}")
    return _DTYPES[dtype]


def open_model(
    source: str | Path | nn.Module | TransformersModel,
    *,
    name: str | None = None,
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
    """Opens a model without validating it numerically; `patchkit.load` is this plus embedded names and validation.

    Args:
        source: a local directory, a hub name, an HF causal LM, or an nnsight `TransformersModel`.
        dtype: default: the checkpoint's own dtype.
        device_map, max_memory: how accelerate spreads the model, and the most bytes it puts on each device.
        lazy: meta weights only: sizes, sites and plans work, runs do not.

    Raises:
        InputError: the directory or its files are missing, the family is unknown, options contradict each other.
    """
    if device is not None and device_map is not None:
        raise InputError(f"device={device!r} and device_map={device_map!r} were both given; give one of them")
    if isinstance(source, nn.Module | TransformersModel):
        given = {
            "dtype": dtype,
            "device": device,
            "device_map": device_map,
            "max_memory": max_memory,
            "revision": revision,
            "lazy": lazy or None,
        }
        unusable = [key for key, value in given.items() if value is not None]
        if unusable:
            raise InputError(
                f"{', '.join(unusable)} cannot be applied to a model that exists already; convert it yourself"
            )
        return _from_module(source, name, tokenizer, attn_implementation)
    path, options, config, tokenizer = read_source(source, tokenizer, revision, trust_remote_code)
    arch = architecture_for(config)
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    spread = {} if max_memory is None else {"max_memory": max_memory}
    torch_dtype = parse_dtype(dtype)
    if lazy:
        with torch.device("meta"):
            lazy_dtype = (
                torch_dtype if isinstance(torch_dtype, torch.dtype) else getattr(config, "dtype", None)
            )
            chosen = {key: value for key, value in options.items() if key != "revision"}
            module = AutoModelForCausalLM.from_config(config, dtype=lazy_dtype or torch.float32, **chosen)
    else:
        module = _read_weights(path, config, torch_dtype, device_map, options | spread)
        if device is not None:
            module = move(module, device)
    module.eval().requires_grad_(False)
    model = _wrap(module, None, name or path, tokenizer, borrowed=False, revision=revision, lazy=lazy)
    assert model.arch == arch
    return model


def _from_module(
    source: nn.Module | TransformersModel,
    name: str | None,
    tokenizer: PreTrainedTokenizerBase | None,
    attn_implementation: str | None,
) -> PatchModel:
    lm = source if isinstance(source, TransformersModel) else None
    if lm is not None:
        # One that was not dispatched yet has meta weights; its first trace would load them anyway.
        lm.dispatch()
        tokenizer = tokenizer or lm.tokenizer
    module: Any = source if lm is None else lm._module
    kind = type(module).__name__
    if not hasattr(module, "config"):
        raise InputError(f"{kind} has no config; expected a Hugging Face causal language model")
    if any(part.training for part in module.modules()):
        raise InputError(f"{kind} is in training mode, where dropout makes runs differ; call .eval() first")
    current = getattr(module.config, "_attn_implementation", None)
    if attn_implementation is not None and attn_implementation != current:
        raise InputError(
            f"{kind} uses attention implementation '{current}' and is not modified; load it with "
            f"attn_implementation='{attn_implementation}' or call its set_attn_implementation first"
        )
    return _wrap(module, lm, name or kind, tokenizer, borrowed=True)


def _wrap(
    module: nn.Module,
    lm: TransformersModel | None,
    name: str,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    borrowed: bool,
    revision: str | None = None,
    lazy: bool = False,
) -> PatchModel:
    config: Any = module.config
    arch = architecture_for(config)
    check_paths(module, arch)
    dims = read_dims(module, config, arch)
    forwards = {} if lm is not None else own_forwards(module)
    if lm is None:
        # nnsight wants a tokenizer even when it is only ever given token ids, and changes its padding: it gets a copy.
        own = placeholder_tokenizer(dims.vocab_size) if tokenizer is None else copy.deepcopy(tokenizer)
        # The pipeline inside would otherwise move the model to the first GPU it finds; a model that accelerate has
        # spread is left alone by itself.
        spread = getattr(module, "hf_device_map", None) or {}
        home = next(module.parameters()).device
        if "disk" in list(spread.values())[:1] or (home.type == "meta" and not lazy):
            # Inputs go where the first weights are.
            raise InputError(
                f"{name}: the token embedding, or the first entry of the device map, is offloaded; keep '{arch.embed}' "
                "first and on a device, and offload other modules"
            )
        place: dict[str, Any] = {} if spread else {"device": home}
        lm = TransformersModel(module, task="text-generation", tokenizer=own, **place)
    return PatchModel(
        lm,
        arch,
        dims,
        name=name,
        tokenizer=tokenizer,
        revision=revision,
        lazy=lazy,
        borrowed=borrowed,
        forwards=forwards,
    )


def move(module: nn.Module, device: str | torch.device) -> nn.Module:
    """The module on a device; InputError where there is no such device or not enough memory on it."""
    try:
        return module.to(device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device '{device}' cannot be used: {in_short(error)}") from error


def read_source(
    source: str | Path,
    tokenizer: PreTrainedTokenizerBase | None,
    revision: str | None,
    trust_remote_code: bool,
) -> tuple[str, dict[str, Any], Any, PreTrainedTokenizerBase | None]:
    """What is read of a model before its weights, wherever these are: its path or hub name, transformers' options for it,
    its config, of a family that is known, and its tokenizer, unless one was given."""
    path = os.path.expanduser(os.fspath(source))
    if not path:
        raise InputError("the model's name is empty; expected an embedded name, a directory or a hub name")
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if revision is not None:
        options["revision"] = revision
    config = _read_config(path, options)
    # Before the tokenizer: an unknown family is said first.
    architecture_for(config)
    return path, options, config, tokenizer or _read_tokenizer(path, options)


# What damaged files make transformers raise is not to be listed: below, everything it raises is about them.


def _read_config(path: str, options: dict[str, Any]) -> Any:
    there = exists(Path(path))
    if Path(path).is_dir() and not exists(Path(path) / "config.json"):
        raise InputError(f"{path}: no config.json in this directory; expected a Hugging Face model directory")
    if not there and (path.startswith((".", "/", "~")) or path.count("/") > 1):
        raise InputError(f"{path}: no such directory")
    if Path(path).is_file():
        raise InputError(f"{path} is a file; expected the directory that holds config.json and the weights")
    try:
        return AutoConfig.from_pretrained(path, **options)
    except Exception as error:
        if there:
            raise InputError(f"{path}: config.json could not be read: {in_short(error)}") from error
        raise InputError(
            f"model '{path}' could not be opened: it is not an embedded name, not a local directory, and the hub gave: "
            f"{in_short(error)}. `patchkit models` lists the embedded names"
        ) from error


def _read_tokenizer(path: str, options: dict[str, Any]) -> PreTrainedTokenizerBase | None:
    if Path(path).is_dir() and not any((Path(path) / file).exists() for file in _TOKENIZER_FILES):
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
        # Parts that contradict each other are found at the first text; in Rust, whose panics are no Exception.
        tokenizer("")
        return tokenizer
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise InputError(
            f"the tokenizer of '{path}' could not be read: {in_short(error)}. Give one with tokenizer=..., or remove "
            "its files to work with token ids"
        ) from error


def _read_weights(
    path: str, config: Any, dtype: torch.dtype | str | None, device_map: Any, options: dict[str, Any]
) -> nn.Module:
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype=dtype or "auto",
            device_map=device_map,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    except Exception as error:
        raise InputError(f"the weights of '{path}' could not be loaded: {in_short(error)}") from error
    module, report = loaded
    missing = sorted(report["missing_keys"])
    if missing:
        # transformers fills them with random numbers.
        raise InputError(
            f"the weights of '{path}' are incomplete: {len(missing)} missing, the first is '{missing[0]}'. "
            "Expected every parameter that config.json asks for"
        )
    _check_depth(path, module, report["unexpected_keys"])
    return module


def _check_depth(path: str, module: nn.Module, unused: Iterable[str]) -> None:
    """Raises InputError where there are weights of layers that the model does not have: transformers leaves them out."""
    layers = architecture_for(module.config).layers
    blocks = len(find_module(module, layers) or ())  # pyright: ignore[reportArgumentType]
    place = re.compile(rf"(?:^|\.){re.escape(layers.rpartition('.')[2])}\.([0-9]+)\.")
    deeper = sorted(name for name in unused if (found := place.search(name)) and int(found[1]) >= blocks)
    if deeper:
        raise InputError(
            f"the weights of '{path}' are of more than the {blocks} layers that config.json asks for: there is "
            f"'{deeper[0]}'. Expected the config of the same model"
        )


def placeholder_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Spells each id as its number; it satisfies nnsight's constructor and is never used on a prompt."""
    vocabulary = {str(i): i for i in range(vocab_size)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="0")), pad_token="0", unk_token="0"
    )


def in_short(error: BaseException) -> str:
    """What an error says, in one line of limited length."""
    text = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return text if len(text) <= 300 else f"{text[:297]}..."
