"""Bytes that a batch takes beside the weights, from sizes alone: what batches are sized by, and what a plan says.

Tensors are counted, part by part; what an allocator or a kernel takes besides is not. Of a layer, d is d_model, q the
width of all query heads, kv that of all keys, m the width of the MLP.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from patchkit.model import Dims
from patchkit.runtime.program import Batched, Differentiating

#: Tokens of one forward on a CPU that a Program fills with patched rows: larger ones gain nothing and leave the caches.
CPU_FORWARD = 1024


def batch_bytes(program: Batched[Any], dims: Dims, itemsize: int, items: Sequence[Any]) -> int:
    """Bytes of one batch of these items at its peak, without the weights.

    Args:
        program: or what a session opens.
        itemsize: bytes of one number in the model's dtype.
    """
    dims = replace(dims, itemsize=itemsize)
    cost = program.cost(dims, items)
    if cost.passes is not None:
        return cost.bytes + cost.passes
    lengths = [program.tokens(item) for item in items]
    backward = isinstance(program, Differentiating) and program.backward
    return cost.bytes + pass_bytes(dims, Shape.of(lengths), backward=backward)


def forward_tokens(dims: Dims, max_batch_tokens: int) -> int:
    """Tokens of one forward that a Program fills with patched rows."""
    return min(max_batch_tokens, CPU_FORWARD) if dims.on_cpu else max_batch_tokens


@dataclass(frozen=True)
class Shape:
    """Of one pass.

    Attributes:
        rows: of the batch.
        width: tokens that are computed in each row, padding included.
        reads: tokens that each of them may attend to: those before a restart too.
        masked: whether some of them are padding, so that attention is given a mask.
    """

    rows: int
    width: int
    reads: int
    masked: bool

    @classmethod
    def of(cls, lengths: Sequence[int]) -> Shape:
        """Of whole prompts, padded to the longest."""
        return cls(len(lengths), max(lengths), max(lengths), min(lengths) < max(lengths))

    @property
    def tokens(self) -> int:
        """Padded tokens that are computed."""
        return self.rows * self.width


def pass_bytes(dims: Dims, shape: Shape, *, backward: bool) -> int:
    """Bytes of a forward at its peak: of one layer, or, if a backward follows, of what every layer keeps for it and
    one layer's backward."""
    mask = shape.rows * shape.width * shape.reads * shape.masked
    # What one layer works on: that of the MLP or, with many tokens and eager attention, that of the attention.
    if backward:
        layers = dims.n_layers * saved_bytes(dims, shape)
        step = shape.tokens * dims.itemsize * (3 * mlp_width(dims) + 2 * dims.d_model)
        return layers + max(step, logit_bytes(dims, shape.rows)) + mask
    return max(attention_bytes(dims, shape), mlp_bytes(dims, shape), logit_bytes(dims, shape.rows)) + mask


def mlp_width(dims: Dims) -> int:
    """m; four widths where an MLP has no neurons of one module: what dense models have."""
    return dims.d_mlp or 4 * dims.d_model


def head_widths(dims: Dims) -> tuple[int, int]:
    """(q, kv)."""
    return dims.n_heads * dims.d_head, dims.n_kv_heads * dims.d_head


def saved_bytes(dims: Dims, shape: Shape) -> int:
    """What one layer keeps for its backward; frozen projections keep nothing.

    Both norms keep the stream that they read (in half precision a copy in float32); attention keeps queries, keys, values
    and what it gives; a gated MLP keeps gate, up and the gate's activation, any other its input, half of it, tanh, and
    1 + tanh.
    """
    q, kv = head_widths(dims)
    # Where attention is given a mask, keys and values are repeated for every query head.
    kv = q if shape.masked else kv
    streams = 2 * dims.d_model * max(4, dims.itemsize)
    numbers = shape.tokens * (2 * q + (3 if dims.gated else 4) * mlp_width(dims))
    numbers += shape.rows * shape.reads * 2 * kv
    kept = 4 + (dims.itemsize if dims.itemsize < 4 else 0)
    return numbers * dims.itemsize + shape.tokens * streams + _probabilities(dims, shape) * kept


def attention_bytes(dims: Dims, shape: Shape) -> int:
    """Of a layer in its attention: the embeddings, the stream and its normed copy; queries, keys and values before and
    after rotary, and of all columns that are read; what attention gives; masked scores and probabilities in float32,
    where these are tensors."""
    q, kv = head_widths(dims)
    kv_read = 2 * (q if shape.masked else kv) * shape.rows * shape.reads
    numbers = shape.tokens * (3 * dims.d_model + 4 * q + 2 * kv) + kv_read
    return numbers * dims.itemsize + _probabilities(dims, shape) * (dims.itemsize + 4)


def mlp_bytes(dims: Dims, shape: Shape) -> int:
    """Of a layer in its MLP: the embeddings, the stream before and behind the attention and its normed copy; three
    widths of the MLP if it is gated, else four: input, cube, tanh, half of the input. Attention's probabilities, where
    they are tensors, are let go of when the layer ends."""
    streams = (4 if dims.gated else 5) * dims.d_model
    numbers = shape.tokens * (streams + (3 if dims.gated else 4) * mlp_width(dims))
    return (numbers + _probabilities(dims, shape)) * dims.itemsize


def logit_bytes(dims: Dims, rows: int) -> int:
    """Logits at the last position, and a copy in float32 that a metric works on."""
    return rows * dims.vocab_size * (dims.itemsize + (4 if dims.itemsize < 4 else 0))


def _probabilities(dims: Dims, shape: Shape) -> int:
    return shape.rows * dims.n_heads * shape.width * shape.reads * dims.eager
