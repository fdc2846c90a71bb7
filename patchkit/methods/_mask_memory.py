"""Memory of a mask's batches: what is kept of the triples, and the larger of opening them and of a step."""

from __future__ import annotations

from patchkit.methods._mask_layout import Layout
from patchkit.methods._restart_memory import site_numbers
from patchkit.model import Dims
from patchkit.runtime.batch_memory import Shape, head_widths, logit_bytes, pass_bytes

#: Tensors in float32 of a blended site: the run's own activation, the alternate's, their difference, the blend.
_BLENDED = 4


def mask_bytes(dims: Dims, layout: Layout, prompts: Shape, run: int, reuse: bool) -> tuple[int, int]:
    """(kept, largest pass).

    Kept are keys and values of the originals before the masked token, and the alternates' activations at it. Opening
    runs whole prompts; a step runs `run` tokens of each, forward and backward.
    """
    _, kv = head_widths(dims)
    sites = site_numbers(dims, layout.sites)
    keys = prompts.rows * (prompts.width - run) * dims.n_layers * 2 * kv if reuse else 0
    kept = (keys + prompts.rows * sites) * dims.itemsize
    step = Shape(prompts.rows, run if reuse else prompts.width, prompts.width, prompts.masked)
    blended = _BLENDED * prompts.rows * sites * max(4, dims.itemsize)
    through = pass_bytes(dims, step, backward=True) + blended + 2 * logit_bytes(dims, prompts.rows)
    return kept, max(through, pass_bytes(dims, prompts, backward=False))
