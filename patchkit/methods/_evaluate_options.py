"""What is asked about a circuit: which sizes, and which of the tests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from patchkit.errors import InputError

SELECTION_NAMES = ("top", "greedy", "threshold")
PATCHINGS = ("edge", "node")


@dataclass(frozen=True)
class EvaluateOptions:
    """Options of `evaluate`.

    Tests (completeness, minimality, random circuits, stability) are about one circuit: the last of `sizes`, the one that
    `tau` gives, or the one that was handed over.

    Attributes:
        sizes: numbers of edges to select from scores; the circuit is pruned afterwards.
        absolute: rank edges by |score|.
        selection: `top` (the best edges), `greedy` (from the logits backwards) or `threshold` (all of at least `tau`).
        tau: of the threshold.
        patching: `edge` (edges outside the circuit are cut) or `node` (nodes outside it are replaced for all that read
            them; a circuit is then its nodes).
        curve: faithfulness at MIB's ten fractions of all edges, ranked by signed and by absolute scores.
        completeness: how many random sets of nodes are taken away from circuit and model; above 0 a greedy set is, too.
        minimality: whether each node of the circuit is needed.
        random: how many random circuits of equal size to compare with.
        stability: bootstraps of the pairs; needs scores that kept those of every pair.
        knockout: names of heads and MLPs to replace, to see which others change their direct effect.
        seed: of all that is drawn.
        draws: bootstrap draws of an interval.
        removals: random sets of nodes that minimality tries for each node.
        candidates: nodes that one step of greedy completeness tries, and partners that minimality tries for a node: with
            more than so many they are drawn (completeness), or are those that feed most of the same receivers
            (minimality).
    """

    sizes: tuple[int, ...] = ()
    absolute: bool = False
    selection: Literal["top", "greedy", "threshold"] = "top"
    tau: float | None = None
    patching: Literal["edge", "node"] = "edge"
    curve: bool = False
    completeness: int = 0
    minimality: bool = False
    random: int = 0
    stability: int = 0
    knockout: tuple[str, ...] = ()
    seed: int = 0
    draws: int = 1000
    removals: int = 4
    candidates: int = 32

    def __post_init__(self) -> None:
        for name, value, known in (
            ("selection", self.selection, SELECTION_NAMES),
            ("patching", self.patching, PATCHINGS),
        ):
            if value not in known:
                raise InputError(f"{name} '{value}' is not known; expected one of: {', '.join(known)}")
        for name, least in (
            ("completeness", 0),
            ("random", 0),
            ("stability", 0),
            ("removals", 0),
            ("draws", 1),
            ("candidates", 1),
        ):
            if getattr(self, name) < least:
                raise InputError(f"{name} must be at least {least}, found {getattr(self, name)}")
        if any(size < 0 for size in self.sizes):
            raise InputError(f"sizes are numbers of edges, at least 0; found {min(self.sizes)}")
        if len(set(self.sizes)) < len(self.sizes):
            raise InputError(f"sizes {', '.join(map(str, self.sizes))}: one comes twice; name each once")
        if len(set(self.knockout)) < len(self.knockout):
            raise InputError(f"knockout {', '.join(self.knockout)}: a node comes twice; name each once")
        if self.stability == 1:
            raise InputError(
                "stability compares bootstraps with one another; expected 0 or at least 2, found 1"
            )
        threshold = self.selection == "threshold"
        if threshold and self.tau is None:
            raise InputError("selection 'threshold' needs tau, the least score of an edge of the circuit")
        if not threshold and self.tau is not None:
            raise InputError(f"tau is for selection 'threshold'; found selection '{self.selection}'")
        if threshold and self.sizes:
            raise InputError("selection 'threshold' takes every edge of at least tau, so it has no sizes")

    @property
    def asks_about_one(self) -> tuple[str, ...]:
        """The tests asked for that are about one circuit."""
        asked = {
            "completeness": self.completeness,
            "minimality": self.minimality,
            "random": self.random,
            "stability": self.stability,
        }
        return tuple(name for name, value in asked.items() if value)
