"""Memory of edge attribution: what a batch keeps, and its largest pass or product.

Most is held at two moments: when a run's backward begins, and when products are made of the gradients that all runs
left. Of one token, d is d_model, q the width of all query heads, kv that of the keys that have gradients.
"""

from __future__ import annotations

from dataclasses import dataclass

from patchkit.methods._edge_drops import ATTENDED_TOKENS
from patchkit.methods._edge_products import Blocks
from patchkit.model import Dims, EdgeGraph
from patchkit.results.edge_scores import EdgeMethod
from patchkit.runtime.batch_memory import Shape, head_widths, mlp_width, pass_bytes, saved_bytes
from patchkit.tracing.gradients import BATCHED_BACKWARD

#: Tensors of one number for each query and key that gradients of repeated keys are made of.
_BY_QUERY = 4
#: The same of the QK fix.
_QK_FIX = 8


@dataclass(frozen=True)
class EdgeMemory:
    """What a batch of prompts takes, in bytes.

    Attributes:
        graph: that scores are made in.
        shape: of the prompts.
    """

    graph: EdgeGraph
    dims: Dims
    shape: Shape
    method: EdgeMethod

    def kept_and_pass(self, at_once: int) -> tuple[int, int]:
        """(kept all along, the most beside it); `at_once`: tokens of the rows of a sender's path."""
        name = self.method.name
        if name == "ifr":
            return self._flow()
        if name == "eap-ig-activations" and self.method.rule == "midpoint":
            return self._paths(at_once)
        if self.method.qk_fix or self.method.grad_drop:
            return self._corrected()
        # Both runs' senders and gradients of the runs before are there when a backward begins, but for `eap`.
        both = 2 * self.senders + self.gradients
        before = {"eap": 0, "clean-corrupted": both - self.senders}.get(name, both)
        return both, max(before + self.through - both, self.products)

    @property
    def tokens(self) -> int:
        return self.shape.tokens

    @property
    def precise(self) -> int:
        """Bytes of a number in what products are made of: float32 at least."""
        return max(4, self.dims.itemsize)

    @property
    def senders(self) -> int:
        """Of one run: the heads and the MLP of each layer, and the input."""
        q, _ = head_widths(self.dims)
        layer = q + self.dims.d_model
        return self.tokens * (self.dims.n_layers * layer + self.dims.d_model) * self.dims.itemsize

    @property
    def gradients(self) -> int:
        """Of each layer those at projections and at the MLP, and of each run that is averaged the units of both norms,
        and of each receiver its part along them."""
        runs = 2 if self.method.name == "clean-corrupted" else self.method.steps or 1
        d = self.dims.d_model
        layer = self._at_projections + d + runs * (2 * d + self.graph.receivers_a_layer)
        return self.tokens * self.dims.n_layers * layer * self.precise

    @property
    def _at_projections(self) -> int:
        return (self.graph.n_heads + 2 * self.graph.n_kv_heads) * self.dims.d_head

    @property
    def through(self) -> int:
        """A forward and what its backward begins with: what layers keep for it, and what is read beside that: queries and
        keys before rotary, what attention and MLP add, what the MLP reads."""
        return pass_bytes(self.dims, self.shape, backward=True) + self._read(self.shape)

    def _read(self, shape: Shape) -> int:
        q, kv = head_widths(self.dims)
        layer = q + kv + 3 * self.dims.d_model
        read = shape.tokens * self.dims.n_layers * layer * self.dims.itemsize
        if self.graph.n_kv_heads == self.dims.n_kv_heads:
            return read
        # Gradients of every query head's own copy of keys and values, and one layer's attention.
        copies = shape.tokens * self.dims.n_layers * 3 * q * self.precise
        return read + copies + _BY_QUERY * self._attended(shape)

    def _attended(self, shape: Shape) -> int:
        return shape.rows * self.dims.n_heads * shape.width * shape.reads * self.precise

    @property
    def products(self) -> int:
        """Senders of a block and receivers of a layer, scores of a block signed and by size, and their sums in double
        precision."""
        blocks = Blocks.of(self.graph, self.shape.rows, self.shape.width)
        cells = self.graph.n_senders * self.graph.n_receivers
        return self.precise * blocks.numbers(self.graph, self.shape.width) + cells * (12 * blocks.pairs + 32)

    def _flow(self) -> tuple[int, int]:
        """Information-flow routes: one run's senders and its streams; one layer's heads, each with what it writes."""
        d, layers = self.dims.d_model, self.dims.n_layers
        streams = self.tokens * (2 * layers + 1) * d * self.dims.itemsize
        written = self.tokens * (2 * self.graph.n_heads + 4) * d * self.precise
        return self.senders + streams, max(written, pass_bytes(self.dims, self.shape, backward=False))

    def _paths(self, at_once: int) -> tuple[int, int]:
        """Each sender's own path: rows of a few senders at every point of their paths; base streams are kept."""
        d, steps, pairs = self.dims.d_model, self.method.steps or 1, self.shape.rows
        senders = max(1, at_once // self.shape.width // (pairs * steps))
        rows = min(senders, self.graph.n_heads + 1) * pairs * steps
        shape = Shape(rows, self.shape.width, self.shape.reads, self.shape.masked)
        vectors = self.tokens * (self.graph.n_heads + 1) * d * self.precise
        cells = 4 * pairs * self.graph.n_senders * self.graph.n_receivers
        kept = 2 * self.senders + self.tokens * self.dims.n_layers * d * self.dims.itemsize + vectors + cells
        # Where each row is moved to, what is added, and what it begins with.
        moved = 6 * shape.tokens * d * self.precise
        return kept, pass_bytes(self.dims, shape, backward=True) + self._read(shape) + moved

    def _corrected(self) -> tuple[int, int]:
        """GradDrop keeps the graph while products are made, and one layer's gradients for every drop; the QK fix runs
        attention again on changed streams, when the graph is gone."""
        d, layers = self.dims.d_model, self.dims.n_layers
        q, kv = head_widths(self.dims)
        slots = layers - 1 if self.method.grad_drop else 1
        blocks = self.precise * Blocks.of(self.graph, self.shape.rows, self.shape.width).numbers(
            self.graph, self.shape.width
        )
        kept = 2 * self.senders
        held = layers * saved_bytes(self.dims, self.shape) + self._read(self.shape)
        if self.method.grad_drop:
            at_once = max(1, min(slots, BATCHED_BACKWARD // self.tokens))
            backward = at_once * (5 * mlp_width(self.dims) + 2 * d)
            by_slot = self._at_projections + 4 * d
            beside = max(self.tokens * backward * self.dims.itemsize, blocks)
            most = held + beside + self.tokens * slots * by_slot * self.precise
        else:
            one_run = self.tokens * layers * (self._at_projections + d) * self.precise
            most = max(
                self.through, self.tokens * (q + 2 * kv + d) * layers * self.dims.itemsize + one_run + blocks
            )
        if self.method.qk_fix:
            # Gradients at z for every drop, streams and values of each layer; the rows that attend.
            by_drop = layers * (layers + 1) // 2 if self.method.grad_drop else layers
            left = self.tokens * (by_drop * q + layers * (d + kv)) * self.precise
            upstream = self.graph.n_senders - self.graph.n_heads - 1
            numbers = min(max(1, ATTENDED_TOKENS // self.tokens), upstream)
            rows = numbers * self.tokens
            attending = rows * (3 * d + 3 * q + 2 * kv) * self.dims.itemsize + rows * d * self.precise
            fixed = left + attending + (_QK_FIX + slots) * self._attended(self.shape)
            most = max(most + left // 2, fixed)
        return kept, most
