"""CPU time of one step of mask training: what reuse saves, and what patchkit adds to a plain loop of the same reuse.

On a random Llama (8 layers, width 256) and 32 prompts of 40 tokens, one process and one thread:

- reuse: a step on cached prefixes, one token a prompt (what patchkit does);
- full: the same step of patchkit on whole prompts;
- plain: reuse again, in plain torch: the HF model, forward hooks, the same fork of the same cache, the same loss, Adam.

All three learn the same mask, which is checked before anything is timed. Repetitions are interleaved and each gives one
ratio, so that a machine that slows down in between slows both sides. Reported: medians, and the quartiles beside them.

    python benchmarks/bench_mask.py [--repetitions 15] [--out benchmarks/results/bench_mask.json]
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from _measure import machine, ratio, seconds, show, write
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from patchkit.data import Triple
from patchkit.methods._mask_layout import Layout
from patchkit.methods._mask_objective import DirectMask, Objective
from patchkit.methods._mask_path import backward
from patchkit.methods._mask_prepared import prepare
from patchkit.model import PatchModel
from patchkit.zoo.load import load

LAYERS, WIDTH, HEADS, TOKENS, PROMPTS, VOCABULARY = 8, 256, 8, 40, 32, 1000
LAM, LR = 0.01, 0.02
#: What the project promises: full / reuse at least, reuse / plain at most.
AT_LEAST, AT_MOST = 7.0, 1.25

Step = Callable[[], None]


def build() -> tuple[LlamaForCausalLM, list[Triple]]:
    """The random model and triples of random prompts; everything is given, so the model answers nothing first."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=int(2.75 * WIDTH),
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS,
            max_position_embeddings=64,
            pad_token_id=0,
        )
    )
    model = model.eval().requires_grad_(False)
    ids = torch.randint(1, VOCABULARY, (2, PROMPTS, TOKENS)).tolist()
    answers = torch.randint(1, VOCABULARY, (2, PROMPTS)).tolist()
    triples = [
        Triple(
            desideratum="value",
            original_ids=tuple(ids[0][i]),
            alternate_ids=tuple(ids[1][i]),
            target_id=answers[1][i],
            original_answer_id=answers[0][i],
            alternate_answer_id=answers[1][i],
        )
        for i in range(PROMPTS)
    ]
    return model, triples


class Ours:
    """A step of patchkit: its own gradient, then Adam."""

    def __init__(self, model: PatchModel, triples: list[Triple], reuse: bool) -> None:
        layout = Layout.build(("head", "mlp"), model.dims)
        self.prepared = prepare(
            model, layout, {"value": triples}, reuse=reuse, max_batch_tokens=PROMPTS * TOKENS
        )
        self.weights = torch.full((PROMPTS,), 1 / PROMPTS)
        self.objective = Objective("cross-entropy", "l0.5")
        self.mask = DirectMask(torch.ones(layout.size), "l0.5", LAM)
        self.optimiser = torch.optim.Adam(self.mask.parameters, lr=LR)

    def step(self) -> None:
        self.mask.before_step()
        backward(self.prepared, self.weights, self.mask, self.objective, True)
        self.optimiser.step()
        self.optimiser.zero_grad()

    @property
    def values(self) -> Tensor:
        return self.mask.values.detach()


class Plain:
    """The same step in plain torch; the hooks stay on, as a loop written for one purpose would leave them."""

    def __init__(self, model: LlamaForCausalLM, triples: list[Triple]) -> None:
        self.model = model
        originals, alternates = (
            torch.tensor([getattr(t, name) for t in triples]) for name in ("original_ids", "alternate_ids")
        )
        self.target = torch.tensor([t.target_id for t in triples])
        self.heads, self.mlps = (
            torch.ones(LAYERS, HEADS, requires_grad=True),
            torch.ones(LAYERS, requires_grad=True),
        )
        self.optimiser = torch.optim.Adam([self.heads, self.mlps], lr=LR)
        self.z, self.mlp_out = self._alternates(alternates)
        with torch.no_grad():
            self.cache = model(
                originals[:, :-1], past_key_values=DynamicCache(), use_cache=True
            ).past_key_values
        self.last = originals[:, -1:]
        self.mask = torch.ones_like(originals)
        self.position = torch.full_like(self.last, TOKENS - 1)
        self._hook()

    def _alternates(self, ids: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        z: list[Tensor] = []
        out: list[Tensor] = []
        handles = []
        for block in self.model.model.layers:
            handles.append(
                block.get_submodule("self_attn.o_proj").register_forward_pre_hook(
                    lambda _, args: z.append(args[0][:, -1])
                )
            )
            handles.append(
                block.get_submodule("mlp").register_forward_hook(
                    lambda _, args, output: out.append(output[:, -1])
                )
            )
        with torch.no_grad():
            self.model(ids, use_cache=False)
        for handle in handles:
            handle.remove()
        return [part.unflatten(-1, (HEADS, -1)) for part in z], out

    def _hook(self) -> None:
        for layer, block in enumerate(self.model.model.layers):
            block.get_submodule("self_attn.o_proj").register_forward_pre_hook(self._blend_heads(layer))
            block.get_submodule("mlp").register_forward_hook(self._blend_mlp(layer))

    def _blend_heads(self, layer: int) -> Callable[..., tuple[Tensor]]:
        def blend(_: torch.nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            own = args[0][:, 0].unflatten(-1, (HEADS, -1))
            keep = self.heads[layer][:, None]
            return ((keep * own + (1 - keep) * self.z[layer]).flatten(-2)[:, None],)

        return blend

    def _blend_mlp(self, layer: int) -> Callable[..., Tensor]:
        def blend(_: torch.nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
            keep = self.mlps[layer]
            return (keep * output[:, 0] + (1 - keep) * self.mlp_out[layer])[:, None]

        return blend

    def step(self) -> None:
        with torch.no_grad():
            self.heads.clamp_(0, 1)
            self.mlps.clamp_(0, 1)
        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(layer) for layer in self.cache.layers]
        logits = self.model(
            self.last,
            attention_mask=self.mask,
            position_ids=self.position,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        loss = torch.nn.functional.cross_entropy(logits, self.target)
        loss = loss + LAM * ((1.001 - self.heads).sqrt().sum() + (1.001 - self.mlps).sqrt().sum())
        loss.backward()
        self.optimiser.step()
        self.optimiser.zero_grad()

    @property
    def values(self) -> Tensor:
        return torch.cat([self.heads.detach().flatten(), self.mlps.detach()])


def measure(repetitions: int, steps: int) -> dict[str, list[float]]:
    """CPU seconds a step, one number a repetition, for each of the three."""
    module, triples = build()
    # Two copies of one model: nnsight's controllers, once on a module, would slow the plain loop too.
    plain = Plain(copy.deepcopy(module), triples)
    model = load(module)
    reuse, full = Ours(model, triples, reuse=True), Ours(model, triples, reuse=False)

    for _ in range(3):
        for each in (full, reuse, plain):
            each.step()
    gap = max(float((other.values - reuse.values).abs().max()) for other in (full, plain))
    if not gap < 1e-5:
        raise SystemExit(f"the three do not learn the same mask: they differ by {gap:.2g} after 3 steps")
    found: dict[str, list[float]] = {"plain": [], "reuse": [], "full": []}
    for _ in range(repetitions):
        found["plain"].append(seconds(plain.step, steps))
        found["reuse"].append(seconds(reuse.step, steps))
        found["full"].append(seconds(full.step, 1))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--steps", type=int, default=5, help="steps in one repetition of reuse and of plain")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "bench_mask.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = measure(options.repetitions, options.steps)
    ratios = {
        "full / reuse": ratio(found["full"], found["reuse"]),
        "reuse / plain": ratio(found["reuse"], found["plain"]),
    }
    result = {
        "benchmark": "mask training step, CPU time",
        "model": {
            "family": "llama",
            "layers": LAYERS,
            "d_model": WIDTH,
            "heads": HEADS,
            "vocabulary": VOCABULARY,
        },
        "prompts": PROMPTS,
        "tokens": TOKENS,
        "repetitions": options.repetitions,
        "milliseconds": {name: round(1000 * statistics.median(times), 2) for name, times in found.items()},
        "ratios": ratios,
        "bars": {"full / reuse": f">= {AT_LEAST:g}", "reuse / plain": f"<= {AT_MOST:g}"},
        "machine": machine(),
    }
    write(result, options.out)
    for name, milliseconds in result["milliseconds"].items():
        print(f"{name:<16}{milliseconds:>9.2f} ms a step")
    for name, spread in ratios.items():
        show(name, spread, result["bars"][name])


if __name__ == "__main__":
    main()
