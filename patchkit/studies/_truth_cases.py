"""The cases of the ground-truth study: models, pairs, and what is true of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from patchkit import tasks
from patchkit.data import Pair
from patchkit.errors import InputError
from patchkit.model import EdgeGraph, PatchModel
from patchkit.results.edge_scores import EdgeScores
from patchkit.results.scoreboard import Family
from patchkit.results.scores import Scores
from patchkit.studies._recall_material import task_of
from patchkit.studies._truth_measures import Labels
from patchkit.studies._truth_scores import attention_inputs, from_edge_scores, from_node_scores
from patchkit.zoo import programs
from patchkit.zoo.known import KnownCircuit

#: Embedded models without a known circuit: exhaustive exact patching says what is true.
NATURAL = ("varbind-llama", "varbind-llama-gqa", "ioi-gpt2")
#: An effect counts where it is at least this share of |base - source| metric: of what trained weights do, most edges do a
#: little of everything.
LEAST = 0.02
#: In weights written by hand, what does nothing does exactly nothing; this allows for rounding alone.
EXACT = 1e-5


@dataclass(frozen=True)
class KnownCase:
    """One model and where its truth comes from.

    Attributes:
        known: the circuit by construction; None where exact patching is the truth.
    """

    name: str
    family: Family
    title: str
    task: str
    shows: str
    known: KnownCircuit | None = field(compare=False)

    def pairs(self, model: PatchModel, n: int, seed: int) -> list[Pair]:
        """`n` prompt pairs."""
        if self.family == "natural":
            return tasks.pairs(task_of(model), model.tokenizer, n, seed)
        return programs.pairs(self.name, n, seed)

    @property
    def rule(self) -> str:
        """Where the truth comes from, in words."""
        if self.family == "handmade":
            return "by construction: what the program writes and reads"
        if self.family == "siit":
            return (
                "nodes by construction; an edge between them counts where exact patching moves the metric by "
                f"{LEAST:.0%} of the two runs' difference, and is not counted where it moves it by less"
            )
        return f"exact patching: an effect of at least {LEAST:.0%} of the two runs' difference"


def handmade_cases(shapes: Sequence[str]) -> list[KnownCase]:
    """Every program in these shapes."""
    found: list[KnownCase] = []
    for name in programs.names():
        program, shape = programs.find(name)
        if shape in shapes:
            found.append(
                KnownCase(name, "handmade", program.name, program.task, program.shows, programs.circuit(name))
            )
    return found


def natural_cases() -> list[KnownCase]:
    """Embedded models with their own task."""
    from patchkit import zoo

    return [
        KnownCase(name, "natural", name, zoo.card(name).task, zoo.card(name).shows, None) for name in NATURAL
    ]


@dataclass(frozen=True, eq=False)
class Truth:
    """What is true of a case, as labels of nodes, of heads' inputs and of edges."""

    nodes: Labels
    inputs: Labels
    edges: Labels
    silent: tuple[str, ...]

    def edge_mask(self, graph: EdgeGraph) -> Bool[Tensor, "senders receivers"]:
        """The true edges as a mask of the graph."""
        mask = torch.zeros_like(graph.real)
        mask[graph.real] = self.edges.true & self.edges.known
        return mask


def truth_of(case: KnownCase, graph: EdgeGraph, nodes: Scores, edges: EdgeScores) -> Truth:
    """Labels of a case, from its known circuit and what exact patching says.

    Raises:
        InputError: a known circuit that names what the model does not have, or nothing with an effect.
    """
    scale = float((edges.base_metric.double().mean() - edges.source_metric.double().mean()).abs())
    least = (EXACT if case.family == "handmade" else LEAST) * scale
    exact = from_node_scores("exact", graph, nodes)
    assert edges.per_pair is not None and exact.inputs is not None
    assert exact.pair_nodes is not None and exact.pair_inputs is not None
    by_edge = from_edge_scores("exact", edges, edges.per_pair.abs())
    assert by_edge.pair_edges is not None
    effect = by_edge.edges[graph.real]
    pair_effect = by_edge.pair_edges[:, graph.real]
    where = graph.real.nonzero().tolist()
    edge_names = tuple(graph.edge_name(*edge) for edge in where)
    input_names = tuple(graph.receivers[int(i)] for i in attention_inputs(graph))
    node_names = graph.senders[1:]
    known = case.known
    if known is None:
        made = [
            _by_effect(names, sizes, pair_sizes, least)
            for names, sizes, pair_sizes in (
                (node_names, exact.nodes, exact.pair_nodes),
                (input_names, exact.inputs, exact.pair_inputs),
                (edge_names, effect, pair_effect),
            )
        ]
        if not all(bool(labels.true.any()) for labels in made):
            raise InputError(f"{case.name}: nothing has an effect of {LEAST:.0%} of the metric's difference")
        return Truth(*made, silent=())
    known.check(graph)
    true = torch.tensor([name in known.edges for name in edge_names])
    labelled = torch.tensor([name not in known.unlabelled for name in edge_names])
    if case.family == "siit":
        # Which of a head's inputs carries a variable is not forced by the training.
        labelled &= ~true | (effect >= least)
    inside = torch.tensor([name.partition("<")[0] in known.nodes for name in input_names])
    carries = torch.tensor([name in known.receivers for name in input_names])
    return Truth(
        nodes=_by_name(node_names, known.nodes, known, exact.pair_nodes, least),
        inputs=Labels(
            input_names,
            carries,
            ~inside if case.family == "siit" else torch.ones_like(carries),
            _kinds(known, input_names),
            exact.pair_inputs > least,
        ),
        edges=Labels(
            edge_names,
            true,
            labelled,
            _kinds(known, edge_names),
            (pair_effect > least) | _in(edge_names, known.silent),
        ),
        silent=tuple(sorted(known.silent)),
    )


def _by_effect(
    names: tuple[str, ...],
    sizes: Float[Tensor, " items"],
    pair_sizes: Float[Tensor, "pairs items"],
    least: float,
) -> Labels:
    true = sizes >= least
    return Labels(names, true, torch.ones_like(true), {}, pair_sizes >= least)


def _by_name(
    names: tuple[str, ...],
    true: frozenset[str],
    known: KnownCircuit,
    pair_sizes: Float[Tensor, "pairs items"],
    least: float,
) -> Labels:
    found = _in(names, true)
    return Labels(
        names,
        found,
        torch.ones_like(found),
        _kinds(known, names),
        (pair_sizes > least) | _in(names, known.silent),
    )


def _in(names: Sequence[str], some: frozenset[str]) -> Bool[Tensor, " items"]:
    return torch.tensor([name in some for name in names])


def _kinds(known: KnownCircuit, names: Sequence[str]) -> Mapping[str, str]:
    return {name: kind for name in names if (kind := known.kind_of(name)) is not None}
