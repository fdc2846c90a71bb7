"""One node of one model put into another, one unpadded prompt at a time, plain torch hooks: what cross-model patching is
compared with; and models that differ in their weights alone."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from patchkit.data import Pair, Triple, read_places
from patchkit.methods import NodeOptions, patch_across
from patchkit.model import NodeGrid, PatchModel
from patchkit.zoo.load import load
from tests import oracles
from tests.comparisons import agree
from tests.families import build
from tests.node_oracle import logit_diff, replaced

#: Weights that end up in the stream's first value and in the logits.
ENDS = ("embed", "wte", "wpe", "lm_head", "ln_f", "model.norm", "final_layer_norm")


@functools.cache
def stages(
    family: str, dtype: torch.dtype = torch.float64, same_ends: bool = False
) -> tuple[tuple[PatchModel, PreTrainedModel], tuple[PatchModel, PreTrainedModel]]:
    """Two models of a family, each with a twin that nnsight never saw.

    With `same_ends` they are alike in embeddings, last norm and unembedding.
    """

    def make(seed: int) -> PreTrainedModel:
        made = build(family, seed, dtype)
        if same_ends:
            kept = build(family, 0, dtype).state_dict()
            ends = {name: value for name, value in kept.items() if any(end in name for end in ENDS)}
            made.load_state_dict(made.state_dict() | ends)
        return made

    return (load(make(0)), make(0)), (load(make(1)), make(1))


def across(
    model: PreTrainedModel,
    donor: PreTrainedModel,
    pair: Pair,
    grid: NodeGrid,
    sets: Iterable[Sequence[int]],
    covered: Sequence[Sequence[int]],
) -> Tensor:
    """For each set: metric(model with the donor's values of these nodes on the clean prompt) - metric(model)."""
    values, _ = oracles.read(donor, pair.clean_ids)
    _, own = oracles.read(model, pair.clean_ids)
    effects = []
    for nodes in sets:
        where = grid.locate(torch.tensor(list(nodes)))
        edits = {}
        for kind, layer, place, unit in zip(*(part.tolist() for part in where), strict=True):
            name = grid.kinds[kind]
            before = edits.get((name, layer), lambda value: value)

            def edit(value, before=before, name=name, layer=layer, place=place, unit=unit):  # type: ignore[no-untyped-def]
                return replaced(before(value), values[name, layer], covered[place], name, unit, 1)

            edits[name, layer] = edit
        patched = oracles.patched_logits(model, pair.clean_ids, edits)
        effects.append(logit_diff(patched, own, pair) - logit_diff(own, own, pair))
    return torch.stack(effects)


def check_across(
    family: str, pairs: Sequence[Pair], kinds: Sequence[str], positions: str = "all", tolerance: float = 1e-9
) -> None:
    """Every node of these kinds, and both models' metrics, against the loop."""
    (model, twin), (donor, other) = stages(family)
    scores = patch_across(model, donor, pairs, NodeOptions(nodes=tuple(kinds), positions=positions))
    covered = read_places(positions, pairs).covered
    for row, pair in enumerate(pairs):
        every = [[node] for node in range(len(scores.grid))]
        expected = across(twin, other, pair, scores.grid, every, covered[row])
        assert bool((expected.abs() > 1e-4).any()), "no node changed the metric: the comparison says little"
        agree(scores.effects[row], expected, f"effects in pair {pair.id}", tolerance)
        for name, hf in (("base", twin), ("source", other)):
            logits = oracles.read(hf, pair.clean_ids)[1]
            found = getattr(scores, f"{name}_metric")[row]
            agree(
                found, logit_diff(logits, logits, pair), f"metric of the {name} run of {pair.id}", tolerance
            )


def answers(
    model: PreTrainedModel,
    donor: PreTrainedModel,
    triples: Sequence[Triple],
    names: Sequence[str],
    grid: NodeGrid,
) -> list[int]:
    """The model's answers to originals while components hold at the last token what they hold in the donor on the
    alternates."""
    found = []
    for triple in triples:
        values, _ = oracles.read(donor, triple.alternate_ids)
        edits = {}
        for node in [int(grid.find(name)) for name in names]:
            (kind,), (layer,), _, (unit,) = (part.tolist() for part in grid.locate(torch.tensor([node])))
            name = grid.kinds[kind]
            before = edits.get((name, layer), lambda value: value)

            def edit(value, values=values, before=before, name=name, layer=layer, unit=unit):  # type: ignore[no-untyped-def]
                value, new = before(value).clone(), values[name, layer]
                if value.ndim == 3:
                    value[-1, unit] = new[-1, unit]
                else:
                    value[-1] = new[-1]
                return value

            edits[name, layer] = edit
        found.append(int(oracles.patched_logits(model, triple.original_ids, edits).argmax()))
    return found
