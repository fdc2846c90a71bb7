"""Mask training the slow, obvious way: torch hooks on a Hugging Face model, whole prompts, one at a time.

Written from the description of the published implementation; nothing of patchkit and nothing of nnsight is used.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

#: By `config.model_type`: the blocks, the projection that reads the heads, what adds the MLP to the residual stream.
_PLACES = {
    "llama": ("model.layers", "self_attn.o_proj", "mlp"),
    "gemma2": ("model.layers", "self_attn.o_proj", "post_feedforward_layernorm"),
    "gpt2": ("transformer.h", "attn.c_proj", "mlp"),
    "gpt_neox": ("gpt_neox.layers", "attention.dense", "mlp"),
}


@dataclass(frozen=True)
class Example:
    """One triple: prompts, the position that is blended in each, and the two answers that are compared."""

    original: Sequence[int]
    alternate: Sequence[int]
    target: int
    rival: int
    invariant: bool
    original_at: int = -1
    alternate_at: int = -1


@contextmanager
def _hooks(model: nn.Module, on_heads: Any, on_mlp: Any) -> Iterator[None]:
    config: Any = model.config
    blocks, reads_heads, mlp = _PLACES[config.model_type]
    handles = []
    for layer, block in enumerate(attrgetter(blocks)(model)):
        before = lambda _, args, layer=layer: on_heads(layer, args[0])  # noqa: E731
        after = lambda _, args, output, layer=layer: on_mlp(layer, output)  # noqa: E731
        handles.append(attrgetter(reads_heads)(block).register_forward_pre_hook(before))
        handles.append(attrgetter(mlp)(block).register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _logits(model: nn.Module, ids: Sequence[int]) -> Tensor:
    return model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0, -1]


def activations(model: nn.Module, ids: Sequence[int], at: int) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Heads' outputs side by side, and the MLPs' outputs, at one position of one prompt, by layer."""
    z: dict[int, Tensor] = {}
    mlp: dict[int, Tensor] = {}

    def on_heads(layer: int, value: Tensor) -> None:
        z[layer] = value[0, at].clone()

    def on_mlp(layer: int, value: Tensor) -> None:
        mlp[layer] = value[0, at].clone()

    with torch.no_grad(), _hooks(model, on_heads, on_mlp):
        _logits(model, ids)
    return z, mlp


def masked_logits(
    model: nn.Module,
    example: Example,
    heads: Tensor,
    mlps: Tensor,
    cached: tuple[dict[int, Tensor], dict[int, Tensor]],
) -> Tensor:
    """The original's last logits with every head and MLP blended at the position; `heads` [layer, head], 1 keeps.

    `cached`: the alternate's activations.
    """
    z, mlp = cached
    at = example.original_at
    count = heads.shape[1]

    def on_heads(layer: int, value: Tensor) -> tuple[Tensor]:
        mixed = value.clone()
        width = value.shape[-1] // count
        for head in range(count):
            here = slice(head * width, (head + 1) * width)
            keep = heads[layer, head]
            mixed[0, at, here] = keep * value[0, at, here] + (1 - keep) * z[layer][here]
        return (mixed,)

    def on_mlp(layer: int, value: Tensor) -> Tensor:
        mixed = value.clone()
        mixed[0, at] = mlps[layer] * value[0, at] + (1 - mlps[layer]) * mlp[layer]
        return mixed

    with _hooks(model, on_heads, on_mlp):
        return _logits(model, example.original)


@dataclass(frozen=True)
class _Ready:
    """An example with what no mask changes: the alternate's activations, and the original's logits."""

    example: Example
    cached: tuple[dict[int, Tensor], dict[int, Tensor]]
    clean: Tensor


def _ready(model: nn.Module, example: Example) -> _Ready:
    with torch.no_grad():
        clean = _logits(model, example.original)
    return _Ready(example, activations(model, example.alternate, example.alternate_at), clean)


def _loss(model: nn.Module, group: Sequence[_Ready], heads: Tensor, mlps: Tensor, loss: str) -> Tensor:
    costs = []
    for ready in group:
        example, clean = ready.example, ready.clean
        logits = masked_logits(model, example, heads, mlps, ready.cached)
        if loss == "cross-entropy":
            costs.append(-torch.log_softmax(logits, -1)[example.target])
            continue
        diff = logits[example.target] - logits[example.rival]
        diff0 = clean[example.target] - clean[example.rival]
        costs.append((diff - diff0) ** 2 if example.invariant else 5 * (diff0 - diff))
    return torch.stack(costs).mean()


def _penalty(heads: Tensor, mlps: Tensor, sparsity: str, lam: float) -> Tensor:
    z = torch.cat([heads.flatten(), mlps])
    return lam * (1 - z).sum() if sparsity == "l1" else lam * ((1.001 - z) ** 0.5).sum()


def train(
    model: nn.Module,
    desiderata: Mapping[str, Sequence[Example]],
    n_heads: int,
    n_layers: int,
    *,
    loss: str,
    sparsity: str,
    lambdas: Sequence[float],
    steps: int,
    steps_after: int,
    lr: float,
) -> list[Tensor]:
    """The masks `[layers * heads + layers]` at each lambda, each started from the one before."""
    heads = torch.ones(n_layers, n_heads, requires_grad=True)
    mlps = torch.ones(n_layers, requires_grad=True)
    ready = {name: [_ready(model, example) for example in group] for name, group in desiderata.items()}
    found = []
    for place, lam in enumerate(lambdas):
        adam = torch.optim.Adam([heads, mlps], lr=lr)
        for _ in range(steps_after if place else steps):
            together = [list(desiderata)] if loss == "cross-entropy" else [[name] for name in desiderata]
            for names in together:
                heads.data.clamp_(0, 1)
                mlps.data.clamp_(0, 1)
                adam.zero_grad()
                cost = torch.stack([_loss(model, ready[name], heads, mlps, loss) for name in names]).sum()
                # As published: patched components are paid for on the dependence's step, or on the only one.
                if loss == "cross-entropy" or not desiderata[names[0]][0].invariant:
                    cost = cost + _penalty(heads, mlps, sparsity, lam)
                cost.backward()
                adam.step()
        heads.data.clamp_(0, 1)
        mlps.data.clamp_(0, 1)
        found.append(torch.cat([heads.detach().flatten(), mlps.detach()]).clone())
    return found
