"""What is known of a model's circuit without running it: the truth that a method's answer is held against."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from patchkit.errors import InputError
from patchkit.model.edges import EdgeGraph


@dataclass(frozen=True)
class KnownCircuit:
    """The nodes and edges that carry a behaviour, by construction.

    Attributes:
        nodes: heads and MLPs, as senders are named (`a0.h1`, `m2`).
        edges: as edges are named (`a0.h1->a1.h2<k>`), keys and values by KV head.
        silent: those of `nodes` and `edges` that change nothing when they alone are patched, since others do the same
            work (a majority) or since they wait for another to fail (a backup).
        planted: why a method may miss something: a node (`a0.h1`), a head's input and all edges into it (`a1.h2<k>`), the
            edges into an MLP (`->m1`), the edges out of a node (`a0.h1->`).
        unlabelled: edges of which nothing is known, and which are counted neither way.
    """

    nodes: frozenset[str]
    edges: frozenset[str]
    silent: frozenset[str] = frozenset()
    planted: Mapping[str, str] = field(default_factory=dict)
    unlabelled: frozenset[str] = frozenset()

    def check(self, graph: EdgeGraph) -> None:
        """InputError if a name is none of the graph's, or something silent is not in the circuit."""
        for node in sorted(self.nodes):
            graph.find_sender(node)
        graph.find_edges(sorted(self.edges | self.unlabelled))
        strays = sorted(self.silent - self.nodes - self.edges)
        if strays:
            raise InputError(f"{strays[0]} is said to be silent, but it is not in the circuit")

    @property
    def receivers(self) -> frozenset[str]:
        """Where the circuit's edges end: `a1.h2<k>`, `m2`, `logits`."""
        return frozenset(edge.partition("->")[2] for edge in self.edges)

    def kind_of(self, name: str) -> str | None:
        """Why a method may miss this node or edge, if any: the receiver's before the sender's."""
        sender, arrow, receiver = name.partition("->")
        if not arrow:
            return self.planted.get(name)
        keys = (receiver if "<" in receiver else f"->{receiver}", f"{sender}->")
        return next((self.planted[key] for key in keys if key in self.planted), None)
