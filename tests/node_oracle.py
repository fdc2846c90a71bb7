"""One node at a time, one unpadded prompt, plain torch hooks: what the node methods are compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from patchkit.data import Pair
from patchkit.model import NodeGrid
from tests import oracles

#: Last-token logits `[vocab]` of a run, and of the base run, to the metric.
Score = Callable[[Tensor, Tensor, Pair], Tensor]
#: (source run's activation, base run's activation, kind, layer) to what is put in.
PutIn = Callable[[Tensor, Tensor, str, int], Tensor]


def logit_diff(logits: Tensor, _: Tensor, pair: Pair) -> Tensor:
    return logits[pair.answer_id] - logits[pair.wrong_id]


def source_value(source: Tensor, own: Tensor, kind: str, layer: int) -> Tensor:
    return source


def prompts(pair: Pair, direction: str) -> tuple[Sequence[int], Sequence[int]]:
    """(base, source)."""
    clean, corrupt = pair.clean_ids, pair.corrupt_ids
    return (clean, corrupt) if direction == "noise" else (corrupt, clean)


def replaced(value: Tensor, new: Tensor, tokens: Sequence[int], kind: str, unit: int, group: int) -> Tensor:
    """`value` with one node taken from `new` at some tokens; `[position, ...]`."""
    value = value.clone()
    for token in tokens:
        if kind == "neuron":
            value[token, unit * group : (unit + 1) * group] = new[token, unit * group : (unit + 1) * group]
        elif value.ndim == 3:
            value[token, unit] = new[token, unit]
        else:
            value[token] = new[token]
    return value


def exact(
    hf: PreTrainedModel,
    pair: Pair,
    covered: Sequence[Sequence[int]],
    grid: NodeGrid,
    nodes: Sequence[int],
    direction: str = "noise",
    score: Score = logit_diff,
    put_in: PutIn = source_value,
) -> Tensor:
    """metric(base with the nodes replaced, all at once) - metric(base)."""
    base, source = prompts(pair, direction)
    own, clean_logits = oracles.read(hf, base)
    other, _ = oracles.read(hf, source)
    at: dict[tuple[str, int], list[tuple[int, int]]] = {}
    for kind, layer, place, unit in zip(*(part.tolist() for part in grid.locate(torch.tensor(nodes))), strict=True):
        at.setdefault((grid.kinds[kind], layer), []).append((place, unit))
    edits = {}
    for (kind, layer), members in at.items():
        new = put_in(other[kind, layer], own[kind, layer], kind, layer)

        def edit(value: Tensor, new=new, members=members, kind=kind) -> Tensor:
            for place, unit in members:
                value = replaced(value, new, covered[place], kind, unit, grid.group)
            return value

        edits[kind, layer] = edit
    patched = oracles.patched_logits(hf, base, edits)
    return score(patched, clean_logits, pair) - score(clean_logits, clean_logits, pair)


def exact_all(hf: PreTrainedModel, pair: Pair, covered, grid: NodeGrid, ids: Sequence[int], **how) -> Tensor:
    """The effect of every node in `ids`, each patched alone."""
    return torch.stack([exact(hf, pair, covered, grid, [node], **how) for node in ids])
