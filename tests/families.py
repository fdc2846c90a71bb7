"""Tiny random models of every family in the table, each with the feature that makes it hard."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.masking_utils import eager_mask

VOCAB = 37
_IDS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "max_position_embeddings": 64,
}
_GQA: dict[str, Any] = _SIZES | _IDS | {"num_attention_heads": 4, "num_key_value_heads": 2}
_NEOX: dict[str, Any] = _SIZES | _IDS | {"num_attention_heads": 4}

#: name -> a fresh, seeded, untrained model. Names carry what is special about the case.
FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama-gqa": lambda: LlamaForCausalLM(LlamaConfig(**_GQA)),
    "llama-mha-wide-head": lambda: LlamaForCausalLM(
        LlamaConfig(**_SIZES, **_IDS, num_attention_heads=4, head_dim=12)
    ),
    "mistral-window": lambda: MistralForCausalLM(MistralConfig(**_GQA, sliding_window=4)),
    "mixtral-experts": lambda: MixtralForCausalLM(
        MixtralConfig(**_GQA, num_local_experts=4, num_experts_per_tok=2)
    ),
    "qwen2-biases": lambda: Qwen2ForCausalLM(Qwen2Config(**_GQA)),
    "qwen2-window-above-layer-0": lambda: Qwen2ForCausalLM(
        Qwen2Config(**_GQA, use_sliding_window=True, sliding_window=4, max_window_layers=1)
    ),
    "qwen3-qk-norm": lambda: Qwen3ForCausalLM(Qwen3Config(**_GQA, head_dim=8)),
    "gemma2-post-norms-softcap": lambda: Gemma2ForCausalLM(
        Gemma2Config(
            **_GQA, head_dim=8, sliding_window=4, attn_logit_softcapping=2.0, final_logit_softcapping=3.0
        )
    ),
    "gemma3-two-thetas": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(
            **_GQA,
            head_dim=8,
            sliding_window=4,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        )
    ),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=3, n_head=4, n_positions=64, **_IDS)
    ),
    "neox-parallel": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**_NEOX)),
    "neox-sequential": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**_NEOX, use_parallel_residual=False)),
    "phi3-fused-gqa": lambda: Phi3ForCausalLM(Phi3Config(**_GQA)),
    "olmo2": lambda: Olmo2ForCausalLM(Olmo2Config(**_GQA)),
}


PRECISE = "eager-in-full-precision"


def _precise_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Eager attention whose softmax has the model's own precision.

    That of transformers is in float32 always, so that a float64 Gemma has 7 digits, and NaN in the rows of padding.
    """
    key, value = (each.repeat_interleave(module.num_key_value_groups, dim=1) for each in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    pattern = (scores if attention_mask is None else scores + attention_mask).softmax(-1)
    return (pattern @ value).transpose(1, 2).contiguous(), pattern


AttentionInterface.register(PRECISE, _precise_attention)
AttentionMaskInterface.register(PRECISE, eager_mask)

#: Families whose MLP cannot be split into neurons.
WITHOUT_NEURONS = {"mixtral-experts"}


def build(name: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model of the table above, with weights large enough that attention is not uniform and biases not zero."""
    torch.manual_seed(seed)
    model: Any = FAMILIES[name]()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(8.0 if "embed" not in parameter_name and "wte" not in parameter_name else 20.0)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    if dtype == torch.float64 and name.startswith("gemma"):
        model.set_attn_implementation(PRECISE)
    return model.to(dtype).eval()
