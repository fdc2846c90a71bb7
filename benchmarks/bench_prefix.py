"""What it saves that a preamble common to all prompts is run once: CPU time and tokens, with it and without.

On a random grouped-query Llama (6 layers, width 256), 8 pairs of a preamble of 200 tokens and 12 tokens behind it, in
batches of 4 pairs, one process, one thread. Both give the same numbers, which is checked first. With the preamble shared,
its one run is in the time of every repetition: what was known before is forgotten.

    python benchmarks/bench_prefix.py [--repetitions 5] [--out benchmarks/results/bench_prefix.json]
"""

from __future__ import annotations

import argparse
import contextlib
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from _measure import keep_memory, machine, ratio, seconds, show, spread, write
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from patchkit import load
from patchkit.data import Pair
from patchkit.methods._edge_options import EdgeOptions
from patchkit.methods._node_options import NodeOptions
from patchkit.methods.activation_patching import patch_nodes
from patchkit.methods.attribution import attribute
from patchkit.methods.circuits import run_circuits
from patchkit.methods.edge_attribution import attribute_edges
from patchkit.model import EdgeGraph, PatchModel
from patchkit.results.circuit import Circuit
from patchkit.tracing.prefixes import Prefixes, use_prefixes

LAYERS, WIDTH, HEADS, KV_HEADS, VOCABULARY = 6, 256, 8, 4, 2000
PREAMBLE, REST, PAIRS, BATCH = 200, 12, 8, 4
BUDGET = BATCH * (PREAMBLE + REST)


def build() -> PatchModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=688,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=2 * (PREAMBLE + REST),
    )
    return load(LlamaForCausalLM(config).eval())


def make_pairs() -> list[Pair]:
    draw = random.Random(0)

    def some(count: int) -> tuple[int, ...]:
        return tuple(draw.randrange(3, VOCABULARY) for _ in range(count))

    preamble = some(PREAMBLE)
    return [Pair(preamble + some(REST), preamble + some(REST), 1, 2, id=str(i)) for i in range(PAIRS)]


def methods(model: PatchModel, pairs: list[Pair]) -> dict[str, Callable[[], Tensor]]:
    """Each gives the numbers that must be the same."""
    nodes = NodeOptions(nodes=("z", "mlp_out"), max_batch_tokens=BUDGET)
    heads = NodeOptions(nodes=("z",), layers=(1, 4), max_batch_tokens=32 * BUDGET)
    edges = EdgeOptions(max_batch_tokens=BUDGET)
    full = Circuit.full(EdgeGraph.of(model.dims))
    return {
        "atp": lambda: attribute(model, pairs, nodes).effects,
        "atp-star": lambda: attribute(model, pairs, nodes, "atp-star").effects,
        "exact, 16 heads": lambda: patch_nodes(model, pairs, heads).effects,
        "eap": lambda: attribute_edges(model, pairs, edges, "eap").mean,
        "eap-ig-inputs": lambda: attribute_edges(model, pairs, edges, "eap-ig-inputs").mean,
        "full circuit": lambda: run_circuits(model, pairs, [full], EdgeOptions(max_batch_tokens=2048)).metric,
    }


@contextlib.contextmanager
def tokens_of(model: PatchModel) -> Iterator[list[int]]:
    """Tokens of every forward inside."""
    seen: list[int] = []

    def note(module: Any, args: Any, kwargs: dict[str, Tensor]) -> None:
        seen.append(kwargs["input_ids"].numel())

    handle = model.hf.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def measure(model: PatchModel, call: Callable[[], Tensor], repetitions: int) -> dict[str, Any]:
    ways: dict[str, Callable[[], Prefixes | None]] = {"shared": Prefixes, "whole": lambda: None}
    numbers, tokens = {}, {}
    for name, held in ways.items():
        with use_prefixes(held()), tokens_of(model) as seen:
            numbers[name] = call().nan_to_num()
        tokens[name] = sum(seen)
    gap = float((numbers["shared"] - numbers["whole"]).abs().max() / numbers["whole"].abs().max())
    assert gap < 1e-4, f"the numbers differ by {gap:.1e} of the largest"
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repetitions):
        for name, held in ways.items():
            with use_prefixes(held()):
                times[name].append(seconds(call))
    return {
        "seconds": {name: spread(each) for name, each in times.items()},
        "whole / shared": ratio(times["whole"], times["shared"]),
        "tokens": tokens,
        "largest difference": gap,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/bench_prefix.json"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    kept = keep_memory()
    model, pairs = build(), make_pairs()
    before = machine()
    found = {}
    for name, call in methods(model, pairs).items():
        found[name] = measure(model, call, given.repetitions)
        tokens = found[name]["tokens"]
        show(f"{name}, whole / shared", found[name]["whole / shared"])
        print(f"{'':<40}tokens {tokens['whole']:,} / {tokens['shared']:,}")
    write(
        {
            "benchmark": "a preamble common to all prompts run once, CPU time",
            "model": {
                "family": "llama",
                "layers": LAYERS,
                "d_model": WIDTH,
                "heads": HEADS,
                "kv_heads": KV_HEADS,
                "vocabulary": VOCABULARY,
            },
            "pairs": PAIRS,
            "pairs_a_batch": BATCH,
            "preamble": PREAMBLE,
            "behind it": REST,
            "repetitions": given.repetitions,
            "memory_kept": kept,
            "found": found,
            "machine": before,
        },
        given.out,
    )


if __name__ == "__main__":
    main()
