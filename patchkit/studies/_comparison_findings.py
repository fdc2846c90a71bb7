"""What a comparison shows, in words that its numbers choose."""

from __future__ import annotations

from patchkit.results.comparison import WHICH, Across, Comparison, FoundCircuit, GroupShift, Which
from patchkit.studies._comparison_groups import CIRCUITS, EVERYTHING

#: Two circuits are called much alike from this Jaccard index on, and unlike below the other.
_ALIKE, _UNLIKE = 0.7, 0.3
#: A circuit that keeps so much of the behaviour is called faithful.
_FAITHFUL = 0.9


def findings(found: Comparison) -> list[str]:
    """Sentences for the report and the terminal, one a part."""
    told = [_behaviour(found), _overlap(found), _circuits(found)]
    told += [said for each in found.across for said in _across(found, each)]
    told.append(_desiderata(found))
    return [said for said in told if said]


def _name(found: Comparison, which: Which) -> str:
    return found.models[WHICH.index(which)].model


def _behaviour(found: Comparison) -> str:
    first, second = found.models
    return (
        f"On {len(found.held_out)} held-out pairs {first.model} answers {first.accuracy:.0%} rightly "
        f"({found.convention.metric} {first.clean:.2f} on clean prompts, {first.corrupt:.2f} on corrupt ones), "
        f"{second.model} {second.accuracy:.0%} ({second.clean:.2f}, {second.corrupt:.2f})."
    )


def _overlap(found: Comparison) -> str:
    size = found.circuits[-1].run.requested
    last = {each.level: each for each in found.overlaps if each.requested == size}
    edges, nodes = last["edge"].jaccard, last["node"].jaccard
    if edges is None or nodes is None:
        return f"With {size} edges asked for nothing is left of both circuits after pruning."
    how = "much alike" if edges >= _ALIKE else "unlike" if edges < _UNLIKE else "alike in part"
    ranked = found.rank_correlation_abs
    said = "" if ranked is None else f"; over all edges the rank correlation of mean |score| is {ranked:.2f}"
    return (
        f"Their circuits of {size} edges are {how}: they share {edges:.0%} of all edges that either has (Jaccard) and "
        f"{nodes:.0%} of the nodes{said}."
    )


def _at_last(found: Comparison, found_in: Which, run_in: Which) -> FoundCircuit:
    mine = [each for each in found.circuits if (each.found_in, each.run_in) == (found_in, run_in)]
    return mine[-1]


def _circuits(found: Comparison) -> str:
    shown = {
        (source, place): _at_last(found, source, place).run.faithfulness
        for source in WHICH
        for place in WHICH
    }
    if any(value is None for value in shown.values()):
        return "Where clean and corrupt prompts have one metric, faithfulness is not defined."
    crossed = [shown["first", "second"] or 0.0, shown["second", "first"] or 0.0]
    kept = [value >= _FAITHFUL for value in crossed]
    said = {
        (True, True): "each works in the other model as well",
        (True, False): "the first's works in the second, not the other way round",
        (False, True): "the second's works in the first, not the other way round",
        (False, False): "neither is enough in the other model",
    }[kept[0], kept[1]]
    return (
        f"With {found.circuits[-1].run.requested} edges, the first's circuit has faithfulness "
        f"{shown['first', 'first']:.2f} in its own model and {crossed[0]:.2f} in the second; the second's "
        f"{shown['second', 'second']:.2f} in its own and {crossed[1]:.2f} in the first: {said}."
    )


def _across(found: Comparison, across: Across) -> list[str]:
    model, donor = _name(found, across.model), _name(found, across.donor)
    ranked = [each for each in across.nodes if each.share is not None]
    if not ranked:
        return [f"{model} and {donor} have one metric on these prompts, so there is no gap to close."]
    best = max(ranked, key=lambda each: each.share or 0.0)
    said = [
        f"Put into the {across.model} ({model}), no single node of the {across.donor} closes more of the gap "
        f"({across.model_metric:.2f} to {across.donor_metric:.2f}) than {best.node}: {best.share:+.0%}."
    ]
    everything = next(each for each in across.groups if each.group == EVERYTHING)
    others = [each for each in across.groups if each.share is not None and len(each.nodes) > 1]
    parts = [each for each in others if each.group not in (EVERYTHING, *CIRCUITS)]
    if parts and everything.share is not None:
        group = max(parts, key=lambda each: each.share or 0.0)
        # At all tokens nothing else of the stream is the model's own.
        rest = "; what is left lies in embeddings, output projections, the last norm and the unembedding"
        said.append(
            f"{EVERYTHING[0].upper()}{EVERYTHING[1:]} together close {everything.share:.0%} of it"
            f"{rest if found.positions == 'all' else ''}. Of the groups, {group.group} closes most: {group.share:.0%} "
            f"({len(group.nodes)} nodes){_chance(group)}."
        )
    return said


def _chance(group: GroupShift) -> str:
    known = [each for each in group.random if each is not None]
    if not known:
        return ""
    return f"; random groups of as many heads and MLPs {min(known):.0%} to {max(known):.0%}"


def _desiderata(found: Comparison) -> str:
    own = {
        which: {
            each.group: min(each.scores.values())
            for each in found.desiderata
            if each.model == each.donor == which and each.scores
        }
        for which in WHICH
    }
    if not own["first"] or not own["second"]:
        return ""
    parts = []
    for which in WHICH:
        group = max(own[which], key=lambda name: own[which][name])
        parts.append(f"in the {which} {group} ({own[which][group]:.0%})")
    crossed = [_crossed(found, which) for which in WHICH]
    return (
        "The group that meets the worst of its desiderata best is "
        f"{' and '.join(parts)}. With the other model's activations put in it is, in the first, {crossed[0]} and, in the "
        f"second, {crossed[1]}."
    )


def _crossed(found: Comparison, model: Which) -> str:
    """The same where the alternates are run in the other model."""
    least = {
        each.group: min(each.scores.values())
        for each in found.desiderata
        if each.model == model != each.donor and each.scores
    }
    best = max(least, key=lambda name: least[name])
    return f"{best} ({least[best]:.0%})"
