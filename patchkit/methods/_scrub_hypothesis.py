"""A hypothesis as data: what the parts of a model are said to compute, and which part feeds which."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field

from patchkit.data import Pair
from patchkit.errors import InputError

#: The root of every hypothesis: the model's output on the input whose answer is scored.
OUTPUT = "output"


@dataclass(frozen=True)
class Interpretation:
    """One node of the interpretation: the model nodes that it stands for depend on the input through its key alone.

    Attributes:
        name: what it is called in the hypothesis and in the report.
        key: what it is said to compute, of the clean prompt of a pair: inputs with equal keys are interchangeable for it.
            Its docstring (or its name) is what the report says.
        nodes: senders `input`, `a1.h3`, `m2`, at the tokens of `positions`, or at others: `m2@last`, `input@query`. Along
            every edge to the model nodes of its parents they carry this node's value.
        edges: instead of nodes: `a0.h1->a2.h3<q>`. The senders stand for this node along these edges alone.
        positions: `all`, `last`, or a comma-separated list of spans and indices, counted on unpadded tokens.
        children: names of the nodes that it is computed from. Without children its value is that of an ordinary run on
            an input with an equal key.
    """

    name: str
    # No content: what it led to, the draws, says all that the numbers depend on.
    key: Callable[[Pair], Hashable] = field(compare=False)
    nodes: tuple[str, ...] = ()
    edges: tuple[str, ...] = ()
    positions: str = "all"
    children: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.name or self.name == OUTPUT or "/" in self.name:
            raise InputError(
                f"interpretation node {self.name!r}: expected a name that is not empty, not '{OUTPUT}', without '/'"
            )
        if bool(self.nodes) == bool(self.edges):
            found = "both" if self.nodes else "neither"
            raise InputError(
                f"interpretation node '{self.name}': expected either nodes or edges of the model, found {found}"
            )
        for what in ("nodes", "edges", "children"):
            said = getattr(self, what)
            twice = [each for place, each in enumerate(said) if each in said[:place]]
            if twice:
                raise InputError(f"interpretation node '{self.name}': {what} name {twice[0]!r} twice")

    @property
    def key_words(self) -> str:
        """The key function's docstring in one line, or its name where it has none."""
        said = inspect.getdoc(self.key) if inspect.isfunction(self.key) else None
        return " ".join((said or getattr(self.key, "__name__", type(self.key).__name__)).split())


@dataclass(frozen=True)
class Hypothesis:
    """A directed acyclic graph of interpretation nodes under the model's output.

    Attributes:
        name: what the report calls it.
        nodes: all interpretation nodes.
        children: those that the output is computed from: the logits read them. With none, nothing is claimed.
        claim: what it says, in words.

    Raises:
        InputError: a name that comes twice, an unknown child, a cycle, a node that is nobody's child.
    """

    name: str
    nodes: tuple[Interpretation, ...] = ()
    children: tuple[str, ...] = ()
    claim: str = ""

    def __post_init__(self) -> None:
        known = [node.name for node in self.nodes]
        twice = [name for place, name in enumerate(known) if name in known[:place]]
        if twice:
            raise InputError(f"hypothesis '{self.name}': two nodes are called '{twice[0]}'; name each once")
        if len(set(self.children)) < len(self.children):
            raise InputError(
                f"hypothesis '{self.name}': its children {', '.join(self.children)} name a node twice"
            )
        for parent, children in (
            (OUTPUT, self.children),
            *((node.name, node.children) for node in self.nodes),
        ):
            for child in children:
                if child not in known:
                    raise InputError(
                        f"hypothesis '{self.name}': '{parent}' has the child '{child}', which is none of its nodes: "
                        f"{', '.join(known) or 'there are none'}"
                    )
        self._refuse_cycles()
        fed = {*self.children, *(child for node in self.nodes for child in node.children)}
        idle = [name for name in known if name not in fed]
        if idle:
            raise InputError(
                f"hypothesis '{self.name}': node '{idle[0]}' is nobody's child, so nothing would read it; name it among "
                "the children of another node or of the hypothesis"
            )

    def node(self, name: str) -> Interpretation:
        """The node of this name."""
        return next(node for node in self.nodes if node.name == name)

    def children_of(self, name: str) -> tuple[str, ...]:
        """Names of the children of a node, or of the output."""
        return self.children if name == OUTPUT else self.node(name).children

    def occurrences(self, name: str = OUTPUT) -> Iterator[str]:
        """Names of all nodes below one in the treeified graph, a node once for each path that leads to it."""
        for child in self.children_of(name):
            yield child
            yield from self.occurrences(child)

    def _refuse_cycles(self) -> None:
        done: set[str] = set()

        def visit(name: str, path: tuple[str, ...]) -> None:
            if name in path:
                around = " -> ".join((*path[path.index(name) :], name))
                raise InputError(
                    f"hypothesis '{self.name}': its nodes go round in a circle: {around}; a node must not need itself"
                )
            if name not in done:
                for child in self.node(name).children:
                    visit(child, (*path, name))
                done.add(name)

        for node in self.nodes:
            visit(node.name, ())
