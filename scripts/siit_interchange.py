"""Replacing the outputs of heads and MLPs while a small model runs: plain hooks, with gradients through them.

A node is a head's z (the input of the attention's output projection) or an MLP's output, at all positions. Layers and
nodes are numbered as in the model; the nodes of one layer are its heads, then its MLP.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

_NODE = re.compile(r"a(\d+)\.h(\d+)|m(\d+)")
_PROJECTIONS = re.compile(r"\.(self_attn\.o_proj|attn\.c_proj)$")


@dataclass(frozen=True)
class Swap:
    """What every node of every row gets.

    Attributes:
        changed: whether the node is replaced at all, `[rows, nodes]`.
        donor: the row whose activation is put in, `[rows, nodes]`.
        blank: where the mean over rows is put in instead, `[rows, nodes]`, ...
        scale: ... times this: 1 the mean, 0 zeros, `[rows, 1]`.
    """

    changed: Bool[Tensor, "rows nodes"]
    donor: Int[Tensor, "rows nodes"]
    blank: Bool[Tensor, "rows nodes"]
    scale: Float[Tensor, "rows 1"]


@dataclass
class NodeHooks:
    """Hooks on a model's heads and MLPs: `recording()` keeps what they give, `swapping(...)` replaces it.

    Attributes:
        names: every node of the model, in order.
    """

    model: PreTrainedModel
    heads: int = field(init=False)
    names: tuple[str, ...] = field(init=False)
    kept: dict[int, Tensor] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        layers = self.model.config.num_hidden_layers
        self.heads = self.model.config.num_attention_heads
        self.names = tuple(
            name
            for layer in range(layers)
            for name in (*(f"a{layer}.h{head}" for head in range(self.heads)), f"m{layer}")
        )

    def numbers(self, names: Sequence[str]) -> list[int]:
        """Where nodes are in `names`."""
        return [self.names.index(name) for name in names]

    def _modules(self) -> Iterator[tuple[int, slice, bool, nn.Module]]:
        """Each module that is hooked: its place, its nodes, and whether its input is meant (heads) or its output."""
        modules = dict(self.model.named_modules())
        attentions = [module for name, module in modules.items() if _PROJECTIONS.search(name)]
        mlps = [module for name, module in modules.items() if name.endswith(".mlp")]
        for layer, (attention, mlp) in enumerate(zip(attentions, mlps, strict=True)):
            start = layer * (self.heads + 1)
            yield 2 * layer, slice(start, start + self.heads), True, attention
            yield 2 * layer + 1, slice(start + self.heads, start + self.heads + 1), False, mlp

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Keeps every node's activation, `[rows, positions, nodes of the module, width]`, for the swaps to come."""
        self.kept.clear()

        def keep(place: int, units: int, value: Tensor) -> Tensor:
            self.kept[place] = value.unflatten(-1, (units, -1))
            return value

        with self._hooked(lambda place, nodes: lambda value: keep(place, nodes.stop - nodes.start, value)):
            yield

    @contextmanager
    def swapping(self, swap: Swap) -> Iterator[None]:
        """Replaces nodes by what was last recorded."""

        def put(place: int, nodes: slice, value: Tensor) -> Tensor:
            kept, units = self.kept[place], nodes.stop - nodes.start
            donors = kept[swap.donor[:, nodes], :, torch.arange(units)].transpose(1, 2)
            average = kept.mean(0, keepdim=True) * swap.scale[:, :, None, None]
            new = torch.where(swap.blank[:, None, nodes, None], average, donors)
            own = value.unflatten(-1, (units, -1))
            return torch.where(swap.changed[:, None, nodes, None], new, own).flatten(-2)

        with self._hooked(lambda place, nodes: lambda value: put(place, nodes, value)):
            yield

    @contextmanager
    def _hooked(self, make: Callable[[int, slice], Callable[[Tensor], Tensor]]) -> Iterator[None]:
        handles = []
        for place, nodes, is_input, module in self._modules():
            change = make(place, nodes)
            if is_input:
                handles.append(
                    module.register_forward_pre_hook(lambda _, args, change=change: (change(args[0]),))
                )
            else:
                handles.append(
                    module.register_forward_hook(lambda _, __, value, change=change: change(value))
                )
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
