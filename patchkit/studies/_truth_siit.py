"""What is known of the edges of a model with a forced circuit: its program says which node reads which."""

from __future__ import annotations

from patchkit import zoo
from patchkit.model import EdgeGraph
from patchkit.zoo.known import KnownCircuit
from patchkit.zoo.siit import CASES, SiitCase


def siit_circuit(case: SiitCase) -> KnownCircuit:
    """The program's nodes, and its edges at every input of the node that reads.

    Training does not say by which of a head's inputs a variable comes in, nor whether one circuit node reads another that
    the program does not let it read. The former are true where exact patching finds them, see `truth_of`; the latter are
    unlabelled. What has an end outside the circuit is in no edge of it.
    """
    card = zoo.card(case.name)
    graph = EdgeGraph(card.layers, card.heads, card.kv_heads, False, card.d_model)
    inside = {"input", *case.nodes}
    stated, others = set[str](), set[str]()
    for sender, receiver in graph.real.nonzero().tolist():
        owners = [graph.sender_name(owner) for owner in graph.owner[:, receiver].nonzero()[:, 0].tolist()]
        ends = ["logits"] if receiver == graph.logits else owners
        start, name = graph.sender_name(sender), graph.edge_name(sender, receiver)
        # A key or value that heads share is in the circuit if one of them is.
        if start not in inside or not ({"logits", *case.nodes} & set(ends)):
            continue
        if any(f"{start}->{end}" in case.edges for end in ends):
            stated.add(name)
        else:
            others.add(name)
    return KnownCircuit(frozenset(case.nodes), frozenset(stated), unlabelled=frozenset(others))


def siit_cases() -> dict[str, SiitCase]:
    """The cases whose weights are in the package, by name."""
    return {name: case for name, case in CASES.items() if zoo.find(name) is not None}
