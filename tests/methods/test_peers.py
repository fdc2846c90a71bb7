"""Exact patching against TransformerLens's `patching.get_act_patch_*`, on random models that both run.

TransformerLens is not among the test dependencies; `pip install "patchkit[peers]"` brings the version meant here, and
without it this file is skipped. Its models are built from ours by its own weight conversions, nothing folded or
centred, so nothing is downloaded. Its q, k and v are those before the rotary embedding, which are called q_proj, k_proj
and v_proj here; on grouped-query models its k and v sweeps go over the KV heads, as ours do, as long as its
`ungroup_grouped_query_attention` is off (with it on, they reach only the first few of the copies).
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from patchkit.data import Pair
from patchkit.methods.activation_patching import NodeOptions, patch_nodes
from patchkit.model import PatchModel
from tests.comparisons import agree, pair
from tests.families import VOCAB

peer = pytest.importorskip("transformer_lens")
patching = pytest.importorskip("transformer_lens.patching")
conversions = pytest.importorskip("transformer_lens.pretrained.weight_conversions")

#: 3.9 is the last version with the class that its own sweeps are written for.
pytestmark = pytest.mark.filterwarnings("ignore:HookedTransformer is deprecated:DeprecationWarning")

FAMILIES = ("gpt2", "llama-mha-wide-head", "llama-gqa")
#: The sweep of TransformerLens, the node kind and the positions here.
SWEEPS = (
    ("attn_head_out_all_pos", "z", "all"),
    ("attn_head_out_by_pos", "z", "each"),
    ("attn_head_q_all_pos", "q_proj", "all"),
    ("attn_head_q_by_pos", "q_proj", "each"),
    ("attn_head_k_all_pos", "k_proj", "all"),
    ("attn_head_k_by_pos", "k_proj", "each"),
    ("attn_head_v_all_pos", "v_proj", "all"),
    ("attn_head_v_by_pos", "v_proj", "each"),
    ("resid_pre", "resid_pre", "each"),
    ("resid_mid", "resid_mid", "each"),
    ("attn_out", "attn_out", "each"),
    ("mlp_out", "mlp_out", "each"),
)
#: The prompts of the first pair begin alike, those of the second differ from the first token on.
PAIRS = (
    Pair((5, 9, 30, 2, 17, 8), (5, 9, 12, 2, 33, 8), 3, 7, id="alike"),
    Pair((11, 3, 7, 4, 21), (6, 1, 35, 20, 14), 16, 29, id="other"),
)


@functools.cache
def peer_of(family: str) -> Any:
    """The TransformerLens model with the weights of ours."""
    _, twin = pair(family)
    shared = {
        "d_vocab": VOCAB,
        "n_layers": twin.config.num_hidden_layers,
        "d_model": twin.config.hidden_size,
        "n_heads": twin.config.num_attention_heads,
        "n_ctx": 64,
        "device": "cpu",
        "dtype": torch.float32,
    }
    if family == "gpt2":
        special, convert = _gpt2(twin), conversions.convert_gpt2_weights
    else:
        special, convert = _llama(twin), conversions.convert_llama_weights
    config = peer.HookedTransformerConfig(**shared, **special)
    assert not config.ungroup_grouped_query_attention
    model = peer.HookedTransformer(config, move_to_device=False)
    model.load_and_process_state_dict(
        convert(twin, config),
        fold_ln=False,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=False,
    )
    return model.eval()


def _gpt2(twin: PreTrainedModel) -> dict[str, Any]:
    config = twin.config
    return {
        "d_head": config.n_embd // config.n_head,
        "d_mlp": 4 * config.n_embd,
        "eps": config.layer_norm_epsilon,
        "act_fn": config.activation_function,
        "normalization_type": "LN",
        "original_architecture": "GPT2LMHeadModel",
    }


def _llama(twin: PreTrainedModel) -> dict[str, Any]:
    config = twin.config
    grouped = config.num_key_value_heads != config.num_attention_heads
    return {
        "d_head": config.head_dim,
        "d_mlp": config.intermediate_size,
        "eps": config.rms_norm_eps,
        "act_fn": config.hidden_act,
        "normalization_type": "RMS",
        "positional_embedding_type": "rotary",
        "rotary_adjacent_pairs": False,
        "rotary_dim": config.head_dim,
        "rotary_base": int(config.rope_parameters["rope_theta"]),
        "final_rms": True,
        "gated_mlp": True,
        "n_key_value_heads": config.num_key_value_heads if grouped else None,
        "original_architecture": "LlamaForCausalLM",
    }


def peer_sweep(model: Any, name: str, given: Pair, direction: str) -> Tensor:
    """metric(patched) - metric(base), with the axes of TransformerLens: layer, then position, then head."""
    clean, corrupt = torch.tensor([given.clean_ids]), torch.tensor([given.corrupt_ids])
    base, source = (clean, corrupt) if direction == "noise" else (corrupt, clean)

    def metric(logits: Tensor) -> Tensor:
        return logits[0, -1, given.answer_id] - logits[0, -1, given.wrong_id]

    with torch.no_grad():
        _, cache = model.run_with_cache(source)
        patched = getattr(patching, f"get_act_patch_{name}")(model, base, cache, metric)
        return patched - metric(model(base))


def test_both_run_the_same_model() -> None:
    for family in FAMILIES:
        _, twin = pair(family)
        for given in PAIRS:
            ids = torch.tensor([given.clean_ids, given.corrupt_ids])
            with torch.no_grad():
                agree(peer_of(family)(ids), twin(ids, use_cache=False).logits, family)


@pytest.mark.parametrize("direction", ["noise", "denoise"])
@pytest.mark.parametrize("family", FAMILIES)
def test_sweeps_agree_with_transformer_lens(family: str, direction: Literal["noise", "denoise"]) -> None:
    model: PatchModel = pair(family)[0]
    for name, kind, positions in SWEEPS:
        for given in PAIRS:
            options = NodeOptions(nodes=(kind,), positions=positions, direction=direction)
            scores = patch_nodes(model, [given], options)
            ours = scores.grid.split(scores.effects)[kind][0]
            theirs = peer_sweep(peer_of(family), name, given, direction)
            assert float(theirs.abs().max()) > 1e-3, f"{family} {name}: nothing has an effect"
            agree(ours, theirs, f"{family} {name} {direction} {given.id}")
