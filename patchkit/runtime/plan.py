"""What a run will take, before it is run: stages of Programs and items are priced by the Programs' own `cost`, over the
batches that the scheduler would make. No weights are needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from patchkit.model import Dims
from patchkit.model.once import once
from patchkit.runtime.batch_memory import mlp_width
from patchkit.runtime.batching import length_buckets
from patchkit.runtime.plan_memory import Taken, batch_taken, with_budget
from patchkit.runtime.program import Batched

#: Batches of a stage that are priced; of more, as many that lie evenly among them, and the last, which is the largest.
PRICED = 48
#: Bytes that a job is sent as beside its items, mostly code, and that a token of these adds; compressed. Measured with
#: jobs of every method: 30 to 90 kB, and 1 to 2 bytes.
SENT_A_JOB, SENT_A_TOKEN = 65_000, 2


@dataclass(frozen=True, eq=False)
class Steps:
    """What is run on batches that a session holds open.

    Attributes:
        count: how often all items are run.
        forwards: token-forwards of an item in all of these together.
        back: bytes that come back from a batch in one of them.
        journalled: whether these are kept in the journal.
        example: a Step to measure, and its token-forwards an item; None where there is none without results.
        jobs: that they are on a host; None: every step one for each batch.
    """

    count: int
    forwards: float
    back: int
    journalled: bool = False
    example: tuple[Any, float] | None = None
    jobs: float | None = None


@dataclass(frozen=True, eq=False)
class Stage:
    """A part of a run: a Program over items, or a session over items and its steps.

    Attributes:
        program: or what the session opens.
        prompts: tokens of the prompts that an item is made of, however often it runs them.
        back: bytes that come back for an item.
        back_of_batch: and for a batch, as sums do.
        repeats: how often the stage is run, on other items of the same kind.
        filled: share of the numbers that come back which is not zero: zeros take nothing on the wire.
    """

    label: str
    program: Batched[Any]
    items: Sequence[Any]
    back: int = 0
    back_of_batch: int = 0
    steps: Steps | None = None
    repeats: float = 1.0
    filled: float = 1.0

    @once
    def tokens(self) -> list[int]:
        """Of every item, as batches are made by. (Of a sweep there are tens of thousands.)"""
        return [self.program.tokens(item) for item in self.items]


@dataclass(frozen=True)
class StagePlan:
    """What a stage takes.

    Attributes:
        items, batches: how many; with the stage's repeats.
        widest: tokens of the largest batch, as its Program counts them.
        forwards: token-forwards: one token through the whole model once is 1, a backward counts 1 more.
        taken: memory of the largest batch.
        sent, back: bytes that go to a hosted model, and bytes of the numbers that come from it.
        requests: jobs for a hosted model.
        passes: how often all weights are read: once for each forward and each backward, at the least.
        journal: bytes on disk until the run is done.
    """

    label: str
    items: float
    batches: float
    widest: int
    forwards: float
    taken: Taken
    sent: float
    back: float
    requests: float
    passes: float
    journal: float


@dataclass(frozen=True)
class Plan:
    """A run before it is run.

    Attributes:
        prompts: base prompts; `tokens`: of all of them.
        token_flops: floating-point operations of one token-forward.
        results: bytes of the results on disk.
    """

    stages: tuple[StagePlan, ...]
    prompts: int
    tokens: int
    token_flops: float
    results: float

    @property
    def forwards(self) -> float:
        return sum(stage.forwards for stage in self.stages)

    @property
    def forward_equivalents(self) -> float:
        """1 = one forward over every base prompt."""
        return self.forwards / self.tokens

    @property
    def flops(self) -> float:
        return self.forwards * self.token_flops

    @property
    def largest(self) -> StagePlan:
        """The stage that takes most memory."""
        return max(self.stages, key=lambda stage: stage.taken.total)

    def summed(self, name: str) -> float:
        """Of all stages: batches, sent, back, requests or journal."""
        return sum(getattr(stage, name) for stage in self.stages)


def make_plan(
    dims: Dims, stages: Sequence[Stage], lengths: Sequence[int], *, max_batch_tokens: int, results: float
) -> Plan:
    """Prices the stages of a run.

    Args:
        dims: with the number size, and whether it runs on a CPU.
        lengths: of the base prompts.
        results: bytes on disk.
    """
    mean = sum(lengths) / len(lengths)
    return Plan(
        stages=tuple(price(dims, stage, max_batch_tokens) for stage in stages),
        prompts=len(lengths),
        tokens=sum(lengths),
        token_flops=token_flops(dims, mean),
        results=results,
    )


def price(dims: Dims, stage: Stage, max_batch_tokens: int) -> StagePlan:
    """One stage."""
    program, items, steps = with_budget(stage.program, max_batch_tokens), stage.items, stage.steps
    tokens = stage.tokens
    numbers = length_buckets(tokens, max_batch_tokens)
    batches = [[items[i] for i in batch] for batch in numbers]
    sizes = [[tokens[i] for i in batch] for batch in numbers]
    chosen = _evenly(batches)
    taken = [batch_taken(program, dims, batch, open_only=steps is not None) for batch in chosen]
    scale = len(batches) / len(chosen)
    forwards = scale * sum(each.forwards for each in taken)
    largest = max(taken, key=lambda each: each.total)
    times = stage.repeats
    padded = sum(len(batch) * max(batch) for batch in sizes)
    back = len(items) * stage.back + len(batches) * stage.back_of_batch
    journal, requests = back, float(len(batches))
    passes = max(2 * requests, forwards / max_batch_tokens)
    if steps is not None:
        forwards += len(items) * steps.forwards
        # What is open stays on the device, all batches of it.
        largest = largest.with_kept(int(scale * sum(each.kept for each in taken)))
        rounds = steps.count * len(batches)
        back += rounds * steps.back
        journal += rounds * steps.back * steps.journalled
        requests += rounds if steps.jobs is None else steps.jobs
        passes += 2 * rounds
    return StagePlan(
        label=stage.label,
        items=len(items) * times,
        batches=len(batches) * times,
        widest=max(map(sum, sizes)),
        forwards=forwards * times,
        taken=largest,
        sent=(requests * SENT_A_JOB + 2 * padded * SENT_A_TOKEN) * times,
        back=back * times,
        requests=requests * times,
        passes=passes * times,
        journal=journal * times,
    )


def _evenly(batches: list[list[Any]]) -> list[list[Any]]:
    if len(batches) <= PRICED:
        return batches
    places = {round(i * (len(batches) - 1) / (PRICED - 1)) for i in range(PRICED)}
    return [batches[place] for place in sorted(places)]


def token_flops(dims: Dims, length: float) -> float:
    """Floating-point operations of one token through the model, in a prompt of this length: two for each weight of the
    blocks, attention over all columns, and its share of one unembedding a prompt."""
    attention = 2 * dims.d_model * (dims.n_heads + dims.n_kv_heads) * dims.d_head
    weights = attention + (3 if dims.gated else 2) * dims.d_model * mlp_width(dims)
    scores = 2 * length * dims.n_heads * dims.d_head
    return 2 * (dims.n_layers * (weights + scores) + dims.d_model * dims.vocab_size / length)
