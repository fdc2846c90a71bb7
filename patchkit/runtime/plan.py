"""What a run will take, from sizes alone: passes, floating-point operations, memory, disk. No weights are needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from patchkit.model import Dims
from patchkit.runtime.batch_memory import Shape, pass_bytes
from patchkit.runtime.program import Cost
from patchkit.runtime.batching import length_buckets


@dataclass(frozen=True)
class Plan:
    """A run before it is run.

    Attributes:
        prompts: base prompts.
        tokens: of all base prompts.
        batches: how many the token budget makes.
        batch_tokens: padded tokens of the largest.
        forwards: token-forwards: one token through the whole model once is 1, a backward counts 1 more.
        flops: floating-point operations.
        weights: bytes of the model's weights.
        passes: bytes of the largest batch's forward and what its backward needs.
        beyond: bytes that the method keeps beside that.
        disk: bytes that the results take.
    """

    prompts: int
    tokens: int
    batches: int
    batch_tokens: int
    forwards: float
    flops: float
    weights: int
    passes: int
    beyond: int
    disk: int

    @property
    def forward_equivalents(self) -> float:
        """1 = one forward over every base prompt."""
        return self.forwards / self.tokens

    @property
    def peak(self) -> int:
        """Bytes at the most."""
        return self.weights + self.passes + self.beyond


def make_plan(
    dims: Dims,
    lengths: Sequence[int],
    cost: Callable[[Sequence[int]], Cost],
    *,
    parameters: int,
    itemsize: int,
    max_batch_tokens: int,
    disk: int,
    backward: bool,
) -> Plan:
    """Plans a run of a program whose cost depends on the prompts' lengths alone.

    Args:
        lengths: of the base prompts.
        cost: of a batch of prompts of these lengths.
        parameters: of the model, without the token embedding, which is looked up and not multiplied.
        itemsize: bytes of one number in the model's dtype.
        backward: whether gradients are taken, so that a forward's activations are kept.
    """
    batches = length_buckets(list(lengths), max_batch_tokens)
    costs = [cost([lengths[i] for i in batch]) for batch in batches]
    widest = max(len(batch) * max(lengths[i] for i in batch) for batch in batches)
    forwards = sum(each.forwards for each in costs)
    return Plan(
        prompts=len(lengths),
        tokens=sum(lengths),
        batches=len(batches),
        batch_tokens=widest,
        forwards=forwards,
        flops=2.0 * parameters * forwards,
        weights=(parameters + dims.vocab_size * dims.d_model) * itemsize,
        passes=pass_bytes(dims, Shape(1, widest, widest, False), backward=backward),
        beyond=max(each.bytes for each in costs),
        disk=disk,
    )
