"""From the logits back to the names: which heads act on the logits, which on the queries, keys and values of those, ...

The iterative path patching of Wang et al. 2022, with the three inputs of a group of heads asked for one by one, so that a
head is known to act on *where* later ones look (queries, keys) or on *what* they bring (values):

    logits                       <- heads            stage `on the logits`; group 1 is what it keeps
    q, k, v of group 1           <- heads below      stages `on the queries of group 1`, ...; group 2 what they add
    q, k, v of group 2           <- heads below      ...

A stage keeps at most so many heads, and only those with a certain share of the behaviour. It ends where nothing is added
or nothing is below. Every stage is run under several corruptions, and a group is what any of them keeps: prompts that
differ in who is named again show the heads that decide between the two names, prompts about other people those that
bring any name at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from patchkit.model import Dims
from patchkit.model.edges import EdgeGraph
from patchkit.results.ioi import DIRECT, INPUTS, read_stage, stage_name
from patchkit.results.paths import PathResult, Stage

#: Path patching of one stage under one corruption: corruption, name of the stage, senders, receivers.
RunStage = Callable[[str, str, list[str], list[str]], PathResult]


def trace_heads(
    dims: Dims, run: RunStage, corruptions: Sequence[str], *, most: int, share: float, groups: int
) -> dict[str, PathResult]:
    """All stages under each corruption, from the logits backwards.

    Args:
        run: patches each sender along its paths to all receivers.
        most: heads that a stage keeps under one corruption.
        share: least |effect| of a head that is kept, in units of (base - source).
        groups: how many groups of heads have their inputs traced.
    """
    graph = EdgeGraph.of(dims)
    found: dict[str, list[PathResult]] = {corruption: [] for corruption in corruptions}

    def stage(name: str, senders: list[str], receivers: list[str]) -> None:
        for corruption in corruptions:
            part = run(corruption, name, senders, receivers)
            kept = _chosen(part.stages[0], name, most, share)
            found[corruption].append(part.model_copy(update={"stages": [kept], "iterative": True}))

    stage(DIRECT, heads_below(graph, dims.n_layers), ["logits"])
    known = set[str]()
    for number in range(1, groups + 1):
        group = [head for head in chosen_heads(_flat(found)) if head not in known]
        known |= set(group)
        top = max((graph.layer_of_sender(graph.find_sender(head)) for head in group), default=0)
        if top == 0:
            break
        for letter in INPUTS:
            stage(stage_name(letter, number), heads_below(graph, top), inputs_of(graph, group, letter))
    return {corruption: _joined(parts) for corruption, parts in found.items()}


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


def chosen_heads(paths: Iterable[PathResult]) -> list[str]:
    """Every head that a stage kept, by the size of its largest share."""
    shares: dict[str, float] = {}
    for result in paths:
        for stage in result.stages:
            for one in stage.effects:
                if one.sender in stage.chosen:
                    shares[one.sender] = max(shares.get(one.sender, 0.0), abs(one.share or 0.0))
    return sorted(shares, key=lambda head: -shares[head])


def groups_of(paths: Iterable[PathResult]) -> list[list[str]]:
    """Heads by how they were found: group 1 acts on the logits, group 2 is what acts on the inputs of group 1, ..."""
    found: list[dict[str, None]] = []
    for stages in zip(*(result.stages for result in paths), strict=True):
        target = read_stage(stages[0].name)
        number = 0 if target is None else target[1]
        while len(found) <= number:
            found.append({})
        earlier = {head for group in found[:number] for head in group}
        found[number] |= dict.fromkeys(
            head for stage in stages for head in stage.chosen if head not in earlier
        )
    return [list(group) for group in found if group]


def movers(paths: Iterable[PathResult], name_movers: Sequence[str]) -> tuple[list[str], str]:
    """The group that is knocked out, and what it is: the name movers that act on the logits, or whoever helps there.

    Heads whose effect on the logits is against the behaviour are not movers.
    """
    helping: dict[str, None] = {}
    for stage in (stage for result in paths for stage in result.stages if stage.name == DIRECT):
        helps = {one.sender for one in stage.effects if one.share is not None and one.share < 0}
        helping |= dict.fromkeys(head for head in stage.chosen if head in helps)
    named = [head for head in helping if head in name_movers]
    if named:
        return named, "the name movers that act on the logits"
    return list(helping), "the heads that act on the logits (none is a name mover)" if helping else ""


def _flat(found: Mapping[str, Sequence[PathResult]]) -> list[PathResult]:
    return [part for parts in found.values() for part in parts]


def _joined(parts: Sequence[PathResult]) -> PathResult:
    return parts[0].model_copy(
        update={
            "stages": [stage for part in parts for stage in part.stages],
            "cost": sum(part.cost for part in parts),
            "notes": list(dict.fromkeys(note for part in parts for note in part.notes)),
        }
    )


def _chosen(stage: Stage, name: str, most: int, share: float) -> Stage:
    """The stage of a plain run under its name, with the heads that it keeps, the largest effect first."""
    able = [one for one in stage.effects if one.share is not None and abs(one.share) >= share]
    kept = sorted(able, key=lambda one: -abs(one.effect))[:most]
    return stage.model_copy(update={"name": name, "chosen": [one.sender for one in kept]})
