"""Sizes, and the weights that come as views."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from patchkit.data.batch import Batch
from patchkit.errors import InputError
from patchkit.model import Site, architecture_for
from patchkit.model.dims import check_paths, input_width, read_dims
from patchkit.tracing import capture
from tests.comparisons import PROMPTS, agree, pair
from tests.families import FAMILIES, build


@pytest.mark.parametrize(
    ("family", "heads", "kv_heads", "d_head", "d_mlp", "parallel"),
    [
        ("llama-gqa", 4, 2, 8, 40, False),
        ("llama-mha-wide-head", 4, 4, 12, 40, False),
        ("qwen3-qk-norm", 4, 2, 8, 40, False),
        ("gpt2", 4, 4, 8, 128, False),
        ("neox-parallel", 4, 4, 8, 40, True),
        ("neox-sequential", 4, 4, 8, 40, False),
        ("phi3-fused-gqa", 4, 2, 8, 40, False),
    ],
)
def test_sizes(family: str, heads: int, kv_heads: int, d_head: int, d_mlp: int, parallel: bool) -> None:
    dims = pair(family)[0].dims
    assert (dims.n_layers, dims.d_model, dims.vocab_size) == (3, 32, 37)
    assert (dims.n_heads, dims.n_kv_heads, dims.d_head, dims.d_mlp) == (heads, kv_heads, d_head, d_mlp)
    assert dims.parallel is parallel
    assert dims.group == heads // kv_heads


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_recompose_to_what_the_projection_gives(family: str) -> None:
    """sum_h z_h @ W_O[h] + b_O, one head at a time, against the module itself."""
    model, twin = pair(family)
    assert [parameter.shape for parameter in twin.parameters()] == [p.shape for p in model.hf.parameters()]
    batch = Batch.from_ids(PROMPTS[:1])
    for layer in range(3):
        z = capture(model, batch, [Site("z", layer)]).values[Site("z", layer)][0]
        weight, bias = model.w_o(layer), model.b_o(layer)
        total = torch.zeros(len(z), 32)
        for head in range(model.dims.n_heads):
            total += z[:, head] @ weight[head]
        if bias is not None:
            assert bias.abs().max() > 0
            total += bias
        projection = twin.get_submodule(
            f"{architecture_for(twin.config).layers}.{layer}.{model.arch.out_proj}"
        )
        with torch.no_grad():
            agree(total, projection(z.flatten(1)), f"{family}, layer {layer}")


def test_weights_are_views() -> None:
    for family in ("llama-gqa", "gpt2"):
        model = pair(family)[0]
        weight = model.w_o(1)
        assert weight.untyped_storage().data_ptr() in {
            p.untyped_storage().data_ptr() for p in model.hf.parameters()
        }


def test_sizes_that_contradict_each_other_are_refused() -> None:
    module = build("llama-gqa")
    entry = architecture_for(module.config)
    check_paths(module, entry)

    def refused(message: str, **changes: int) -> None:
        settings: dict[str, Any] = module.config.to_dict() | changes
        config = LlamaConfig(**settings)
        with pytest.raises(InputError, match=message):
            read_dims(module, config, entry)

    refused(r"reads 32 columns, expected heads x d_head = 4 x 16 = 64", head_dim=16)
    refused(r"4 heads do not divide into 3 KV heads", num_key_value_heads=3)


def test_a_projection_is_expected() -> None:
    assert input_width(torch.nn.Linear(3, 5)) == 3
    for module in (torch.nn.LayerNorm(4), torch.nn.Dropout()):
        with pytest.raises(InputError, match=f"expected a projection.*found {type(module).__name__}"):
            input_width(module)


def test_every_block_is_checked_not_only_the_first() -> None:
    module = build("llama-gqa")
    delattr(module.get_submodule("model.layers.2.mlp"), "down_proj")
    with pytest.raises(InputError, match="layer 2: no module 'mlp.down_proj' for 'neurons'"):
        check_paths(module, architecture_for(module.config))
