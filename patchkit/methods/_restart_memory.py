"""Memory of runs that patched rows restart from, and of the rows themselves (`patchkit.tracing.restart`)."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

from patchkit.model import KINDS, Dims, Site
from patchkit.runtime.batch_memory import Shape, head_widths, logit_bytes, mlp_bytes, pass_bytes


def site_numbers(dims: Dims, sites: Iterable[Site]) -> int:
    """Numbers at one token of several sites."""
    return sum(prod(KINDS[site.kind].shape(dims)) for site in sites)


def base_numbers(dims: Dims, behind: int) -> int:
    """Of a base run, at one token: the stream before each layer, each layer's keys and values, and the heads of the
    layers that can be restarted behind their attention."""
    q, kv = head_widths(dims)
    return dims.n_layers * (dims.d_model + 2 * kv) + behind * q


def row_bytes(dims: Dims, rows: Shape, unit: int, nodes: int, *, attends: bool = True) -> int:
    """Of patched rows: their pass, what is put in at one site, of `unit` numbers a token, and at which of its `nodes`.

    Args:
        attends: whether attention is run, which it is not where rows restart behind the last layer's.
    """
    put_in = rows.tokens * unit * dims.itemsize
    ends = max(mlp_bytes(dims, rows), logit_bytes(dims, rows.rows))
    through = pass_bytes(dims, rows, backward=False) if attends else ends
    return through + put_in + 2 * rows.rows * rows.reads * nodes
