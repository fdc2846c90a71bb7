"""Embedded trained models, twins of them that nnsight never saw, and short pairs of their tasks."""

from __future__ import annotations

import functools
from typing import Any

from transformers import PreTrainedModel

from patchkit import tasks
from patchkit.data import Pair
from patchkit.model import PatchModel
from patchkit.zoo.load import load


@functools.cache
def trained(name: str, task: str, count: int = 2) -> tuple[PatchModel, PreTrainedModel, tuple[Pair, ...]]:
    """The shortest of some pairs."""
    model = load(name)
    kind: Any = type(model.hf)
    twin = kind(model.config).eval()
    twin.load_state_dict(model.hf.state_dict())
    drawn = tasks.pairs(task, model.tokenizer, 8, 0)
    return model, twin, tuple(sorted(drawn, key=lambda pair: len(pair.clean_ids))[:count])
