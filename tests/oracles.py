"""Reading and patching by plain torch hooks, one unpadded prompt at a time: what the tracing tests compare with.

Slow and obvious, written from the Hugging Face modelling code. Nothing of patchkit and nothing of nnsight is used, and
no attention mask is ever given: attention is computed here head by head, from the model's config.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

#: A node kind and a layer.
Place = tuple[str, int]
#: An activation of one prompt, `[position, ...]`, to what stands in its place.
Edit = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Family:
    """Where one `config.model_type` keeps its modules. Paths are inside a block, `blocks` is in the model."""

    blocks: str = "model.layers"
    attention: str = "self_attn"
    projections: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    #: The module whose output the block adds to the residual stream.
    attention_adds: str = "self_attn"
    mlp_adds: str = "mlp"
    mlp: str = "mlp"
    #: None where the MLP has no neurons to read.
    down: str | None = "mlp.down_proj"


_POST_NORMS = Family(attention_adds="post_attention_layernorm", mlp_adds="post_feedforward_layernorm")
FAMILIES = {
    "llama": Family(),
    "mistral": Family(),
    "mixtral": Family(down=None),
    "qwen2": Family(),
    "qwen3": Family(),
    "phi3": Family(projections=("self_attn.qkv_proj",)),
    "gemma2": _POST_NORMS,
    "gemma3_text": _POST_NORMS,
    "olmo2": _POST_NORMS,
    "gpt2": Family("transformer.h", "attn", ("attn.c_attn",), "attn", "mlp", "mlp", "mlp.c_proj"),
    "gpt_neox": Family(
        "gpt_neox.layers",
        "attention",
        ("attention.query_key_value",),
        "attention",
        "mlp",
        "mlp",
        "mlp.dense_4h_to_h",
    ),
}


@dataclass
class Run:
    """One forward over one prompt: last-token logits `[vocab]`, activations by place, attention by layer."""

    logits: Tensor
    values: dict[Place, Tensor] = field(default_factory=dict)
    attention: dict[int, Tensor] = field(default_factory=dict)


def run(
    model: PreTrainedModel,
    ids: Sequence[int],
    edits: Mapping[Place, Edit] | None = None,
    *,
    grad: bool = False,
) -> Run:
    """Runs one prompt with every activation edited as asked, and returns them all.

    Activations have the shapes of the contract: heads `[position, head, d_head]` (KV heads for k and v), neurons
    `[position, neuron]`, others `[position, d_model]`. With `grad` they are in the graph of the logits.
    """
    edits, found = edits or {}, Run(torch.empty(0))

    def touch(kind: str, layer: int, value: Tensor) -> Tensor:
        """Notes an activation `[1, position, ...]` and gives what the forward goes on with."""
        edit = edits.get((kind, layer))
        # The copy is what the rest of the forward reads, so that a gradient at it is the total one.
        value = value.clone() if edit is None else edit(value[0].clone())[None]
        found.values[kind, layer] = value
        return value

    with torch.set_grad_enabled(grad), _hooked(model, touch, found.attention):
        found.logits = model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0, -1]
    return found


def squeezed(values: Mapping[Place, Tensor]) -> dict[Place, Tensor]:
    """Without the batch axis and the graph."""
    return {place: value[0].detach() for place, value in values.items()}


def read(model: PreTrainedModel, ids: Sequence[int]) -> tuple[dict[Place, Tensor], Tensor]:
    """(activations by place, last-token logits) of one prompt."""
    found = run(model, ids)
    return squeezed(found.values), found.logits


def patched_logits(model: PreTrainedModel, ids: Sequence[int], edits: Mapping[Place, Edit]) -> Tensor:
    """Last-token logits `[vocab]` of one prompt under edits."""
    return run(model, ids, edits).logits


def gradients(
    model: PreTrainedModel, ids: Sequence[int], metric: Callable[[Tensor], Tensor]
) -> tuple[dict[Place, Tensor], Tensor]:
    """(gradient of the metric at every activation, the metric) of one prompt; `metric`: logits `[1, vocab]` to `[1]`."""
    found = run(model, ids, grad=True)
    for value in found.values.values():
        value.retain_grad()
    score = metric(found.logits[None])[0]
    model.zero_grad()
    score.backward()
    model.zero_grad()
    return (
        {
            place: torch.zeros_like(value[0]) if value.grad is None else value.grad[0]
            for place, value in found.values.items()
        },
        score.detach(),
    )


@contextmanager
def _hooked(
    model: PreTrainedModel, touch: Callable[[str, int, Tensor], Tensor], attention: dict[int, Tensor]
) -> Iterator[None]:
    config: Any = model.config
    family = FAMILIES[config.model_type]
    sequential = not (config.model_type == "gpt_neox" and config.use_parallel_residual)
    handles: list[Any] = []
    for layer, block in enumerate(attrgetter(family.blocks)(model)):
        handles += _hook_block(block, layer, family, config, touch, sequential)
    implementation = config._attn_implementation
    ALL_ATTENTION_FUNCTIONS["oracle"] = _attention_by_hand(config, touch, attention)
    config._attn_implementation = "oracle"
    try:
        yield
    finally:
        config._attn_implementation = implementation
        del ALL_ATTENTION_FUNCTIONS["oracle"]
        for handle in handles:
            handle.remove()


def _hook_block(
    block: nn.Module, layer: int, family: Family, config: Any, touch: Callable[..., Tensor], sequential: bool
) -> list[Any]:
    at = {name: attrgetter(getattr(family, name))(block) for name in ("attention_adds", "mlp_adds")}
    residual: dict[str, Tensor] = {}

    def before_block(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        residual["pre"] = touch("resid_pre", layer, args[0])
        return (residual["pre"], *args[1:])

    def after_attention(_: nn.Module, args: Any, output: Any) -> Any:
        added = touch("attn_out", layer, output[0] if isinstance(output, tuple) else output)
        if sequential:
            # The block adds the residual stream once more; what it must add is the rest.
            added = touch("resid_mid", layer, residual["pre"] + added) - residual["pre"]
        return (added, *output[1:]) if isinstance(output, tuple) else added

    def after_block(_: nn.Module, args: Any, output: Any) -> Any:
        assert isinstance(output, Tensor)
        return touch("resid_post", layer, output)

    handles = [
        block.register_forward_pre_hook(before_block),
        at["attention_adds"].register_forward_hook(after_attention),
        at["mlp_adds"].register_forward_hook(lambda _, args, output: touch("mlp_out", layer, output)),
        block.register_forward_hook(after_block),
    ]
    mlp = attrgetter(family.mlp)(block)
    handles.append(mlp.register_forward_pre_hook(lambda _, args: (touch("mlp_in", layer, args[0]),)))
    if family.down is not None:
        down = attrgetter(family.down)(block)
        handles.append(down.register_forward_pre_hook(lambda _, args: (touch("neuron", layer, args[0]),)))
    for which, path in enumerate(family.projections):
        split = _projection_hook(layer, which, len(family.projections) == 1, config, touch)
        handles.append(attrgetter(path)(block).register_forward_hook(split))
    return handles


def _heads(config: Any) -> tuple[int, int]:
    heads = config.num_attention_heads
    return heads, getattr(config, "num_key_value_heads", None) or heads


def _projection_hook(
    layer: int, which: int, fused: bool, config: Any, touch: Callable[..., Tensor]
) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    heads, kv_heads = _heads(config)
    kinds, counts = ("q_proj", "k_proj", "v_proj"), (heads, kv_heads, kv_heads)

    def separate(_: nn.Module, args: Any, output: Tensor) -> Tensor:
        width = output.shape[-1] // counts[which]
        value = output.reshape(*output.shape[:2], counts[which], width)
        return touch(kinds[which], layer, value).reshape(output.shape)

    def stacked(_: nn.Module, args: Any, output: Tensor) -> Tensor:
        width = output.shape[-1] // sum(counts)
        start, parts = 0, []
        for kind, count in zip(kinds, counts, strict=True):
            part = output[..., start : start + count * width].reshape(*output.shape[:2], count, width)
            parts.append(touch(kind, layer, part).reshape(*output.shape[:2], count * width))
            start += count * width
        return torch.cat(parts, dim=-1)

    def by_head(_: nn.Module, args: Any, output: Tensor) -> Tensor:
        width = output.shape[-1] // heads // 3
        columns = output.reshape(*output.shape[:2], heads, 3 * width)
        parts = [
            touch(kind, layer, columns[..., i * width : (i + 1) * width]) for i, kind in enumerate(kinds)
        ]
        return torch.cat(parts, dim=-1).reshape(output.shape)

    if not fused:
        return separate
    return by_head if config.model_type == "gpt_neox" else stacked


def window_of(config: Any, layer: int) -> int | None:
    """How many tokens, itself included, a token of this layer sees; None for all before it."""
    types = getattr(config, "layer_types", None)
    if types is not None and types[layer] != "sliding_attention":
        return None
    return getattr(config, "sliding_window", None)


def _attention_by_hand(
    config: Any, touch: Callable[..., Tensor], attention: dict[int, Tensor]
) -> Callable[..., tuple[Tensor, None]]:
    heads, kv_heads = _heads(config)
    cap = getattr(config, "attn_logit_softcapping", None)

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **_: Any
    ) -> tuple[Tensor, None]:
        layer = module.layer_idx
        query, key, value = (
            touch(kind, layer, tensor.transpose(1, 2))[0]
            for kind, tensor in (("q", query), ("k", key), ("v", value))
        )
        scale = getattr(config, "query_pre_attn_scalar", query.shape[-1]) ** -0.5
        far = window_of(config, layer) or len(query)
        place = torch.arange(len(query))
        seen = (place[:, None] >= place) & (place[:, None] - place < far)
        mixed, patterns = [], []
        for head in range(heads):
            shared = head // (heads // kv_heads)
            scores = query[:, head] @ key[:, shared].T * scale
            if cap is not None:
                scores = cap * torch.tanh(scores / cap)
            patterns.append(scores.masked_fill(~seen, -torch.inf).softmax(-1))
            mixed.append(patterns[-1] @ value[:, shared])
        attention[layer] = torch.stack(patterns).detach()
        return touch("z", layer, torch.stack(mixed, dim=1)[None]), None

    return attend


def rotated_by_hand(model: PreTrainedModel, layer: int, kind: str, projected: Tensor) -> Tensor:
    """Queries or keys as used by attention, from the projection's output `[position, head, d_head]`: norms, rotary."""
    config: Any = model.config
    block = attrgetter(FAMILIES[config.model_type].blocks)(model)[layer]
    if config.model_type in ("qwen3", "gemma3_text", "olmo2"):
        projected = _normed(getattr(block.self_attn, f"{kind}_norm"), config, projected)
    if config.model_type == "gpt2":
        return projected
    rope = config.rope_parameters
    rope = rope[config.layer_types[layer]] if "rope_theta" not in rope else rope
    width = int(projected.shape[-1] * rope.get("partial_rotary_factor", 1.0))
    frequency = torch.tensor([rope["rope_theta"] ** (-2 * i / width) for i in range(width // 2)]).double()
    turned = projected.clone()
    for position in range(len(projected)):
        angle = position * frequency
        first, second = (
            projected[position, :, : width // 2].double(),
            projected[position, :, width // 2 : width].double(),
        )
        turned[position, :, : width // 2] = (first * angle.cos() - second * angle.sin()).to(projected)
        turned[position, :, width // 2 : width] = (second * angle.cos() + first * angle.sin()).to(projected)
    return turned


def _normed(norm: Any, config: Any, projected: Tensor) -> Tensor:
    """Over each head, except for olmo2, which takes the norm over all heads at once."""
    value = projected.flatten(-2) if config.model_type == "olmo2" else projected
    scale = (value.double().pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).rsqrt()
    weight = norm.weight.detach().double() + (1 if config.model_type == "gemma3_text" else 0)
    return (value.double() * scale * weight).to(projected).reshape(projected.shape)
