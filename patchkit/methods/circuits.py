"""Running circuits on prompt pairs: what is left of the behaviour when all other edges, or nodes, are cut.

With edge patching every edge outside the circuit carries the ablated value and every edge inside the sender's value in
the circuit's own run (Hanna et al. 2024, arXiv:2403.17806; Conmy et al. 2023, arXiv:2304.14997). With node patching every
sender without an edge out, heads, MLPs and the input alike, has the ablated value everywhere, and those that are left
read all of the stream: the same as the circuit of all edges among them, and run as that.

    metric(full circuit) = metric(base run)        metric(empty circuit) = metric(every edge ablated)

where the latter is the source run under `resample`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from patchkit.data import Metric, Pair, read_places, resolve_metric
from patchkit.errors import InputError
from patchkit.methods._circuit_work import circuit_work, room, share_out
from patchkit.methods._edge_options import EdgeOptions
from patchkit.methods._edge_replacement import EdgeReplacement, edge_replacement
from patchkit.methods._edge_row_memory import circuits_bytes
from patchkit.methods._pair_batch import PairBatch
from patchkit.methods.activation_patching import CPU_FORWARD
from patchkit.model import Dims, PatchModel
from patchkit.model.edges import EdgeGraph
from patchkit.results.circuit import Circuit
from patchkit.runtime import Cost, Journal, Progress, run_program
from patchkit.runtime.batch_memory import Shape, forward_tokens
from patchkit.tracing.circuit import CutRun, check_graph, circuit_logits, cut_run, run_both
from patchkit.tracing.senders import capture_senders

PATCHING = ("edge", "node")


@dataclass(frozen=True, eq=False)
class CircuitMetrics:
    """What circuits gave.

    Attributes:
        metric: of each circuit on each pair.
        clean: of the base run, which is the full circuit's.
        corrupt: of the run with every edge ablated, which is the empty circuit's.
        cost: in forward-equivalents; 1 = one forward over every base prompt.
    """

    metric: Float[Tensor, "pairs circuits"]
    clean: Float[Tensor, " pairs"]
    corrupt: Float[Tensor, " pairs"]
    cost: float


@dataclass(frozen=True, eq=False)
class RunCircuits:
    """The Program of circuits, all of one graph: every circuit on every pair.

    `run` gives for each pair `metric` (`[pairs, circuits]`), the metric of the `base` run and with every edge `cut`, and
    the `work` paid, in token-forwards.
    """

    graph: EdgeGraph
    circuits: tuple[Tensor, ...]
    metric: str
    direction: str
    replacement: EdgeReplacement
    max_batch_tokens: int = field(compare=False)
    copies: int

    def tokens(self, item: Pair) -> int:
        """Counts the differences of senders that the largest circuit keeps at every token."""
        return round(len(item.clean_ids) * max(room(edges, self.copies) for edges in self.circuits))

    def run(self, model: PatchModel, items: Sequence[Pair]) -> dict[str, Tensor]:
        covered = read_places("all", items).covered
        batch = PairBatch.of(model, items, covered, self.direction)
        if self.replacement.causal:
            batch = batch.behind_prefix(model)
        metric = resolve_metric(self.metric)
        cut, base, source = _run_ends(model, batch, self.replacement)
        circuits = list(self.circuits)
        if source is None:
            circuits.append(torch.zeros_like(circuits[0]))
        tokens = len(items) * batch.base.width
        most = CPU_FORWARD if model.embed_device.type == "cpu" else self.max_batch_tokens
        rooms = [room(edges, self.copies) for edges in circuits]
        columns: list[Tensor] = [base] * len(circuits)
        for group in share_out(rooms, self.max_batch_tokens / tokens, max(1, most // tokens)):
            logits = circuit_logits(model, cut, self.graph, [circuits[number] for number in group])
            for number, each in zip(group, logits, strict=True):
                columns[number] = batch.score(metric, each, base)
        ablated = columns.pop() if source is None else batch.score(metric, source, base)
        return {
            "metric": torch.stack(columns, dim=1),
            "base": batch.score(metric, base, base),
            "cut": ablated,
            "work": self._forwards(model.dims, batch.base.lengths.cpu()) + batch.shared / len(items),
        }

    def cost(self, dims: Dims, items: Sequence[Pair]) -> Cost:
        """A base and a source run, and what each circuit computes."""
        lengths = torch.tensor([len(item.clean_ids) for item in items])
        shape = Shape.of(lengths.tolist())
        rooms = [room(edges, self.copies) for edges in self.circuits]
        senders = [int(edges.any(1).sum()) for edges in self.circuits]
        most = max(1, forward_tokens(dims, self.max_batch_tokens) // shape.tokens)
        groups = [
            [senders[number] for number in group]
            for group in share_out(rooms, self.max_batch_tokens / shape.tokens, most)
        ]
        together = self.replacement.ablation == "resample"
        kept, passes = circuits_bytes(dims, self.graph, shape, groups, self.copies, together)
        return Cost(float(self._forwards(dims, lengths).sum()), kept, passes)

    def _forwards(self, dims: Dims, lengths: Int[Tensor, " items"]) -> Float[Tensor, " items"]:
        """Token-forwards of prompts that run so many tokens."""
        return lengths.double() * (2 + sum(circuit_work(dims, self.graph, edges) for edges in self.circuits))


def _run_ends(
    model: PatchModel, batch: PairBatch, replacement: EdgeReplacement
) -> tuple[CutRun, Tensor, Tensor | None]:
    """The run with every edge cut, the base runs' logits, and that run's where it has been run."""
    if replacement.ablation == "resample":
        return run_both(model, batch.base, batch.source)
    own, base = capture_senders(model, batch.base)
    other, _ = replacement.senders(model, batch, own)
    return cut_run(model, batch.base, own, other), base, None


def run_circuits(
    model: PatchModel,
    pairs: Sequence[Pair],
    circuits: Sequence[Circuit],
    options: EdgeOptions | None = None,
    *,
    patching: str = "edge",
    reference: Sequence[Pair] | None = None,
    checkpoint: Path | None = None,
    progress: Progress | None = None,
) -> CircuitMetrics:
    """The metric of circuits, run as they are: prune them first if dead ends are not to be computed.

    Args:
        circuits: of the model's own graph, or of its graph by query head, in which every query head has a key and a
            value of its own (`patchkit.tracing.circuit`).
        patching: `edge` cuts edges; `node` replaces the senders that have no edge out.
        reference: prompt pairs whose source prompts the means are taken over; by default the pairs themselves.
        checkpoint: a directory for finished batches, from which an interrupted run goes on.

    Raises:
        InputError: no pairs or circuits, a circuit of another model's graph, positions other than `all`, a metric that
            does not exist or is not finite.
    """
    options = options or EdgeOptions()
    check_circuit_options(options)
    if patching not in PATCHING:
        raise InputError(f"patching '{patching}' is not known; expected one of: {', '.join(PATCHING)}")
    if not circuits:
        raise InputError("there are no circuits to run; expected at least one")
    # Refuses a run without pairs.
    read_places("all", pairs)
    for circuit in circuits:
        check_graph(model, circuit.graph)
    made = edge_replacement(model, pairs, options, reference)
    edges = [_among_nodes(circuit) if patching == "node" else circuit.edges for circuit in circuits]
    by_graph: dict[EdgeGraph, list[int]] = {}
    for number, circuit in enumerate(circuits):
        by_graph.setdefault(circuit.graph, []).append(number)
    columns: dict[int, Tensor] = {}
    cost, found = 0.0, {}
    for graph, numbers in by_graph.items():
        program = RunCircuits(
            graph=graph,
            circuits=tuple(edges[number] for number in numbers),
            metric=options.metric,
            direction=options.direction,
            replacement=made,
            max_batch_tokens=options.max_batch_tokens,
            copies=1 if graph.n_kv_heads == model.dims.n_kv_heads else model.dims.group,
        )
        found = run_program(
            program,
            model,
            list(pairs),
            max_batch_tokens=options.max_batch_tokens,
            progress=progress,
            label="circuits",
            journal=None if checkpoint is None else Journal(checkpoint),
        )
        columns |= dict(zip(numbers, found["metric"].unbind(1), strict=True))
        cost += float(found["work"].sum())
    if made.means is not None:
        cost += sum(len(pair.clean_ids) for pair in (pairs if reference is None else reference))
    return CircuitMetrics(
        metric=torch.stack([columns[number] for number in range(len(circuits))], dim=1),
        clean=found["base"],
        corrupt=found["cut"],
        cost=cost / sum(len(pair.clean_ids) for pair in pairs),
    )


def check_circuit_options(options: EdgeOptions) -> Metric:
    """The metric that options for circuits name.

    Raises:
        InputError: a metric that does not exist, or positions other than `all`.
    """
    if options.positions.strip() != "all":
        raise InputError(
            f"positions '{options.positions}': a circuit cuts its edges at all tokens; expected all, the default. "
            "Effects at single positions are those of edges (`patchkit edges`) and paths"
        )
    return resolve_metric(options.metric)


def _among_nodes(circuit: Circuit) -> Tensor:
    """All edges among the senders with an edge out, and from them to the logits."""
    graph, kept = circuit.graph, circuit.nodes
    into = (graph.owner & kept[:, None]).any(0)
    into[graph.logits] = True
    return graph.real & kept[:, None] & into
