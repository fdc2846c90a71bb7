"""CPU time of the node methods, against plain torch and in forwards.

On a random GPT-2 and a random grouped-query Llama (12 layers, width 384), 8 pairs of 16 tokens, one process, one thread.
F is one forward of the plain Hugging Face model over the 8 prompts, measured before and after each item.

- atp: attribution patching of all heads, MLPs and neurons, against the same with hooks and autograd;
- graddrop: AtP with GradDrop, against one backward for each dropped block on one graph;
- sweep: every head patched exactly, at all tokens at once, in F per patch; beside it a plain cache of the residual stream
  that runs the blocks from the patched one on, and the FLOPs of both, counted from the shapes that their linear maps saw;
- positions: every head at every token, in F per patch.

Whatever is compared gives the same numbers, which is checked before anything is timed. Repetitions are interleaved.

    python benchmarks/bench_nodes.py [--repetitions 7] [--return-memory] [--out benchmarks/results/bench_nodes.json]
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _measure import Spread, keep_memory, load_average, machine, ratio, seconds, show, spread, write
from _plain_nodes import PlainNodes
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from patchkit import load
from patchkit.data import Pair
from patchkit.methods.activation_patching import CPU_FORWARD, NodeOptions, patch_nodes
from patchkit.methods.attribution import attribute
from patchkit.model import PatchModel

LAYERS, WIDTH, HEADS, KV_HEADS, VOCABULARY, TOKENS, PAIRS = 12, 384, 12, 4, 5000, 16, 8
ANSWER, WRONG = 1, 2
#: What the project promises, at most.
BARS = {
    "atp / plain": 1.15,
    "graddrop / plain": 0.6,
    "sweep, F per patch": 0.4,
    "positions, F per patch": 0.25,
}
ALL = NodeOptions(nodes=("z", "mlp_out", "neuron"), positions="all")
SWEEP = NodeOptions(nodes=("z",), positions="all")
#: The heads in two halves, so that a repetition takes half as long.
POSITIONS = tuple(
    NodeOptions(
        nodes=tuple(f"a{layer}.h{head}" for layer in range(LAYERS) for head in range(half, HEADS, 2)),
        positions="each",
    )
    for half in (0, 1)
)
#: Heads and tokens that the sweep over positions is checked at, by whole forwards.
PROBES = ((0, 0, 0), (0, 5, 15), (3, 11, 7), (7, 2, 14), (10, 8, 9), (11, 4, 15), (11, 9, 3))


def build(family: str) -> Any:
    torch.manual_seed(0)
    if family == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, n_positions=4 * TOKENS
            )
        ).eval()
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=1024,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=KV_HEADS,
            max_position_embeddings=4 * TOKENS,
        )
    ).eval()


def random_pairs() -> list[Pair]:
    """Pairs of random prompts; two prompts of a pair differ from the first token on, so no patch is left out."""
    ids = torch.randint(3, VOCABULARY, (2, PAIRS, TOKENS), generator=torch.Generator().manual_seed(0))
    assert bool((ids[0, :, 0] != ids[1, :, 0]).all())
    return [
        Pair(tuple(ids[0, i].tolist()), tuple(ids[1, i].tolist()), ANSWER, WRONG, id=str(i))
        for i in range(PAIRS)
    ]


class Case:
    """One family: the model as patchkit opens it, and a copy of it for the plain side."""

    def __init__(self, family: str) -> None:
        module, self.pairs = build(family), random_pairs()
        base, source = (
            torch.tensor([getattr(pair, name) for pair in self.pairs])
            for name in ("clean_ids", "corrupt_ids")
        )
        self.plain = PlainNodes(
            copy.deepcopy(module), base, source, torch.full((PAIRS,), ANSWER), torch.full((PAIRS,), WRONG)
        )
        self.model: PatchModel = load(module)

    def atp(self, method: Any = "atp") -> Any:
        return attribute(self.model, self.pairs, ALL, method)

    def sweep(self) -> Any:
        return patch_nodes(self.model, self.pairs, SWEEP)

    def positions(self, half: int) -> None:
        self.by_position = patch_nodes(self.model, self.pairs, POSITIONS[half])

    def plain_sweep(self) -> Tensor:
        return self.plain.sweep(CPU_FORWARD)

    def in_forwards(self, run: Callable[[], object]) -> float:
        """CPU time of a run over that of F, taken before and after it."""
        around = seconds(self.plain.forward, 3)
        taken = seconds(run)
        return taken / ((around + seconds(self.plain.forward, 3)) / 2)

    def check(self) -> dict[str, Any]:
        """Raises unless both sides agree on all but the sweep over positions; returns what was counted meanwhile.

        That is layer-backwards, and the FLOPs per patch over those of F: what a sweep leaves to be computed.
        """
        found = self.atp()
        _same("atp", found.grid.split(found.effects), self.plain.atp())
        dropped = self.atp("atp-graddrop")
        _same("graddrop", dropped.grid.split(dropped.magnitudes), self.plain.grad_drop())
        with counted(self.plain.model) as forward:
            self.plain.forward()
        with counted(self.model.hf) as flops:
            swept = self.sweep()
        with counted(self.plain.model) as plain_flops:
            expected = self.plain_sweep()
        _same("sweep", swept.grid.split(swept.effects), {"z": expected})
        patches = LAYERS * HEADS * sum(forward)
        return {
            "flops per patch, of F": {
                "patchkit": round(sum(flops) / patches, 3),
                "plain cache": round(sum(plain_flops) / patches, 3),
            },
            "layer backwards": {"patchkit": LAYERS + dropped.layer_backwards, "plain": LAYERS * LAYERS},
        }

    def check_positions(self, half: int) -> None:
        """Raises unless the last `positions` agrees with whole forwards of the plain side at the probes of its half."""
        effects = self.by_position.grid.split(self.by_position.effects)["z"]
        for layer, head, token in PROBES:
            if head % 2 == half:
                expected = self.plain.effect(layer, head, slice(token, token + 1))
                _same(
                    f"positions a{layer}.h{head}@{token}",
                    {"z": effects[:, layer, token, head]},
                    {"z": expected},
                )


def _same(what: str, found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for kind, values in expected.items():
        gap = float((found[kind] - values).abs().max())
        if not gap < 1e-5:
            raise SystemExit(f"{what}: {kind} of patchkit and of plain torch differ by {gap:.2g}")


@contextlib.contextmanager
def counted(model: nn.Module) -> Iterator[list[int]]:
    """FLOPs of the linear maps that run meanwhile, one number a call; the products within attention are left out."""
    flops: list[int] = []

    def add(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        flops.append(2 * args[0].numel() * output.shape[-1])

    linear = [module for module in model.modules() if isinstance(module, nn.Linear | Conv1D)]
    handles = [module.register_forward_hook(add) for module in linear]
    yield flops
    for handle in handles:
        handle.remove()


def measure(family: str, repetitions: int) -> dict[str, Any]:
    case = Case(family)
    counts = case.check()
    heads = LAYERS * HEADS
    items: dict[str, Callable[[], object]] = {
        "atp": case.atp,
        "atp plain": case.plain.atp,
        "graddrop": lambda: case.atp("atp-graddrop"),
        "graddrop plain": case.plain.grad_drop,
        "sweep": case.sweep,
        "sweep plain": case.plain_sweep,
    }
    # The short items are repeated more often within the same time.
    often = {"atp": repetitions, "graddrop": max(2, repetitions // 2), "sweep": max(2, repetitions // 2)}
    taken: dict[str, list[float]] = {name: [] for name in items}
    for name, times in often.items():
        for _ in range(times):
            for side in (name, f"{name} plain"):
                taken[side].append(case.in_forwards(items[side]))
    by_position: list[float] = []
    for half in range(len(POSITIONS)):
        by_position.append(case.in_forwards(partial(case.positions, half)))
        # Checked here and not before, since it takes as long as a repetition.
        case.check_positions(half)
    ratios: dict[str, Spread] = {
        "atp / plain": ratio(taken["atp"], taken["atp plain"]),
        "graddrop / plain": ratio(taken["graddrop"], taken["graddrop plain"]),
        "sweep, F per patch": spread([value / heads for value in taken["sweep"]]),
        "plain cache, F per patch": spread([value / heads for value in taken["sweep plain"]]),
        "sweep / plain cache": ratio(taken["sweep"], taken["sweep plain"]),
        "positions, F per patch": spread([2 * value / (heads * TOKENS) for value in by_position]),
    }
    return {
        "milliseconds of F": round(
            1000 * statistics.median(seconds(case.plain.forward) for _ in range(9)), 1
        ),
        "F": {name: round(statistics.median(values), 2) for name, values in taken.items()},
        "ratios": ratios,
        **counts,
        "load_average": load_average(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "bench_nodes.json")
    parser.add_argument(
        "--return-memory", action="store_true", help="leave the allocator as it is; see keep_memory"
    )
    options = parser.parse_args()
    kept = not options.return_memory and keep_memory()
    torch.set_num_threads(1)
    found = {family: measure(family, options.repetitions) for family in ("gpt2", "llama")}
    result = {
        "benchmark": "attribution and exact patching of nodes, CPU time",
        "model": {
            "families": {"gpt2": {"kv_heads": HEADS}, "llama": {"kv_heads": KV_HEADS, "d_mlp": 1024}},
            "layers": LAYERS,
            "d_model": WIDTH,
            "heads": HEADS,
            "vocabulary": VOCABULARY,
        },
        "pairs": PAIRS,
        "tokens": TOKENS,
        "repetitions": options.repetitions,
        "memory_kept": kept,
        "found": found,
        "bars": {name: f"<= {bar:g}" for name, bar in BARS.items()},
        "machine": machine(),
    }
    write(result, options.out)
    for family, one in found.items():
        for name, values in one["ratios"].items():
            show(f"{family}: {name}", values, result["bars"].get(name, ""))
        for name in ("flops per patch, of F", "layer backwards"):
            print(f"{family}: {name:<{38 - len(family)}}", one[name])


if __name__ == "__main__":
    main()
