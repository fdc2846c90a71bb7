"""From the logits back to the names: which heads act on the logits, which on the queries, keys and values of those, ...

The iterative path patching of Wang et al. 2022, with the three inputs of a group of heads asked for one by one, so that a
head is known to act on *where* later ones look (queries, keys) or on *what* they bring (values):

    logits                       <- heads            stage `on the logits`; group 1 is what it keeps
    q, k, v of group 1           <- heads below      stages `on the queries of group 1`, ...; group 2 what they add
    q, k, v of group 2           <- heads below      ...

A stage keeps at most so many heads, and only those with a certain share of the behaviour. It ends where nothing is added
or nothing is below.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from patchkit.model import Dims
from patchkit.model.edges import EdgeGraph
from patchkit.results.paths import PathResult, Stage

DIRECT = "on the logits"
LETTERS = {"q": "queries", "k": "keys", "v": "values"}

#: Path patching of one stage: its name, senders, receivers.
RunStage = Callable[[str, list[str], list[str]], PathResult]


def trace_heads(dims: Dims, run: RunStage, *, most: int, share: float, groups: int) -> PathResult:
    """All stages as one result, from the logits backwards.

    Args:
        run: patches each sender along its paths to all receivers.
        most: heads that a stage keeps.
        share: least |effect| of a head that is kept, in units of (base - source).
        groups: how many groups of heads have their inputs traced.
    """
    graph = EdgeGraph.of(dims)
    found = run(DIRECT, heads_below(graph, dims.n_layers), ["logits"])
    stages = [_stage(found, DIRECT, most, share)]
    cost, known = found.cost, set[str]()
    for number in range(1, groups + 1):
        group = [head for head in _union(stages) if head not in known]
        known |= set(group)
        top = max((graph.layer_of_sender(graph.find_sender(head)) for head in group), default=0)
        if top == 0:
            break
        for letter, word in LETTERS.items():
            name = f"on the {word} of group {number}"
            part = run(name, heads_below(graph, top), inputs_of(graph, group, letter))
            stages.append(_stage(part, name, most, share))
            cost += part.cost
    return found.model_copy(update={"iterative": True, "stages": stages, "cost": cost})


def heads_below(graph: EdgeGraph, layer: int) -> list[str]:
    """All heads of the layers below this one."""
    return [f"a{below}.h{head}" for below in range(layer) for head in range(graph.n_heads)]


def inputs_of(graph: EdgeGraph, heads: Sequence[str], letter: str) -> list[str]:
    """The query, key or value inputs of some heads that have anything below them; a shared key or value once."""
    numbers = [
        receiver
        for head in heads
        for receiver in graph.owner[graph.find_sender(head)].nonzero()[:, 0].tolist()
        if graph.layer_of_receiver(receiver) > 0
    ]
    names = dict.fromkeys(graph.receiver_name(receiver) for receiver in numbers)
    return [name for name in names if name.endswith(f"<{letter}>")]


def chosen_heads(paths: PathResult) -> list[str]:
    """Every head that a stage kept, in the order in which they were found."""
    return _union(paths.stages)


def _union(stages: Sequence[Stage]) -> list[str]:
    return list(dict.fromkeys(head for stage in stages for head in stage.chosen))


def _stage(found: PathResult, name: str, most: int, share: float) -> Stage:
    """The one stage of a plain run, with the heads that it keeps."""
    (stage,) = found.stages
    able = [one for one in stage.effects if one.share is not None and abs(one.share) >= share]
    kept = sorted(able, key=lambda one: -abs(one.effect))[:most]
    return stage.model_copy(update={"name": name, "chosen": [one.sender for one in kept]})
