"""Circuits by hand: every receiver gets a residual stream of its own, put together sender by sender.

One unpadded prompt at a time, from the Hugging Face modules and the edges' names. Each sender that a receiver reads is
taken at its value in this very run if the edge is in the circuit, and at the ablated value if it is not; heads, MLPs and
logits are then computed from these streams, heads one by one. `check_circuits` is the comparison itself: the tests of
circuits must pass it, and those of mutations must make it fail.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from patchkit.data import Pair
from patchkit.methods._edge_options import EdgeOptions
from patchkit.methods.circuits import CircuitMetrics, run_circuits
from patchkit.model import PatchModel
from patchkit.model.edges import EdgeGraph
from patchkit.results.circuit import Circuit
from tests import oracles
from tests.comparisons import agree, pair

#: Last-token logits `[vocab]` of a run, and of the base run, to the metric.
Score = Callable[[Tensor, Tensor, Pair], Tensor]
#: What a float64 model holds to: RMSNorms compute in float32 all the same, and so are rotary embeddings made.
IN_FLOAT64 = {"gpt2": 1e-10, "neox-parallel": 1e-7, "neox-sequential": 1e-7}


@dataclass
class Held:
    """What the senders of a run hold: the input `[position, d_model]`, z of each layer, the MLPs' contributions."""

    input: Tensor
    z: list[Tensor]
    mlp: list[Tensor]


@dataclass(frozen=True)
class Parts:
    """The modules of one block, by what they do."""

    attention_norm: Any
    projections: list[Any]
    out: Any
    behind_attention: Any
    mlp_norm: Any
    mlp: Any
    behind_mlp: Any


def _nothing(value: Tensor) -> Tensor:
    return value


def parts_of(hf: PreTrainedModel, layer: int) -> Parts:
    config: Any = hf.config
    family = oracles.FAMILIES[config.model_type]
    block = attrgetter(family.blocks)(hf)[layer]
    projections = [attrgetter(path)(block) for path in family.projections]
    match config.model_type:
        case "gpt2":
            return Parts(
                block.ln_1, projections, block.attn.c_proj, _nothing, block.ln_2, block.mlp, _nothing
            )
        case "gpt_neox":
            out, norm = block.attention.dense, block.post_attention_layernorm
            return Parts(block.input_layernorm, projections, out, _nothing, norm, block.mlp, _nothing)
    out, after_attention = block.self_attn.o_proj, block.post_attention_layernorm
    match config.model_type:
        case "olmo2":
            after_mlp = block.post_feedforward_layernorm
            return Parts(_nothing, projections, out, after_attention, _nothing, block.mlp, after_mlp)
        case "gemma2" | "gemma3_text":
            before, after = block.pre_feedforward_layernorm, block.post_feedforward_layernorm
            return Parts(block.input_layernorm, projections, out, after_attention, before, block.mlp, after)
    return Parts(block.input_layernorm, projections, out, _nothing, after_attention, block.mlp, _nothing)


def _positions(hf: PreTrainedModel, length: int) -> Tensor:
    if hf.config.model_type != "gpt2":
        return torch.zeros((), dtype=hf.dtype)
    return hf.transformer.wpe(torch.arange(length))


def held(hf: PreTrainedModel, ids: Sequence[int]) -> tuple[Held, Tensor]:
    """(senders of an ordinary run, its last-token logits)."""
    values, logits = oracles.read(hf, ids)
    layers = range(hf.config.num_hidden_layers)
    embedded = values["resid_pre", 0] - _positions(hf, len(ids))
    return Held(embedded, [values["z", i] for i in layers], [values["mlp_out", i] for i in layers]), logits


@torch.no_grad()
def circuit_logits(
    hf: PreTrainedModel, given: Tensor, ablated: Held, edges: Collection[str], *, by_query: bool = False
) -> Tensor:
    """Last-token logits `[vocab]` of a circuit.

    Args:
        given: the base prompt's embeddings, `[position, d_model]`.
        ablated: what senders carry where an edge is cut.
        edges: names of the edges that are not.
        by_query: whether keys and values have receivers of their own for every query head.
    """
    config: Any = hf.config
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    parallel = config.model_type == "gpt_neox" and config.use_parallel_residual
    current = Held(given, [], [])

    def stream(receiver: str, attentions: int, mlps: int) -> Tensor:
        """What the receiver reads: so many layers' heads, and so many MLPs, are below it."""

        def chosen(sender: str, now: Tensor, cut: Tensor) -> Tensor:
            return (now if f"{sender}->{receiver}" in edges else cut).clone()

        read = _positions(hf, len(given)) + chosen("input", given, ablated.input)
        for layer in range(attentions):
            parts = parts_of(hf, layer)
            z = [
                chosen(f"a{layer}.h{head}", current.z[layer][:, head], ablated.z[layer][:, head])
                for head in range(heads)
            ]
            read = read + parts.behind_attention(parts.out(torch.cat(z, dim=-1)[None]))[0]
            if layer < mlps:
                read = read + chosen(f"m{layer}", current.mlp[layer], ablated.mlp[layer])
        return read

    for layer in range(layers):
        parts = parts_of(hf, layer)
        # One projection of all heads for each copy of the keys and values; head by head from streams of their own.
        copies = heads // kv_heads if by_query else 1
        made: dict[str, list[Tensor]] = {}
        for letter, count in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
            made[letter] = []
            for copy in range(1 if letter == "q" else copies):
                columns = []
                for head in range(count):
                    receiver = head * copies + copy if letter != "q" else head
                    read = stream(f"a{layer}.h{receiver}<{letter}>", layer, layer)
                    columns.append(_projected(hf, parts, letter, parts.attention_norm(read[None]))[:, head])
                projected = torch.stack(columns, dim=1)
                if letter != "v":
                    projected = oracles.rotated_by_hand(hf, layer, letter, projected)
                made[letter].append(projected)
        z = []
        for head in range(heads):
            group, place = divmod(head, heads // kv_heads)
            copy = place if by_query else 0
            keys, values = made["k"][copy][:, group], made["v"][copy][:, group]
            z.append(_pattern(config, layer, made["q"][0][:, head], keys) @ values)
        current.z.append(torch.stack(z, dim=1))
        read = stream(f"m{layer}", layer if parallel else layer + 1, layer)
        current.mlp.append(parts.behind_mlp(parts.mlp(parts.mlp_norm(read[None])))[0])
    return _logits(hf, stream("logits", layers, layers))


def _projected(hf: PreTrainedModel, parts: Parts, letter: str, read: Tensor) -> Tensor:
    """All heads of one projection, `[position, head, d_head]`, from a normed stream `[1, position, d_model]`."""
    config: Any = hf.config
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    place, counts = "qkv".index(letter), (heads, kv_heads, kv_heads)
    if len(parts.projections) == 3:
        return parts.projections[place](read)[0].reshape(read.shape[1], counts[place], -1)
    fused = parts.projections[0](read)[0]
    if config.model_type == "gpt_neox":
        return fused.reshape(len(fused), heads, 3, -1)[:, :, place]
    width = fused.shape[-1] // sum(counts)
    first = sum(counts[:place]) * width
    return fused[:, first : first + counts[place] * width].reshape(len(fused), counts[place], width)


def _pattern(config: Any, layer: int, query: Tensor, key: Tensor) -> Tensor:
    scores = query @ key.T * getattr(config, "query_pre_attn_scalar", query.shape[-1]) ** -0.5
    cap = getattr(config, "attn_logit_softcapping", None)
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    place = torch.arange(len(query))
    far = oracles.window_of(config, layer) or len(query)
    seen = (place[:, None] >= place) & (place[:, None] - place < far)
    return scores.masked_fill(~seen, -torch.inf).softmax(-1)


def _logits(hf: PreTrainedModel, read: Tensor) -> Tensor:
    norm = {"gpt2": "transformer.ln_f", "gpt_neox": "gpt_neox.final_layer_norm"}
    found = attrgetter(norm.get(hf.config.model_type, "model.norm"))(hf)(read[None])
    logits = hf.get_output_embeddings()(found)[0, -1]
    cap = getattr(hf.config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


# Comparisons.


def logit_diff(logits: Tensor, _: Tensor, pair: Pair) -> Tensor:
    return logits[pair.answer_id] - logits[pair.wrong_id]


def kl(logits: Tensor, reference: Tensor, _: Pair) -> Tensor:
    wanted = reference.log_softmax(-1)
    return (wanted.exp() * (wanted - logits.log_softmax(-1))).sum()


def prompts(each: Pair, direction: str) -> tuple[Sequence[int], Sequence[int]]:
    """(base, source)."""
    return (each.clean_ids, each.corrupt_ids) if direction == "noise" else (each.corrupt_ids, each.clean_ids)


def ablated_by(hf: PreTrainedModel, each: Pair, reference: Sequence[Pair], options: EdgeOptions) -> Held:
    """What cut edges carry in this pair."""
    source, _ = held(hf, prompts(each, options.direction)[1])
    if options.ablation == "resample":
        return source

    def replaced(take: Callable[[Held], Tensor]) -> Tensor:
        if options.ablation == "zero":
            return torch.zeros_like(take(source))
        others = [take(held(hf, prompts(other, options.direction)[1])[0]) for other in reference]
        if options.ablation == "mean":
            return torch.cat(others).mean(0).expand_as(take(source))
        return torch.stack(others).mean(0)

    return Held(
        replaced(lambda run: run.input),
        [replaced(lambda run, i=i: run.z[i]) for i in range(len(source.z))],
        [replaced(lambda run, i=i: run.mlp[i]) for i in range(len(source.mlp))],
    )


def by_query(circuit: Circuit, hf: PreTrainedModel) -> bool:
    return circuit.graph.n_kv_heads != (
        getattr(hf.config, "num_key_value_heads", None) or circuit.graph.n_heads
    )


def expected_metrics(
    hf: PreTrainedModel,
    pairs: Sequence[Pair],
    circuits: Sequence[Circuit],
    options: EdgeOptions,
    score: Score = logit_diff,
) -> tuple[Tensor, Tensor, Tensor]:
    """(metric `[pairs, circuits]`, that of the base runs, that of the runs in which every edge is cut)."""
    rows = []
    names = [set(circuit.names()) for circuit in circuits]
    for each in pairs:
        own, base = held(hf, prompts(each, options.direction)[0])
        ablated = ablated_by(hf, each, pairs, options)
        logits = [
            circuit_logits(hf, own.input, ablated, edges, by_query=by_query(circuit, hf))
            for edges, circuit in zip(names, circuits, strict=True)
        ]
        cut = circuit_logits(hf, own.input, ablated, set())
        rows.append(torch.stack([score(each_run, base, each) for each_run in (*logits, base, cut)]))
    table = torch.stack(rows)
    return table[:, :-2], table[:, -2], table[:, -1]


def check_metrics(
    found: CircuitMetrics,
    expected: tuple[Tensor, Tensor, Tensor],
    pairs: Sequence[Pair],
    tolerance: float,
) -> None:
    """Circuit by circuit and pair by pair, with the ends."""
    metric, clean, cut = expected
    for row, each in enumerate(pairs):
        agree(found.clean[row], clean[row], f"base run of {each.id}", tolerance)
        agree(found.corrupt[row], cut[row], f"every edge cut in {each.id}", tolerance)
        for column in range(metric.shape[1]):
            what = f"circuit {column} in pair {each.id}"
            agree(found.metric[row, column], metric[row, column], what, tolerance)


def random_circuits(
    graph: EdgeGraph, shares: Sequence[float] = (0.05, 0.5, 0.95), seed: int = 0
) -> list[Circuit]:
    """Circuits of some of the edges, not pruned."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.rand(graph.real.shape, generator=generator) for _ in shares]
    return [Circuit(graph, graph.real & (each < share)) for each, share in zip(drawn, shares, strict=True)]


def graphs_of(model: PatchModel) -> list[EdgeGraph]:
    """The native graph, and that by query head where it is another one."""
    return list(dict.fromkeys(EdgeGraph.of(model.dims, by_query_head=wide) for wide in (False, True)))


def tolerance_of(family: str, dtype: torch.dtype) -> float:
    return 1e-5 if dtype == torch.float32 else IN_FLOAT64.get(family, 1e-6)


def check_circuits(
    family: str,
    pairs: Sequence[Pair],
    dtype: torch.dtype = torch.float64,
    circuits: Sequence[Circuit] | None = None,
    score: Score = logit_diff,
    **options: object,
) -> CircuitMetrics:
    """Circuits of a family equal the oracle's; by default random ones, native and by query head."""
    model, twin = pair(family, dtype)
    if circuits is None:
        circuits = [each for graph in graphs_of(model) for each in random_circuits(graph)]
    asked = EdgeOptions(**options)  # type: ignore[arg-type]
    found = run_circuits(model, pairs, circuits, asked)
    check_metrics(
        found, expected_metrics(twin, pairs, circuits, asked, score), pairs, tolerance_of(family, dtype)
    )
    return found
