"""Llamas of well-known shapes with random weights, and a meter of seconds and memory on one device."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from patchkit import load
from patchkit.data import Pair
from patchkit.model import PatchModel

#: layers, heads, KV heads, width, neurons, vocabulary.
SHAPES = {
    "13b": (40, 40, 40, 5120, 13824, 32000),
    "8b": (32, 32, 8, 4096, 14336, 128256),
    "tiny": (3, 4, 2, 64, 128, 300),
}


def build(shape: str, device: str) -> PatchModel:
    """The model of a shape, in bfloat16, made on the device."""
    layers, heads, kv_heads, width, neurons, vocabulary = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=neurons,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=512,
        dtype=torch.bfloat16,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            module = LlamaForCausalLM(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)
    return load(module)


def pairs_of(model: PatchModel, count: int, tokens: int) -> list[Pair]:
    """Pairs of random prompts."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.dims.vocab_size, (2, count, tokens), generator=generator).tolist()
    return [Pair(tuple(a), tuple(b), 1, 2, {}, str(i)) for i, (a, b) in enumerate(zip(*ids, strict=True))]


class Meter:
    """Seconds and peak bytes of a call on one device."""

    def __init__(self, device: str) -> None:
        self.on_gpu = device != "cpu"

    def __call__(self, run: Callable[[], Any], times: int = 1) -> tuple[float, int, Any]:
        """(median seconds, peak bytes beside what was there, the last result); the first call is not counted."""
        found = run()
        taken, peak = [], 0
        for _ in range(times):
            if self.on_gpu:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                there = torch.cuda.memory_allocated()
            start = time.perf_counter()
            found = run()
            if self.on_gpu:
                torch.cuda.synchronize()
                peak = max(peak, torch.cuda.max_memory_allocated() - there)
            taken.append(time.perf_counter() - start)
        return sorted(taken)[len(taken) // 2], peak, found
