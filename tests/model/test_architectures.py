"""The architecture table: what is refused and how, a family of one's own in ten lines, and wrong entries found out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertLMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from patchkit.errors import InputError
from patchkit.model import (
    Architecture,
    architecture_for,
    families,
    register_architecture,
    unregister_architecture,
)
from patchkit.zoo.load import load
from tests import oracles
from tests.comparisons import check_gradients, check_patches, check_reads, kinds_of
from tests.families import FAMILIES, build


class ToyConfig(LlamaConfig):
    model_type = "toy"


class ToyForCausalLM(LlamaForCausalLM):
    config_class = ToyConfig
    config: ToyConfig


def toy_entry(**changes: Any) -> Architecture:
    entry = Architecture(
        family="toy",
        layers="model.layers",
        embed="model.embed_tokens",
        final_norm="model.norm",
        attn="self_attn",
        qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        out_proj="self_attn.o_proj",
        mid_input="post_attention_layernorm",
        mlp="mlp",
        neurons="mlp.down_proj",
    )
    return replace(entry, **changes)


def toy() -> ToyForCausalLM:
    """Without GQA, so that queries, keys and values have one shape and can be mistaken for each other."""
    torch.manual_seed(0)
    config = ToyConfig(
        vocab_size=37,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=4,
        pad_token_id=0,
    )
    model = ToyForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8.0 if parameter.ndim > 1 else 1.0)
    return model.eval()


@pytest.fixture
def clean_table() -> Iterator[None]:
    yield
    if "toy" in families():
        unregister_architecture("toy")


def test_the_table_has_the_families_of_the_tests() -> None:
    assert {build(family).config.model_type for family in FAMILIES} == set(families())
    assert families() == sorted(families())


def test_an_unknown_family_says_what_was_looked_for() -> None:
    with pytest.raises(InputError) as caught:
        load(toy())
    message = str(caught.value)
    assert "model family 'toy' (config.model_type of ToyConfig)" in message
    assert all(family in message for family in families())
    assert "register_architecture" in message and "\n" not in message


def test_a_model_that_is_no_decoder_is_refused_by_its_family() -> None:
    config = BertConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        vocab_size=9,
        is_decoder=True,
    )
    with pytest.raises(InputError, match="model family 'bert'"):
        load(BertLMHeadModel(config).eval())


@pytest.mark.usefixtures("clean_table")
def test_a_family_of_ones_own_in_ten_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    register_architecture(toy_entry())
    model, twin = load(toy()), toy()
    assert model.arch is architecture_for(twin.config)
    monkeypatch.setitem(oracles.FAMILIES, "toy", oracles.FAMILIES["llama"])
    kinds = kinds_of("llama-gqa")
    check_reads(model, twin, kinds)
    check_gradients(model, twin, kinds)
    check_patches(model, twin, kinds)


@pytest.mark.usefixtures("clean_table")
def test_entries_are_replaced_only_when_asked() -> None:
    register_architecture(toy_entry())
    with pytest.raises(InputError, match="'toy' is registered already; pass replace_existing=True"):
        register_architecture(toy_entry())
    with pytest.raises(InputError, match="'llama' is registered already"):
        register_architecture(toy_entry(family="llama"))
    other = toy_entry(neurons="mlp.up_proj")
    register_architecture(other, replace_existing=True)
    assert architecture_for(ToyConfig()) is other
    unregister_architecture("toy")
    with pytest.raises(InputError, match="'toy' is not registered; known: .*llama"):
        unregister_architecture("toy")


def test_an_entry_with_the_wrong_number_of_projections_is_refused() -> None:
    with pytest.raises(InputError, match=r"'toy': packing 'separate' needs 3 path\(s\) in qkv, found 1"):
        toy_entry(qkv=("self_attn.qkv_proj",))
    with pytest.raises(InputError, match=r"packing 'stacked' needs 1 path\(s\) in qkv, found 3"):
        toy_entry(packing="stacked")


Q, K, V = toy_entry().qkv
#: A wrong entry, and what the error must name.
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no such path in the model": (
        {"final_norm": "model.final"},
        r"no module 'model.final' for 'final_norm'. Found: .*model.norm",
    ),
    "no such path in a block": (
        {"out_proj": "self_attn.dense"},
        r"layer 0: no module 'self_attn.dense' for 'out_proj'. Found: .*o_proj",
    ),
    "blocks that are no list": (
        {"layers": "model"},
        r"'model' should be a non-empty ModuleList, found LlamaModel",
    ),
    "embedding that is none": (
        {"embed": "model.norm"},
        r"'model.norm' should be the token embedding.*found LlamaRMSNorm",
    ),
    "neurons of a module without weights": (
        {"neurons": "mlp"},
        r"neurons='mlp': expected a projection.*found LlamaMLP",
    ),
    "neurons before the nonlinearity": ({"neurons": "mlp.gate_proj"}, "neurons do not recompose to mlp_out"),
    "queries and keys exchanged": ({"qkv": (K, Q, V)}, "OutOfOrderError.*q_proj.output"),
    "keys and values exchanged": ({"qkv": (Q, V, K)}, "OutOfOrderError.*k_proj.output"),
    "one projection twice": (
        {"qkv": (Q, K, K)},
        "writing one head of 'v_proj' leaves that head of 'v' as it is",
    ),
    "wrong output projection": ({"out_proj": Q}, "OutOfOrderError.*q_proj.input"),
    "wrong middle of the block": ({"mid_input": "input_layernorm"}, "OutOfOrderError.*input_layernorm.input"),
    "middle of the block after its norm": (
        {"mid_input": "mlp"},
        "layer 0: resid_pre [+] attn_out is not resid_mid",
    ),
    "wrong attention output": ({"attn_out": "post_attention_layernorm"}, "OutOfOrderError.*post_attention"),
    "wrong MLP output": ({"mlp_out": "mlp.up_proj"}, "OutOfOrderError.*up_proj.output"),
    "called parallel": ({"parallel_flag": True}, "called parallel, but the MLP reads the attention's output"),
    "no attention at all": ({"attn": "mlp"}, "could not be read by the architecture table: AttributeError"),
}


@pytest.mark.usefixtures("clean_table")
@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_entry_is_found_out(case: str) -> None:
    changes, message = WRONG[case]
    register_architecture(toy_entry(**changes))
    module = toy()
    with pytest.raises(InputError, match=message):
        load(module)


@pytest.mark.usefixtures("clean_table")
def test_entries_of_other_families_do_not_fit() -> None:
    """Each table entry with the model of another family that has the same module names."""
    for family, entry_of in (
        ("gemma2-post-norms-softcap", "llama"),
        ("olmo2", "llama"),
        ("gemma3-two-thetas", "olmo2"),
    ):
        module = build(family)
        right = architecture_for(module.config)
        wrong = architecture_for(build(next(name for name in FAMILIES if name.startswith(entry_of))).config)
        register_architecture(replace(wrong, family=right.family), replace_existing=True)
        try:
            with pytest.raises(InputError, match=f"family '{right.family}'.* layer 0"):
                load(module)
        finally:
            register_architecture(right, replace_existing=True)


class CopyingLayer(LlamaDecoderLayer):
    """Gives its MLP branch a copy of the residual stream: what is written there does not reach the skip connection."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:  # pyright: ignore
        middle = (
            hidden_states + self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)[0]
        )
        return middle + self.mlp(self.post_attention_layernorm(middle.clone()))


@pytest.mark.usefixtures("clean_table")
def test_a_write_that_misses_the_skip_connection_is_found_out() -> None:
    register_architecture(toy_entry())
    module = toy()
    for layer in module.model.layers:
        layer.__class__ = CopyingLayer
    with pytest.raises(InputError, match="after writing 'resid_mid' the residual stream does not add up"):
        load(module)


@pytest.mark.usefixtures("clean_table")
def test_neurons_of_a_parallel_flag_come_from_the_config() -> None:
    sequential, parallel = build("neox-sequential").config, build("neox-parallel").config
    entry = architecture_for(sequential)
    assert not entry.is_parallel(sequential) and entry.is_parallel(parallel)
    assert toy_entry(parallel_flag=True).is_parallel(sequential)
