"""`PatchModel`: an unmodified Hugging Face decoder behind nnsight, with its sizes, its weights as views and its sites."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from nnsight.intervention.source import STATE
from nnsight.modeling.transformers import TransformersModel
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from patchkit.errors import InputError
from patchkit.model.architectures import Architecture
from patchkit.model.dims import Dims
from patchkit.model.norms import Norm, norm_of

#: Elements of each weight that `content_key` reads.
_SAMPLED = 4096


class Projection(NamedTuple):
    """One of the three maps of an attention, per head: x @ weight[h] + bias[h]. Views of the model's weights."""

    weight: Float[Tensor, "head d_model d_head"]
    bias: Float[Tensor, "head d_head"] | None


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


class PatchModel:
    """A model that patchkit can read and patch. Made by `patchkit.load`; the HF model inside is not modified.

    Attributes:
        lm: nnsight's wrapper; only `patchkit.tracing` opens traces on it.
        name: what the user called it: an embedded name, a directory, a hub name, or the module's class.
        revision: the hub revision, if one was asked for.
        arch: where this family keeps things.
        dims: its sizes.
        tokenizer: None for a model that came without one (prompts are then token ids).
        lazy: whether the weights are still on the meta device (plans only).
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
    ) -> None:
        self.lm = lm
        self.arch = arch
        self.dims = dims
        self.name = name
        self.tokenizer = tokenizer
        self.revision = revision
        self.lazy = lazy
        self._borrowed = borrowed
        self._forwards = forwards or {}
        self._content_key: str | None = None
        self.opening: dict[str, Any] | None = None

    def __repr__(self) -> str:
        d = self.dims
        sizes = f"{d.n_layers} layers x {d.n_heads} heads, d_model {d.d_model}"
        return f"PatchModel({self.name!r}, {self.arch.family}, {sizes})"

    @property
    def hf(self) -> nn.Module:
        """The Hugging Face module."""
        return self.lm._module

    @property
    def config(self) -> PretrainedConfig:
        return self.hf.config  # pyright: ignore[reportReturnType]

    @property
    def embed_device(self) -> torch.device:
        """Where prompts go: the device of the token embedding."""
        return attrgetter(self.arch.embed)(self.hf).weight.device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.hf.parameters()).dtype

    @property
    def pad_id(self) -> int:
        """A token for left padding; it is masked, so any id of the vocabulary will do when none is declared."""
        declared = getattr(self.tokenizer, "pad_token_id", None)
        if declared is None:
            declared = getattr(self.config, "pad_token_id", None)
        return declared if declared is not None and 0 <= declared < self.dims.vocab_size else 0

    def block(self, layer: int) -> Any:
        """The nnsight envoy of a block."""
        return attrgetter(self.arch.layers)(self.lm)[layer]

    def block_module(self, layer: int) -> nn.Module:
        """The HF module of a block."""
        return attrgetter(self.arch.layers)(self.hf)[layer]

    def layer_device(self, layer: int) -> torch.device | None:
        """Where a layer computes, to which accelerate brings its weights if they are offloaded; None where that is not
        known here, as of a model that was opened lazily."""
        block = self.block_module(layer)
        for module in block.modules():
            device = execution_device(module)
            if device is not None:
                return device
        parameter = next(block.parameters())
        return None if parameter.is_meta else parameter.device

    def w_o(self, layer: int) -> Float[Tensor, "head d_head d_model"]:
        """W_O of a layer, per head: a view of the model's weight.

        attn_out before any post-norm = sum_h z_h @ W_O[h] + b_O. Of an offloaded layer the stored copy
        is read.
        """
        module = attrgetter(self.arch.out_proj)(self.block_module(layer))
        weight = _present(module, "weight")
        weight = weight if _is_conv1d(module) else weight.T
        heads, width = self.dims.n_heads, self.dims.d_head
        if tuple(weight.shape) != (heads * width, self.dims.d_model):
            raise InputError(
                f"{self.name}: W_O of layer {layer} has shape {tuple(weight.shape)}, expected "
                f"{(heads * width, self.dims.d_model)}; a tensor-parallel shard cannot be used"
            )
        return weight.unflatten(0, (heads, width))

    def b_o(self, layer: int) -> Float[Tensor, " d_model"] | None:
        """The output projection's bias, or None."""
        module = attrgetter(self.arch.out_proj)(self.block_module(layer))
        return None if module.bias is None else _present(module, "bias")

    def projections(self, layer: int) -> tuple[Projection, Projection, Projection]:
        """The query, key and value projections of a layer, per head; of an offloaded layer the stored copies."""
        block, dims = self.block_module(layer), self.dims
        counts = (dims.n_heads, dims.n_kv_heads, dims.n_kv_heads)
        weights, biases = [], []
        for path in self.arch.qkv:
            module = attrgetter(path)(block)
            weight = _present(module, "weight")
            weights.append(weight if _is_conv1d(module) else weight.T)
            biases.append(None if module.bias is None else _present(module, "bias"))
        if self.arch.packing == "per_head":
            # Columns are (head, which of the three, d_head).
            split = weights[0].unflatten(1, (dims.n_heads, 3, dims.d_head)).unbind(2)
            none = (None, None, None)
            shifts = (
                none
                if biases[0] is None
                else biases[0].unflatten(0, (dims.n_heads, 3, dims.d_head)).unbind(1)
            )
        else:
            if self.arch.packing == "stacked":
                widths = [count * dims.d_head for count in counts]
                weights = list(weights[0].split(widths, dim=1))
                biases = [None] * 3 if biases[0] is None else list(biases[0].split(widths))
            split = [w.unflatten(1, (count, dims.d_head)) for w, count in zip(weights, counts, strict=True)]
            shifts = [
                None if b is None else b.unflatten(0, (count, dims.d_head))
                for b, count in zip(biases, counts, strict=True)
            ]
        q, k, v = (Projection(w.transpose(0, 1), b) for w, b in zip(split, shifts, strict=True))
        return q, k, v

    def attention_norm(self, layer: int) -> Norm | None:
        """The norm that a layer's attention reads the stream through, or None."""
        return self._norm(self.arch.attn_norm, self.block_module(layer))

    def mlp_norm(self, layer: int) -> Norm | None:
        """The norm that a layer's MLP reads the stream through, or None."""
        return self._norm(self.arch.mlp_norm, self.block_module(layer))

    def attention_post_norm(self, layer: int) -> Norm | None:
        """The norm between a layer's heads and the stream, or None."""
        return self._norm(self.arch.attn_out, self.block_module(layer))

    def final_norm(self) -> Norm:
        """The norm before the unembedding."""
        found = self._norm(self.arch.final_norm, self.hf)
        assert found is not None
        return found

    def _norm(self, path: str | None, root: nn.Module) -> Norm | None:
        if path is None:
            return None
        module = attrgetter(path)(root)
        bias = None if getattr(module, "bias", None) is None else _present(module, "bias")
        return norm_of(module, self.arch.norm_offset, _present(module, "weight"), bias)

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
                        digest.update(f"{name}.{own_name} ".encode() + _sample(_present(module, own_name)))
            self._content_key = digest.hexdigest()[:32]
        return self._content_key

    def frozen(self) -> Frozen:
        """A context in which parameters need no gradient; a borrowed module gets its own settings back afterwards."""
        return Frozen([p for p in self.hf.parameters() if p.requires_grad] if self._borrowed else [])

    def require_weights(self) -> None:
        """Raises InputError on a lazily opened model, which can be planned with but not run."""
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


def execution_device(module: nn.Module) -> torch.device | None:
    """Where accelerate has a module compute, None without a hook of its own that says so."""
    for hook in _accelerate_hooks(module):
        device = getattr(hook, "execution_device", None)
        if device is not None:
            return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    return None


def _accelerate_hooks(module: nn.Module) -> list[Any]:
    hook = module.__dict__.get("_hf_hook")
    return [] if hook is None else list(getattr(hook, "hooks", [hook]))


def _present(module: nn.Module, name: str) -> Tensor:
    """A parameter, from accelerate's store where it is offloaded."""
    value = getattr(module, name)
    if value.is_meta:
        for hook in _accelerate_hooks(module):
            if getattr(hook, "weights_map", None) is not None:
                return hook.weights_map[name]
    return value


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


def _is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D"
