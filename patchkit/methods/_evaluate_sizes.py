"""Which circuits an evaluation is about, how faithful each is, and the curve of faithfulness against size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from patchkit.errors import InputError
from patchkit.methods._edge_options import EdgeOptions
from patchkit.methods._evaluate_bootstrap import PairBootstrap, faithfulness
from patchkit.methods._evaluate_options import EvaluateOptions
from patchkit.methods._evaluate_runs import CircuitRunner
from patchkit.model import Dims
from patchkit.model.edges import EdgeGraph
from patchkit.results.circuit import SELECTIONS, Circuit, threshold
from patchkit.results.curves import FRACTIONS, curve
from patchkit.results.edge_scores import EdgeScores
from patchkit.results.evaluation import CircuitRun, Curve


@dataclass(frozen=True, eq=False)
class Chosen:
    """A circuit, pruned, and how it came to be.

    Attributes:
        requested: edges before pruning; None for a circuit that was handed over.
        dead_ends: edges that pruning took away.
    """

    circuit: Circuit
    requested: int | None
    selection: str
    absolute: bool
    dead_ends: int

    @classmethod
    def of(cls, circuit: Circuit, requested: int | None, selection: str, absolute: bool) -> Chosen:
        pruned = circuit.pruned()
        return cls(pruned, requested, selection, absolute, circuit.n_edges - pruned.n_edges)


def check_graph(source: EdgeScores | Circuit, dims: Dims, what: str) -> None:
    """Raises InputError unless scores or a circuit are of a graph of this model's, native or (a circuit) by query head,
    and have no positions.
    """
    graph = EdgeGraph.of(dims)
    if source.graph not in (graph, EdgeGraph.of(dims, by_query_head=True)):
        raise InputError(
            f"{what} is of another graph: expected {_sizes(graph)}; found {_sizes(source.graph)}. Give one of this model"
        )
    if isinstance(source, EdgeScores) and source.placed:
        raise InputError(
            f"{what} has a score a position ({', '.join(source.places[:4])}, ...), and a circuit's edges have none; "
            "score the edges again with positions all"
        )


def _sizes(graph: EdgeGraph) -> str:
    order = "parallel blocks" if graph.parallel else "sequential blocks"
    return (
        f"{graph.n_layers} layers, {graph.n_heads} heads, {graph.n_kv_heads} keys and values a layer, "
        f"{order}, d_model {graph.d_model}"
    )


def select(scores: EdgeScores, n: int, selection: str, absolute: bool) -> Chosen:
    """The circuit of n edges by these scores, pruned."""
    # A threshold takes the best edges of all, whatever their number, so at a given number it is `top`.
    name = "top" if selection == "threshold" else selection
    found = SELECTIONS[name](scores.graph, scores.importance, n, absolute=absolute)
    return Chosen.of(found, n, name, absolute)


def choose(source: EdgeScores | Circuit, asked: EvaluateOptions) -> list[Chosen]:
    """The circuits that were asked for, in that order.

    Raises:
        InputError: sizes of a circuit that was handed over, or scores without anything to select by.
    """
    if isinstance(source, Circuit):
        if asked.sizes or asked.curve or asked.tau is not None:
            raise InputError(
                "sizes, tau and curve select from scores, and a circuit was given; give scores, or leave them out"
            )
        return [Chosen.of(source, source.requested, "given", False)]
    if asked.selection == "threshold":
        assert asked.tau is not None
        found = threshold(source.graph, source.importance, asked.tau, absolute=asked.absolute)
        return [Chosen.of(found, found.requested, "threshold", asked.absolute)]
    if asked.sizes:
        return [select(source, n, asked.selection, asked.absolute) for n in asked.sizes]
    if source.circuit is not None:
        return [Chosen.of(source.circuit, source.circuit.requested, source.method.name, False)]
    if asked.curve:
        return []
    raise InputError(
        f"scores of method '{source.method.name}' are not a circuit yet: say how many edges (sizes), ask for all sizes "
        "(curve), or give a threshold (selection 'threshold' with tau)"
    )


def curve_circuits(scores: EdgeScores, selection: str, absolute: bool) -> list[Chosen]:
    """The circuits at the fractions of MIB; nominal sizes are rounded down."""
    # The product of a fraction and a count may come out just below a whole number.
    sizes = [math.floor(fraction * scores.graph.n_edges + 1e-6) for fraction in FRACTIONS]
    return [select(scores, n, selection, absolute) for n in sizes]


def circuit_run(
    chosen: Chosen,
    metric: Float[Tensor, " pairs"],
    runner: CircuitRunner,
    bootstrap: PairBootstrap,
    options: EdgeOptions,
) -> CircuitRun:
    """What is reported of one circuit."""
    (clean, corrupt), mean = runner.ends, float(metric.mean())
    return CircuitRun(
        requested=chosen.requested,
        n_edges=chosen.circuit.n_edges,
        n_nodes=int(chosen.circuit.nodes.sum()),
        circuit_metric=mean,
        faithfulness=faithfulness(mean, clean, corrupt),
        gap=abs(clean - mean),
        per_pair=metric.tolist(),
        absolute=chosen.absolute,
        ablation=options.ablation,
        patching=runner.patching,
        selection=chosen.selection,
        interval=bootstrap.interval(metric),
        faithfulness_interval=bootstrap.faithfulness_interval(metric, runner.clean, runner.corrupt),
    )


def curve_of(
    chosen: Sequence[Chosen],
    metric: Float[Tensor, "pairs circuits"],
    runner: CircuitRunner,
    options: EdgeOptions,
) -> Curve:
    """The curve of circuits at all fractions."""
    ends = runner.ends
    return curve(
        list(FRACTIONS),
        [each.requested or 0 for each in chosen],
        [each.circuit.n_edges for each in chosen],
        [faithfulness(mean, *ends) for mean in metric.mean(0).tolist()],
        absolute=chosen[0].absolute,
        selection=chosen[0].selection,
        ablation=options.ablation,
        patching=runner.patching,
    )
