"""A model that is linear in its residual stream: effects of edges add up exactly, so that sum rules can be tested.

A Llama with the handmade one's norm (the identity), whose queries, keys and MLP gates read a constant of the embedding
that nothing else ever writes: attention follows positions alone, and gates are the same for all tokens.
"""

from __future__ import annotations

import functools

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from patchkit.data import Pair
from patchkit.model import PatchModel
from patchkit.zoo.load import load

WIDTH, VOCAB = 24, 19


@functools.cache
def linear_model(layers: int = 3) -> tuple[PatchModel, tuple[Pair, ...]]:
    """The model and two pairs of different length."""
    torch.manual_seed(3)
    hf = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=WIDTH,
            intermediate_size=16,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            rms_norm_eps=float(2**40),
            tie_word_embeddings=False,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            if "norm" in name:
                parameter.fill_(2.0**20)
            else:
                parameter.normal_(std=0.3)
            if name.split(".")[-2] in ("q_proj", "k_proj", "gate_proj"):
                parameter[:, 1:] = 0
            elif "o_proj" in name or "down_proj" in name:
                parameter[0] = 0
        hf.get_input_embeddings().weight[:, 0] = 1.0
    pairs = (
        Pair((3, 5, 7, 9, 11, 13), (4, 6, 3, 10, 12, 8), 4, 6, {"s": (2, 4)}, "six"),
        Pair((8, 6, 4, 17), (8, 5, 14, 3), 5, 7, {"s": (1, 2)}, "four"),
    )
    return load(hf.eval().requires_grad_(False)), pairs
