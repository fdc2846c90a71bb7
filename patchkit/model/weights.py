"""A model's weights as views, per head, and norms as arithmetic: from wherever accelerate has put them."""

from __future__ import annotations

from operator import attrgetter
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from patchkit.errors import InputError
from patchkit.model.architectures import Architecture
from patchkit.model.dims import Dims
from patchkit.model.norms import Norm, norm_of


class Projection(NamedTuple):
    """One of the three maps of an attention, per head: x @ weight[h] + bias[h]. Views of the model's weights."""

    weight: Float[Tensor, "head d_model d_head"]
    bias: Float[Tensor, "head d_head"] | None


class Weights:
    """The part of a `PatchModel` that reads weights; every view is checked to be as wide as the model's sizes say."""

    name: str
    arch: Architecture
    dims: Dims

    @property
    def hf(self) -> nn.Module:
        """The Hugging Face module."""
        raise NotImplementedError

    def block_module(self, layer: int) -> nn.Module:
        """The HF module of a block."""
        return attrgetter(self.arch.layers)(self.hf)[layer]

    def w_o(self, layer: int) -> Float[Tensor, "head d_head d_model"]:
        """W_O of a layer, per head: a view of the model's weight.

        attn_out before any post-norm = sum_h z_h @ W_O[h] + b_O. Of an offloaded layer the stored copy
        is read.
        """
        module = attrgetter(self.arch.out_proj)(self.block_module(layer))
        width = self.dims.n_heads * self.dims.d_head
        weight = self._whole(_matrix(module), f"W_O of layer {layer}", width, self.dims.d_model)
        return weight.unflatten(0, (self.dims.n_heads, self.dims.d_head))

    def b_o(self, layer: int) -> Float[Tensor, " d_model"] | None:
        """The output projection's bias, or None."""
        module = attrgetter(self.arch.out_proj)(self.block_module(layer))
        if module.bias is None:
            return None
        return self._whole(present(module, "bias"), f"b_O of layer {layer}", self.dims.d_model)

    def projections(self, layer: int) -> tuple[Projection, Projection, Projection]:
        """The query, key and value projections of a layer, per head; of an offloaded layer the stored copies."""
        block, dims = self.block_module(layer), self.dims
        counts = (dims.n_heads, dims.n_kv_heads, dims.n_kv_heads)
        widths = [count * dims.d_head for count in counts]
        weights, biases = [], []
        for place, path in enumerate(self.arch.qkv):
            module, what = attrgetter(path)(block), f"{path} of layer {layer}"
            width = widths[place] if self.arch.packing == "separate" else sum(widths)
            weights.append(self._whole(_matrix(module), f"the weight of {what}", dims.d_model, width))
            bias = None if module.bias is None else present(module, "bias")
            biases.append(None if bias is None else self._whole(bias, f"the bias of {what}", width))
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
        return self._norm(self.arch.attn_norm, layer)

    def mlp_norm(self, layer: int) -> Norm | None:
        """The norm that a layer's MLP reads the stream through, or None."""
        return self._norm(self.arch.mlp_norm, layer)

    def attention_post_norm(self, layer: int) -> Norm | None:
        """The norm between a layer's heads and the stream, or None."""
        return self._norm(self.arch.attn_out, layer)

    def final_norm(self) -> Norm:
        """The norm before the unembedding."""
        found = self._norm(self.arch.final_norm)
        assert found is not None
        return found

    def _norm(self, path: str | None, layer: int | None = None) -> Norm | None:
        if path is None:
            return None
        module = attrgetter(path)(self.hf if layer is None else self.block_module(layer))
        what = path if layer is None else f"{path} of layer {layer}"
        weight = self._whole(present(module, "weight"), f"the weight of {what}", self.dims.d_model)
        bias = None if getattr(module, "bias", None) is None else present(module, "bias")
        bias = None if bias is None else self._whole(bias, f"the bias of {what}", self.dims.d_model)
        return norm_of(module, self.arch.norm_offset, weight, bias)

    def _whole(self, weight: Tensor, what: str, *expected: int) -> Tensor:
        """Refuses a weight of which one device holds a slice only (tensor parallelism), or another module's."""
        if tuple(weight.shape) != expected:
            raise InputError(
                f"{self.name}: {what} has shape {tuple(weight.shape)}, expected {expected}. A tensor-parallel shard "
                "cannot be used: load the model with device_map instead; if it is none, the architecture table of family "
                f"'{self.arch.family}' names the wrong module"
            )
        return weight


def execution_device(module: nn.Module) -> torch.device | None:
    """Where accelerate has a module compute, None without a hook of its own that says so."""
    for hook in _accelerate_hooks(module):
        device = getattr(hook, "execution_device", None)
        if device is not None:
            # A bare number is one of the accelerator's, whichever that is.
            return torch.device(device)
    return None


def _accelerate_hooks(module: nn.Module) -> list[Any]:
    hook = module.__dict__.get("_hf_hook")
    return [] if hook is None else list(getattr(hook, "hooks", [hook]))


def present(module: nn.Module, name: str) -> Tensor:
    """A parameter, from accelerate's store where it is offloaded."""
    value = getattr(module, name)
    if value.is_meta:
        for hook in _accelerate_hooks(module):
            if getattr(hook, "weights_map", None) is not None:
                return hook.weights_map[name]
    return value


def _matrix(module: nn.Module) -> Tensor:
    """The weight of a linear map, with inputs as rows."""
    weight = present(module, "weight")
    # GPT-2's keeps it so.
    return weight if type(module).__name__ == "Conv1D" else weight.T
