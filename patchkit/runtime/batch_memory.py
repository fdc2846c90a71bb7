"""Bytes that a batch takes beside the weights, from sizes alone: what batches are sized by, and what a plan says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from patchkit.model import Dims
from patchkit.runtime.program import Program


def batch_bytes(program: Program[Any], dims: Dims, itemsize: int, items: Sequence[Any]) -> int:
    """Bytes of one batch of these items at its peak, without the weights.

    Args:
        itemsize: bytes of one number in the model's dtype.
    """
    widest = len(items) * max(program.tokens(item) for item in items)
    # A program that takes gradients says so by a property; most do not.
    backward = bool(getattr(program, "backward", False))
    passes = pass_bytes(dims, widest, itemsize, backward=backward)
    return passes + program.cost(dims, items).bytes


def pass_bytes(dims: Dims, tokens: int, itemsize: int, *, backward: bool) -> int:
    """Bytes of a forward over so many tokens: of every layer if a backward follows, else of one layer.

    Of a layer are kept what both norms read and give, projections before and after rotary, heads, what attention and MLP
    add, and of the MLP gate, up, their activation and product; not the attention's probabilities, which a fused attention
    does not keep.
    """
    heads = (dims.n_heads + 2 * dims.n_kv_heads) * dims.d_head
    layer = 6 * dims.d_model + 2 * heads + 5 * max(dims.d_mlp, dims.d_model)
    return tokens * layer * itemsize * (dims.n_layers if backward else 1)
