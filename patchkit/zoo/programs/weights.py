"""From parts of a program to the matrices of heads and MLPs, alike for Llama and GPT-2.

Every dimension of a space has a mirror that holds its negative. Reads take half of the difference, so that a constant
added to all dimensions changes nothing, and the mean over the stream is 0: GPT-2's LayerNorm, which takes the mean away,
then is the identity as Llama's RMSNorm is (`NORM_EPS`, `NORM_WEIGHT`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from patchkit.errors import InputError
from patchkit.zoo.programs.language import ONE_HOT, At, Head, Match, Mlp, Offset, Program

#: x / sqrt(mean(x^2) + 2^40) * 2^20 is x in float32 while mean(x^2) is far below 2^40 * 2^-24.
NORM_EPS, NORM_WEIGHT = float(2**40), float(2**20)
#: silu(s x) / s and gelu(s x) / s are relu(x) in float32, exactly, unless |x| is below 0.1.
GAIN = 1024.0
#: The two places of a position in the stream of a model without rotary embeddings: cosine and sine of its number.
POSITION = ("cos", "sin")


class Stream:
    """Where each symbol of each space lives in the residual stream of a program's model."""

    def __init__(self, program: Program, n_heads: int) -> None:
        names = ["token", "one", "position", *program.spaces]
        self._at: dict[tuple[str, str], int] = {}
        for space in names:
            symbols = POSITION if space == "position" else program.symbols(space)
            for symbol in symbols:
                self._at[space, symbol] = len(self._at)
        self.half = -(-len(self._at) // (4 * n_heads)) * 4 * n_heads // 2 * 2
        self.width = 2 * self.half

    def write(
        self, into: Float[Tensor, " d_model"], space: str, symbol: str, weight: float | Tensor = 1.0
    ) -> None:
        """Adds `weight` where the symbol lives, and its negative in the mirror."""
        place = self._at[space, symbol]
        into[place] += weight
        into[place + self.half] -= weight

    def read(self, row: Float[Tensor, " d_model"], space: str, symbol: str, weight: float = 1.0) -> None:
        """Makes `row . stream` grow by `weight` times the symbol's content."""
        place = self._at[space, symbol]
        row[place] += weight / 2
        row[place + self.half] -= weight / 2


@dataclass(frozen=True, eq=False)
class HeadWeights:
    """One head's projections: rows read the stream, columns of `o` write it."""

    q: Float[Tensor, "d_head d_model"]
    k: Float[Tensor, "d_head d_model"]
    v: Float[Tensor, "d_head d_model"]
    o: Float[Tensor, "d_model d_head"]


#: Writes "look so many tokens back" into a head's queries and keys; the score there is the number.
WriteOffset = Callable[[HeadWeights, int, float], None]


def head_weights(
    part: Head, stream: Stream, d_head: int, slots: Sequence[int], write_offset: WriteOffset
) -> HeadWeights:
    """The matrices of a head. `slots` are the head's dimensions that do not turn with the position.

    Raises:
        InputError: more symbols than dimensions.
    """
    q, k, v = (torch.zeros(d_head, stream.width) for _ in range(3))
    made = HeadWeights(q, k, v, torch.zeros(stream.width, d_head))
    free = list(slots)
    for look in part.looks:
        if isinstance(look, Offset):
            write_offset(made, look.back, ONE_HOT * math.sqrt(d_head))
        elif isinstance(look, Match):
            for query, key in _pairs(look.query, look.key, free, part, d_head):
                slot = free.pop(0)
                stream.read(made.q[slot], look.query.space, query, look.score * math.sqrt(d_head))
                stream.read(made.k[slot], look.key.space, key)
    free = list(range(d_head))
    for move in part.moves:
        for source, target in _pairs(move.reads, move.writes, free, part, d_head):
            slot = free.pop(0)
            stream.read(made.v[slot], move.reads.space, source)
            stream.write(made.o[:, slot], move.writes.space, target, move.scale)
    return made


def _pairs(first: At, second: At, free: Sequence[int], part: Head, d_head: int) -> Sequence[tuple[str, str]]:
    if len(first.symbols) != len(second.symbols) or len(first.symbols) > len(free):
        raise InputError(
            f"{part.name}: {len(first.symbols)} symbols of {first.space} and {len(second.symbols)} of {second.space} for "
            f"{len(free)} free dimensions of {d_head}; expected as many of both, and no more than are free"
        )
    return list(zip(first.symbols, second.symbols, strict=True))


@dataclass(frozen=True, eq=False)
class MlpWeights:
    """relu(`reads` @ stream + `bias`), one row a neuron, written by the columns of `writes`."""

    reads: Float[Tensor, "neurons d_model"]
    bias: Float[Tensor, " neurons"]
    writes: Float[Tensor, "d_model neurons"]


def mlp_weights(part: Mlp, stream: Stream, neurons: int) -> MlpWeights:
    """The matrices of an MLP, filled up with zeros to `neurons`."""
    made = MlpWeights(
        torch.zeros(neurons, stream.width), torch.zeros(neurons), torch.zeros(stream.width, neurons)
    )
    for number, neuron in enumerate(part.neurons):
        for space, symbol, weight in neuron.reads:
            stream.read(made.reads[number], space, symbol, weight)
        made.bias[number] = neuron.bias
        for space, symbol, weight in neuron.writes:
            stream.write(made.writes[:, number], space, symbol, weight)
    return made
