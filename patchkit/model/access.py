"""How each site is read and written inside a trace. These functions run in a trace body; they never open one.

Canonical shapes, whatever the family: heads `[batch, position, head, d_head]`, neurons `[batch, position, neuron]`,
residual stream and module outputs `[batch, position, d_model]`. A read is safe to keep (it is never changed by a later
write); a write takes the canonical shape and replaces the whole site.
"""

from __future__ import annotations

from collections.abc import Iterable
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from patchkit.errors import InputError
from patchkit.model.sites import KINDS, Site

if TYPE_CHECKING:
    from patchkit.model.patch_model import PatchModel

_PROJECTION = {"q_proj": 0, "k_proj": 1, "v_proj": 2}
_ATTENTION_ARGUMENT = {"q": 1, "k": 2, "v": 3}


def prepare(model: PatchModel, sites: Iterable[Site]) -> None:
    """Call before opening a trace that visits q, k or v sites.

    nnsight looks inside an attention module's forward only after its `.source` was asked for, and a forward that is
    already running is not looked into any more.
    """
    for site in sites:
        if site.kind in _ATTENTION_ARGUMENT:
            _attention_call(model.block(site.layer), model.arch.attn)


def raw_site(model: PatchModel, site: Site) -> Tensor:
    """The very tensor the forward uses at this site, in the family's own layout; gradients are taken at it.

    Raises:
        InputError: it has not the width that the site has in a model of these sizes.
    """
    raw = _found(model, site)
    kind, dims = KINDS[site.kind], model.dims
    width = kind.count(dims) * kind.width(dims)
    if site.kind in _PROJECTION and model.arch.packing != "separate":
        width = (dims.n_heads + 2 * dims.n_kv_heads) * dims.d_head
    found = raw.shape[-1] * (raw.shape[1] if site.kind in _ATTENTION_ARGUMENT else 1)
    if found != width:
        raise InputError(
            f"{model.name}: site {site} holds {found} numbers a token, expected {width}. Either the model is sharded by "
            "tensor parallelism, of which one device sees a slice only: load it with device_map instead; or the "
            f"architecture table of family '{model.arch.family}' names the wrong module"
        )
    return raw


def _found(model: PatchModel, site: Site) -> Tensor:
    block, arch = model.block(site.layer), model.arch
    match site.kind:
        case "resid_pre":
            return block.input
        case "resid_post":
            return block.output
        case "resid_mid":
            return module_at(block, arch.mid_input).input
        case "attn_out":
            return module_at(block, arch.attn_out_path).output
        case "mlp_in":
            mlp = module_at(block, arch.mlp)
            if arch.mlp_norm is None:
                # What it reads is the residual stream's own tensor: a copy has the gradient of the MLP alone.
                mlp.input = mlp.input.clone()
            return mlp.input
        case "mlp_out":
            return module_at(block, arch.mlp_out_path).output
        case "z":
            return module_at(block, arch.out_proj).input
        case "neuron":
            return _neurons(model, block).input
        case "q" | "k" | "v":
            return _attention_call(block, arch.attn).inputs[0][_ATTENTION_ARGUMENT[site.kind]]
    return module_at(block, arch.qkv[_PROJECTION[site.kind] if arch.packing == "separate" else 0]).output


def canonical(model: PatchModel, site: Site, raw: Tensor) -> Tensor:
    """A raw activation (or its gradient) in canonical shape and on its layer's own device: else a view of it."""
    dims = model.dims
    match site.kind:
        case "resid_pre":
            # Of a model that is spread over devices, the layer before hands it over on its own.
            return raw.to(model.layer_device(site.layer))
        case "z":
            return raw.unflatten(-1, (dims.n_heads, dims.d_head))
        case "q" | "k" | "v":
            return raw.transpose(1, 2)
        case "q_proj" | "k_proj" | "v_proj":
            which = _PROJECTION[site.kind]
            if model.arch.packing != "separate":
                return _unpack(model, raw)[which]
            return raw.unflatten(-1, (dims.n_heads if which == 0 else dims.n_kv_heads, dims.d_head))
    return raw


def read_site(model: PatchModel, site: Site) -> Tensor:
    """The site's activation in canonical shape; call it inside a trace, sites in execution order."""
    raw = raw_site(model, site)
    if site.kind in ("k", "v"):
        # Attention is given those of earlier columns too, where these were run before.
        queries = raw_site(model, Site("q", site.layer))
        return canonical(model, site, raw[:, :, raw.shape[2] - queries.shape[2] :])
    # resid_mid is written in place, so what is read of it must be a copy.
    return raw.clone() if site.kind == "resid_mid" else canonical(model, site, raw)


def write_site(model: PatchModel, site: Site, value: Tensor) -> None:
    """Replaces the site's activation by `value` in canonical shape; call it inside a trace, after any read of it.

    Keys and values of columns that were run before stay as they are.
    """
    block, arch = model.block(site.layer), model.arch
    match site.kind:
        case "resid_pre":
            block.input = value
        case "resid_post":
            block.output = value
        case "resid_mid":
            # The block adds the MLP's output to this very tensor: replacing the module's input alone would
            # leave the skip path untouched.
            module_at(block, arch.mid_input).input.copy_(value)
        case "attn_out":
            module_at(block, arch.attn_out_path).output = value
        case "mlp_in":
            module_at(block, arch.mlp).input = value
        case "mlp_out":
            module_at(block, arch.mlp_out_path).output = value
        case "z":
            module_at(block, arch.out_proj).input = value.flatten(-2)
        case "neuron":
            _neurons(model, block).input = value
        case "q" | "k" | "v":
            call = _attention_call(block, arch.attn)
            arguments, keywords = call.inputs
            place = _ATTENTION_ARGUMENT[site.kind]
            used, value = arguments[place], value.transpose(1, 2)
            if value.shape[2] < used.shape[2]:
                value = torch.cat([used[:, :, : used.shape[2] - value.shape[2]], value], dim=2)
            replaced = (*arguments[:place], value, *arguments[place + 1 :])
            call.inputs = (replaced, keywords)
        case _:
            which = _PROJECTION[site.kind]
            if arch.packing == "separate":
                module_at(block, arch.qkv[which]).output = value.flatten(-2)
            else:
                module = module_at(block, arch.qkv[0])
                parts = list(_unpack(model, module.output))
                parts[which] = value
                module.output = _pack(model, parts)


def skip_projections(model: PatchModel, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> None:
    """Puts queries, keys and values, in canonical shape, in the place of a layer's projections, which then do not run.

    Call it inside a trace. What the family does behind its projections (q/k norms, rotary, windows) is done with these.
    """
    block, arch = model.block(layer), model.arch
    parts = [queries, keys, values]
    if arch.packing == "separate":
        for path, part in zip(arch.qkv, parts, strict=True):
            module_at(block, path).skip(part.flatten(-2))
    else:
        module_at(block, arch.qkv[0]).skip(_pack(model, parts))


def attention_arguments(model: PatchModel, layer: int) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """(queries, keys, keyword arguments) of the layer's attention call, canonical shapes; inside a trace."""
    arguments, keywords = _attention_call(model.block(layer), model.arch.attn).inputs
    return arguments[1].transpose(1, 2), arguments[2].transpose(1, 2), keywords


def module_at(block: Any, path: str) -> Any:
    return attrgetter(path)(block)


def _attention_call(block: Any, attn: str) -> Any:
    """The call `attention_interface(module, q, k, v, mask, ...)` inside the attention module's forward."""
    return module_at(block, attn).source.attention_interface_1


def _neurons(model: PatchModel, block: Any) -> Any:
    # `check_site` has refused the sites that are not there.
    assert model.arch.neurons is not None
    return module_at(block, model.arch.neurons)


def _unpack(model: PatchModel, fused: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A fused projection's output as (q, k, v), each [batch, position, head, d_head]."""
    dims = model.dims
    if model.arch.packing == "per_head":
        q, k, v = fused.unflatten(-1, (dims.n_heads, 3 * dims.d_head)).chunk(3, dim=-1)
        return q, k, v
    heads, kv_heads = dims.n_heads, dims.n_kv_heads
    q, k, v = fused.unflatten(-1, (heads + 2 * kv_heads, dims.d_head)).split(
        [heads, kv_heads, kv_heads], dim=-2
    )
    return q, k, v


def _pack(model: PatchModel, parts: list[Tensor]) -> Tensor:
    """The inverse of `_unpack`."""
    if model.arch.packing == "per_head":
        return torch.cat(parts, dim=-1).flatten(-2)
    return torch.cat(parts, dim=-2).flatten(-2)
