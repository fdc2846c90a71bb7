"""What one case of the ground-truth study will run."""

from __future__ import annotations

from dataclasses import replace

from patchkit.methods import EdgeOptions, NodeOptions
from patchkit.methods.edge_plans import (
    acdc_stages,
    attribution_stages,
    circuits_stage,
    evenly_spread,
    exact_stages,
)
from patchkit.methods.mask_plans import mask_stages
from patchkit.methods.node_plans import attribution_stages as node_attribution_stages
from patchkit.methods.node_plans import patching_stages
from patchkit.model import EdgeGraph, PatchModel
from patchkit.results.curves import FRACTIONS
from patchkit.runtime.plan import Stage
from patchkit.studies._truth_methods import (
    METHODS,
    NODE_GRADIENTS,
    edge_attributions,
    mask_options,
    mask_triples,
)
from patchkit.studies._truth_scores import NODE_KINDS
from patchkit.studies.ground_truth import TruthOptions, case_of


def truth_stages(model: PatchModel, seed: int) -> tuple[list[Stage], list[int]]:
    """The stages, and the lengths of the prompts.

    Raises:
        InputError: a model that is no case.
    """
    options, case = TruthOptions(seed=seed), case_of(model)
    settings, graph, edge_options = options.settings, EdgeGraph.of(model.dims), EdgeOptions()
    pairs = case.pairs(model, options.pairs, seed)
    test = case.pairs(model, options.test_pairs, seed + 1)
    asked = NodeOptions(nodes=NODE_KINDS)
    exact = patching_stages(model, pairs, asked)
    # Three searches, of which one draws with each seed.
    searched = settings.budget * (2 + len(settings.seeds))
    stages = [*exact, *(replace(each, label="searches", repeats=each.repeats * searched) for each in exact)]
    for method in NODE_GRADIENTS:
        stages += [
            replace(each, label=method) for each in node_attribution_stages(model, pairs, asked, method)
        ]
    stages += exact_stages(model, pairs, edge_options)
    for label, how in edge_attributions(settings).items():
        stages += [
            replace(each, label=label)
            for each in attribution_stages(model, pairs, edge_options, **how)  # type: ignore[arg-type]
        ]
    stages += acdc_stages(model, pairs, edge_options)
    triples = mask_triples(pairs, test)
    for number in settings.seeds:
        stages += mask_stages(model, triples, mask_options(settings, number))
    every = [evenly_spread(graph, max(1, round(fraction * graph.n_edges))) for fraction in FRACTIONS]
    stages.append(circuits_stage(model, test, edge_options, every, "circuits", float(len(METHODS))))
    return stages, [len(pair.clean_ids) for pair in [*pairs, *test]]
