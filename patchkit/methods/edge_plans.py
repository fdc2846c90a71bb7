"""What edges, paths and circuits will run, as stages of a plan: the same Programs and items, without weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from patchkit.data import Pair, read_places, resolve_metric
from patchkit.methods._acdc_order import known_at
from patchkit.methods._acdc_runs import Pairs
from patchkit.methods._circuit_work import circuit_work
from patchkit.methods._edge_options import EdgeOptions
from patchkit.methods._edge_replacement import EdgeReplacement, SenderSums
from patchkit.methods._evaluate_completeness import GREEDY_NODES, removable
from patchkit.methods._evaluate_options import EvaluateOptions
from patchkit.methods._evaluate_repair import DirectEffects, find_group
from patchkit.methods._evaluate_sizes import choose, curve_circuits
from patchkit.methods._path_names import StagePlan, find_receivers, find_senders, inputs_of, one_place
from patchkit.methods._path_program import Mlps
from patchkit.methods.attribution import PairItem
from patchkit.methods.circuits import RunCircuits, check_circuit_options
from patchkit.methods.edge_attribution import EdgeAttribution, edge_method
from patchkit.methods.edge_patching import Sweep
from patchkit.methods.path_patching import PathStudy
from patchkit.model import EdgeGraph, PatchModel
from patchkit.results.circuit import Circuit
from patchkit.results.curves import FRACTIONS
from patchkit.results.edge_scores import EdgeScores
from patchkit.runtime.plan import Stage, Steps

#: Bytes that come back beside a pair's scores: both metrics and the work.
_ENDS = 16
#: Of the circuits of one test, so many are priced as one Program.
_TOGETHER = 16


def attribution_stages(
    model: PatchModel,
    pairs: Sequence[Pair],
    options: EdgeOptions,
    method: str,
    *,
    steps: int = 5,
    rule: str | None = None,
    qk_fix: bool = False,
    grad_drop: bool = False,
    keep_pairs: bool = False,
    reference: Sequence[Pair] | None = None,
) -> list[Stage]:
    """Of `attribute_edges`.

    Raises:
        InputError: options that contradict each other or the pairs.
    """
    made_of = edge_method(method, steps, rule, qk_fix, grad_drop)
    resolve_metric(options.metric)
    places = read_places(options.positions, pairs)
    by_query = model.dims.group > 1 and not (qk_fix or grad_drop or method == "ifr")
    program = EdgeAttribution(
        made_of,
        options.metric,
        options.direction,
        EdgeReplacement(options.ablation),
        by_query,
        keep_pairs,
        options.max_batch_tokens,
    )
    items = [PairItem(pair, covered) for pair, covered in zip(pairs, places.covered, strict=True)]
    native = len(places.labels) * _cells(EdgeGraph.of(model.dims))
    wide = len(places.labels) * _cells(EdgeGraph.of(model.dims, by_query_head=True))
    # Sums, signed and by size, in double precision.
    sums = 2 * 8 * (native + (wide if by_query else 0))
    back = _ENDS + 4 * native * keep_pairs
    return [*_means(pairs, options, reference), Stage(method, program, items, back=back, back_of_batch=sums)]


def exact_stages(
    model: PatchModel,
    pairs: Sequence[Pair],
    options: EdgeOptions,
    *,
    by_query: bool = False,
    reference: Sequence[Pair] | None = None,
) -> list[Stage]:
    """Of `patch_edges`, all edges."""
    resolve_metric(options.metric)
    places = read_places(options.positions, pairs)
    made = EdgeReplacement(options.ablation)
    sweep = Sweep(model, tuple(pairs), places, options, made, None, None)
    graph = EdgeGraph.of(model.dims)
    parts = [("patching edges", graph, graph.real)]
    if by_query and model.dims.group > 1:
        wide = EdgeGraph.of(model.dims, by_query_head=True)
        shared = torch.tensor([name.endswith(("<k>", "<v>")) for name in wide.receivers])
        parts.append(("by query head", wide, wide.real & shared))
    stages = _means(pairs, options, reference)
    for label, each, edges in parts:
        program, items, _ = sweep.work(each, edges)
        stages.append(Stage(label, program, items, back=4 * program.most + _ENDS))
    return stages


def acdc_stages(
    model: PatchModel,
    pairs: Sequence[Pair],
    options: EdgeOptions,
    *,
    max_forwards: float | None = None,
    reference: Sequence[Pair] | None = None,
) -> list[Stage]:
    """Of `acdc`, if no edge came to be out of reach: each is tried once, in a circuit that has all other edges.

    As edges are cut, circuits become cheaper, and whole receivers are left out; so this is the most.
    """
    check_circuit_options(options)
    graph = EdgeGraph.of(model.dims)
    work: dict[int, float] = {}
    tried = 0.0
    for receiver, upstream in enumerate(graph.upstream.tolist()):
        known = known_at(graph, receiver)
        if known not in work:
            work[known] = circuit_work(model.dims, graph, graph.real, known)
        tried += upstream * work[known]
    if max_forwards is not None:
        tried = min(tried, max_forwards - 2)
    opener = Pairs(graph, options.metric, options.direction, EdgeReplacement(options.ablation))
    mean = sum(len(pair.clean_ids) for pair in pairs) / len(pairs)
    steps = Steps(graph.n_edges, tried * mean, back=4, journalled=True)
    return [*_means(pairs, options, reference), Stage("acdc", opener, list(pairs), back=_ENDS, steps=steps)]


def paths_stages(
    model: PatchModel,
    pairs: Sequence[Pair],
    options: EdgeOptions,
    *,
    senders: Sequence[str] = ("all",),
    receivers: Sequence[str] = ("logits",),
    mlps: str = "recomputed",
    plans: Sequence[StagePlan] = (),
    reference: Sequence[Pair] | None = None,
) -> list[Stage]:
    """Of `patch_paths`, or with `plans` of `trace_paths_back`.

    Which senders a stage keeps is not known yet: the receivers of the next are taken from the highest layers down, where
    there are most senders upstream.
    """
    resolve_metric(options.metric)
    graph = EdgeGraph.of(model.dims)
    places = one_place(options.positions, pairs)
    made = EdgeReplacement(options.ablation)
    study = PathStudy(model, graph, tuple(pairs), places, options, cast(Mlps, mlps), made, None, None)
    parts = [("path patching", find_senders(graph, senders), find_receivers(graph, receivers))]
    if plans:
        parts = [(plans[0].name, list(range(graph.n_senders)), [graph.logits])]
        for number, plan in enumerate(plans[1:]):
            last = graph.n_senders - 2 - number * (graph.n_heads + 1)
            kept = [sender for sender in range(last, 0, -1) if graph.sender_name(sender)[0] == "a"][
                : plans[number].k
            ]
            ends = inputs_of(graph, kept, plans[number].letters)
            if not ends:
                break
            parts.append((plan.name, list(range(int(graph.upstream[ends].max()))), ends))
    stages = _means(pairs, options, reference)
    for label, starts, ends in parts:
        program, items, _ = study.work(starts, ends)
        stages.append(Stage(label, program, items, back=4 * program.most + _ENDS))
    return stages


def evaluate_stages(
    model: PatchModel,
    pairs: Sequence[Pair],
    source: EdgeScores | Circuit | None,
    options: EdgeOptions,
    asked: EvaluateOptions,
    *,
    reference: Sequence[Pair] | None = None,
) -> list[Stage]:
    """Of `evaluate`: the circuits that it selects, and as many more as its tests make of the last of them.

    Args:
        source: None where nothing is scored yet: edges of the sizes asked for are then spread evenly over all.
    """
    check_circuit_options(options)
    graph = EdgeGraph.of(model.dims)
    circuits = [] if source is None else [each.circuit for each in choose(source, asked)]
    if source is None:
        circuits = [evenly_spread(graph, size) for size in asked.sizes]
    curves: list[Circuit] = []
    if asked.curve and isinstance(source, EdgeScores):
        lines = [curve_circuits(source, asked.selection, absolute) for absolute in (False, True)]
        curves = [each.circuit for line in lines for each in line]
    elif asked.curve and source is None:
        curves = 2 * [evenly_spread(graph, round(fraction * graph.n_edges)) for fraction in FRACTIONS]
    stages = _means(pairs, options, reference)
    if circuits or curves:
        stages.append(circuits_stage(model, pairs, options, [*circuits, *curves], "circuits"))
    if circuits:
        for label, count in _tests(circuits[-1], asked).items():
            several = [circuits[-1]] * min(count, _TOGETHER)
            stages.append(circuits_stage(model, pairs, options, several, label, count / len(several)))
    if asked.knockout:
        group = find_group(graph, asked.knockout)
        program = DirectEffects(options.metric, options.direction, EdgeReplacement(options.ablation), group)
        covered = read_places("all", pairs).covered
        items = [PairItem(pair, each) for pair, each in zip(pairs, covered, strict=True)]
        stages.append(Stage("knockout", program, items, back=4 * (2 * graph.n_senders + 3)))
    return stages


def circuits_stage(
    model: PatchModel,
    pairs: Sequence[Pair],
    options: EdgeOptions,
    circuits: Sequence[Circuit],
    label: str,
    repeats: float = 1.0,
) -> Stage:
    """Circuits on all pairs, run at once."""
    graph = circuits[0].graph
    copies = 1 if graph.n_kv_heads == model.dims.n_kv_heads else model.dims.group
    program = RunCircuits(
        graph=graph,
        circuits=tuple(circuit.edges for circuit in circuits),
        metric=options.metric,
        direction=options.direction,
        replacement=EdgeReplacement(options.ablation),
        max_batch_tokens=options.max_batch_tokens,
        copies=copies,
    )
    return Stage(label, program, list(pairs), back=4 * len(circuits) + 8, repeats=repeats)


def evenly_spread(graph: EdgeGraph, size: int) -> Circuit:
    """A circuit of so many edges, evenly over all: for plans where none is known yet."""
    flat = graph.real.flatten().nonzero()[:, 0]
    chosen = torch.zeros(graph.real.numel(), dtype=torch.bool)
    chosen[flat[torch.linspace(0, len(flat) - 1, min(size, len(flat))).long()]] = True
    return Circuit(graph, chosen.reshape(graph.real.shape))


def synthetic_pairs(count: int, tokens: int, vocabulary: int) -> list[Pair]:
    """Pairs that stand for prompts of one length where there are none yet: random tokens, other ones in both prompts."""
    generator = torch.Generator().manual_seed(0)
    ids: Tensor = torch.randint(vocabulary, (2, count, tokens), generator=generator)
    # Everywhere another token: what is patched changes from the first one on.
    ids[1] = torch.where(ids[0] == ids[1], (ids[1] + 1) % vocabulary, ids[1])
    wrong = min(1, vocabulary - 1)
    return [
        Pair(tuple(clean), tuple(corrupt), 0, wrong, {}, str(number))
        for number, (clean, corrupt) in enumerate(zip(*ids.tolist(), strict=True))
    ]


def _tests(circuit: Circuit, asked: EvaluateOptions) -> dict[str, int]:
    """How many circuits each test runs, at the most."""
    nodes = int(removable(circuit).sum())
    tried = min(nodes, asked.candidates)
    counts = {
        "completeness": 2 * (asked.completeness + 1 + GREEDY_NODES * tried) if asked.completeness else 0,
        "minimality": (1 + nodes) * (1 + asked.removals) + nodes * (tried + 2) if asked.minimality else 0,
        "random": asked.random,
    }
    return {label: count for label, count in counts.items() if count}


def _means(pairs: Sequence[Pair], options: EdgeOptions, reference: Sequence[Pair] | None) -> list[Stage]:
    """Running the prompts that a mean is taken over."""
    if options.ablation not in ("mean", "mean-positional"):
        return []
    program = SenderSums(options.direction, positional=options.ablation == "mean-positional")
    return [Stage("means", program, list(pairs if reference is None else reference))]


def _cells(graph: EdgeGraph) -> int:
    return graph.n_senders * graph.n_receivers
