"""What path patching is asked for, by name: senders, receivers, one place, and the plan of each stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from patchkit.data import Pair, Places, read_places
from patchkit.errors import InputError
from patchkit.model.edges import EdgeGraph

#: Words for many senders at once.
GROUPS = ("heads", "mlps", "all")
MLPS = ("recomputed", "frozen")
SIGNS = ("hurt", "help", "both")
LETTERS = "qkv"


@dataclass(frozen=True)
class StagePlan:
    """How one stage of iterative path patching chooses its senders, and what of them the next stage asks about.

    A sender's share is its effect over (base metric - source metric): at -1 patching it makes the base run as the source
    run is.

    Attributes:
        name: what the group that is found is called.
        k: keep so many at most, of the largest |share|; None: all that pass.
        threshold: keep those whose |share| is at least this; None: any that is not 0.
        letters: which inputs of the chosen heads are the next stage's receivers: `q`, `k`, `v` or several of them.
        sign: which effects count. `hurt`: those that move the metric from the base run's towards the source run's
            (share below 0): under `noise`, patching the sender hurts the behaviour, under `denoise` it restores it.
            `help`: those that move it away. `both`.
        only: `heads`, `mlps` or `all` senders, the input among the last.

    Raises:
        InputError: neither k nor threshold, or one that keeps nothing; an unknown letter or word.
    """

    name: str
    k: int | None = None
    threshold: float | None = None
    letters: str = "q"
    sign: str = "hurt"
    only: str = "heads"

    def __post_init__(self) -> None:
        stage = f"stage '{self.name}'"
        if not self.name:
            raise InputError("a stage has no name; expected one, such as 'movers'")
        if self.k is None and self.threshold is None:
            raise InputError(
                f"{stage}: expected k (how many senders to keep), a threshold, or both; found neither"
            )
        if self.k is not None and self.k < 1:
            raise InputError(f"{stage}: k is {self.k}; expected at least 1 sender to keep")
        if self.threshold is not None and not self.threshold > 0:
            raise InputError(f"{stage}: threshold {self.threshold}; expected a share above 0, such as 0.02")
        if not self.letters or set(self.letters) - set(LETTERS) or len(set(self.letters)) < len(self.letters):
            raise InputError(
                f"{stage}: letters '{self.letters}'; expected q, k, v or several of them, as 'qk'"
            )
        for what, value, known in (("sign", self.sign, SIGNS), ("only", self.only, GROUPS)):
            if value not in known:
                raise InputError(
                    f"{stage}: {what} '{value}' is not known; expected one of: {', '.join(known)}"
                )


def find_senders(graph: EdgeGraph, names: Sequence[str]) -> list[int]:
    """Senders by name or word, each once, ascending.

    Raises:
        InputError: there are none, or one is unknown.
    """
    if isinstance(names, str) or not names:
        raise InputError(
            f"senders {names!r}: expected a list of names (input, a1.h3, m2) or words ({', '.join(GROUPS)})"
        )
    found: set[int] = set()
    for name in names:
        found.update(_group(graph, name) if name in GROUPS else [graph.find_sender(name)])
    return sorted(found)


def find_receivers(graph: EdgeGraph, names: Sequence[str]) -> list[int]:
    """Receivers by name, each once, ascending.

    Raises:
        InputError: there are none, or one is unknown.
    """
    if isinstance(names, str) or not names:
        raise InputError(f"receivers {names!r}: expected a list of names (logits, m2, a1.h3<q>)")
    return sorted({graph.find_receiver(name) for name in names})


def one_place(text: str, pairs: Sequence[Pair]) -> Places:
    """The place that senders are patched at.

    Raises:
        InputError: as `read_places`, and where there are several places.
    """
    places = read_places(text, pairs)
    if len(places.labels) > 1:
        raise InputError(
            f"positions '{text}' are {len(places.labels)} places, and path patching gives one effect a sender; expected "
            "one place (last, all, one span or one index): run it once for each"
        )
    return places


def inputs_of(graph: EdgeGraph, senders: Sequence[int], letters: str) -> list[int]:
    """Receivers that make these senders what they are: inputs of heads by letter, of MLPs; the input has none."""
    group = graph.n_heads // graph.n_kv_heads
    found: set[int] = set()
    for sender in senders:
        layer = graph.layer_of_sender(sender)
        if layer < 0:
            continue
        if sender == graph.mlp_sender(layer):
            found.add(graph.mlp_receiver(layer))
            continue
        head = sender - graph.heads(layer).start
        for letter in letters:
            found.add(graph.receivers_of(layer, letter).start + (head if letter == "q" else head // group))
    return sorted(found)


def upstream_of(graph: EdgeGraph, receivers: Sequence[int], group: str) -> list[int]:
    """Senders of a group that are upstream of any of the receivers."""
    most = int(graph.upstream[list(receivers)].max())
    return [sender for sender in _group(graph, group) if sender < most]


def _group(graph: EdgeGraph, word: str) -> list[int]:
    mlps = {graph.mlp_sender(layer) for layer in range(graph.n_layers)}
    everyone = range(graph.n_senders)
    if word == "mlps":
        return sorted(mlps)
    return list(everyone) if word == "all" else [s for s in everyone if s and s not in mlps]
