"""What a comparison of two models and generalisation over prompts will run, as stages of a plan of one model.

Which edges are found is not known yet: as many are spread evenly over all. Groups are planned as the circuits' heads
layer by layer would be.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from patchkit.data import Pair, Triple, span_positions
from patchkit.methods import Layout
from patchkit.methods._mask_prepare import Masked, Preparation
from patchkit.methods.edge_plans import attribution_stages, circuits_stage, evenly_spread, exact_stages
from patchkit.methods.node_plans import patching_stages, sets_stage
from patchkit.model import EdgeGraph, PatchModel
from patchkit.runtime.plan import Stage, Steps
from patchkit.studies._comparison_groups import groups_of, random_groups
from patchkit.studies.comparison import CompareOptions
from patchkit.studies.generalisation import GeneraliseOptions

Options = CompareOptions | GeneraliseOptions


def compare_stages(
    model: PatchModel,
    pairs: Sequence[Pair],
    held_out: Sequence[Pair],
    options: CompareOptions,
    *,
    triples: Mapping[str, Sequence[Triple]] | None = None,
    groups: Mapping[str, Sequence[str]] | None = None,
) -> list[Stage]:
    """The stages that run on one of the two models; the other one's runs beside it are counted as the source runs.

    Raises:
        InputError: as `compare_models`, as far as it can be told without weights.
    """
    graph = EdgeGraph.of(model.dims)
    circuits = [evenly_spread(graph, size) for size in options.sizes]
    named = groups_of([circuits[-1], circuits[-1]], groups, model.dims)
    sets = [
        each
        for members in named.values()
        for each in (members, *random_groups(members, model.dims, options.random, options.seed))
    ]
    stages = [
        *_edges(model, pairs, options),
        circuits_stage(model, held_out, options.edges, 2 * circuits, "circuits"),
        *patching_stages(model, held_out, options.across),
        sets_stage(model, held_out, sets, options.grouped, "groups"),
    ]
    if triples:
        stages.append(_desiderata(model, triples, 1 + len(named)))
    return stages


def generalise_stages(
    model: PatchModel, sets: Mapping[str, tuple[Sequence[Pair], Sequence[Pair]]], options: GeneraliseOptions
) -> list[Stage]:
    """Of `generalise`.

    Args:
        sets: pairs to find with and held-out pairs, by the set's name.
    """
    graph = EdgeGraph.of(model.dims)
    found_on = [pair for pairs, _ in sets.values() for pair in pairs]
    held_out = [pair for _, pairs in sets.values() for pair in pairs]
    circuits = [
        evenly_spread(graph, size) for size in options.sizes for _ in range(len(sets) + 1 + options.random)
    ]
    return [
        *_edges(model, found_on, options),
        circuits_stage(model, held_out, options.edges, circuits, "circuits"),
    ]


def _edges(model: PatchModel, pairs: Sequence[Pair], options: Options) -> list[Stage]:
    if options.method == "exact":
        return exact_stages(model, pairs, options.edges)
    return attribution_stages(model, pairs, options.edges, options.method)


def _desiderata(model: PatchModel, triples: Mapping[str, Sequence[Triple]], sets: int) -> Stage:
    """Every set patched at the last token, from both models."""
    every = [triple for members in triples.values() for triple in members]
    places = zip(every, *span_positions(every, "last"), strict=True)
    items = [Masked(*place, number) for number, place in enumerate(places)]
    layout = Layout.build(("head", "mlp"), model.dims)
    opener = Preparation(layout)
    steps = Steps(1, float(sets * opener.rerun(items)), back=8 * sets)
    return Stage("desiderata", opener, items, back=24, steps=steps, repeats=2.0)
