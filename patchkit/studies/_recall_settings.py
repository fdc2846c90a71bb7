"""One setting of the recall study: the exact truth on some pairs, and the curve of every method against it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import exp, log

import torch
from torch import Tensor

from patchkit.data import Pair
from patchkit.errors import InputError
from patchkit.methods import search
from patchkit.methods._node_options import NodeOptions
from patchkit.methods.activation_patching import patch_nodes, patch_sets
from patchkit.methods.attribution import Method, attribute
from patchkit.methods.recall import Recall, cost_curve, mean_recall
from patchkit.methods.search import Search
from patchkit.model import PatchModel
from patchkit.results.recall import Evidence, Material, MethodRecall, NodeClass, RecallSetting, thin

KINDS: dict[NodeClass, tuple[str, ...]] = {
    "attention nodes": ("q", "k", "v", "z"),
    "neuron nodes": ("neuron",),
}
#: Without q and k nodes the QK fix has nothing to do: AtP with it is AtP, and AtP* is AtP with GradDrop.
GRADIENT_METHODS: dict[NodeClass, tuple[Method, ...]] = {
    "attention nodes": ("atp", "atp-qk", "atp-graddrop", "atp-star"),
    "neuron nodes": ("atp", "atp-star"),
}
POSITIONS: dict[Evidence, str] = {"pair": "each", "distribution": "all"}


@dataclass(frozen=True)
class SearchOptions:
    """The searches' parameters; of several the study reports the one that served a search best in each setting.

    Attributes:
        subsampling: (p, draws).
        block_sizes, branchings: of Blocks and Hierarchical.
        random_orders: random orders whose curves are averaged.
        floor: |effects| up to this are rounding: patching is exact to 1e-5 in float32.
    """

    subsampling: tuple[tuple[float, int], ...] = ((0.03, 133), (0.03, 400), (0.1, 120))
    block_sizes: tuple[int, ...] = (4, 16, 64)
    branchings: tuple[int, ...] = (4, 8)
    random_orders: int = 8
    floor: float = 1e-5

    @property
    def described(self) -> dict[str, str]:
        """Label and value, for a reader."""
        return {
            "subsampling (p, draws)": "; ".join(f"{p:g}, {draws}" for p, draws in self.subsampling),
            "sizes of blocks": ", ".join(map(str, self.block_sizes)),
            "branching of the hierarchy": ", ".join(map(str, self.branchings)),
            "random orders averaged": str(self.random_orders),
            "|effect| taken for rounding": f"{self.floor:g}",
        }


@dataclass(frozen=True, eq=False)
class Cell:
    """What one setting is about; `group` neighbouring neurons make one node."""

    model: PatchModel
    material: Material
    evidence: Evidence
    node_class: NodeClass
    group: int = 1

    @property
    def options(self) -> NodeOptions:
        group = self.group if self.node_class == "neuron nodes" else 1
        return NodeOptions(nodes=KINDS[self.node_class], positions=POSITIONS[self.evidence], group=group)


def measure(cell: Cell, pairs: Sequence[Pair], options: SearchOptions, seed: int) -> RecallSetting:
    """The exact truth and all curves.

    With evidence `pair` every pair is a truth of its own, with `distribution` all pairs are one.

    Raises:
        InputError: no node has an effect in any pair.
    """
    groups = [[pair] for pair in pairs] if cell.evidence == "pair" else [list(pairs)]
    found: list[dict[tuple[str, str], Recall]] = []
    silent: list[str] = []
    nodes = 0
    for number, group in enumerate(groups):
        exact = patch_nodes(cell.model, group, cell.options)
        truth, nodes = exact.mean_abs(), len(exact.grid)
        if float(truth.max()) > options.floor:
            curves = {
                key: mean_recall([cost_curve(truth, each, options.floor) for each in searches])
                for key, searches in _searches(cell, group, nodes, options, seed + number)
            }
            found.append(curves)
        else:
            silent += [pair.id for pair in group]
    if not found:
        raise InputError(
            f"{cell.model.name}, {cell.material}: no {cell.node_class[:-1]} has an effect above {options.floor:g} in any "
            "of the pairs, so there is nothing to recall"
        )
    names = dict.fromkeys(name for name, _ in found[0])
    return RecallSetting(
        model=cell.model.name,
        material=cell.material,
        evidence=cell.evidence,
        node_class=cell.node_class,
        kinds=list(KINDS[cell.node_class]),
        convention=cell.options.convention,
        nodes=nodes,
        recalled=[len(next(iter(curves.values())).cost) for curves in found],
        pairs=len(pairs) - len(silent),
        silent=silent,
        methods=[_best(name, found) for name in names],
    )


def _searches(
    cell: Cell, pairs: Sequence[Pair], nodes: int, options: SearchOptions, seed: int
) -> Iterator[tuple[tuple[str, str], list[Search]]]:
    """((method, parameters), its searches): one each, but several random orders."""
    for method in GRADIENT_METHODS[cell.node_class]:
        scores = attribute(cell.model, pairs, cell.options, method)
        yield (method, ""), [search.from_scores(method, scores.mean_abs(), scores.cost)]

    def effects(sets: Sequence[Tensor], numbers: Sequence[int]) -> Tensor:
        return patch_sets(cell.model, pairs, sets, numbers, cell.options).effects

    magnitude = search.mean_magnitude(effects, len(pairs))
    for p, draws in options.subsampling:
        found = search.subsampling(effects, nodes, len(pairs), p=p, draws=draws, seed=seed)
        yield (found.name, f"p {p:g}, {draws} draws"), [found]
    for size in options.block_sizes:
        found = search.blocks(magnitude, torch.arange(nodes), size)
        yield (found.name, f"of {size}"), [found]
    for branching in options.branchings:
        found = search.hierarchical(magnitude, nodes, branching)
        yield (found.name, f"branching {branching}"), [found]
    yield ("iterative", ""), [search.iterative(nodes)]
    several = [search.random(nodes, seed * options.random_orders + i) for i in range(options.random_orders)]
    yield ("random", ""), several


def geometric_mean(values: Sequence[float]) -> float:
    """exp of the mean of logarithms."""
    return exp(sum(log(value) for value in values) / len(values))


def _best(name: str, found: Sequence[dict[tuple[str, str], Recall]]) -> MethodRecall:
    """A method with the parameters whose aggregate over pairs is least."""
    candidates = []
    for key in found[0]:
        if key[0] == name:
            recalls = [curves[key] for curves in found]
            per_pair = [recall.aggregate for recall in recalls]
            candidates.append((geometric_mean(per_pair), key[1], per_pair, recalls))
    aggregate, parameters, per_pair, recalls = min(candidates, key=lambda candidate: candidate[0])
    mean = mean_recall(recalls)
    ranks, cost = thin(mean.cost.tolist())
    return MethodRecall(
        name=name,
        parameters=parameters,
        preparation=mean.preparation,
        aggregate=aggregate,
        unprepared=geometric_mean([recall.unprepared().aggregate for recall in recalls]),
        per_pair=per_pair,
        ranks=ranks,
        cost=cost,
    )
