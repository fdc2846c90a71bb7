"""Memory of exact edges, of paths and of circuits: base runs of pairs, and rows that run together."""

from __future__ import annotations

from collections.abc import Sequence

from patchkit.methods._restart_memory import base_numbers, row_bytes
from patchkit.model import Dims
from patchkit.model.edges import EdgeGraph
from patchkit.runtime.batch_memory import Shape, attention_bytes, head_widths, mlp_bytes, pass_bytes


def edge_base_numbers(dims: Dims, *, attention: bool = False) -> int:
    """At one token, of base runs whose edges are cut: what restarts need, what MLPs (and heads) add, what MLPs read, the
    final stream, and the senders of the other run."""
    q, _ = head_widths(dims)
    d, layers = dims.d_model, dims.n_layers
    own = base_numbers(dims, behind=layers) + layers * d * (1 + attention + (not dims.parallel)) + d
    return own + layers * (q + d) + d


def edge_rows_bytes(
    dims: Dims,
    pairs: Shape,
    reads: Sequence[tuple[int, int]],
    into_heads: Sequence[tuple[int, int]],
    others: Sequence[tuple[int, int]],
    at_once: int,
) -> int:
    """The largest pass of patched edges. Rows are given as (how many in one layer, tokens that each runs).

    Args:
        reads: runs of one layer's attention, which all its heads read: of queries, keys and values each their own.
        into_heads: rows that end in heads.
        others: rows that end in MLPs or the logits.
        at_once: tokens of a forward.
    """
    q, kv = head_widths(dims)
    d, size, wide = dims.d_model, dims.itemsize, pairs.width

    def shaped(count: int, width: int) -> Shape:
        return Shape(min(count, max(1, at_once // width)), width, wide, pairs.masked)

    most, heads = pass_bytes(dims, pairs, backward=False), 0
    for each in reads:
        run = shaped(*each)
        changes = max(1, run.rows // 3)
        made = changes * (run.width * 3 * d + wide * (q + 2 * kv)) * size
        marks = run.rows * wide * (dims.n_heads + 2 * dims.n_kv_heads)
        heads = max(heads, run.rows * wide * q * size)
        most = max(most, made + marks + attention_bytes(dims, run) + run.rows * wide * q * size)
    for count, width in into_heads:
        run = row_bytes(dims, shaped(count, width), q, dims.n_heads, attends=width > 1)
        most = max(most, heads + run)
    for each in others:
        most = max(most, _own_stream(dims, shaped(*each)))
    return most


def _own_stream(dims: Dims, run: Shape) -> int:
    """Of rows that each bring a stream of their own, as wide as the prompt: it is made from one of zeros."""
    stream = run.rows * run.reads * dims.d_model * dims.itemsize
    changed = run.tokens * dims.d_model * dims.itemsize
    return max(
        2 * stream + 2 * changed, stream + row_bytes(dims, run, dims.d_model, 1, attends=run.width > 1)
    )


def path_numbers(dims: Dims, layers: Sequence[int], letters: Sequence[int]) -> int:
    """Numbers at one token of what receivers are given, the logits aside: one tensor for each layer and letter (queries,
    keys, values, and the MLP's input)."""
    q, kv = head_widths(dims)
    sizes = {0: q, 1: kv, 2: kv, 3: dims.d_model}
    return sum(sizes.get(letter, 0) for _, letter in set(zip(layers, letters, strict=True)))


def path_rows_bytes(
    dims: Dims, pairs: Shape, rows: Sequence[tuple[int, int]], sites: int, at_once: int
) -> int:
    """The largest pass of senders whose change is carried to receivers.

    Args:
        rows: (how many rows, tokens that each runs).
        sites: numbers at one token of what all receivers are given.
    """
    d, size, wide = dims.d_model, dims.itemsize, pairs.width
    most = pass_bytes(dims, pairs, backward=False)
    for count, width in rows:
        run = Shape(min(count, max(1, at_once // width)), width, wide, pairs.masked)
        if not sites:
            most = max(most, _own_stream(dims, run))
            continue
        # What the sender adds, the change, what is passed on; then what each receiver is given, as wide as the prompt.
        carried = run.tokens * 5 * d * size + mlp_bytes(dims, run)
        given = run.rows * wide * sites * size
        most = max(most, given + max(carried, row_bytes(dims, run, d, dims.n_heads)))
    return most


def circuits_bytes(
    dims: Dims, graph: EdgeGraph, pairs: Shape, groups: Sequence[Sequence[int]], copies: int, together: bool
) -> tuple[int, int]:
    """(kept, largest pass) of circuits.

    Args:
        groups: of the circuits that are run at once, the senders that each computes.
        together: whether base and source runs are one batch, which is kept whole.
    """
    q, kv = head_widths(dims)
    d, layers = dims.d_model, dims.n_layers
    size = dims.itemsize
    # Streams before every layer and before every MLP, and what senders carry where an edge is cut.
    cut = ((2 * layers + 1) * d + layers * (q + d) + 2 * d) * (2 if together else 1)
    kept = pairs.tokens * cut * size
    ends = Shape(2 * pairs.rows if together else pairs.rows, pairs.width, pairs.reads, pairs.masked)
    most = pass_bytes(dims, ends, backward=False) - (kept if together else 0)
    for senders in groups:
        # Differences of senders; the streams of one layer's receivers of one circuit, their norm's two copies, and what
        # they are projected to.
        differences = pairs.tokens * sum(2 + count for count in senders) * d * size
        streams = 3 * pairs.tokens * (graph.receivers_a_layer + 1) * d * size
        run = Shape(copies * len(senders) * pairs.rows, pairs.width, pairs.reads, pairs.masked)
        given = run.tokens * (q + 2 * kv + 2 * q * pairs.masked) * size
        most = max(most, differences + max(streams + given, pass_bytes(dims, run, backward=False)))
    return kept, most
