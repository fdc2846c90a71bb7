"""Edge attribution the slow way: the residual stream is cloned for every receiver, one unpadded prompt at a time.

Plain torch hooks on the Hugging Face model; nothing of patchkit's methods is used but the graph's names. Every query,
key and value of every head reads a clone of its own through the model's norm module and its slice of the projection; so
do the MLPs and the logits. The gradient at a clone is the gradient at that receiver.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from patchkit.data import Pair, read_places
from patchkit.methods._edge_options import EdgeOptions
from patchkit.methods.edge_attribution import attribute_edges
from patchkit.model import EdgeGraph
from patchkit.results.edge_scores import EdgeScores
from tests.attribution_oracle import probabilities
from tests.comparisons import agree, pair
from tests.node_oracle import prompts
from tests.oracles import FAMILIES, window_of

#: (which, layer): `attn` and `mlp` are contributions to the stream, `input` (layer 0) the token embedding.
Place = tuple[str, int]
Edit = Callable[[Tensor], Tensor]
#: Attention modules, behind which no norm stands.
_BARE = ("self_attn", "attention", "attn")
_OUT = {"gpt2": "attn.c_proj", "gpt_neox": "attention.dense"}
_NORMS = {
    "gpt2": ("ln_1", "ln_2", "transformer.ln_f", "transformer.wte"),
    "gpt_neox": (
        "input_layernorm",
        "post_attention_layernorm",
        "gpt_neox.final_layer_norm",
        "gpt_neox.embed_in",
    ),
    "olmo2": (None, None, "model.norm", "model.embed_tokens"),
    "gemma2": ("input_layernorm", "pre_feedforward_layernorm", "model.norm", "model.embed_tokens"),
    "gemma3_text": ("input_layernorm", "pre_feedforward_layernorm", "model.norm", "model.embed_tokens"),
}
_PLAIN = ("input_layernorm", "post_attention_layernorm", "model.norm", "model.embed_tokens")


@dataclass
class Split:
    """One forward over one prompt with the stream cloned for every receiver."""

    logits: Tensor
    clones: dict[str, Tensor] = field(default_factory=dict)
    z: dict[int, Tensor] = field(default_factory=dict)
    used: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    written: dict[Place, Tensor] = field(default_factory=dict)
    embedded: Tensor | None = None


def split_run(
    hf: PreTrainedModel,
    ids: Sequence[int],
    *,
    by_query: bool = True,
    edits: Mapping[Place, Edit] | None = None,
    shifts: Mapping[str, Tensor] | None = None,
    embed: Tensor | None = None,
) -> Split:
    """Runs a prompt. `shifts` are added to the clones of receivers; `embed` replaces the token embeddings.

    With `by_query` every query head has a key and value clone of its own; else every KV head has one.
    """
    found = Split(torch.empty(0))
    with torch.enable_grad(), _hooked(hf, found, by_query, edits or {}, shifts or {}, embed):
        found.logits = hf(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0, -1]
    return found


@contextmanager
def _hooked(
    hf: Any,
    found: Split,
    by_query: bool,
    edits: Mapping[Place, Edit],
    shifts: Mapping[str, Tensor],
    embed: Tensor | None,
) -> Iterator[None]:
    config = hf.config
    family = FAMILIES[config.model_type]
    attn_norm, mlp_norm, final, embedding = _NORMS.get(config.model_type, _PLAIN)
    handles: list[Any] = []

    def clone(name: str, stream: Tensor) -> Tensor:
        made = stream.clone()
        if name in shifts:
            made = made + shifts[name]
        found.clones[name] = made
        return made

    def embedded(_: nn.Module, args: Any, output: Tensor) -> Tensor:
        value = output if embed is None else embed[None]
        found.embedded = value[0].detach()
        return value.detach().clone().requires_grad_(True)

    handles.append(attrgetter(embedding)(hf).register_forward_hook(embedded))
    for layer, block in enumerate(attrgetter(family.blocks)(hf)):
        stream: dict[str, Tensor] = {}

        def before(_: nn.Module, args: Any, layer=layer, stream=stream) -> Any:
            value = args[0]
            if layer == 0 and ("input", 0) in edits:
                value = edits["input", 0](value)
            stream["pre"] = value
            return (value, *args[1:])

        handles.append(block.register_forward_pre_hook(before))
        norm = None if attn_norm is None else getattr(block, attn_norm)
        for which, path in enumerate(family.projections):
            project = _projection(
                hf, layer, which, len(family.projections) == 1, by_query, norm, stream, clone
            )
            handles.append(attrgetter(path)(block).register_forward_hook(project))
        reader = block.mlp if mlp_norm is None else getattr(block, mlp_norm)
        handles.append(
            reader.register_forward_pre_hook(lambda _, args, layer=layer: (clone(f"m{layer}", args[0]),))
        )
        for place, path in (("attn", family.attention_adds), ("mlp", family.mlp_adds)):

            def adds(_: nn.Module, args: Any, output: Any, key=(place, layer)) -> Any:
                value = output[0] if isinstance(output, tuple) else output
                value = edits[key](value) if key in edits else value
                found.written[key] = value[0].detach()
                return (value, *output[1:]) if isinstance(output, tuple) else value

            handles.append(attrgetter(path)(block).register_forward_hook(adds))
    handles.append(
        attrgetter(final)(hf).register_forward_pre_hook(lambda _, args: (clone("logits", args[0]),))
    )
    before_implementation = config._attn_implementation
    ALL_ATTENTION_FUNCTIONS["edge-oracle"] = _attention(config, found)
    config._attn_implementation = "edge-oracle"
    try:
        yield
    finally:
        config._attn_implementation = before_implementation
        del ALL_ATTENTION_FUNCTIONS["edge-oracle"]
        for handle in handles:
            handle.remove()


def _sizes(hf: Any) -> tuple[int, int, int]:
    config = hf.config
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return heads, kv_heads, getattr(config, "head_dim", None) or config.hidden_size // heads


def _weight(module: Any) -> tuple[Tensor, Tensor | None]:
    weight = module.weight.T if type(module).__name__ == "Conv1D" else module.weight
    return weight, module.bias


def _projection(
    hf: Any,
    layer: int,
    which: int,
    fused: bool,
    by_query: bool,
    norm: nn.Module | None,
    stream: dict[str, Tensor],
    clone: Callable[[str, Tensor], Tensor],
) -> Callable[..., Tensor]:
    heads, kv_heads, width = _sizes(hf)
    group = heads // kv_heads
    per_head = hf.config.model_type == "gpt_neox"

    def one(module: Any, letter: str, number: int, first: int) -> Tensor:
        """One head's projection of its own clone; rows `first` on of the weight."""
        weight, bias = _weight(module)
        value = clone(f"a{layer}.h{number}<{letter}>", stream["pre"])
        value = value if norm is None else norm(value)
        rows = slice(first, first + width)
        return nn.functional.linear(value, weight[rows], None if bias is None else bias[rows])

    def letters(module: Any, letter: str, begin: int) -> list[Tensor]:
        count = heads if letter == "q" else kv_heads
        if letter != "q" and by_query and group > 1:
            return [one(module, letter, head, begin + head // group * width) for head in range(heads)]
        return [one(module, letter, number, begin + number * width) for number in range(count)]

    def hook(module: Any, args: Any, output: Tensor) -> Tensor:
        if not fused:
            return torch.cat(letters(module, "qkv"[which], 0), dim=-1)
        if per_head:
            parts = [
                one(module, letter, head, (3 * head + place) * width)
                for head in range(heads)
                for place, letter in enumerate("qkv")
            ]
            return torch.cat(parts, dim=-1)
        begins = (0, heads * width, (heads + kv_heads) * width)
        return torch.cat(
            [
                part
                for letter, begin in zip("qkv", begins, strict=True)
                for part in letters(module, letter, begin)
            ],
            dim=-1,
        )

    return hook


def _attention(config: Any, found: Split) -> Callable[..., tuple[Tensor, None]]:
    cap = getattr(config, "attn_logit_softcapping", None)

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **_: Any
    ) -> tuple[Tensor, None]:
        layer = module.layer_idx
        for letter, tensor in (("q", query), ("k", key), ("v", value)):
            found.used[letter, layer] = tensor[0].transpose(0, 1).detach()
        scale = getattr(config, "query_pre_attn_scalar", query.shape[-1]) ** -0.5
        copies = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(copies, 1), value.repeat_interleave(copies, 1)
        scores = query @ key.transpose(2, 3) * scale
        scores = scores if cap is None else torch.tanh(scores / cap) * cap
        length = query.shape[2]
        place = torch.arange(length)
        seen = (place[:, None] >= place) & (place[:, None] - place < (window_of(config, layer) or length))
        mixed = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ value
        z = mixed.transpose(1, 2).contiguous()
        found.z[layer] = z[0]
        found.clones[f"z{layer}"] = z
        return z, None

    return attend


def changes(hf: Any, own: Split, other: Split) -> dict[str, Tensor]:
    """What the stream gains when each sender alone is replaced, `[position, d_model]`."""
    config = hf.config
    family, (heads, _, width) = FAMILIES[config.model_type], _sizes(hf)
    assert own.embedded is not None and other.embedded is not None
    gained = {"input": other.embedded - own.embedded}
    for layer, block in enumerate(attrgetter(family.blocks)(hf)):
        weight, bias = _weight(attrgetter(_OUT.get(config.model_type, "self_attn.o_proj"))(block))
        mine, theirs = own.z[layer].detach(), other.z[layer].detach()
        total = mine.flatten(1) @ weight.T + (0 if bias is None else bias)
        post = (
            None
            if family.attention_adds in ("self_attn", "attention", "attn")
            else attrgetter(family.attention_adds)(block)
        )
        for head in range(heads):
            columns = slice(head * width, (head + 1) * width)
            change = (theirs[:, head] - mine[:, head]) @ weight[:, columns].T
            gained[f"a{layer}.h{head}"] = change if post is None else post(total + change) - post(total)
        gained[f"m{layer}"] = other.written["mlp", layer] - own.written["mlp", layer]
    return {name: value.detach() for name, value in gained.items()}


def gradients(run: Split, score: Tensor) -> dict[str, Tensor]:
    """The gradient of a score of the run at every clone, and at each layer's z."""
    names = list(run.clones)
    taken = torch.autograd.grad(
        score, [run.clones[name] for name in names], allow_unused=True, retain_graph=True
    )
    return {
        name: torch.zeros_like(run.clones[name][0]) if g is None else g[0].detach()
        for name, g in zip(names, taken, strict=True)
    }


def diff(logits: Tensor, given: Pair) -> Tensor:
    return logits[given.answer_id] - logits[given.wrong_id]


def average(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: sum(part[name] for part in parts) / len(parts) for name in parts[0]}  # type: ignore[misc]


def products(
    graph: EdgeGraph, gained: Mapping[str, Tensor], at: Mapping[str, Tensor], tokens: Sequence[int]
) -> Tensor:
    """Every edge's score by a loop: `[senders, receivers]`, 0 where there is none."""
    scores = torch.zeros(graph.n_senders, graph.n_receivers, dtype=gained["input"].dtype)
    for sender, receiver in graph.real.nonzero().tolist():
        change, gradient = gained[graph.sender_name(sender)], at[graph.receiver_name(receiver)]
        scores[sender, receiver] = sum((change[t] * gradient[t]).sum() for t in tokens)
    return scores


def estimate(
    hf: Any,
    given: Pair,
    graph: EdgeGraph,
    tokens: Sequence[int],
    method: str,
    direction: str,
    steps: int,
    rule: str | None,
) -> Tensor:
    """`[senders, receivers]` of one pair."""
    by_query = graph.by_query_head
    base, source = prompts(given, direction)

    def run(ids: Sequence[int], **options: Any) -> Split:
        return split_run(hf, ids, by_query=by_query, **options)

    own, other = run(base), run(source)
    gained = changes(hf, own, other)

    def at(one: Split) -> dict[str, Tensor]:
        return gradients(one, diff(one.logits, given))

    if method == "eap":
        return products(graph, gained, at(own), tokens)
    if method == "clean-corrupted":
        return products(graph, gained, average([at(own), at(other)]), tokens)
    if method == "eap-ig-inputs":
        points = [(k + (0.5 if rule == "midpoint" else 0.0)) / steps for k in range(steps)]
        assert own.embedded is not None and other.embedded is not None
        runs = [run(base, embed=other.embedded + a * (own.embedded - other.embedded)) for a in points]
        return products(graph, gained, average([at(one) for one in runs]), tokens)
    assert method == "eap-ig-activations"
    if rule == "repo":
        return _along_sites(hf, graph, run, at, own, other, gained, base, steps, tokens)
    scores = torch.zeros(graph.n_senders, graph.n_receivers, dtype=gained["input"].dtype)
    inside = torch.zeros(len(base), 1, dtype=gained["input"].dtype)
    inside[list(tokens)] = 1
    for sender in range(graph.n_senders):
        name = graph.sender_name(sender)
        letter = {"i": "input", "a": "attn", "m": "mlp"}[name[0]]
        place = (letter, max(0, graph.layer_of_sender(sender)))
        parts = []
        for k in range(steps):
            change = gained[name] * inside * (k + 0.5) / steps
            parts.append(at(run(base, edits={place: lambda value, change=change: value + change})))
        mean = average(parts)
        for receiver in range(graph.n_receivers):
            if sender < int(graph.upstream[receiver]):
                scores[sender, receiver] = (gained[name] * mean[graph.receiver_name(receiver)])[
                    list(tokens)
                ].sum()
    return scores


def _along_sites(
    hf: Any,
    graph: EdgeGraph,
    run: Callable[..., Split],
    at: Callable[[Split], dict[str, Tensor]],
    own: Split,
    other: Split,
    gained: Mapping[str, Tensor],
    base: Sequence[int],
    steps: int,
    tokens: Sequence[int],
) -> Tensor:
    family = FAMILIES[hf.config.model_type]
    blocks = attrgetter(family.blocks)(hf)
    parts = []
    assert own.embedded is not None and other.embedded is not None
    for a in [k / steps for k in range(1, steps + 1)]:
        parts.append(at(run(base, embed=a * own.embedded + (1 - a) * other.embedded)))
        for layer, block in enumerate(blocks):
            out = attrgetter(_OUT.get(hf.config.model_type, "self_attn.o_proj"))(block)
            z = a * own.z[layer] + (1 - a) * other.z[layer]
            added = out(z.detach().flatten(1)[None]).detach()
            if family.attention_adds not in _BARE:
                added = attrgetter(family.attention_adds)(block)(added).detach()
            parts.append(at(run(base, edits={("attn", layer): lambda _, added=added: added})))
            mlp = (a * own.written["mlp", layer] + (1 - a) * other.written["mlp", layer])[None]
            parts.append(at(run(base, edits={("mlp", layer): lambda _, mlp=mlp: mlp})))
    return products(graph, gained, average(parts), tokens)


def corrected(
    hf: Any,
    given: Pair,
    graph: EdgeGraph,
    tokens: Sequence[int],
    qk_fix: bool,
    grad_drop: bool,
    direction: str,
) -> tuple[Tensor, Tensor]:
    """(signed, magnitude) of EAP with the QK fix and GradDrop: native graph, loops over drops, senders and queries."""
    base, source = prompts(given, direction)
    own, other = (split_run(hf, ids, by_query=False) for ids in (base, source))
    gained = changes(hf, own, other)
    layers = graph.n_layers
    drops: list[int | None] = [*range(layers)] if grad_drop else [None]
    scores = []
    for drop in drops:
        edits = {} if drop is None else {(place, drop): torch.Tensor.detach for place in ("attn", "mlp")}
        one = split_run(hf, base, by_query=False, edits=edits)
        at = gradients(one, diff(one.logits, given))
        found = products(graph, gained, at, tokens)
        if qk_fix:
            _fix(hf, graph, base, own, gained, at, tokens, found)
        scores.append(found)
    stacked = torch.stack(scores)
    factor = torch.full(
        (graph.n_receivers,), layers / (layers - 1) if grad_drop else 1.0, dtype=stacked.dtype
    )
    factor[graph.logits] = 1.0
    return stacked.mean(0) * factor, stacked.abs().mean(0) * factor


def _fix(
    hf: Any,
    graph: EdgeGraph,
    base: Sequence[int],
    own: Split,
    gained: Mapping[str, Tensor],
    at: Mapping[str, Tensor],
    tokens: Sequence[int],
    scores: Tensor,
) -> None:
    heads, kv_heads, _ = _sizes(hf)
    for layer in range(graph.n_layers):
        first = graph.receivers_of(layer, "q").start, graph.receivers_of(layer, "k").start
        for sender in range(int(graph.upstream[first[0]])):
            change = gained[graph.sender_name(sender)][None]
            shifts = {f"a{layer}.h{head}<{letter}>": change for head in range(heads) for letter in "qk"}
            moved = split_run(hf, base, by_query=False, shifts=shifts)
            for letter, start, count in (("q", first[0], heads), ("k", first[1], kv_heads)):
                for number in range(count):
                    scores[sender, start + number] = _finite(
                        hf, layer, letter, number, own, moved, at[f"z{layer}"], tokens, heads // kv_heads
                    )


def _finite(
    hf: Any,
    layer: int,
    letter: str,
    number: int,
    own: Split,
    moved: Split,
    dz: Tensor,
    tokens: Sequence[int],
    group: int,
) -> Tensor:
    queries, keys, values = (own.used[name, layer] for name in "qkv")
    total = torch.zeros((), dtype=queries.dtype)
    for head in [number] if letter == "q" else range(number * group, (number + 1) * group):
        shared = head // group
        new_keys = keys[:, shared].clone()
        if letter == "k":
            new_keys[list(tokens)] = moved.used["k", layer][list(tokens), shared]
        for query in range(len(queries)):
            new_query = queries[query, head]
            if letter == "q":
                if query not in tokens:
                    continue
                new_query = moved.used["q", layer][query, head]
            before = probabilities(hf, layer, queries[query, head], keys[:, shared], query)
            after = probabilities(hf, layer, new_query, new_keys, query)
            total = total + (after - before) @ (values[:, shared] @ dz[query, head])
    return total


def check_edges(
    family: str,
    pairs: Sequence[Pair],
    method: str,
    dtype: torch.dtype = torch.float64,
    tolerance: float | None = None,
    steps: int = 2,
    rule: str | None = None,
    qk_fix: bool = False,
    grad_drop: bool = False,
    **options: Any,
) -> EdgeScores:
    """Every edge of every pair against the oracle, native and by query head, each pair, place and mean."""
    model, twin = pair(family, dtype)
    asked = EdgeOptions(**options)
    scores = attribute_edges(
        model,
        pairs,
        asked,
        method,
        steps=steps,
        rule=rule,
        qk_fix=qk_fix,
        grad_drop=grad_drop,
        keep_pairs=True,  # type: ignore[arg-type]
    )
    exact_norms = twin.config.model_type in ("gpt2", "gpt_neox")
    tolerance = tolerance or (1e-5 if dtype == torch.float32 else 1e-11 if exact_norms else 2e-6)
    places = read_places(asked.positions, pairs)
    graph, what = scores.graph, f"{family} {method} {rule or ''}"
    assert scores.per_pair is not None
    signed, sizes = [], []
    for row, (given, covered) in enumerate(zip(pairs, places.covered, strict=True)):
        found = scores.per_pair[row] if scores.placed else scores.per_pair[row][None]
        mine, mine_abs = [], []
        for place, tokens in enumerate(covered):
            if qk_fix or grad_drop:
                expected, size = corrected(twin, given, graph, tokens, qk_fix, grad_drop, asked.direction)
            else:
                used = rule or {"eap-ig-inputs": "repo", "eap-ig-activations": "midpoint"}.get(method)
                expected = estimate(twin, given, graph, tokens, method, asked.direction, steps, used)
                size = expected.abs()
            agree(
                found[place].nan_to_num(0.0), expected, f"{what}, pair {given.id}, place {place}", tolerance
            )
            mine.append(expected)
            mine_abs.append(size)
        signed.append(torch.stack(mine))
        sizes.append(torch.stack(mine_abs))
    assert float(torch.stack(sizes).max()) > 1e-3, f"{what}: nothing has an effect"
    for name, kept, expected in (("mean", scores.mean, signed), ("mean |.|", scores.mean_abs, sizes)):
        kept = kept if scores.placed else kept[None]
        assert torch.equal(kept.isnan(), (~graph.real).expand_as(kept)), f"{what}: NaN where there is an edge"
        agree(
            kept.nan_to_num(0.0),
            torch.stack(expected).mean(0).float(),
            f"{what}: {name} over pairs",
            max(tolerance, 1e-6),
        )
    return scores


def check_by_query(
    family: str,
    pairs: Sequence[Pair],
    method: str,
    dtype: torch.dtype = torch.float64,
    steps: int = 2,
    rule: str | None = None,
) -> None:
    """Means by query head, of a model with shared keys, against clones for every query head."""
    model, twin = pair(family, dtype)
    scores = attribute_edges(model, pairs, EdgeOptions(), method, steps=steps, rule=rule)  # type: ignore[arg-type]
    assert scores.by_query is not None
    graph = EdgeGraph.of(model.dims, by_query_head=True)
    used = rule or {"eap-ig-inputs": "repo", "eap-ig-activations": "midpoint"}.get(method)
    expected = torch.stack(
        [
            estimate(twin, each, graph, range(len(each.clean_ids)), method, "noise", steps, used)
            for each in pairs
        ]
    )
    for kept, wanted in zip(scores.by_query, (expected.mean(0), expected.abs().mean(0)), strict=True):
        agree(kept.nan_to_num(0.0), wanted.float(), f"{family} {method} by query head", 3e-6)
    # What is linear in the gradient adds up over the heads that share a key or value.
    for layer, letter in itertools.product(range(graph.n_layers), "kv"):
        wide = scores.by_query[0][:, graph.receivers_of(layer, letter)].nan_to_num(0.0)
        native = scores.mean[:, scores.graph.receivers_of(layer, letter)].nan_to_num(0.0)
        agree(wide.unflatten(1, (native.shape[1], -1)).sum(2), native, "sum over a group", 3e-6)
