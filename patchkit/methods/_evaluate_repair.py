"""Backup behaviour: a group of nodes is knocked out, and others change what they do to the logits because of it.

The direct effect of a node is that of its edge to the logits: the metric with this edge cut, less the metric (a helping
node has a negative one under direction `noise`). It is measured in the base run and in the run in which the group holds
what is put in, for everybody who reads it. If nobody moved, the knocked-out run would have lost the group's own direct
effects, all its edges to the logits cut at once, and nothing else:

    repaired = (knocked out - expected) / (clean - expected),    expected = clean + joint direct effect of the group

which is 0 if nobody makes up for anything and 1 if nothing is lost (self-repair: McGrath et al. 2023; Wang et al. 2022 on
backup name movers). It is negative where nodes that need the group break too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from patchkit.data import Metric, Pair, read_places, resolve_metric
from patchkit.errors import InputError
from patchkit.methods._edge_options import EdgeOptions
from patchkit.methods._edge_replacement import EdgeReplacement, edge_replacement
from patchkit.methods._evaluate_bootstrap import PairBootstrap, same_metric
from patchkit.methods._pair_batch import PairBatch
from patchkit.methods.attribution import PairItem
from patchkit.model import Dims, PatchModel
from patchkit.model.edges import EdgeGraph
from patchkit.results.evaluation import Repair, SelfRepair
from patchkit.runtime import Cost, Journal, Progress, run_program
from patchkit.tracing.direct import Ended, joint_change, read_out, run_to_end, single_changes
from patchkit.tracing.senders import Senders

#: Logits in one reading of final streams.
_AT_ONCE = 1 << 24


@dataclass(frozen=True, eq=False)
class DirectEffects:
    """The Program of backup behaviour.

    `run` gives for each pair the metric of the base run (`clean`), of the `knocked_out` run and with the group's edges to
    the logits cut in the base run (`expected`), and each sender's direct effect `before` and `after`, `[pairs, senders]`
    (0 for the input, which is not looked at).
    """

    metric: str
    direction: str
    replacement: EdgeReplacement
    group: Bool[Tensor, " senders"]

    def tokens(self, item: PairItem) -> int:
        return len(item.pair.clean_ids)

    def run(self, model: PatchModel, items: Sequence[PairItem]) -> dict[str, Tensor]:
        batch = PairBatch.of(model, [i.pair for i in items], [i.covered for i in items], self.direction)
        metric = resolve_metric(self.metric)
        base = run_to_end(model, batch.base)
        put_in, _ = self.replacement.senders(model, batch, base.senders)
        where = batch.cover.any(1)
        knocked_out = run_to_end(model, batch.base, self.group, put_in, where)
        reader = _Reader(model, batch, metric, base.logits, where[:, -1])
        joint = joint_change(model, base.senders, put_in, self.group)
        clean = reader.score(base.logits)
        return {
            "clean": clean,
            "knocked_out": reader.score(knocked_out.logits),
            "expected": clean + reader.effects(base, joint[:, None])[:, 0],
            "before": reader.all_effects(base, put_in),
            "after": reader.all_effects(knocked_out, put_in),
        }

    def cost(self, dims: Dims, items: Sequence[PairItem]) -> Cost:
        """Base, source and knocked-out run; of each cut only the unembedding of one token."""
        tokens = sum(self.tokens(item) for item in items)
        cuts = 2 * EdgeGraph.of(dims).n_senders
        layer = (
            2 * dims.d_model * (dims.n_heads + dims.n_kv_heads) * dims.d_head + 3 * dims.d_model * dims.d_mlp
        )
        unembedding = dims.d_model * dims.vocab_size
        share = unembedding / (layer * dims.n_layers + unembedding)
        kept = 3 * tokens * dims.n_layers * (dims.d_model + dims.n_heads * dims.d_head) * 4
        return Cost(3 * tokens + len(items) * cuts * share, kept)


@dataclass(frozen=True, eq=False)
class _Reader:
    """The metric of final streams.

    Attributes:
        reference: the base runs' logits.
        at_end: whether the last position is one at which edges are cut.
    """

    model: PatchModel
    batch: PairBatch
    metric: Metric
    reference: Float[Tensor, "pairs vocab"]
    at_end: Bool[Tensor, " pairs"]

    def score(self, logits: Tensor, rows: Tensor | None = None) -> Tensor:
        return self.batch.score(self.metric, logits, self.reference, rows).cpu()

    def all_effects(self, run: Ended, put_in: Senders) -> Float[Tensor, "pairs senders"]:
        graph = EdgeGraph.of(self.model.dims)
        found = torch.zeros(len(self.at_end), graph.n_senders, dtype=self.score(run.logits).dtype)
        for numbers, changes in single_changes(self.model, run.senders, put_in):
            found[:, numbers] = self.effects(run, changes)
        return found

    def effects(
        self, run: Ended, changes: Float[Tensor, "pairs cuts d_model"]
    ) -> Float[Tensor, "pairs cuts"]:
        """Metric with each change of the final stream, less that of the run."""
        pairs, cuts, width = changes.shape
        precise = torch.promote_types(run.stream.dtype, torch.float32)
        streams = run.stream.to(precise)[:, None] + changes.to(run.stream.device, precise)
        rows = torch.arange(pairs).repeat_interleave(cuts)
        flat = streams.reshape(pairs * cuts, width)
        at_once = max(1, _AT_ONCE // self.model.dims.vocab_size)
        scores = [
            self.score(read_out(self.model, part), of)
            for part, of in zip(flat.split(at_once), rows.split(at_once), strict=True)
        ]
        effects = torch.cat(scores).reshape(pairs, cuts) - self.score(run.logits)[:, None]
        return effects * self.at_end[:, None]


def find_group(graph: EdgeGraph, names: Sequence[str]) -> Bool[Tensor, " senders"]:
    """The senders of these names.

    Raises:
        InputError: an unknown name, the input, or every head and MLP there is.
    """
    group = torch.zeros(graph.n_senders, dtype=torch.bool)
    for name in names:
        try:
            group[graph.find_sender(name)] = True
        except InputError as error:
            raise InputError(f"knockout: {error}") from None
    if bool(group[0]):
        raise InputError(
            "knockout: the input is not a node that others can make up for; name heads and MLPs, such as a9.h6 or m3"
        )
    if bool(group[1:].all()):
        raise InputError(
            "knockout: these are all heads and MLPs of the model, so none is left that could make up for them"
        )
    return group


class Knockout(NamedTuple):
    """What a knock-out showed, its cost in forward-equivalents, and what a reader must know."""

    repair: SelfRepair
    cost: float
    notes: list[str]


def self_repair(
    model: PatchModel,
    pairs: Sequence[Pair],
    group: Bool[Tensor, " senders"],
    options: EdgeOptions,
    bootstrap: PairBootstrap,
    *,
    reference: Sequence[Pair] | None = None,
    checkpoint: Path | None = None,
    progress: Progress | None = None,
) -> Knockout:
    """Knocks a group out.

    Nodes are by size of the change, those of the group and the input left out; the interval is of the change.
    """
    places = read_places(options.positions, pairs)
    made = edge_replacement(model, pairs, options, reference)
    program = DirectEffects(options.metric, options.direction, made, group)
    items = [PairItem(pair, covered) for pair, covered in zip(pairs, places.covered, strict=True)]
    numbers = group.nonzero()[:, 0].tolist()
    found = run_program(
        program,
        model,
        items,
        max_batch_tokens=options.max_batch_tokens,
        progress=progress,
        label="knockout",
        journal=None if checkpoint is None else Journal(checkpoint),
    )
    graph = EdgeGraph.of(model.dims)
    clean, knocked_out, expected = (
        float(found[name].double().mean()) for name in ("clean", "knocked_out", "expected")
    )
    before, after = found["before"].double(), found["after"].double()
    others = ~group
    others[0] = False
    changes = (after - before).mean(0)
    order = torch.sort(changes.abs().masked_fill(~others, -1.0), descending=True, stable=True).indices
    nodes = [
        Repair(
            node=graph.sender_name(number),
            before=float(before[:, number].mean()),
            after=float(after[:, number].mean()),
            change=float(changes[number]),
            interval=bootstrap.interval(after[:, number] - before[:, number]),
        )
        for number in order[: int(others.sum())].tolist()
    ]
    repair = SelfRepair(
        group=[graph.sender_name(number) for number in numbers],
        clean=clean,
        knocked_out=knocked_out,
        expected=expected,
        repaired=None if same_metric(clean, expected) else (knocked_out - expected) / (clean - expected),
        nodes=nodes,
    )
    cost = program.cost(model.dims, items).forwards / sum(program.tokens(item) for item in items)
    notes: list[str] = []
    if repair.repaired is None or bootstrap.changes_sign(found["clean"], found["expected"]):
        notes.append(
            f"The direct effect of {', '.join(repair.group)} on the logits may as well be 0, so that there is nothing "
            "direct to make up for; the share that was repaired says little."
        )
    return Knockout(repair, cost, notes)
