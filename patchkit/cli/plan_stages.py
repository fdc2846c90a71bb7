"""From a command with its own options to the stages of its plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from patchkit.cli.edge_options import edge_options
from patchkit.cli.edges import METHODS, check_own_options
from patchkit.cli.evaluate import evaluate_options
from patchkit.cli.given import given_pairs, given_reference
from patchkit.cli.hosted import check_hosted
from patchkit.cli.masks import mask_options, mask_triples
from patchkit.cli.nodes import node_options, proof_options
from patchkit.cli.options import one_of, words_of
from patchkit.cli.paths import stage_plans
from patchkit.cli.plan_across import compare_plan, generalise_plan
from patchkit.cli.run_options import RunOptions
from patchkit.errors import InputError

if TYPE_CHECKING:
    from patchkit.data import Pair
    from patchkit.model import PatchModel
    from patchkit.runtime.plan import Stage


@dataclass(frozen=True, eq=False)
class Planned:
    """What a command will run.

    Attributes:
        lengths: of its prompts.
        made_up: whether these are only as many and as long as was said.
        results: bytes that stay on disk.
        facts: label and value of what else is known.
    """

    stages: list[Stage]
    lengths: list[int]
    made_up: bool
    results: float
    facts: tuple[tuple[str, str], ...] = ()


def shared_options(given: dict[str, Any]) -> RunOptions:
    """The options that all commands share, as they were given; their values are checked, not whether this machine has
    what they ask for."""
    known = {field.name for field in fields(RunOptions)} & given.keys()
    shared = RunOptions(**{name: given[name] for name in known})
    if shared.batch_tokens < 1:
        raise AssertionError
    check_hosted(shared)
    for name in ("num_processes", "gpus_per_replica"):
        value = getattr(shared, name)
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} {value}: expected at least 1")
    return shared


def stages_of(model: PatchModel, command: str, given: dict[str, Any], tokens: int) -> Planned:
    """The stages of a command on a model that need have no weights.

    Args:
        given: the command's parsed options.
        tokens: length of made-up prompts.

    Raises:
        InputError: what the command itself would refuse, as far as it can be told without weights.
    """
    shared = shared_options(given)
    if command in ("study", "demo"):
        return _study(model, given.get("name", "variable-binding"), shared.seed)
    if command == "mask":
        return _mask(model, given, shared, tokens)
    if command in _ACROSS:
        from patchkit.model import EdgeGraph

        stages, made, made_up = _ACROSS[command](model, given, shared, tokens)
        facts = _graph(model)
        if command == "compare":
            facts = (
                *facts,
                ("both models", "their weights are in memory at a time; each takes its own plan"),
            )
        # Scores of edges and what was made of them, some hundred bytes an edge in all.
        results = 100.0 * EdgeGraph.of(model.dims).n_edges
        return Planned(stages, [len(pair.clean_ids) for pair in made], made_up, results, facts)
    made, made_up = _pairs(model, given, tokens)
    stages, results = _PAIRED[command](model, made, given, shared)
    facts = _graph(model) if command in ("edges", "paths", "evaluate") else ()
    return Planned(stages, [len(pair.clean_ids) for pair in made], made_up, results, facts)


def _graph(model: PatchModel) -> tuple[tuple[str, str], ...]:
    from patchkit.model import EdgeGraph

    graph, wide = EdgeGraph.of(model.dims), EdgeGraph.of(model.dims, by_query_head=True)
    said = f"{graph.n_senders:,} senders, {graph.n_edges:,} edges"
    return (("graph", said if wide == graph else f"{said} ({wide.n_edges:,} by query head)"),)


def models_of(command: str, given: dict[str, Any]) -> Sequence[str]:
    """The models that a command runs, by name."""
    if command == "study":
        from patchkit.cli.study import STUDIES
        from patchkit.studies.plans import STUDY_PLANS

        one_of(STUDIES, given["name"], "study")
        return [given["model"]] if given["model"] else STUDY_PLANS[given["name"]][0]
    if command == "compare":
        return [given["first"], given["second"]]
    return [given["model"]]


def _pairs(model: PatchModel, given: dict[str, Any], tokens: int) -> tuple[list[Pair], bool]:
    from patchkit.methods.edge_plans import synthetic_pairs

    if given["pairs"] is not None and given["task"] is not None:
        raise InputError(
            "give either --pairs FILE or --task NAME, one of the two, or neither for a plan by --n and --tokens"
        )
    if given["pairs"] is None and given["task"] is None:
        return synthetic_pairs(given["n"], tokens, model.dims.vocab_size), True
    return list(given_pairs(model, given)), False


def _patch(
    model: PatchModel, pairs: Sequence[Pair], given: dict[str, Any], shared: RunOptions
) -> tuple[list[Stage], float]:
    from patchkit.methods.node_plans import patching_stages

    options = node_options(given, shared)
    stages = patching_stages(model, pairs, options, given_reference(model, given))
    return stages, _node_results(model, pairs, options)


def _attribute(
    model: PatchModel, pairs: Sequence[Pair], given: dict[str, Any], shared: RunOptions
) -> tuple[list[Stage], float]:
    from patchkit.methods import BoundOptions
    from patchkit.methods.node_plans import attribution_stages

    options, method = node_options(given, shared), proof_options(given)
    bound = None
    if given["bound"] is not None:
        bound = BoundOptions(alpha=given["bound"], min_count=given["bound_draws"])
    stages = attribution_stages(
        model,
        pairs,
        options,
        method,
        verify=given["verify"],
        sample=given["sample"],
        bound=bound,
        reference=given_reference(model, given),
    )
    return stages, _node_results(model, pairs, options)


def _node_results(model: PatchModel, pairs: Sequence[Pair], options: Any) -> float:
    """Means and their sizes, and every pair's effects."""
    from patchkit.methods._node_options import ask

    nodes = len(ask(model, pairs, options).grid)
    return 4.0 * nodes * (2 + len(pairs)) + 64 * len(pairs)


def _edges(
    model: PatchModel, pairs: Sequence[Pair], given: dict[str, Any], shared: RunOptions
) -> tuple[list[Stage], float]:
    from patchkit.methods import edge_plans
    from patchkit.model import EdgeGraph

    method = one_of(METHODS, given["method"], "--method")
    check_own_options(given)
    options, reference = edge_options(given, shared), given_reference(model, given)
    graph = EdgeGraph.of(model.dims)
    cells = graph.n_senders * graph.n_receivers
    # Means and their sizes, graph.pt, and some 60 characters an edge in graph.json.
    results = 2.0 * 4 * cells + 5 * cells + 60 * graph.n_edges + 4 * cells * len(pairs) * given["keep_pairs"]
    match method:
        case "exact":
            stages = edge_plans.exact_stages(
                model, pairs, options, by_query=given["by_query"], reference=reference
            )
        case "acdc":
            stages = edge_plans.acdc_stages(
                model, pairs, options, max_forwards=given["max_forwards"], reference=reference
            )
        case _:
            *means, own = edge_plans.attribution_stages(
                model,
                pairs,
                options,
                method,
                steps=given["steps"],
                rule=given["ig_rule"],
                qk_fix=given["qk_fix"],
                grad_drop=given["graddrop"],
                keep_pairs=given["keep_pairs"],
                reference=reference,
            )
            # Of all senders by all receivers, which come back as sums, the others are zero.
            stages = [*means, replace(own, filled=graph.n_edges / cells)]
    return stages, results


def _paths(
    model: PatchModel, pairs: Sequence[Pair], given: dict[str, Any], shared: RunOptions
) -> tuple[list[Stage], float]:
    from patchkit.methods.edge_plans import paths_stages
    from patchkit.model import EdgeGraph

    plans = stage_plans(given)
    stages = paths_stages(
        model,
        pairs,
        edge_options(given, shared),
        senders=words_of(given["senders"] or "all", "--senders"),
        receivers=words_of(given["receivers"] or "logits", "--receivers"),
        mlps=one_of(("recomputed", "frozen"), given["mlps"], "--mlps"),
        plans=plans,
        reference=given_reference(model, given),
    )
    return stages, 20.0 * len(stages) * EdgeGraph.of(model.dims).n_senders * len(pairs)


def _evaluate(
    model: PatchModel, pairs: Sequence[Pair], given: dict[str, Any], shared: RunOptions
) -> tuple[list[Stage], float]:
    from patchkit.methods.edge_plans import evaluate_stages
    from patchkit.results.circuit_source import read_circuit

    asked = evaluate_options(given)
    # A plan may be made before there is anything to evaluate.
    source = read_circuit(given["circuit"], model.dims).source if given["circuit"].exists() else None
    stages = evaluate_stages(
        model, pairs, source, edge_options(given, shared), asked, reference=given_reference(model, given)
    )
    if not stages:
        raise InputError(
            f"plan evaluate: {given['circuit']} is not there, and nothing says how large a circuit is; give --top-n or "
            "--curve"
        )
    return stages, 20.0 * len(pairs) * sum(len(getattr(each.program, "circuits", ())) for each in stages)


_PAIRED: dict[str, Callable[..., tuple[list[Any], float]]] = {
    "patch": _patch,
    "attribute": _attribute,
    "edges": _edges,
    "paths": _paths,
    "evaluate": _evaluate,
}


#: Those of several sets of pairs, or models.
_ACROSS = {"compare": compare_plan, "generalise": generalise_plan}


def _mask(model: PatchModel, given: dict[str, Any], shared: RunOptions, tokens: int) -> Planned:
    from patchkit.methods.mask_plans import mask_stages, synthetic_triples

    if given["desiderata"] is not None and given["task"] is not None:
        raise InputError(
            "give either --desiderata FILE or --task NAME, one of the two, or neither for a plan by --n and --tokens"
        )
    options = mask_options(given, shared)
    made_up = given["desiderata"] is None and given["task"] is None
    if made_up:
        names = options.train_on or ("first", "second")
        triples = synthetic_triples(names, given["n"], tokens, model.dims.vocab_size)
    else:
        triples = mask_triples(
            model,
            given["desiderata"],
            given["task"],
            options.train_on,
            given["n"],
            shared.seed,
            given["answer_first_token"],
        )[0]
    lengths = [len(triple.original_ids) for triple in triples]
    layers = model.dims.n_layers
    return Planned(mask_stages(model, triples, options), lengths, made_up, 2e5 + 40.0 * layers * len(triples))


def _study(model: PatchModel, name: str, seed: int) -> Planned:
    from patchkit.studies.plans import STUDY_PLANS

    found = STUDY_PLANS[name][1](model, seed)
    return Planned(found.stages, found.lengths, False, 2e6)
