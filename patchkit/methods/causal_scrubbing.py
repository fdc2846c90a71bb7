"""Causal scrubbing (Chan et al. 2022): what is left of a behaviour when all is resampled that a hypothesis leaves free.

A hypothesis names interpretation nodes, what of the model each stands for, and its key: what it is said to compute of the
input. For a reference input x, treeified from the output:

    scrub(w, x) = what w's model nodes hold in a run on an unrelated input x', in which
                  every edge from a child c carries scrub(c, x_c),  x_c drawn with key_c(x_c) = key_c(x), afresh each time
                  every other edge carries the plain activation on x'
    scrub(w, x) = what w's model nodes hold in a plain run on x,    where w has no children

The output is scrubbed so on every reference, and the metric takes the reference's answer. `random` is the metric of the
whole model on the output's own x': it is a draw from the same distribution as any other unrelated input, and with it a
hypothesis that claims nothing recovers exactly 0.

Exact, by three steps a batch: each different input is run once, plain; nodes that have children are computed again from
the plain streams of their x', changed along the claimed edges alone (`patchkit.tracing.scrub`); and the logits from the
changed final stream.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from patchkit.data import Batch, Metric, Pair, resolve_metric
from patchkit.errors import InputError
from patchkit.methods._scrub_draws import Draw, Draws, draw
from patchkit.methods._scrub_hypothesis import OUTPUT, Hypothesis
from patchkit.methods._scrub_hypothesis import Interpretation as Interpretation
from patchkit.methods._scrub_reading import Reading, read_hypothesis
from patchkit.methods._scrub_summary import summarise
from patchkit.model import Dims, EdgeGraph, PatchModel
from patchkit.results.scrubbing import ScrubResult
from patchkit.runtime import MAX_BATCH_TOKENS, Cost, Journal, Progress, run_program
from patchkit.runtime.batch_memory import Shape, pass_bytes
from patchkit.tracing.scrub import PlainRun, Replaced, logits_with, recompute, run_plain


@dataclass(frozen=True)
class ScrubOptions:
    """Options of `scrub`.

    Attributes:
        metric: `logit-diff`, `prob-diff`, `kl` (from the reference's own run), `target-logprob` or `module:function`.
        samples: scrubbed runs of each reference, with draws of their own.
        seed: of the draws.
        max_batch_tokens: padded tokens in one forward, which bounds the memory.
    """

    metric: str = "logit-diff"
    samples: int = 1
    seed: int = 0
    max_batch_tokens: int = MAX_BATCH_TOKENS

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise InputError(f"samples must be at least 1, found {self.samples}")


@dataclass(frozen=True)
class ScrubItem:
    """One scrubbed run: a reference, its tree of draws, and the tokens of the longest prompt in it."""

    tree: Draw
    longest: int

    @property
    def prompts(self) -> list[int]:
        """Numbers of the inputs that it runs, the reference first."""
        return [self.tree.input, *self.tree.inputs()]


@dataclass(frozen=True, eq=False)
class Scrub:
    """The Program of causal scrubbing.

    `run` gives for each item the metric of the `model`, of the `scrubbed` run and of the `random` one, and its share of
    the `forwards` that the batch took.
    """

    reading: Reading
    inputs: tuple[Pair, ...]
    metric: str

    def tokens(self, item: ScrubItem) -> int:
        """Counts an input as often as it is drawn, though it is run once."""
        return item.longest * len(item.prompts)

    def run(self, model: PatchModel, items: Sequence[ScrubItem]) -> dict[str, Tensor]:
        wanted = sorted({number for item in items for number in item.prompts})
        batch = Batch.from_ids([self.inputs[number].clean_ids for number in wanted], model.pad_id)
        plain = run_plain(model, batch, self.reading.held, self.reading.recomputed)
        run = _Run(model, self.reading, plain, {number: row for row, number in enumerate(wanted)})
        roots = [item.tree for item in items]
        unrelated = run.unrelated(roots)
        logits = logits_with(model, unrelated, run.replaced(OUTPUT, roots))
        reference = plain.rows(run.index([root.input for root in roots])).logits
        metric = resolve_metric(self.metric)
        found = {
            name: self._score(metric, each, reference, roots).cpu()
            for name, each in (("model", reference), ("scrubbed", logits), ("random", unrelated.logits))
        }
        paid = len(wanted) + len(items) * self._again(model.dims, items[0].tree)
        return found | {"forwards": torch.full((len(items),), paid / len(items), dtype=torch.float64)}

    def _score(
        self, metric: Metric, logits: Tensor, reference: Tensor, roots: Sequence[Draw]
    ) -> Float[Tensor, " items"]:
        pairs = [self.inputs[root.input] for root in roots]
        return metric(
            logits,
            answer=torch.tensor([pair.answer_id for pair in pairs], device=logits.device),
            wrong=torch.tensor([pair.wrong_id for pair in pairs], device=logits.device),
            reference=reference.to(logits.device),
        )

    def _again(self, dims: Dims, tree: Draw) -> float:
        """What the nodes with children take beside the plain runs, in forwards: attentions and MLPs of some layers."""
        graph, halves = self.reading.graph, 0
        for each in tree.occurrences():
            if each.children and each.node != OUTPUT:
                senders = {part.sender for part in self.reading.parts[each.node]}
                mlps = {
                    sender for sender in senders if graph.mlp_sender(graph.layer_of_sender(sender)) == sender
                }
                halves += len(mlps) + len({graph.layer_of_sender(sender) for sender in senders - mlps})
        return halves / (2 * dims.n_layers)

    def cost(self, dims: Dims, items: Sequence[ScrubItem]) -> Cost:
        """An upper bound: that inputs are drawn more than once is not counted on."""
        each = len(items[0].prompts) + self._again(dims, items[0].tree)
        tokens = sum(item.longest for item in items)
        streams = len({self.reading.graph.layer_of_sender(sender) for sender in self.reading.held}) + 1
        inputs = Shape.of(
            [len(self.inputs[number].clean_ids) for number in {n for item in items for n in item.prompts}]
        )
        # Of each input once: streams or what senders hold, and of what is drawn of them a copy.
        kept = inputs.tokens * dims.d_model * 2 * streams * dims.itemsize
        return Cost(each * tokens, kept, pass_bytes(dims, inputs, backward=False))


class _Run:
    """One batch: the plain runs of its inputs, and what every occurrence of a node holds in its rows."""

    def __init__(self, model: PatchModel, reading: Reading, plain: PlainRun, row: Mapping[int, int]) -> None:
        self.model, self.reading, self.plain, self.row = model, reading, plain, row

    def index(self, numbers: Sequence[int]) -> Int[Tensor, " rows"]:
        return torch.tensor([self.row[number] for number in numbers])

    def columns(self, place: str, numbers: Sequence[int]) -> Int[Tensor, "rows tokens"]:
        """The padded columns of a place in some inputs."""
        tokens = torch.tensor([self.reading.tokens[place][number] for number in numbers])
        offset = self.plain.batch.offset.cpu()[self.index(numbers)]
        return tokens + offset[:, None]

    def unrelated(self, draws: Sequence[Draw]) -> PlainRun:
        """The plain runs that these occurrences are built from."""
        return self.plain.rows(self.index(_numbers(draws)))

    def replaced(self, parent: str, draws: Sequence[Draw]) -> list[Replaced]:
        """What the children of one occurrence of a node, one row each, hold in the run on its unrelated input."""
        found = []
        for place, child in enumerate(self.reading.hypothesis.children_of(parent)):
            held = self.scrubbed(child, [each.children[place] for each in draws])
            for part, values in zip(self.reading.parts[child], held, strict=True):
                columns = self.columns(part.place, _numbers(draws))
                readers = part.readers(self.reading.receivers[parent])
                found.append(Replaced(part.sender, columns, values, readers))
        return found

    def scrubbed(self, name: str, draws: Sequence[Draw]) -> list[Float[Tensor, "rows tokens width"]]:
        """What each part of one occurrence of a node holds, one row for each draw."""
        parts, graph = self.reading.parts[name], self.reading.graph
        if not self.reading.hypothesis.children_of(name):
            plain = self.plain.rows(self.index([each.input for each in draws]))
            numbers = [each.input for each in draws]
            return [plain.value(graph, part.sender, self.columns(part.place, numbers)) for part in parts]
        members: dict[int, list[Tensor]] = {}
        for part in parts:
            members.setdefault(part.sender, []).append(self.columns(part.place, _numbers(draws)))
        # A sender at several places is computed once, at all their columns.
        at = {sender: torch.cat(places, dim=1) for sender, places in members.items()}
        found = recompute(self.model, self.unrelated(draws), self.replaced(name, draws), at)
        split = {
            sender: list(found[sender].split([each.shape[1] for each in places], dim=1))
            for sender, places in members.items()
        }
        return [split[part.sender].pop(0) for part in parts]


def _numbers(draws: Sequence[Draw]) -> list[int]:
    """The unrelated inputs of occurrences of a node with children."""
    return [each.unrelated for each in draws if each.unrelated is not None]


def scrub(
    model: PatchModel,
    pairs: Sequence[Pair],
    hypothesis: Hypothesis,
    options: ScrubOptions | None = None,
    *,
    pool: Sequence[Pair] | None = None,
    checkpoint: Path | None = None,
    progress: Progress | None = None,
) -> ScrubResult:
    """Tests a hypothesis by resampling every activation that it says does not matter (Chan et al. 2022).

    Args:
        pairs: references; their clean prompts are the inputs, their answers what the metric takes.
        pool: the inputs that are drawn; default: the references. Its answers do not matter.
        checkpoint: a directory for finished batches, from which an interrupted run goes on.

    Returns:
        `ScrubResult`: recovered share with its interval, per-input metrics, and how well the inputs could test each node.

    Raises:
        InputError: a hypothesis that does not fit the model or the inputs, fewer than two different prompts, a key that
            fails, an unknown metric.
    """
    options = options or ScrubOptions()
    resolve_metric(options.metric)
    draws = draw(hypothesis, pairs, pool, samples=options.samples, seed=options.seed)
    reading = read_hypothesis(hypothesis, EdgeGraph.of(model.dims), draws.inputs)
    program, items = scrub_work(reading, draws, options.metric)
    found = run_program(
        program,
        model,
        items,
        max_batch_tokens=options.max_batch_tokens,
        progress=progress,
        label=f"scrubbing: {hypothesis.name}",
        journal=None if checkpoint is None else Journal(checkpoint),
    )
    return summarise(model.name, reading, draws, found, options.metric, options.samples, options.seed)


def scrub_work(reading: Reading, draws: Draws, metric: str) -> tuple[Scrub, list[ScrubItem]]:
    """The Program of these draws, and its items."""
    return Scrub(reading, draws.inputs, metric), [_item(tree, draws) for tree in draws.trees]


def _item(tree: Draw, draws: Draws) -> ScrubItem:
    numbers = {tree.input, *tree.inputs()}
    return ScrubItem(tree, max(len(draws.inputs[number].clean_ids) for number in numbers))
