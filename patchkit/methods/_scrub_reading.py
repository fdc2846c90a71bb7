"""A hypothesis read against a model and inputs: which senders, at which tokens, carry what along which edges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from jaxtyping import Bool
from torch import Tensor

from patchkit.data import Pair, read_places
from patchkit.errors import InputError
from patchkit.methods._scrub_hypothesis import OUTPUT, Hypothesis, Interpretation
from patchkit.model import EdgeGraph

#: Tokens of a place in every input, counted from 0 on unpadded tokens.
Tokens = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, eq=False)
class Part:
    """One sender at one place, as a part of an interpretation node."""

    name: str
    sender: int
    place: str
    edges: Bool[Tensor, " receivers"]

    def readers(self, parent: Bool[Tensor, " receivers"]) -> Bool[Tensor, " receivers"]:
        """Which receivers of a parent read this part's value."""
        return self.edges & parent


@dataclass(frozen=True, eq=False)
class Reading:
    """What a hypothesis says of one model.

    Attributes:
        parts: of each interpretation node, by sender.
        receivers: what each interpretation node, and the output, reads with.
        tokens: of each place that is named.
    """

    hypothesis: Hypothesis
    graph: EdgeGraph
    parts: Mapping[str, tuple[Part, ...]]
    receivers: Mapping[str, Bool[Tensor, " receivers"]]
    tokens: Mapping[str, Tokens]

    @property
    def held(self) -> set[int]:
        """All senders that stand for anything."""
        return {part.sender for parts in self.parts.values() for part in parts}

    @property
    def recomputed(self) -> set[int]:
        """The senders of nodes that have children."""
        return {
            part.sender for node in self.hypothesis.nodes if node.children for part in self.parts[node.name]
        }


def read_hypothesis(hypothesis: Hypothesis, graph: EdgeGraph, inputs: Sequence[Pair]) -> Reading:
    """Checks a hypothesis against the model's graph and every input.

    Raises:
        InputError: a model node, edge or place that does not exist; a node that stands for one sender twice; model nodes
            that do not reach their parents'; two children of one parent that claim the same thing.
    """
    parts = {node.name: _parts(node, graph) for node in hypothesis.nodes}
    tokens: dict[str, Tokens] = {}
    for name, mine in parts.items():
        for place in dict.fromkeys(part.place for part in mine):
            tokens[place] = tokens.get(place) or _tokens(name, place, inputs)
    receivers = {name: graph.owner[[part.sender for part in mine]].any(0) for name, mine in parts.items()}
    receivers[OUTPUT] = torch.arange(graph.n_receivers) == graph.logits
    reading = Reading(hypothesis, graph, parts, receivers, tokens)
    for node in hypothesis.nodes:
        _check_node(node, reading)
        _check_read(node.name, reading, inputs)
    for parent in (OUTPUT, *(node.name for node in hypothesis.nodes)):
        _check_claims(parent, reading, inputs)
    return reading


def _named(node: Interpretation) -> list[tuple[str, str, str]]:
    """(as the user said it, name of the sender, place) of every model node that an interpretation node names."""
    if node.edges:
        senders = dict.fromkeys(edge.partition("->")[0] for edge in node.edges)
        return [(sender, sender, node.positions) for sender in senders]
    named = []
    for said in node.nodes:
        sender, at, place = said.partition("@")
        named.append((said, sender, place if at else node.positions))
    return named


def _tokens(name: str, place: str, inputs: Sequence[Pair]) -> Tokens:
    if place.strip() == "each":
        raise InputError(
            f"interpretation node '{name}': positions 'each' have no meaning here, since a node stands for all its "
            "tokens together; use all, last, names of spans, or indices"
        )
    try:
        read = read_places(place, inputs)
    except InputError as error:
        raise InputError(f"interpretation node '{name}': {error}") from None
    found = tuple(tuple(sorted({token for each in places for token in each})) for places in read.covered)
    for pair, mine in zip(inputs, found, strict=True):
        if len(mine) != len(found[0]):
            raise InputError(
                f"interpretation node '{name}': '{place}' covers {len(found[0])} tokens in pair {inputs[0].id!r} and "
                f"{len(mine)} in pair {pair.id!r}; activations are exchanged token by token, so it must cover as many in "
                "every pair: use pairs of one length, or last, indices, or spans of one length"
            )
    return found


def _parts(node: Interpretation, graph: EdgeGraph) -> tuple[Part, ...]:
    try:
        along = graph.find_edges(node.edges) if node.edges else graph.real
        found = [
            Part(said, number := graph.find_sender(sender), place, along[number])
            for said, sender, place in _named(node)
        ]
    except InputError as error:
        raise InputError(f"interpretation node '{node.name}': {error}") from None
    return tuple(sorted(found, key=lambda part: part.sender))


def _check_node(node: Interpretation, reading: Reading) -> None:
    for first, second in combinations(reading.parts[node.name], 2):
        if first.sender == second.sender and _overlap(reading, first, second) is not None:
            raise InputError(
                f"interpretation node '{node.name}': {first.name} and {second.name} share tokens; name each once"
            )
    if node.children and reading.parts[node.name][0].sender == 0:
        raise InputError(
            f"interpretation node '{node.name}': it has children, but the model's input is computed from nothing; give "
            "`input` an interpretation node of its own, without children"
        )
    if node.edges:
        above = [name for name in reading.receivers if node.name in reading.hypothesis.children_of(name)]
        read = torch.stack([reading.receivers[name] for name in above]).any(0)
        for part in reading.parts[node.name]:
            idle = (part.edges & ~read).nonzero()[:, 0].tolist()
            if idle:
                edge = reading.graph.edge_name(part.sender, idle[0])
                raise InputError(
                    f"interpretation node '{node.name}': the edge {edge} ends at no model node of its parents "
                    f"({', '.join(above)}), so nothing would read it"
                )


def _check_claims(parent: str, reading: Reading, inputs: Sequence[Pair]) -> None:
    """Refuses two claims on what one edge carries at one token."""
    mine = reading.receivers[parent]
    children = reading.hypothesis.children_of(parent)
    own = [] if parent == OUTPUT else [(parent, part) for part in reading.parts[parent]]
    claims = own + [(child, part) for child in children for part in reading.parts[child]]
    for (first, one), (second, other) in combinations(claims, 2):
        if first == second or one.sender != other.sender:
            continue
        # What a node's own parts hold, they hold along every edge.
        there = other.readers(mine) if first == parent else one.readers(mine) & other.readers(mine)
        number = _overlap(reading, one, other)
        if number is None or not bool(there.any()):
            continue
        edge = reading.graph.edge_name(one.sender, int(there.nonzero()[0]))
        raise InputError(
            f"hypothesis '{reading.hypothesis.name}': '{first}' and '{second}' both say what {edge} carries to "
            f"'{parent}' (in pair {inputs[number].id!r} at a token that both cover); let one of them claim it, or give "
            "them different edges or positions"
        )


def _overlap(reading: Reading, one: Part, other: Part) -> int | None:
    """The first input in which two parts have a token in common."""
    both = zip(reading.tokens[one.place], reading.tokens[other.place], strict=True)
    return next((number for number, (a, b) in enumerate(both) if set(a) & set(b)), None)


def _check_read(child: str, reading: Reading, inputs: Sequence[Pair]) -> None:
    """Refuses a node that a parent would never read, and a part of it that none of them would."""
    parents = [name for name in reading.receivers if child in reading.hypothesis.children_of(name)]
    parts = reading.parts[child]
    reached = torch.stack(
        [torch.stack([_reached(parent, part, reading, inputs) for part in parts]) for parent in parents]
    )
    for parent, by_part in zip(parents, reached, strict=True):
        _require_read(
            by_part.any(0), f"'{child}' ({parts[0].name}, ...)", f"its parent '{parent}'", reading, inputs
        )
    for part, by_input in zip(parts, reached.any(0), strict=True):
        spoken = " or ".join(f"'{parent}'" for parent in parents)
        _require_read(by_input, f"{part.name} of '{child}'", spoken, reading, inputs)


def _require_read(
    read: Bool[Tensor, " inputs"], what: str, by: str, reading: Reading, inputs: Sequence[Pair]
) -> None:
    if not bool(read.all()):
        pair = inputs[int((~read).nonzero()[0])]
        raise InputError(
            f"hypothesis '{reading.hypothesis.name}': {what} is not upstream of any model node of {by} (in pair "
            f"{pair.id!r}, along the edges and at the tokens claimed), so nothing would read it. Keys and values "
            "are read at the reader's token and before, everything else at the same token, the logits at the last"
        )


def _reached(parent: str, part: Part, reading: Reading, inputs: Sequence[Pair]) -> Bool[Tensor, " inputs"]:
    """In which inputs a parent reads a part of its child."""
    tokens = reading.tokens[part.place]
    if parent == OUTPUT:
        read = bool(part.readers(reading.receivers[OUTPUT]).any())
        return torch.tensor(
            [read and tokens[i][-1] == len(pair.clean_ids) - 1 for i, pair in enumerate(inputs)]
        )
    reached = torch.zeros(len(inputs), dtype=torch.bool)
    for reader in reading.parts[parent]:
        reached |= _read_at(part, reader, reading)
        if bool(reached.all()):
            break
    return reached


def _read_at(part: Part, reader: Part, reading: Reading) -> Bool[Tensor, " inputs"]:
    """In which inputs one part of a parent reads a part of its child, by their tokens."""
    graph = reading.graph
    read = part.readers(graph.owner[reader.sender]).nonzero()[:, 0].tolist()
    names = [graph.receiver_name(receiver) for receiver in read]
    looking_back = any(name.endswith(("<k>", "<v>")) for name in names)
    found = [
        bool(names) and (bool(set(a) & set(b)) or (looking_back and a[0] <= b[-1]))
        for a, b in zip(reading.tokens[part.place], reading.tokens[reader.place], strict=True)
    ]
    return torch.tensor(found)
