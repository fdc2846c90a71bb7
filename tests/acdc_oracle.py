"""ACDC by hand: every edge is tried on its own, by the oracle of circuits, on tiny models.

`check_acdc` is the comparison: the tests of ACDC must pass it, and those of mutations must make it fail.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from patchkit.data import Pair
from patchkit.methods._edge_options import EdgeOptions
from patchkit.methods.acdc import acdc
from patchkit.model import PatchModel
from patchkit.model.edges import EdgeGraph
from patchkit.results.circuit import Circuit
from patchkit.results.edge_scores import EdgeScores
from patchkit.zoo.load import load
from tests.circuit_oracle import (
    Held,
    Score,
    ablated_by,
    circuit_logits,
    held,
    logit_diff,
    parts_of,
    prompts,
)
from tests.comparisons import agree
from tests.families import PRECISE, VOCAB
from tests.node_oracle import LONG, SHORT

PAIRS = (LONG, SHORT)
_IDS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SIZES: dict[str, Any] = _IDS | {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
}
#: Two layers of two heads.
TINY: dict[str, Any] = {
    "llama-gqa": lambda: LlamaForCausalLM(LlamaConfig(**_SIZES, num_key_value_heads=1)),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(**_SIZES, num_key_value_heads=2, head_dim=8, sliding_window=4)
    ),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(**_IDS, vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=16)
    ),
    "neox-parallel": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**_SIZES)),
}


@functools.cache
def tiny(name: str) -> tuple[PatchModel, PreTrainedModel]:
    """A float64 model opened by patchkit, and its twin that nnsight never saw."""

    def built() -> Any:
        torch.manual_seed(3)
        model: Any = TINY[name]()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.mul_(10.0)
        if name == "gemma2":
            model.set_attn_implementation(PRECISE)
        return model.double().eval()

    return load(built()), built()


@dataclass
class Found:
    """Edges that are left, by name, and the effects of those that were tried, pair by pair."""

    kept: set[str]
    effects: dict[str, Tensor] = field(default_factory=dict)
    skipped: set[str] = field(default_factory=set)
    #: How close a damage came to tau.
    closest: float = math.inf


def receivers(config: Any) -> Iterator[tuple[str, list[str]]]:
    """(receiver, the senders that it is an input of), in the order of visits."""
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    group = heads // kv_heads
    yield "logits", []
    for layer in reversed(range(layers)):
        yield f"m{layer}", [f"m{layer}"]
        for shared in range(kv_heads):
            sharing = [f"a{layer}.h{head}" for head in range(shared * group, (shared + 1) * group)]
            yield f"a{layer}.h{shared}<v>", sharing
            yield f"a{layer}.h{shared}<k>", sharing
            for head in sharing:
                yield f"{head}<q>", [head]


def sizes(hf: PreTrainedModel, runs: Sequence[tuple[Held, Held]]) -> dict[str, float]:
    """Of each sender, the squared change of the stream when it alone is ablated, over all pairs."""
    found: dict[str, float] = {"input": 0.0}
    for own, ablated in runs:
        found["input"] += float((ablated.input - own.input).square().sum())
        for layer, z in enumerate(own.z):
            parts = parts_of(hf, layer)
            for head in range(z.shape[1]):
                changed = z.clone()
                changed[:, head] = ablated.z[layer][:, head]
                change = parts.behind_attention(parts.out(changed.flatten(1)[None]))
                change = change - parts.behind_attention(parts.out(z.flatten(1)[None]))
                name = f"a{layer}.h{head}"
                found[name] = found.get(name, 0.0) + float(change.square().sum())
            change = ablated.mlp[layer] - own.mlp[layer]
            found[f"m{layer}"] = found.get(f"m{layer}", 0.0) + float(change.square().sum())
    return found


@torch.no_grad()
def acdc_by_hand(
    hf: PreTrainedModel,
    graph: EdgeGraph,
    pairs: Sequence[Pair],
    options: EdgeOptions,
    tau: float,
    *,
    order: str = "reverse",
    absolute: bool = False,
    score: Score = logit_diff,
) -> Found:
    """One edge at a time, on every pair."""
    ends = [held(hf, prompts(each, options.direction)[0]) for each in pairs]
    cut = [ablated_by(hf, each, pairs, options) for each in pairs]
    size = sizes(hf, [(own, other) for (own, _), other in zip(ends, cut, strict=True)])

    def metric(edges: set[str]) -> Tensor:
        return torch.stack(
            [
                score(circuit_logits(hf, own.input, other, edges), base, each)
                for (own, base), other, each in zip(ends, cut, pairs, strict=True)
            ]
        )

    found = Found(set(Circuit.full(graph).names()))
    current = metric(found.kept)
    for receiver, owners in receivers(hf.config):
        into = [edge for edge in Circuit.full(graph).names() if edge.endswith(f"->{receiver}")]
        if owners and not any(edge.split("->")[0] in owners for edge in found.kept):
            found.kept -= set(into)
            found.skipped |= set(into)
            continue
        # Names come by sender, the earliest first.
        into.reverse()
        if order == "by-size":
            into.sort(key=lambda edge: size[edge.split("->")[0]])
        for edge in into:
            new = metric(found.kept - {edge})
            found.effects[edge] = new - current
            damage = float((new - current).mean())
            if options.metric != "kl" and options.direction == "noise":
                damage = -damage
            damage = abs(damage) if absolute else damage
            found.closest = min(found.closest, abs(damage - tau))
            if damage < tau:
                found.kept.remove(edge)
                current = new
    return found


@functools.cache
def _expected(name: str, options: EdgeOptions, tau: float, order: str, absolute: bool, score: Score) -> Found:
    model, twin = tiny(name)
    graph = EdgeGraph.of(model.dims)
    return acdc_by_hand(twin, graph, PAIRS, options, tau, order=order, absolute=absolute, score=score)


def check_acdc(
    name: str,
    tau: float,
    *,
    score: Score = logit_diff,
    order: str = "reverse",
    absolute: bool = False,
    **asked: Any,
) -> tuple[EdgeScores, Found]:
    """ACDC on a tiny model keeps the same edges, and measures the same effects, as edge by edge with the oracle."""
    model, options = tiny(name)[0], EdgeOptions(**asked)
    expected = _expected(name, options, tau, order, absolute, score)
    # A decision at the edge of rounding would say nothing.
    assert expected.closest > 1e-5, f"a damage comes within {expected.closest:.1g} of tau"
    assert expected.kept and expected.effects.keys() - expected.kept, "all edges are kept, or all are cut"
    found = acdc(model, PAIRS, options, tau=tau, order=order, absolute=absolute)
    check_found(found, expected)
    return found, expected


def check_found(found: EdgeScores, expected: Found) -> None:
    """Effects of the edges that were tried, nothing of the others, and what is kept."""
    graph = found.graph
    for edge in Circuit.full(graph).names():
        place = graph.find_edge(edge)
        if edge not in expected.effects:
            assert found.mean[place].isnan(), f"{edge} was not to be tried"
            continue
        effects = expected.effects[edge]
        agree(found.mean[place], effects.mean().to(found.mean), f"effect of {edge}", 1e-6)
        agree(found.mean_abs[place], effects.abs().mean().to(found.mean_abs), f"size of {edge}", 1e-6)
    assert found.circuit is not None
    assert set(found.circuit.names()) == set(Circuit.of_names(graph, expected.kept).pruned().names()), (
        "kept edges"
    )
