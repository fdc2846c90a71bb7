"""One node at a time, one unpadded prompt, plain torch hooks: what the node methods are compared with.

`check_sweep` and `check_sets` are the comparisons themselves: the tests of the methods must pass them, and those of
mutations must make them fail.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from patchkit.data import Pair, read_places
from patchkit.methods._node_options import NodeOptions
from patchkit.methods.activation_patching import patch_nodes, patch_sets
from patchkit.model import KINDS, NodeGrid, PatchModel
from patchkit.results.scores import Scores
from tests import oracles
from tests.comparisons import agree, pair
from tests.families import FAMILIES

#: Last-token logits `[vocab]` of a run, and of the base run, to the metric.
Score = Callable[[Tensor, Tensor, Pair], Tensor]
#: (source run's activation, base run's activation, kind, layer) to what is put in.
PutIn = Callable[[Tensor, Tensor, str, int], Tensor]

#: The families that the oracle knows.
DENSE = tuple(name for name in FAMILIES if "experts" not in name)
#: The same, as parameters: a few that differ most in the fast lane, the others in the slow one.
CORE = ("llama-gqa", "gpt2", "gemma2-post-norms-softcap", "neox-parallel")
DENSE_BY_LANE = [pytest.param(name, marks=() if name in CORE else (pytest.mark.slow,)) for name in DENSE]
#: Neurons of one node in the comparisons: 40 and 128 are no multiples of it.
GROUP = 9
#: Wider than the sliding windows; the prompts differ from the first token on.
LONG = Pair((3, 5, 7, 9, 11, 13, 2), (9, 5, 3, 30, 11, 17, 8), 4, 6, {"s": (2, 5)}, "long")
#: Another length, so that it is padded beside the others; the prompts differ from the third token on.
SHORT = Pair((4, 6, 8, 10, 3), (4, 6, 18, 12, 3), 5, 7, {"s": (1, 3)}, "short")
#: As long as the first; the prompts differ in one token in the middle.
MIDDLE = Pair((14, 21, 33, 9, 26, 5, 30), (14, 21, 33, 20, 26, 5, 30), 3, 8, {"s": (3, 4)}, "middle")


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
    sets: Sequence[Sequence[int]],
    direction: str = "noise",
    score: Score = logit_diff,
    put_in: PutIn = source_value,
) -> Tensor:
    """For each set: metric(base with the nodes of the set replaced, all at once) - metric(base)."""
    base, source = prompts(pair, direction)
    own, clean_logits = oracles.read(hf, base)
    other, _ = oracles.read(hf, source)
    effects = []
    where = grid.locate(torch.tensor([node for nodes in sets for node in nodes], dtype=torch.long))
    nodes_of_sets = iter(list(zip(*(part.tolist() for part in where), strict=True)))
    for nodes in sets:
        at: dict[tuple[str, int], list[tuple[int, int]]] = {}
        for kind, layer, place, unit in itertools.islice(nodes_of_sets, len(nodes)):
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
        effects.append(score(patched, clean_logits, pair) - score(clean_logits, clean_logits, pair))
    return torch.stack(effects)


def kinds_of(model: PatchModel) -> tuple[str, ...]:
    """Every node kind that the model has."""
    return tuple(kind for kind in KINDS if kind != "resid_mid" or not model.dims.parallel)


def spread(grid: NodeGrid, per_layer: int, seed: int = 0) -> list[int]:
    """Nodes of every kind and layer, drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    chosen: list[int] = []
    for kind in grid.kinds:
        start, size = grid.start(kind), grid.size(kind) // grid.dims.n_layers
        for layer in range(grid.dims.n_layers):
            first = start + layer * size
            chosen += (first + torch.randperm(size, generator=generator)[:per_layer]).tolist()
    return chosen


def check_sweep(
    family: str,
    pairs: Sequence[Pair],
    dtype: torch.dtype = torch.float64,
    per_layer: int | None = None,
    kinds: Sequence[str] = (),
    tolerance: float | None = None,
    score: Score = logit_diff,
    **options: object,
) -> Scores:
    """A sweep over the nodes of a family, by default of all kinds, equals the oracle, by default at every node."""
    model, twin = pair(family, dtype)
    kinds = tuple(kinds) or kinds_of(model)
    asked = NodeOptions(nodes=kinds, group=GROUP if "neuron" in kinds else 1, **options)  # type: ignore[arg-type]
    scores = patch_nodes(model, pairs, asked)
    check_scores(twin, pairs, scores, per_layer, tolerance, score)
    return scores


def check_scores(
    twin: PreTrainedModel,
    pairs: Sequence[Pair],
    scores: Scores,
    per_layer: int | None = None,
    tolerance: float | None = None,
    score: Score = logit_diff,
) -> None:
    """Effects and the metric of both runs, pair by pair, against the oracle."""
    tolerance = tolerance or (1e-10 if scores.effects.dtype == torch.float64 else 1e-5)
    grid, direction = scores.grid, scores.convention.direction
    nodes = list(range(len(grid))) if per_layer is None else spread(grid, per_layer)
    covered = read_places(scores.convention.positions, pairs).covered
    names, moved = grid.names(nodes), torch.zeros(len(nodes), dtype=torch.bool)
    for row, each in enumerate(pairs):
        expected = exact(twin, each, covered[row], grid, [[node] for node in nodes], direction, score)
        for name, found, wanted in zip(names, scores.effects[row, nodes], expected, strict=True):
            agree(found, wanted, f"effect of {name} in pair {each.id}", tolerance)
        moved |= expected.abs() > 1e-4
        for name, ids in zip(("base", "source"), prompts(each, direction), strict=True):
            logits, base = oracles.read(twin, ids)[1], oracles.read(twin, prompts(each, direction)[0])[1]
            found = getattr(scores, f"{name}_metric")[row]
            agree(found, score(logits, base, each), f"metric of the {name} run of {each.id}", tolerance)
    # Most patches of a position before the last cannot be seen in the last layers; of each kind some must be.
    kind_of = grid.locate(torch.tensor(nodes)).kind
    for index, kind in enumerate(grid.kinds):
        assert moved[kind_of == index].any(), (
            f"no patch of {kind} changed the metric: the comparison says little"
        )


def check_sets(
    family: str,
    pairs: Sequence[Pair],
    sets: Sequence[Sequence[str]],
    dtype: torch.dtype = torch.float64,
    kinds: Sequence[str] = (),
    tolerance: float | None = None,
    **options: object,
) -> None:
    """Sets of nodes, by name, patched together in every pair."""
    model, twin = pair(family, dtype)
    asked = NodeOptions(nodes=tuple(kinds) or kinds_of(model), **options)  # type: ignore[arg-type]
    places = read_places(asked.positions, pairs)
    grid = NodeGrid(model.dims, asked.nodes, places.labels, places.placed, asked.group)
    numbers = [torch.cat([torch.empty(0).long(), *(grid.find(name) for name in names)]) for names in sets]
    tolerance = tolerance or (1e-10 if dtype == torch.float64 else 1e-5)
    rows = [number for _ in sets for number in range(len(pairs))]
    found = patch_sets(model, pairs, [each for each in numbers for _ in pairs], rows, asked).effects
    found = found.reshape(len(sets), len(pairs))
    for row, each in enumerate(pairs):
        members = [nodes.tolist() for nodes in numbers]
        expected = exact(twin, each, places.covered[row], grid, members, asked.direction)
        for place, names in enumerate(sets):
            agree(found[place, row], expected[place], f"set {', '.join(names)} in pair {each.id}", tolerance)
