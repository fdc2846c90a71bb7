"""DOT of a circuit, read again by a small grammar of the language, and by graphviz where it is installed."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass, field

import pytest
import torch

from patchkit.errors import InputError
from patchkit.model import EdgeGraph
from patchkit.results.circuit import Circuit, greedy
from patchkit.results.dot import COLOURS, to_dot

PLAIN = EdgeGraph(3, 2, 2, False, 4)
GROUPED = EdgeGraph(2, 4, 2, False, 8)
TOKEN = re.compile(r'\s*(?:(//[^\n]*\n)|("(?:[^"\\]|\\.)*")|([A-Za-z_][A-Za-z0-9_]*)|(->|[{}\[\];,=]))')


@dataclass
class Drawn:
    """A graph that was read: edges with what they look like, and the nodes of each rank."""

    title: str = ""
    edges: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    ranks: list[dict[str, dict[str, str]]] = field(default_factory=list)


class Grammar:
    """`digraph ID { statements }`, as much of it as is written here; anything else is an error."""

    def __init__(self, text: str) -> None:
        self.tokens: list[str] = []
        at = 0
        while text[at:].strip():
            match = TOKEN.match(text, at)
            assert match is not None, f"no token at: {text[at : at + 40]!r}"
            at = match.end()
            if match[1] is None:
                self.tokens.append(match[2] or match[3] or match[4])
        self.drawn = Drawn()

    def take(self, expected: str | None = None) -> str:
        token = self.tokens.pop(0)
        assert expected is None or token == expected, f"expected {expected}, found {token}"
        return token

    def name(self) -> str:
        token = self.take()
        if token.startswith('"'):
            return re.sub(r"\\(.)", r"\1", token[1:-1])
        assert re.fullmatch(r"[A-Za-z_]\w*", token), token
        assert token.lower() not in {"node", "edge", "graph", "digraph", "subgraph", "strict"}, token
        return token

    def attributes(self) -> dict[str, str]:
        found = {}
        if self.tokens[0] == "[":
            self.take("[")
            while self.tokens[0] != "]":
                key = self.name()
                self.take("=")
                found[key] = self.name()
                if self.tokens[0] == ",":
                    self.take()
            self.take("]")
        return found

    def read(self) -> Drawn:
        self.take("digraph")
        self.drawn.title = self.name()
        self.take("{")
        while self.tokens[0] != "}":
            if self.tokens[0] == "{":
                self.take()
                rank = {}
                while self.tokens[0] != "}":
                    name = self.name()
                    if self.tokens[0] == "=":
                        self.take()
                        assert (name, self.name()) == ("rank", "same")
                    else:
                        rank[name] = self.attributes()
                    self.take(";")
                self.drawn.ranks.append(rank)
                self.take("}")
                continue
            if self.tokens[0] in ("node", "edge"):
                self.take()
                assert self.attributes()
            else:
                name = self.name()
                if self.tokens[0] == "->":
                    self.take()
                    end = self.name()
                    self.drawn.edges.append((name, end, self.attributes()))
                else:
                    self.take("=")
                    self.name()
            self.take(";")
        self.take("}")
        assert self.tokens == []
        return self.drawn


def checked(text: str) -> Drawn:
    dot = shutil.which("dot")
    if dot is not None:
        subprocess.run([dot, "-Tcanon"], input=text, text=True, check=True, capture_output=True)
    return Grammar(text).read()


def scored(graph: EdgeGraph, n: int) -> tuple[Circuit, torch.Tensor]:
    scores = torch.randn(graph.real.shape, generator=torch.Generator().manual_seed(2))
    return greedy(graph, scores, n, absolute=True).pruned(), scores


def test_every_edge_is_drawn_between_its_nodes() -> None:
    circuit, scores = scored(PLAIN, 20)
    drawn = checked(to_dot(circuit, scores))
    found = {f"{u}->{v}" + (f"<{look['label']}>" if "label" in look else "") for u, v, look in drawn.edges}
    assert found == set(circuit.names()) and len(drawn.edges) == circuit.n_edges
    largest = max(float(scores[PLAIN.find_edge(name)].abs()) for name in found)
    for u, v, look in drawn.edges:
        letter = look.get("label", "")
        score = float(scores[PLAIN.find_edge(f"{u}->{v}" + (f"<{letter}>" if letter else ""))])
        assert look["color"] == COLOURS[letter]
        assert float(look["penwidth"]) == pytest.approx(0.6 + 4.4 * abs(score) / largest, rel=1e-2)
        assert ("style" in look) == (score < 0)
    assert len({COLOURS[letter] for letter in COLOURS}) == 4


def test_layers_are_ranks_in_the_order_of_execution() -> None:
    drawn = checked(to_dot(Circuit.full(PLAIN)))
    assert [sorted(rank) for rank in drawn.ranks] == [
        ["input"],
        ["a0.h0", "a0.h1"],
        ["m0"],
        ["a1.h0", "a1.h1"],
        ["m1"],
        ["a2.h0", "a2.h1"],
        ["m2"],
        ["logits"],
    ]
    ranked = {name: number for number, rank in enumerate(drawn.ranks) for name in rank}
    assert all(ranked[u] < ranked[v] for u, v, _ in drawn.edges)


def test_a_shared_key_is_a_node_of_its_own() -> None:
    circuit = Circuit.of_names(
        GROUPED, ["input->a0.h1<k>", "a0.h2->logits", "a0.h3->a1.h0<q>", "a1.h0->logits", "input->a0.h0<q>"]
    )
    drawn = checked(to_dot(circuit))
    assert {(u, v) for u, v, look in drawn.edges if look.get("style") == "dotted"} == {
        ("a0.h1<k>", "a0.h2"),
        ("a0.h1<k>", "a0.h3"),
    }
    assert ("input", "a0.h1<k>") in {(u, v) for u, v, _ in drawn.edges}
    assert drawn.ranks[1]["a0.h1<k>"] == {"shape": "diamond"}
    assert len(drawn.edges) == circuit.n_edges + 2


def test_the_largest_edges_are_drawn_and_the_others_counted() -> None:
    circuit, scores = scored(PLAIN, 40)
    text = to_dot(circuit, scores, limit=5)
    assert text.startswith(f"// {circuit.n_edges} edges, 5 drawn, {circuit.n_edges - 5} left out.\n")
    ranked = sorted(circuit.names(), key=lambda name: -abs(float(scores[PLAIN.find_edge(name)])))
    found = {
        f"{u}->{v}" + (f"<{look['label']}>" if "label" in look else "") for u, v, look in checked(text).edges
    }
    assert found == set(ranked[:5])
    unscored = checked(to_dot(Circuit.full(PLAIN), limit=10))
    assert {v for _, v, _ in unscored.edges} == {"logits"}


def test_names_and_titles_are_escaped() -> None:
    circuit = Circuit.of_names(PLAIN, ["input->logits"])
    for title in ('"', "\\", 'a"; evil [label="x', "ends in \\", "graph", "Größe", "", "two\nlines", "a.b"):
        drawn = checked(to_dot(circuit, title=title))
        assert drawn.title == " ".join(title.split()) and [edge[:2] for edge in drawn.edges] == [
            ("input", "logits")
        ]


def test_circuits_of_nothing_and_scores_of_nothing_are_drawn() -> None:
    assert checked(to_dot(Circuit.empty(PLAIN))).edges == []
    for value in (0.0, float("nan")):
        flat = torch.full(PLAIN.real.shape, value)
        drawn = checked(to_dot(Circuit.full(PLAIN), flat))
        assert not any("penwidth" in look for _, _, look in drawn.edges)


def test_what_cannot_be_drawn_is_refused() -> None:
    with pytest.raises(InputError, match="limit: expected at least 1 edge to draw, found 0"):
        to_dot(Circuit.full(PLAIN), limit=0)
    with pytest.raises(
        InputError, match=r"scores of this circuit: expected shape \[10, 22\], found \[3, 3\]"
    ):
        to_dot(Circuit.full(PLAIN), torch.zeros(3, 3))
