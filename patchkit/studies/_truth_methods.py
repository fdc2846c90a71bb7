"""Every method of the library on one case, through the scheduler."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from patchkit.data import Pair, Triple
from patchkit.data.desiderata import Split
from patchkit.methods import (
    EdgeOptions,
    MaskOptions,
    NodeOptions,
    Schedule,
    acdc,
    attribute,
    attribute_edges,
    learn_mask,
    patch_edges,
    patch_nodes,
    patch_sets,
    search,
)
from patchkit.methods.attribution import Method
from patchkit.model import EdgeGraph, PatchModel
from patchkit.results.edge_scores import EdgeScores
from patchkit.results.mask import MaskResult
from patchkit.results.scores import Scores
from patchkit.studies._truth_scores import (
    NODE_KINDS,
    MethodScores,
    from_edge_scores,
    from_grid,
    from_node_scores,
    from_nodes,
)

#: What each method is, in the order of the tables.
METHODS: dict[str, str] = {
    "exact": "each node patched alone (exact activation patching)",
    "atp": "attribution patching: one gradient (Nanda 2023)",
    "atp-qk": "AtP with the QK fix: finite changes of attention at queries and keys",
    "atp-graddrop": "AtP with GradDrop: mean size over drops of each layer's gradient",
    "atp-star": "AtP*: both (Kramár et al. 2024)",
    "subsampling": "random sets of nodes patched together; mean with the node less mean without it",
    "blocks": "blocks of neighbouring nodes patched together; a node has its block's effect",
    "hierarchical": "best-first search down a tree of sets; only nodes that it reached have a score",
    "mask": "desiderata mask (DCM) over heads and MLPs at the last token: the corrupt prompt's answer must come out",
    "random nodes": "random numbers",
    "exact edges": "each edge patched alone",
    "eap": "edge attribution patching: one gradient (Syed et al. 2023)",
    "eap-qk": "EAP with the QK fix",
    "eap-graddrop": "EAP with GradDrop",
    "eap-star": "EAP with both: AtP* for edges",
    "eap-ig-inputs": "EAP-IG, 5 steps along token embeddings, the repository's rule (Hanna et al. 2024)",
    "eap-ig-midpoint": "the same with the midpoint rule",
    "eap-ig-activations": "EAP-IG, 5 steps along each sender's own path",
    "clean-corrupted": "EAP with the mean of both runs' gradients",
    "acdc": "edges cut one after another while the metric holds (Conmy et al. 2023)",
    "ifr": "information-flow routes: no gradient, no metric (Ferrando and Voita 2024)",
    "random edges": "random numbers",
}
NODE_GRADIENTS: tuple[Method, ...] = ("atp", "atp-qk", "atp-graddrop", "atp-star")


@dataclass(frozen=True)
class MethodSettings:
    """Parameters of methods.

    Attributes:
        budget: forwards a pair that Subsampling, Blocks and Hierarchical may pay, as a share of patching every node.
        inclusion: probability of a node to be in a set of Subsampling.
        steps: of the two EAP-IG methods.
        tau: ACDC's threshold, as a share of |base - source| metric.
        seeds: of methods that draw at random; the first gives the numbers, all give the spread.
        schedule: of the mask.
    """

    budget: float = 0.25
    inclusion: float = 0.1
    steps: int = 5
    tau: float = 0.01
    seeds: tuple[int, ...] = (0, 1)
    schedule: Schedule = field(default_factory=Schedule)


@dataclass(frozen=True, eq=False)
class Scorer:
    """What all methods score: a model and pairs, and others that a mask is validated on."""

    model: PatchModel
    pairs: Sequence[Pair]
    test: Sequence[Pair]
    settings: MethodSettings

    @property
    def graph(self) -> EdgeGraph:
        return EdgeGraph.of(self.model.dims)

    @property
    def options(self) -> NodeOptions:
        return NodeOptions(nodes=NODE_KINDS)

    def exact_nodes(self) -> Scores:
        """Every node patched alone."""
        return patch_nodes(self.model, self.pairs, self.options)

    def exact_edges(self) -> EdgeScores:
        """Every edge patched alone, with the effects in each pair."""
        return patch_edges(self.model, self.pairs, EdgeOptions(), keep_pairs=True)

    def makers(self, nodes: Scores, edges: EdgeScores) -> dict[str, Callable[[], MethodScores]]:
        """What makes each method's scores, in the order of `METHODS`; the exact ones are given."""
        graph = self.graph
        made: dict[str, Callable[[], MethodScores]] = {
            "exact": lambda: from_node_scores("exact", graph, nodes),
            **{name: partial(self._node_gradient, name) for name in NODE_GRADIENTS},
            "subsampling": partial(self._seeded, partial(self._subsampling, nodes)),
            "blocks": partial(self._blocks, nodes),
            "hierarchical": partial(self._hierarchical, nodes),
            "mask": partial(self._seeded, self._mask),
            "random nodes": partial(self._seeded, partial(self._random_nodes, nodes)),
            "exact edges": lambda: from_edge_scores("exact edges", edges, _sizes(edges)),
            **{
                name: partial(self._edge_gradient, name, asked)
                for name, asked in edge_attributions(self.settings).items()
            },
            "acdc": partial(self._acdc, edges),
            "ifr": self._routes,
            "random edges": partial(self._seeded, partial(self._random_edges, edges)),
        }
        return {name: made[name] for name in METHODS}

    def _node_gradient(self, name: Method) -> MethodScores:
        return from_node_scores(name, self.graph, attribute(self.model, self.pairs, self.options, name))

    def _edge_gradient(self, name: str, asked: dict[str, object]) -> MethodScores:
        found = attribute_edges(self.model, self.pairs, EdgeOptions(), keep_pairs=True, **asked)  # type: ignore[arg-type]
        return from_edge_scores(name, found, self._single(asked) if "grad_drop" in asked else _sizes(found))

    def _routes(self) -> MethodScores:
        return from_edge_scores("ifr", attribute_edges(self.model, self.pairs, EdgeOptions(), "ifr"), None)

    def _single(self, asked: dict[str, object]) -> Tensor:
        """Sizes of each pair alone under GradDrop, whose means over drops are not the sizes of their mean."""
        each = [attribute_edges(self.model, [pair], EdgeOptions(), **asked) for pair in self.pairs]  # type: ignore[arg-type]
        return torch.stack([found.mean_abs for found in each])

    def _seeded(self, make: Callable[[int], MethodScores]) -> MethodScores:
        made = [make(seed) for seed in self.settings.seeds]
        return replace(made[0], by_seed=tuple(each.nodes for each in made))

    # Searches, cut off at a budget.

    def _effects(self, sets: Sequence[Tensor], numbers: Sequence[int]) -> Tensor:
        return patch_sets(self.model, self.pairs, sets, numbers, self.options).effects

    def _budget(self, nodes: Scores) -> int:
        return max(1, round(self.settings.budget * len(nodes.grid)))

    def _subsampling(self, nodes: Scores, seed: int) -> MethodScores:
        budget, count = self._budget(nodes), len(nodes.grid)
        found = search.subsampling(
            self._effects,
            count,
            len(self.pairs),
            p=self.settings.inclusion,
            draws=budget * len(self.pairs),
            seed=seed,
        )
        # The order is all that it gives; the first is the largest.
        ranks = torch.empty(count, dtype=torch.float64)
        ranks[found.order] = torch.arange(count, 0, -1, dtype=torch.float64)
        return from_grid("subsampling", self.graph, float(budget), ranks, nodes)

    def _blocks(self, nodes: Scores) -> MethodScores:
        parts = torch.arange(len(nodes.grid)).split(max(1, round(1 / self.settings.budget)))
        sizes = search.mean_magnitude(self._effects, len(self.pairs))(parts)
        flat = torch.cat([size.expand(len(part)) for size, part in zip(sizes, parts, strict=True)])
        return from_grid("blocks", self.graph, float(len(parts)), flat, nodes)

    def _hierarchical(self, nodes: Scores) -> MethodScores:
        budget = self._budget(nodes)
        sizes = search.mean_magnitude(self._effects, len(self.pairs))
        found = search.hierarchical(sizes, len(nodes.grid))
        # A node that was reached was patched alone: its score is its effect.
        flat = torch.where(found.cost_at <= budget, nodes.mean_abs().double(), 0.0)
        return from_grid("hierarchical", self.graph, float(budget), flat, nodes)

    def _random_nodes(self, nodes: Scores, seed: int) -> MethodScores:
        drawn = torch.rand(len(nodes.grid), generator=torch.Generator().manual_seed(seed))
        return from_grid("random nodes", self.graph, 0.0, drawn, nodes)

    def _random_edges(self, edges: EdgeScores, seed: int) -> MethodScores:
        drawn = torch.rand(edges.mean.shape, generator=torch.Generator().manual_seed(seed))
        drawn = drawn.masked_fill(~edges.graph.real, torch.nan)
        return from_edge_scores("random edges", replace(edges, mean=drawn, mean_abs=drawn, cost=0.0), None)

    def _mask(self, seed: int) -> MethodScores:
        found = learn_mask(self.model, mask_triples(self.pairs, self.test), mask_options(self.settings, seed))
        return from_nodes("mask", self.graph, found.forward_equivalents, _mask_sizes(found, self.graph), None)

    def _acdc(self, edges: EdgeScores) -> MethodScores:
        scale = float((edges.base_metric.double().mean() - edges.source_metric.double().mean()).abs())
        found = acdc(self.model, self.pairs, EdgeOptions(), tau=self.settings.tau * scale)
        return from_edge_scores("acdc", found, None)


def edge_attributions(settings: MethodSettings) -> dict[str, dict[str, object]]:
    """Arguments of `attribute_edges`, by method."""
    return {
        "eap": {"method": "eap"},
        "eap-qk": {"method": "eap", "qk_fix": True},
        "eap-graddrop": {"method": "eap", "grad_drop": True},
        "eap-star": {"method": "eap", "qk_fix": True, "grad_drop": True},
        "eap-ig-inputs": {"method": "eap-ig-inputs", "steps": settings.steps},
        "eap-ig-midpoint": {"method": "eap-ig-inputs", "steps": settings.steps, "rule": "midpoint"},
        "eap-ig-activations": {"method": "eap-ig-activations", "steps": settings.steps},
        "clean-corrupted": {"method": "clean-corrupted"},
    }


def mask_options(settings: MethodSettings, seed: int) -> MaskOptions:
    """One mask, without what only a report of masks needs."""
    return MaskOptions(
        schedule=settings.schedule, seeds=(seed,), own_masks=False, random_sets=1, carried_limit=0
    )


def mask_triples(pairs: Sequence[Pair], test: Sequence[Pair]) -> list[Triple]:
    """One desideratum: put in from the corrupt prompt, the components make its answer come out.

    Held-out pairs whose clean prompt was drawn for training too are left out: some programs have few prompts.
    """
    seen = {pair.clean_ids for pair in pairs}
    unseen = [pair for pair in test if pair.clean_ids not in seen]
    halves: tuple[tuple[Split, Sequence[Pair]], ...] = (("train", pairs), ("test", unseen))
    return [
        Triple(
            desideratum="the corrupt prompt's answer",
            original_ids=pair.clean_ids,
            alternate_ids=pair.corrupt_ids,
            target_id=pair.wrong_id,
            split=split,
            original_answer_id=pair.answer_id,
            alternate_answer_id=pair.wrong_id,
        )
        for split, some in halves
        for pair in some
    ]


def _sizes(found: EdgeScores) -> Tensor:
    assert found.per_pair is not None
    return found.per_pair.abs()


def _mask_sizes(found: MaskResult, graph: EdgeGraph) -> Tensor:
    """How far each head and MLP is given over to the alternate; those that the mask keeps come before all others."""
    parts = [1.0 - found.values["head"], 1.0 - found.values["mlp"].reshape(graph.n_layers, 1)]
    sizes = torch.cat(parts, 1).flatten().double().clamp(min=0.0)
    chosen = torch.tensor([name in found.chosen for name in graph.senders[1:]])
    return sizes + chosen
