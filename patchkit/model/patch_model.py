"""`PatchModel`: an unmodified Hugging Face decoder behind nnsight, with its sizes, its weights as views and its sites."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import torch
from nnsight.intervention.source import STATE
from nnsight.modeling.transformers import TransformersModel
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from patchkit.errors import InputError
from patchkit.model.architectures import Architecture
from patchkit.model.dims import Dims
from patchkit.model.weights import Weights, execution_device, present

#: Elements of each weight that `content_key` reads.
_SAMPLED = 4096


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


class Frozen:
    """Parameters that need no gradient for a while. (A class, since a generator does not travel to a hosted model.)"""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = parameters

    def __enter__(self) -> None:
        for parameter in self._parameters:
            parameter.requires_grad_(False)

    def __exit__(self, *error: object) -> None:
        for parameter in self._parameters:
            parameter.requires_grad_(True)


class PatchModel(Weights):
    """A model that patchkit can read and patch. Made by `patchkit.load`; the HF model inside is not modified.

    Attributes:
        lm: nnsight's wrapper; only `patchkit.tracing` opens traces on it.
        name: what the user called it: an embedded name, a directory, a hub name, or the module's class.
        revision: the hub revision, if one was asked for.
        arch: where this family keeps things.
        dims: its sizes.
        tokenizer: None for a model that came without one (prompts are then token ids).
        lazy: whether the weights are still on the meta device (plans only).
        hosted: where its weights are, if they are not here.
        pad_id: a token for left padding; it is masked, so any id of the vocabulary will do when none is declared.
        opening: arguments with which `patchkit.load` opens the same model in another process; None for a module that was
            made here.
    """

    def __init__(
        self,
        lm: TransformersModel,
        arch: Architecture,
        dims: Dims,
        *,
        name: str,
        tokenizer: PreTrainedTokenizerBase | None,
        revision: str | None = None,
        lazy: bool = False,
        borrowed: bool = False,
        forwards: Mapping[nn.Module, Any] | None = None,
        hosted: Hosted | None = None,
    ) -> None:
        self.lm = lm
        # Of a model that travels: what is known of it where its module cannot be reached.
        self._told: tuple[PretrainedConfig, torch.dtype] | None = None
        self.arch = arch
        self.dims = dims
        self.name = name
        self.tokenizer = tokenizer
        self.revision = revision
        self.lazy = lazy
        self.hosted = hosted
        declared = getattr(tokenizer, "pad_token_id", None)
        if declared is None:
            declared = getattr(self.config, "pad_token_id", None)
        self.pad_id: int = declared if declared is not None and 0 <= declared < dims.vocab_size else 0
        self._borrowed = borrowed
        self._forwards = forwards or {}
        self._content_key: str | None = None
        self.opening: dict[str, Any] | None = None

    def __repr__(self) -> str:
        d = self.dims
        sizes = f"{d.n_layers} layers x {d.n_heads} heads, d_model {d.d_model}"
        return f"PatchModel({self.name!r}, {self.arch.family}, {sizes})"

    @property
    def reachable(self) -> bool:
        """Whether the module can be reached: not by a job in a host's sandbox, which sees its activations alone."""
        return self.lm._module is not None

    @property
    def hf(self) -> nn.Module:
        """The Hugging Face module.

        Raises InputError in a host's sandbox.
        """
        if not self.reachable:
            raise InputError(
                f"{self.name}: this host runs jobs in a sandbox, where weights cannot be read. Methods that read and "
                "write activations alone work there: exact activation patching (patch)"
            )
        return self.lm._module

    @property
    def config(self) -> PretrainedConfig:
        if self._told is not None and not self.reachable:
            return self._told[0]
        return self.hf.config  # pyright: ignore[reportReturnType]

    @property
    def embed_device(self) -> torch.device:
        """Where prompts go: the device of the token embedding."""
        if not self.reachable:
            # The host brings them to it.
            return torch.empty(0).device
        return attrgetter(self.arch.embed)(self.hf).weight.device

    @property
    def dtype(self) -> torch.dtype:
        if self._told is not None and not self.reachable:
            return self._told[1]
        return next(self.hf.parameters()).dtype

    def block(self, layer: int) -> Any:
        """The nnsight envoy of a block."""
        return attrgetter(self.arch.layers)(self.lm)[layer]

    def layer_device(self, layer: int) -> torch.device | None:
        """Where a layer computes, to which accelerate brings its weights if they are offloaded; None where that is not
        known here, as of a model that was opened lazily."""
        if not self.reachable:
            return None
        block = self.block_module(layer)
        for module in block.modules():
            device = execution_device(module)
            if device is not None:
                return device
        parameter = next(block.parameters())
        return None if parameter.is_meta else parameter.device

    def fingerprint(self) -> str:
        """A digest of the weights' metadata (names, shapes, dtypes) and of the config.

        The same model gives the same digest wherever it lies and whichever transformers opens it.
        """
        digest = hashlib.sha256()
        for name, tensor in sorted(self.hf.state_dict().items()):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        config = self.config.to_dict()
        # Not said by a module that was never saved, or said by the weights already.
        for incidental in ("_name_or_path", "transformers_version", "architectures", "dtype"):
            config.pop(incidental, None)
        digest.update(json.dumps(config, sort_keys=True, default=str).encode())
        return digest.hexdigest()[:32]

    def content_key(self) -> str:
        """A digest of the metadata and of a sample of every weight's values: another training stage of the same
        architecture has another one.

        It is the same wherever the model lies, whatever it is called and however it is spread over devices.
        """
        # A module that the user brought may be trained on between two calls.
        if self._content_key is None or self._borrowed:
            digest = hashlib.sha256(self.fingerprint().encode())
            for name, module in sorted(self.hf.named_modules()):
                own = {*module._parameters, *module._buffers} - module._non_persistent_buffers_set
                for own_name in sorted(own):
                    if getattr(module, own_name) is not None:
                        digest.update(f"{name}.{own_name} ".encode() + _sample(present(module, own_name)))
            self._content_key = digest.hexdigest()[:32]
        return self._content_key

    def set_content_key(self, key: str) -> None:
        """What a host has found `content_key` to be."""
        self._content_key = key

    def travelling(self) -> PatchModel:
        """The same model as it travels to its host, where its weights are."""
        there = PatchModel(
            self.lm, self.arch, self.dims, name=self.name, tokenizer=None, revision=self.revision
        )
        there.pad_id, there._told = self.pad_id, (self.config, self.dtype)
        return there

    def frozen(self) -> Frozen:
        """A context in which parameters need no gradient; a borrowed module gets its own settings back afterwards."""
        return Frozen([p for p in self.hf.parameters() if p.requires_grad] if self._borrowed else [])

    def require_weights(self) -> None:
        """Raises InputError on a lazily opened model, which can be planned with but not run, and on a hosted one, on
        which whole methods can be run but no single trace."""
        if self.hosted is not None:
            raise InputError(
                f"{self.name} is hosted at {self.hosted.url} and has no weights here: run a method on it, such as "
                "patch_nodes, or load it without a host"
            )
        if self.lazy:
            raise InputError(
                f"{self.name} was loaded with lazy=True and has no weights; load it without lazy to run it"
            )

    def release(self) -> None:
        """Takes nnsight's controllers off the HF module, which is then exactly as it was before `patchkit.load`.

        Those of an nnsight model that the user brought stay, and so do those that another wrapper of the same module
        still uses.
        """
        for module, forward in self._forwards.items():
            state = module.__dict__.get(STATE)
            if state is None:
                continue
            state.routes = [route for route in state.routes if route[0]() not in (None, self.lm.interleaver)]
            if state.routes:
                continue
            del module.__dict__[STATE]
            if forward is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = forward


def own_forwards(root: nn.Module) -> dict[nn.Module, Any]:
    """Each submodule's own `forward` attribute (accelerate sets one), or None: what nnsight is about to replace.

    Of a module that has a controller already, the original cannot always be known; it is then left out.
    """
    found: dict[nn.Module, Any] = {}
    for module in root.modules():
        state = module.__dict__.get(STATE)
        if state is None:
            found[module] = module.__dict__.get("forward")
        elif state.original is type(module).forward and "_hf_hook" not in module.__dict__:
            found[module] = None
    return found


def _sample(value: Tensor) -> bytes:
    """Some elements from all over a weight, a small one's all; of one that lies nowhere, that it was not read."""
    if value.is_meta:
        return b"not read"
    flat = value.detach().reshape(-1)
    if len(flat) > _SAMPLED:
        # Multiples of the golden ratio are spread evenly, and not all in one column, as equal steps may be.
        spread = torch.arange(_SAMPLED) * 10_368_889 % (1 << 24)
        flat = flat[(spread * len(flat) >> 24).to(flat.device)]
    return flat.cpu().contiguous().view(torch.uint8).numpy().tobytes()
