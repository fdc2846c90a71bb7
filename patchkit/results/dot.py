"""A circuit as DOT, the language of graphviz, as text: neither graphviz nor its C library is needed to write it."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from patchkit.errors import InputError
from patchkit.results.circuit import Circuit

#: Of edges into queries, keys and values; black into MLPs and the logits.
COLOURS = {"q": "#b5179e", "k": "#2b9348", "v": "#1d4ed8", "": "#333333"}
_THIN, _THICK = 0.6, 5.0
_PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# Words of the language, in any case.
_WORDS = frozenset({"node", "edge", "graph", "digraph", "subgraph", "strict"})


def to_dot(
    circuit: Circuit,
    scores: Float[Tensor, "senders receivers"] | None = None,
    *,
    limit: int = 400,
    title: str = "circuit",
) -> str:
    """The circuit as a directed graph, the input at the bottom and the logits on top, one rank a layer's heads or MLP.

    Edges into queries, keys and values have a colour each; their width grows with |score|, and a negative score is
    dashed. A key or value that several heads share is a diamond of its own, with a dotted line to each head of its group
    that is drawn. Of a larger circuit the `limit` edges of the largest |score| are drawn (without scores: those latest in
    the model), and a comment says how many were left out.

    Raises:
        InputError: scores of another shape, or a limit below 1.
    """
    if limit < 1:
        raise InputError(f"limit: expected at least 1 edge to draw, found {limit}")
    if scores is not None and scores.shape != circuit.edges.shape:
        raise InputError(
            f"scores of this circuit: expected shape {list(circuit.edges.shape)}, found {list(scores.shape)}"
        )
    drawn = _largest(circuit, scores, limit)
    size = {edge: None if scores is None else float(scores[edge]) for edge in drawn}
    largest = max(
        (abs(value) for value in size.values() if value is not None and value == value), default=0.0
    )
    graph, ranks = circuit.graph, defaultdict[int, dict[str, str]](dict)
    lines: list[str] = []
    shared: dict[int, str] = {}
    senders = {sender for sender, _ in drawn}
    for sender, receiver in drawn:
        start, name = graph.sender_name(sender), graph.receiver_name(receiver)
        ranks[_rank(graph.layer_of_sender(sender), start)][start] = "box"
        owners = graph.owner[:, receiver].nonzero()[:, 0].tolist()
        end, letter = (name, "") if "<" not in name else (name[: name.index("<")], name[-2])
        if len(owners) > 1:
            end = shared[receiver] = name
            ranks[2 * graph.layer_of_receiver(receiver) + 1][name] = "diamond"
        else:
            ranks[_rank(graph.layer_of_receiver(receiver), end)][end] = "box"
        lines.append(
            f"{_quoted(start)} -> {_quoted(end)} [{_look(letter, size[sender, receiver], largest)}];"
        )
    for receiver, name in shared.items():
        for owner in graph.owner[:, receiver].nonzero()[:, 0].tolist():
            if owner in senders:
                head = graph.sender_name(owner)
                lines.append(f'{_quoted(name)} -> {_quoted(head)} [style="dotted", arrowhead="none"];')
    left_out = circuit.n_edges - len(drawn)
    comments = [f"// {circuit.n_edges} edges, {len(drawn)} drawn, {left_out} left out."]
    return (
        "\n".join([*comments, *_header(title), *_ranked(ranks), *(f"  {line}" for line in lines), "}"]) + "\n"
    )


def _largest(circuit: Circuit, scores: Tensor | None, limit: int) -> list[tuple[int, int]]:
    edges = circuit.edges.nonzero()
    if len(edges) > limit:
        keys = (
            edges[:, 1].double() if scores is None else scores[circuit.edges].abs().nan_to_num(-1.0).double()
        )
        edges = edges[torch.sort(keys, descending=True, stable=True).indices[:limit].sort().values]
    return [(sender, receiver) for sender, receiver in edges.tolist()]


def _rank(layer: int, name: str) -> int:
    """0 for the input, then two a layer: heads, MLP."""
    return 2 * layer + (2 if name.startswith(("m", "input")) else 1)


def _look(letter: str, score: float | None, largest: float) -> str:
    attributes = {"color": COLOURS[letter]}
    if letter:
        attributes["label"], attributes["fontcolor"] = letter, COLOURS[letter]
    if score is not None and score == score and largest > 0:
        attributes["penwidth"] = f"{_THIN + (_THICK - _THIN) * abs(score) / largest:.3g}"
        attributes["tooltip"] = f"{score:.6g}"
        if score < 0:
            attributes["style"] = "dashed"
    return ", ".join(f"{key}={_quoted(value)}" for key, value in attributes.items())


def _header(title: str) -> Iterable[str]:
    yield f"digraph {_quoted(title)} {{"
    yield f"  label={_quoted(title)};"
    yield '  rankdir="BT";'
    yield '  node [fontname="Helvetica", fontsize="10", shape="box", style="rounded"];'
    yield '  edge [fontname="Helvetica", fontsize="8", arrowsize="0.5"];'


def _ranked(ranks: dict[int, dict[str, str]]) -> Iterable[str]:
    for _, nodes in sorted(ranks.items()):
        parts = [
            _quoted(name) + (' [shape="diamond"]' if shape == "diamond" else "")
            for name, shape in nodes.items()
        ]
        yield f'  {{ rank="same"; {"; ".join(parts)}; }}'


def _quoted(text: str) -> str:
    """An identifier: as it is where the language allows, else in quotes, in which only the quote has to be escaped."""
    if _PLAIN.fullmatch(text) and text.lower() not in _WORDS:
        return text
    flat = " ".join(text.split())
    # A backslash at the end would escape the quote that follows.
    return '"' + flat.replace("\\", "\\\\").replace('"', '\\"') + '"'
