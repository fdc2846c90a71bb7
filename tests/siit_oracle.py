"""Node replacement in a plain Hugging Face model, by torch hooks, one prompt at a time: the slow, obvious version."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def modules(model: PreTrainedModel, layer: int) -> tuple[nn.Module, nn.Module]:
    """The attention's output projection, whose input holds all heads' z one after the other, and the MLP."""
    if model.config.model_type == "gpt2":
        block = model.transformer.h[layer]
        return block.attn.c_proj, block.mlp
    block = model.model.layers[layer]
    return block.self_attn.o_proj, block.mlp


def all_nodes(model: PreTrainedModel) -> list[str]:
    config = model.config
    heads = [
        f"a{layer}.h{head}"
        for layer in range(config.num_hidden_layers)
        for head in range(config.num_attention_heads)
    ]
    return [*heads, *(f"m{layer}" for layer in range(config.num_hidden_layers))]


def read(name: str) -> tuple[int, int | None]:
    """Layer, and head or None for an MLP."""
    if name.startswith("m"):
        return int(name[1:]), None
    layer, head = name[1:].split(".h")
    return int(layer), int(head)


@contextmanager
def hooked(
    model: PreTrainedModel, values: Mapping[str, Tensor] | None, kept: dict[str, Tensor]
) -> Iterator[None]:
    """Puts `values` in, and keeps every node as it comes out of the model before that."""
    handles = []
    size = model.config.hidden_size // model.config.num_attention_heads
    for name in all_nodes(model):
        layer, head = read(name)
        projection, mlp = modules(model, layer)
        new = None if values is None else values.get(name)
        if head is None:

            def change_output(
                _: nn.Module, __: object, out: Tensor, name: str = name, new: Tensor | None = new
            ) -> Tensor:
                kept[name] = out[0].clone()
                return out if new is None else new[None].clone()

            handles.append(mlp.register_forward_hook(change_output))
        else:
            part = slice(head * size, (head + 1) * size)

            def change_input(
                _: nn.Module,
                args: tuple[Tensor],
                name: str = name,
                new: Tensor | None = new,
                part: slice = part,
            ) -> tuple[Tensor]:
                kept[name] = args[0][0, :, part].clone()
                if new is None:
                    return args
                changed = args[0].clone()
                changed[0, :, part] = new
                return (changed,)

            handles.append(projection.register_forward_pre_hook(change_input))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def activations(model: PreTrainedModel, ids: Sequence[int]) -> dict[str, Tensor]:
    """Every node's activation on a prompt, `[positions, width]`."""
    kept: dict[str, Tensor] = {}
    with torch.no_grad(), hooked(model, None, kept):
        model(torch.tensor([list(ids)]))
    return kept


def answer(model: PreTrainedModel, ids: Sequence[int], values: Mapping[str, Tensor]) -> int:
    """The token with the largest logit at the end of a prompt, with nodes replaced."""
    with torch.no_grad(), hooked(model, values, {}):
        return int(model(torch.tensor([list(ids)])).logits[0, -1].argmax())
