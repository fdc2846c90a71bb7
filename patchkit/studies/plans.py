"""What the studies will run, as stages of a plan: their own material and options, without weights.

Where a part looks at what another found (which heads a stage keeps, say), as much is planned as it may find.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from patchkit import tasks
from patchkit.errors import InputError
from patchkit.methods import EdgeOptions, EvaluateOptions, NodeOptions, ScrubOptions
from patchkit.methods.edge_plans import (
    acdc_stages,
    attribution_stages,
    circuits_stage,
    evaluate_stages,
    evenly_spread,
    exact_stages,
    paths_stages,
    synthetic_pairs,
)
from patchkit.methods.mask_plans import mask_stages
from patchkit.methods.node_plans import attribution_stages as node_attribution_stages
from patchkit.methods.node_plans import patching_stages
from patchkit.methods.scrub_plans import scrub_stage
from patchkit.model import EdgeGraph, PatchModel
from patchkit.results.circuit import Circuit
from patchkit.results.curves import FRACTIONS
from patchkit.runtime.plan import Stage
from patchkit.studies._ioi_material import study_pairs
from patchkit.studies._ioi_options import IoiOptions
from patchkit.studies._ioi_paths import heads_below
from patchkit.studies._recall_material import task_of, task_pairs
from patchkit.studies._recall_settings import GRADIENT_METHODS, KINDS, POSITIONS, SearchOptions
from patchkit.studies._truth_plan import truth_stages
from patchkit.studies.attribution_recall import MODELS, RecallOptions
from patchkit.studies.binding_hypotheses import VALUE_HEADS, BindingOptions, binding_inputs, hypotheses
from patchkit.studies.circuits import ESTIMATES, CircuitStudyOptions
from patchkit.studies.ground_truth import case_names
from patchkit.studies.variable_binding import TRAINED, StudyOptions, make_triples


@dataclass(frozen=True, eq=False)
class StudyStages:
    """A study on one model: its stages, and the lengths of the prompts that it is about."""

    stages: list[Stage]
    lengths: list[int]


def variable_binding(model: PatchModel, seed: int) -> StudyStages:
    """Of the study and the demo; looking at single forms and at attention is left out, a few forwards a prompt."""
    options = StudyOptions(seed=seed)
    triples, _ = make_triples(model, options)
    trained = tuple(each.name for each in TRAINED)
    mask = replace(options.mask, train_on=trained, seeds=(seed, seed + 1, seed + 2))
    return StudyStages(mask_stages(model, triples, mask), [len(each.original_ids) for each in triples])


def attribution_recall(model: PatchModel, seed: int) -> StudyStages:
    """Of one model: every material, evidence and class of nodes."""
    options, stages, lengths = RecallOptions(seed=seed), [], []
    for material in (task_of(model), "random-text"):
        for evidence, positions in POSITIONS.items():
            single = evidence == "pair"
            count, drawn = (options.pairs, seed) if single else (options.distribution, seed + 1)
            pairs = (
                synthetic_pairs(count, options.random_tokens, model.dims.vocab_size)
                if material == "random-text"
                else task_pairs(model, count, drawn, options.pool if single else 0)
            )
            lengths += [len(pair.clean_ids) for pair in pairs]
            groups = [[pair] for pair in pairs] if single else [pairs]
            for nodes, kinds in KINDS.items():
                asked = NodeOptions(nodes=kinds, positions=positions)
                for group in groups:
                    exact = patching_stages(model, group, asked)
                    label = f"{material}, {evidence}, {nodes}"
                    searched = _searched(len(exact[0].items[0].nodes) * len(exact[0].items), options.searches)
                    stages += [replace(each, label=f"{label}: exact") for each in exact]
                    stages += [replace(each, label=f"{label}: searches", repeats=searched) for each in exact]
                    for method in GRADIENT_METHODS[nodes]:
                        found = node_attribution_stages(model, group, asked, method)
                        stages += [replace(each, label=f"{label}: estimates") for each in found]
    return StudyStages(_joined(stages), lengths)


def circuits(model: PatchModel, seed: int) -> StudyStages:
    """Of one model: every estimate, exact patching, ACDC, and the circuits of each."""
    options, task, edge_options = CircuitStudyOptions(seed=seed), task_of(model), EdgeOptions(seed=seed)
    graph = EdgeGraph.of(model.dims)
    train = tasks.pairs(task, model.tokenizer, options.pairs, seed)
    test = tasks.pairs(task, model.tokenizer, options.test_pairs, seed + 1)
    stages = exact_stages(model, train, edge_options)
    for label, asked in ESTIMATES.items():
        found = attribution_stages(model, train, edge_options, **asked)  # type: ignore[arg-type]
        stages += [replace(each, label=label) for each in found]
    stages += acdc_stages(model, train, edge_options)
    sizes = [size for size in options.sizes if size < graph.n_edges]
    sizes += 2 * [round(fraction * graph.n_edges) for fraction in FRACTIONS]
    every = [evenly_spread(graph, size) for size in sizes]
    # Every estimate's, exact patching's and random ones.
    stages.append(circuits_stage(model, test, edge_options, every, "circuits", float(len(ESTIMATES) + 2)))
    return StudyStages(stages, [len(pair.clean_ids) for pair in [*train, *test]])


def ioi(model: PatchModel, seed: int) -> StudyStages:
    """Of one model: paths under each corruption, the circuit and its tests; what heads do is a few forwards a prompt."""
    options, graph = IoiOptions(seed=seed), EdgeGraph.of(model.dims)
    edge_options, stages, lengths = EdgeOptions(seed=seed), [], []
    for corruption in options.corruptions:
        pairs = study_pairs(model, options.pairs, seed, corruption)
        lengths += [len(pair.clean_ids) for pair in pairs]
        top = model.dims.n_layers
        stages += paths_stages(
            model, pairs, edge_options, senders=heads_below(graph, top), receivers=["logits"]
        )
        for number in range(1, min(options.groups, top - 1) + 1):
            layer = top - number
            ends = [f"a{layer}.h{head}" for head in range(min(options.most, model.dims.n_heads))]
            for letter in "qkv":
                group = model.dims.group if letter != "q" else 1
                named = dict.fromkeys(
                    f"a{layer}.h{int(end.split('h')[1]) // group}<{letter}>" for end in ends
                )
                stages += paths_stages(
                    model, pairs, edge_options, senders=heads_below(graph, layer), receivers=list(named)
                )
    judged = study_pairs(model, options.evaluated, seed + 1, options.corruptions[-1])
    asked = EvaluateOptions(
        patching="node",
        completeness=options.completeness,
        minimality=True,
        random=options.random,
        knockout=(f"a{model.dims.n_layers - 1}.h0",),
        removals=options.removals,
        candidates=options.candidates,
        seed=seed,
    )
    whole = Circuit.full(graph)
    stages += evaluate_stages(model, judged, whole, edge_options, asked)
    stages.append(
        circuits_stage(model, judged, edge_options, [whole], "other protocols", 4.0 + options.templates)
    )
    return StudyStages(_joined(stages), lengths + [len(pair.clean_ids) for pair in judged])


def scrubbing(model: PatchModel, seed: int) -> StudyStages:
    """Of one model: every hypothesis on the same prompts."""
    options = BindingOptions()
    heads = options.heads or VALUE_HEADS.get(model.name)
    if heads is None:
        raise InputError(
            f"{model.name}: it is not known which heads of this model carry the value; known of: {', '.join(VALUE_HEADS)}"
        )
    known, inputs = hypotheses(EdgeGraph.of(model.dims), heads), binding_inputs(model, options)
    asked = ScrubOptions(samples=options.samples, seed=options.seed)
    stages = [scrub_stage(model, inputs, known[name], asked) for name in options.hypotheses]
    return StudyStages(stages, [len(pair.clean_ids) for pair in inputs])


def ground_truth(model: PatchModel, seed: int) -> StudyStages:
    """Of one case: every method, and the circuits of each."""
    return StudyStages(*truth_stages(model, seed))


#: By name: the models that a study is made for, and its stages on one of them.
STUDY_PLANS: dict[str, tuple[tuple[str, ...], Callable[[PatchModel, int], StudyStages]]] = {
    "variable-binding": (("varbind-llama",), variable_binding),
    "attribution-recall": (tuple(MODELS), attribution_recall),
    "circuits": (("varbind-llama",), circuits),
    "ioi": (("ioi-gpt2",), ioi),
    "ground-truth": (tuple(case_names()), ground_truth),
    "scrubbing": (("varbind-llama",), scrubbing),
}


def _searched(nodes: int, searches: SearchOptions) -> float:
    """Sets that all searches patch, for each node."""
    sets = sum(draws for _, draws in searches.subsampling)
    sets += sum(nodes // size for size in searches.block_sizes)
    sets += sum(nodes // (branching - 1) for branching in searches.branchings)
    return sets / nodes


def _joined(stages: Sequence[Stage]) -> list[Stage]:
    """Stages of one name and one kind of Program as one, priced by the first: they differ in their pairs."""
    found: dict[tuple[str, type], list[Stage]] = {}
    for stage in stages:
        found.setdefault((stage.label, type(stage.program)), []).append(stage)
    joined = []
    for members in found.values():
        largest = max(members, key=lambda each: sum(each.program.tokens(item) for item in each.items))
        tokens = [sum(each.program.tokens(item) for item in each.items) * each.repeats for each in members]
        mine = sum(largest.program.tokens(item) for item in largest.items)
        joined.append(replace(largest, repeats=sum(tokens) / mine))
    return joined
