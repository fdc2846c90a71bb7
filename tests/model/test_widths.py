"""Every read of an activation and of a weight is as wide as the model's sizes say; a tensor-parallel shard is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from operator import attrgetter
from typing import Any

import pytest
from torch import nn

from patchkit.data import Batch
from patchkit.errors import InputError
from patchkit.model import PatchModel, Site
from patchkit.tracing import capture, capture_gradients
from patchkit.tracing.validate import available_kinds
from tests.comparisons import PROMPTS, metric, pair

FAMILIES = ("llama-gqa", "gpt2", "neox-parallel", "phi3-fused-gqa", "gemma2-post-norms-softcap")


def wider(model: PatchModel) -> PatchModel:
    """The same model, said to be twice as wide in everything: what one of two tensor-parallel devices would see."""
    dims = model.dims
    made = copy.copy(model)
    made.dims = replace(dims, d_model=2 * dims.d_model, d_head=2 * dims.d_head, d_mlp=2 * dims.d_mlp)
    return made


@pytest.mark.parametrize("family", FAMILIES)
def test_half_an_activation_is_refused_by_name(family: str) -> None:
    model, _ = pair(family)
    batch = Batch.from_ids(PROMPTS, pad_id=model.pad_id)
    whole = capture(model, batch, [Site(kind, 1) for kind in available_kinds(model)]).values
    for kind in available_kinds(model):
        site = Site(kind, 1)
        found = whole[site][0, 0].numel()
        if kind.endswith("_proj") and model.arch.packing != "separate":
            # One module gives all three.
            found = sum(whole[Site(f"{letter}_proj", 1)][0, 0].numel() for letter in "qkv")
        expected = f"site {kind}.1 holds {found} numbers a token, expected {2 * found}. .* tensor parallelism"
        with pytest.raises(InputError, match=expected):
            capture(wider(model), batch, [site])
        with pytest.raises(InputError, match=expected):
            capture_gradients(wider(model), batch, [site], metric)


#: Of a layer: the parameter that is cut, and which of its axes.
VIEWS: dict[str, tuple[str, Callable[[PatchModel], object]]] = {
    "W_O": ("out_proj.weight", lambda model: model.w_o(1)),
    "b_O": ("out_proj.bias", lambda model: model.b_o(1)),
    "projections": ("qkv.weight", lambda model: model.projections(1)),
    "their biases": ("qkv.bias", lambda model: model.projections(1)),
    "the attention's norm": ("attn_norm.weight", lambda model: model.attention_norm(1)),
    "its bias": ("attn_norm.bias", lambda model: model.attention_norm(1)),
    "the MLP's norm": ("mlp_norm.weight", lambda model: model.mlp_norm(1)),
    "the norm behind the heads": ("attn_out.weight", lambda model: model.attention_post_norm(1)),
    "the final norm": ("final_norm.weight", lambda model: model.final_norm()),
}


@contextmanager
def cut(module: nn.Module, name: str, axis: int) -> Iterator[None]:
    """Inside, the module has the first half of a parameter only."""
    whole = getattr(module, name)
    half = whole.shape[axis] // 2
    setattr(module, name, nn.Parameter(whole.narrow(axis, 0, half).clone(), requires_grad=False))
    try:
        yield
    finally:
        setattr(module, name, whole)


@pytest.mark.parametrize("family", FAMILIES)
def test_half_a_weight_is_refused_by_name(family: str) -> None:
    model, _ = pair(family)
    tried = 0
    for place, name, read in ((*view[0].split("."), view[1]) for view in VIEWS.values()):
        path: Any = getattr(model.arch, place)
        for each in path if isinstance(path, tuple) else (path,):
            if each is None:
                continue
            root: Any = model.hf if place == "final_norm" else model.block_module(1)
            module = attrgetter(each)(root)
            parameter = getattr(module, name, None)
            if parameter is None:
                continue
            read(model)
            for axis in range(parameter.ndim):
                with cut(module, name, axis):
                    of_layer = "" if place == "final_norm" else " of layer 1"
                    shape = r"\(\d+(, \d+)?,?\), expected \(\d+(, \d+)?,?\)"
                    with pytest.raises(InputError, match=rf"{of_layer} has shape {shape}. A tensor-parallel"):
                        read(model)
                tried += 1
    assert tried >= 7
