"""Memory of node patching and of attribution: what batches keep, and their largest pass."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod

from patchkit.methods._restart_memory import base_numbers, row_bytes, site_numbers
from patchkit.methods._set_rows import Restart, Rows
from patchkit.model import KINDS, Dims, Site
from patchkit.runtime.batch_memory import Shape, mlp_width, pass_bytes, saved_bytes
from patchkit.tracing.gradients import BATCHED_BACKWARD
from patchkit.tracing.restart import BEHIND_ATTENTION

#: Kinds whose raw tensor the backward keeps too: reading it keeps nothing more.
_KEPT_ANYWAY = ("resid_pre", "resid_mid", "resid_post", "q", "k", "v", "z")
#: Tensors of one number for each query and key that the QK fix of keys at single positions works with at once.
_OF_KEYS = 16
#: The same where keys are patched together, and of queries.
_OF_QUERIES = 6


def patching_bytes(
    dims: Dims, pairs: Shape, sites: Sequence[Site], ablation: str, restarts: Iterable[Restart], rows: Rows
) -> tuple[int, int]:
    """(kept, largest pass) of patched sets.

    Kept are the base runs, what is put in at every site, and the base runs' own there where that is made of it.
    """
    behind = len({site.layer for site in sites if site.kind in BEHIND_ATTENTION})
    held = {"mean": 0, "noise": 2}.get(ablation, 1) * site_numbers(dims, sites)
    kept = pairs.tokens * (base_numbers(dims, behind) + held) * dims.itemsize
    shapes = {Shape(len(each.rows), pairs.width - each.start, pairs.width, pairs.masked) for each in restarts}
    unit = max(prod(KINDS[site.kind].shape(dims)) for site in sites)
    nodes = max(KINDS[site.kind].count(dims) for site in sites)
    passes = [row_bytes(dims, shape, unit, 2 * nodes) for shape in shapes]
    return kept, max([pass_bytes(dims, pairs, backward=False), *passes])


def attribution_bytes(
    dims: Dims, pairs: Shape, sites: Sequence[Site], ablation: str, places: int, qk_fix: bool, grad_drop: bool
) -> tuple[int, int]:
    """(kept, forward and backward) of AtP and its corrections.

    Kept are what is put in at every site, and the run's own there as far as the backward does not keep it anyway; then
    the gradients, with GradDrop one layer's for every drop.
    """
    size, layers = dims.itemsize, range(dims.n_layers)
    held = {"mean": 0, "noise": 2}.get(ablation, 1) * site_numbers(dims, sites)
    own = site_numbers(dims, (site for site in sites if site.kind not in _KEPT_ANYWAY))
    kept = pairs.tokens * (held + own) * size
    by_layer = [site_numbers(dims, (site for site in sites if site.layer == layer)) for layer in layers]
    fixed = qk_fix and any(site.kind in ("q", "k") for site in sites)
    together = fixed * pairs.rows * dims.n_heads * pairs.width**2 * 4
    together *= _OF_KEYS if places > 1 and any(site.kind == "k" for site in sites) else _OF_QUERIES
    saved = dims.n_layers * saved_bytes(dims, pairs)
    # One block's backward: gradients at the MLP's product, its activation and its gate.
    step = 3 * mlp_width(dims) + 2 * dims.d_model
    if not grad_drop:
        # The gradients are all there when what was kept for the backward is not any more.
        taken = pairs.tokens * sum(by_layer) * size
        through = pass_bytes(dims, pairs, backward=True)
        return kept, max(through, taken + together + saved // 2)
    # Cotangents of the drops above a block go through it several at once; each leaves gradients of the whole layer.
    drops = dims.n_layers - 1
    at_once = max(1, min(drops, BATCHED_BACKWARD // pairs.tokens))
    batched = at_once * (step + 2 * mlp_width(dims)) + drops * dims.d_model
    taken = drops * (dims.d_model + max(by_layer))
    return kept, saved + max(pairs.tokens * batched * size, pairs.tokens * taken * size + together)
