"""How much memory a run needs beyond a forward and backward: the peak of a process's resident memory, on Linux.

For processes that do nothing else, and whose model nothing has run on: what was freed before may be used again without
being seen. The same is done on a tiny model first, so that whatever is loaded or made once is there. Both sides of a
comparison use this, so nothing here imports either.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
#: What resets the peak, see proc(5).
_RESET_PEAK = "5"


def peak() -> float:
    """The largest resident memory so far, in MiB."""
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024


def peak_rise(warm: Callable[[], object], run: Callable[[], object]) -> float:
    """MiB by which the peak of `run` is above that of `warm`, which goes first."""
    # Building a model needs more than running it; that peak must not hide the one that is asked for.
    _CLEAR.write_text(_RESET_PEAK)
    warm()
    before = peak()
    run()
    return round(peak() - before, 1)


def forward_and_backward(model: Any, ids: Tensor) -> None:
    """What memory is counted from: a forward and backward of a Hugging Face model, parameters frozen."""
    embeddings = model.requires_grad_(False).get_input_embeddings()(ids).requires_grad_(True)
    model(inputs_embeds=embeddings, use_cache=False).logits[:, -1].sum().backward()


def tiny(config: Any) -> Any:
    """The config of a model of the same kind with two narrow layers."""
    small = copy.deepcopy(config)
    small.num_hidden_layers, small.hidden_size = 2, 4 * config.num_attention_heads
    if config.model_type == "llama":
        small.head_dim, small.intermediate_size = 4, 8
    return small
