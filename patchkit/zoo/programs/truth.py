"""The true circuit of a program, from its description alone: what differs between prompts and reaches the logits.

A part is made of units: a symbol that a head moves, a neuron of an MLP. Forwards, a unit **varies** if it reads a
dimension that varies: the word here does, the constant and the position do not. Backwards, it is **used** if it writes a
dimension that the unembedding or a used unit above reads. An edge is true where its sender writes a dimension that varies
and that used units of its receiver read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from patchkit.zoo.known import KnownCircuit
from patchkit.zoo.programs.compile import Placement, Shape
from patchkit.zoo.programs.language import Head, Match, Mlp, Program

#: A dimension of the stream: space and symbol.
Dim = tuple[str, str]


@dataclass(frozen=True)
class _Unit:
    """What is read at each of a part's inputs (`q`, `k`, `v`; `in` of an MLP), and what is written for it."""

    reads: Mapping[str, frozenset[Dim]]
    writes: frozenset[Dim]

    def varies(self, varying: frozenset[Dim]) -> bool:
        return any(dims & varying for dims in self.reads.values())


def known_circuit(program: Program, shape: Shape) -> KnownCircuit:
    """Nodes and edges as they are named in the model of this shape.

    Raises:
        InputError: the description contradicts itself.
    """
    program.check()
    # Heads of a layer read what layers below have written; its MLP reads its heads as well.
    stages = [
        [
            (part.name, _units(part))
            for part in program.parts
            if part.layer == layer and isinstance(part, kind)
        ]
        for layer in range(program.layers)
        for kind in (Head, Mlp)
    ]
    words = frozenset(("token", word) for word in program.symbols("token"))
    written: list[list[tuple[str, frozenset[Dim]]]] = []
    varying = words
    for stage in stages:
        written.append([(name, _written(units, varying)) for name, units in stage])
        varying = varying.union(*(dims for _, dims in written[-1]))

    edges: set[tuple[str, str, str]] = set()

    def read_by(receiver: str, letter: str, dims: frozenset[Dim], below: int) -> None:
        senders = [("input", words), *(sender for stage in written[:below] for sender in stage)]
        edges.update((name, receiver, letter) for name, wrote in senders if wrote & dims)

    used = frozenset(("result", symbol) for symbol in program.answers)
    read_by("logits", "", used, len(stages))
    for number in reversed(range(len(stages))):
        added: set[Dim] = set()
        for name, units in stages[number]:
            in_use = [unit for unit in units if unit.writes & used]
            for letter in ("q", "k", "v", "in"):
                dims = frozenset[Dim]().union(*(unit.reads.get(letter, frozenset()) for unit in in_use))
                read_by(name, letter, dims, number)
                added |= dims
        used |= added
    return _named(program, Placement.of(program, shape), edges)


def _units(part: Head | Mlp) -> list[_Unit]:
    if isinstance(part, Mlp):
        return [
            _Unit(
                {"in": frozenset((space, symbol) for space, symbol, _ in neuron.reads)},
                frozenset((space, symbol) for space, symbol, _ in neuron.writes),
            )
            for neuron in part.neurons
        ]
    matches = [look for look in part.looks if isinstance(look, Match)]
    looks = {
        "q": frozenset((look.query.space, symbol) for look in matches for symbol in look.query.symbols),
        "k": frozenset((look.key.space, symbol) for look in matches for symbol in look.key.symbols),
    }
    return [
        _Unit(
            {**looks, "v": frozenset({(move.reads.space, source)})},
            frozenset({(move.writes.space, target)}),
        )
        for move in part.moves
        for source, target in zip(move.reads.symbols, move.writes.symbols, strict=True)
    ]


def _written(units: list[_Unit], varying: frozenset[Dim]) -> frozenset[Dim]:
    """What varies of that which a part writes."""
    return frozenset[Dim]().union(*(unit.writes for unit in units if unit.varies(varying)))


def _named(program: Program, placement: Placement, edges: set[tuple[str, str, str]]) -> KnownCircuit:
    def sender(name: str) -> str:
        return placement.query.get(name, name)

    def receiver(name: str, letter: str) -> str:
        if letter in ("", "in"):
            return name
        return f"{(placement.query if letter == 'q' else placement.key)[name]}<{letter}>"

    def planted(name: str) -> str:
        head, bracket, letter = name.partition("<")
        if bracket:
            return receiver(head, letter[0])
        return f"{sender(name[:-2])}->" if name.endswith("->") else sender(name)

    names = {edge: f"{sender(edge[0])}->{receiver(*edge[1:])}" for edge in edges}
    nodes = frozenset(sender(edge[0]) for edge in edges if edge[0] != "input")
    quiet = {sender(name) for name in program.silent}
    return KnownCircuit(
        nodes=nodes,
        edges=frozenset(names.values()),
        silent=frozenset(quiet)
        | {name for edge, name in names.items() if {edge[0], edge[1]} & set(program.silent)},
        planted={planted(name): kind for name, kind in program.planted.items()},
    )
