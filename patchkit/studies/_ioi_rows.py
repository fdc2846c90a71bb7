"""One row a head: its numbers, what path patching and the knock-out say of it, and what it is called."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from patchkit.results.evaluation import Evaluation
from patchkit.results.ioi import Attention, HeadBehaviour, HeadRow, StageShare
from patchkit.results.paths import PathResult
from patchkit.studies._ioi_heads import Known, Thresholds, classes_of, evidence
from patchkit.studies._ioi_words import looks, unnamed


def known_heads(
    behaviours: Mapping[str, HeadBehaviour],
    even: Attention,
    paths: Mapping[str, PathResult],
    evaluation: Evaluation,
    name_movers: Sequence[str],
    knocked_out: Collection[str],
) -> dict[str, Known]:
    """What the rules look at, of every head."""
    inhibits = _on_queries(paths, name_movers)
    rises = takes_over(evaluation, knocked_out)
    first = min(map(_layer, knocked_out), default=0)
    behind = {head: rise for head, rise in rises.items() if head in behaviours and _layer(head) > first}
    return {head: Known(one, even, inhibits.get(head), behind.get(head)) for head, one in behaviours.items()}


def _layer(head: str) -> int:
    return int(head[1:].split(".")[0])


def _on_queries(paths: Mapping[str, PathResult], name_movers: Sequence[str]) -> dict[str, float]:
    """How much each head helps through the queries of a group with a name mover in it, at most."""
    queries = {f"{head}<q>" for head in name_movers}
    found: dict[str, float] = {}
    for result in paths.values():
        for stage in result.stages:
            if queries & set(stage.receivers):
                for one in stage.effects:
                    if one.share is not None:
                        found[one.sender] = max(found.get(one.sender, 0.0), -one.share)
    return found


def takes_over(evaluation: Evaluation, knocked_out: Collection[str]) -> dict[str, float]:
    """What each node helps more on the logits once the group is gone, in units of (clean - corrupt).

    Nodes that were knocked out are not in it. A helping node has a negative direct effect, so its rise is a fall of that.
    """
    scale = evaluation.clean_metric - evaluation.corrupt_metric
    if evaluation.repair is None or scale == 0:
        return {}
    return {
        node.node: -node.change / scale for node in evaluation.repair.nodes if node.node not in knocked_out
    }


def head_rows(
    known: Mapping[str, Known],
    paths: Mapping[str, PathResult],
    chosen: Collection[str],
    rises: Mapping[str, float],
    thresholds: Thresholds,
) -> list[HeadRow]:
    """The rows of all heads, by layer; `rises` are those of `takes_over`."""
    rows = []
    for head, one in known.items():
        classes = classes_of(one, thresholds)
        said = evidence(classes, one) if classes else unnamed(one.behaviour, one.even, thresholds)
        rows.append(
            HeadRow(
                head=head,
                classes=[each.name for each in classes],
                evidence=said,
                in_circuit=head in chosen,
                stages=_stages(head, paths),
                behaviour=one.behaviour,
                looks=looks(one.behaviour, one.even, thresholds),
                takes_over=rises.get(head),
            )
        )
    return rows


def _stages(head: str, paths: Mapping[str, PathResult]) -> list[StageShare]:
    return [
        StageShare(corruption=corruption, stage=stage.name, share=one.share, chosen=head in stage.chosen)
        for corruption, result in paths.items()
        for stage in result.stages
        for one in stage.effects
        if one.sender == head and one.share is not None
    ]
