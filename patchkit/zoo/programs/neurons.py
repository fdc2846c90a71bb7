"""What MLPs of handmade programs are made of: linear maps, conjunctions and steps, each from ReLUs."""

from __future__ import annotations

from collections.abc import Sequence

from patchkit.zoo.programs.language import At, Neuron, Weighted

_ONE: tuple[Weighted, ...] = (("one", "1", 1.0),)


def constant(writes: Sequence[Weighted]) -> Neuron:
    """Writes the same at every token."""
    return Neuron(_ONE, 0.0, tuple(writes))


def linear(reads: At, writes: At, scale: float = 1.0) -> tuple[Neuron, ...]:
    """Symbol i of `reads` to symbol i of `writes`, linearly for contents above -1: relu(x + 1) - 1."""
    pairs = list(zip(reads.symbols, writes.symbols, strict=True))
    moved = tuple(
        Neuron(((reads.space, source, 1.0),), 1.0, ((writes.space, target, scale),))
        for source, target in pairs
    )
    return (*moved, constant([(writes.space, target, -scale) for _, target in pairs]))


def both(first: tuple[str, str], second: tuple[str, str], writes: Sequence[Weighted]) -> Neuron:
    """Writes where both symbols are present: 2 relu(x + y - 1.5), 1 at (1, 1), and flat elsewhere."""
    doubled = tuple((space, symbol, 2.0 * weight) for space, symbol, weight in writes)
    return Neuron(((*first, 1.0), (*second, 1.0)), -1.5, doubled)


def step(reads: tuple[str, str], start: float, stop: float, writes: Sequence[Weighted]) -> tuple[Neuron, ...]:
    """0 up to `start`, 1 from `stop` on, linear between."""
    slope = 1.0 / (stop - start)
    up = tuple((space, symbol, slope * weight) for space, symbol, weight in writes)
    down = tuple((space, symbol, -slope * weight) for space, symbol, weight in writes)
    read: tuple[Weighted, ...] = ((*reads, 1.0),)
    return Neuron(read, -start, up), Neuron(read, -stop, down)
