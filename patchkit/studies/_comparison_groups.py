"""Groups of nodes that a comparison asks about: those named, or what the two circuits suggest; random ones beside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from patchkit.errors import InputError
from patchkit.model import Dims, NodeGrid
from patchkit.results.circuit import Circuit

#: What groups are made of: heads before their output projection, and what MLPs add to the stream.
KINDS = ("z", "mlp_out")
EVERYTHING = "every head and MLP"
CIRCUITS = ("circuit of the first", "circuit of the second")


def groups_of(
    circuits: Sequence[Circuit], named: Mapping[str, Sequence[str]] | None, dims: Dims
) -> dict[str, list[str]]:
    """Names of nodes by group: each circuit's, and those named, or (by default) the circuits' heads layer by layer and
    their MLPs; and all nodes there are.

    Raises:
        InputError: a group without nodes, of a name that is taken, or a node that is no head or MLP of the model.
    """
    grid = NodeGrid(dims, KINDS)
    nodes = [[name for name in circuit.node_names if name != "input"] for circuit in circuits]
    found: dict[str, list[str]] = dict(zip(CIRCUITS, nodes, strict=True))
    if named is None:
        either = set(nodes[0]) | set(nodes[1])
        for layer in range(dims.n_layers):
            heads = [f"a{layer}.h{head}" for head in range(dims.n_heads)]
            found[f"heads of layer {layer}"] = [name for name in heads if name in either]
        found["MLPs"] = [f"m{layer}" for layer in range(dims.n_layers) if f"m{layer}" in either]
    for name, members in (named or {}).items():
        if name in found or name == EVERYTHING:
            raise InputError(
                f"group '{name}': that name is taken by a group that is always there; choose another"
            )
        if not members:
            raise InputError(f"group '{name}' has no nodes; expected names such as a1.h0,m2")
        for node in members:
            grid.find(node)
        found[name] = list(dict.fromkeys(members))
    found[EVERYTHING] = grid.names()
    return {name: members for name, members in found.items() if members}


def random_groups(members: Sequence[str], dims: Dims, count: int, seed: int) -> list[list[str]]:
    """Random groups of as many heads and as many MLPs, from all layers; none where there is but one such group."""
    every = NodeGrid(dims, KINDS).names()
    kinds = [[name for name in every if name[0] == letter] for letter in "am"]
    wanted = [sum(name[0] == letter for name in members) for letter in "am"]
    if all(number in (0, len(names)) for number, names in zip(wanted, kinds, strict=True)):
        return []
    generator = torch.Generator().manual_seed(seed)
    return [
        [
            names[place]
            for number, names in zip(wanted, kinds, strict=True)
            for place in sorted(torch.randperm(len(names), generator=generator)[:number].tolist())
        ]
        for _ in range(count)
    ]
