"""What the IOI study found, in sentences made from its numbers: what is there, what is not, and what is there instead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median

from patchkit.results.evaluation import Evaluation
from patchkit.results.ioi import Accuracy, Attention, HeadRow, ProtocolScore, Rule
from patchkit.results.paths import PathResult
from patchkit.studies._ioi_heads import Thresholds
from patchkit.studies._ioi_words import between, listed, percent, signed, together, two_digits

# Below this a model that must choose between two names hardly does better than a coin.
_DOES_IT = 0.75
_SHOWN = 3


def findings(
    rows: Sequence[HeadRow],
    rules: Sequence[Rule],
    groups: Sequence[Sequence[str]],
    accuracy: Accuracy,
    even: Attention,
    evaluation: Evaluation,
    protocols: Sequence[ProtocolScore],
    knocked_out: str,
    thresholds: Thresholds,
) -> list[str]:
    """The sentences, from the task through heads and circuit to the knock-out."""
    said = [_task(accuracy), *_groups(groups)]
    said += _classes(rules, rows)
    said += together(rows, even, thresholds)
    said += [_circuit(rows, evaluation), *_protocols(protocols), *_tests(evaluation)]
    if evaluation.repair is not None:
        said.append(_knockout(evaluation, knocked_out, rows))
    return said


def _task(accuracy: Accuracy) -> str:
    said = (
        f"The model prefers IO to S in {percent(accuracy.prefers_io)} of the prompts, and IO is what it says in "
        f"{percent(accuracy.says_io)}."
    )
    if accuracy.prefers_io >= _DOES_IT:
        return said
    return f"{said} It hardly does the task, so nothing below says how it is done."


def _groups(groups: Sequence[Sequence[str]]) -> list[str]:
    """Which heads are group 1, 2, ...: the stages' names speak of them."""
    said = [f"group {number} ({_acts(number)}) is {listed(heads)}" for number, heads in enumerate(groups, 1)]
    return [f"From the logits backwards: {'; '.join(said)}."] if said else []


def _acts(number: int) -> str:
    return "which acts on the logits" if number == 1 else f"which acts on the inputs of group {number - 1}"


def _classes(rules: Sequence[Rule], rows: Sequence[HeadRow]) -> list[str]:
    """A sentence a class that some head is of; one for all that none is of."""
    inside = {row.head for row in rows if row.in_circuit}
    said = []
    for rule in rules:
        if rule.heads:
            outside = [head for head in rule.heads if head not in inside]
            also = f" (not in the circuit: {listed(outside)})" if outside else ""
            said.append(f"{rule.name.capitalize()}: {listed(rule.heads)}{also}.")
    missing = [f"{rule.name} ({rule.nearest or 'nobody comes near'})" for rule in rules if not rule.heads]
    return [*said, f"No head meets the rule of: {'; '.join(missing)}."] if missing else said


def _circuit(rows: Sequence[HeadRow], evaluation: Evaluation) -> str:
    kept = [row.head for row in rows if row.in_circuit]
    (run,) = evaluation.circuits
    if not kept:
        return "Path patching keeps no head, so the circuit is the MLPs alone."
    said = (
        f"The circuit is {len(kept)} of {len(rows)} heads and every MLP. On other prompts it keeps "
        f"{_faithful(run.faithfulness)} of the behaviour (logit difference {two_digits(run.circuit_metric)}; model "
        f"{two_digits(evaluation.clean_metric)}, everything replaced {two_digits(evaluation.corrupt_metric)}; "
        f"{run.patching} patching, {run.ablation} from other people's prompts)"
    )
    chance = evaluation.random
    if chance is None:
        return f"{said}."
    reached = [value for value in chance.faithfulness if value is not None]
    if not reached:
        return f"{said}."
    return (
        f"{said}; half of {chance.count} random circuits of equal size keep more than {percent(median(reached))}, "
        f"p = {chance.p_value:.3f}."
    )


def _faithful(value: float | None) -> str:
    return "an undefined share" if value is None else percent(value)


def _protocols(protocols: Sequence[ProtocolScore]) -> list[str]:
    """The circuit under other protocols, in a sentence."""
    parts = [
        f"{_faithful(one.faithfulness)} ({one.circuit}, {one.patching} patching, {one.ablation} {one.corruption})"
        for one in protocols
        if one.template is None
    ]
    means = [
        one.faithfulness for one in protocols if one.template is not None and one.faithfulness is not None
    ]
    if means:
        parts.append(
            f"{between(means, percent)} (means of the template over other people's prompts, "
            f"{len(means)} templates)"
        )
    return [f"The same heads under other protocols keep {', '.join(parts)}."] if parts else []


def _tests(evaluation: Evaluation) -> list[str]:
    said = []
    lacks, idle = evaluation.completeness, evaluation.minimality
    if lacks is not None and lacks.removals:
        worst = max(lacks.removals, key=lambda one: one.gap)
        share = "" if lacks.worst_share is None else f", {percent(lacks.worst_share)} of the behaviour"
        said.append(
            f"Completeness: the same nodes taken from circuit and model leave them at most {two_digits(worst.gap)} "
            f"apart{share} ({worst.how} choice, {len(worst.nodes)} nodes: {listed(worst.nodes)})."
        )
    if idle is not None:
        idlers = idle.superfluous
        found = f"{listed(idlers)} change less than that" if idlers else "every one does"
        said.append(
            f"Minimality: of {len(idle.nodes)} nodes, each should change {percent(idle.limit)} of the behaviour when it "
            f"goes besides some others; {found}."
        )
    return said


def _knockout(evaluation: Evaluation, knocked_out: str, rows: Sequence[HeadRow]) -> str:
    repair = evaluation.repair
    assert repair is not None
    said = (
        f"Without {knocked_out}, {listed(repair.group)}, the logit difference falls from {two_digits(repair.clean)} "
        f"to {two_digits(repair.knocked_out)}; the loss of their direct effects alone would leave "
        f"{two_digits(repair.expected)}"
    )
    if repair.repaired is not None:
        made_up = "make up for" if repair.repaired >= 0 else "add to the loss, as much as"
        said += f", so the others {made_up} {percent(abs(repair.repaired))} of it"
    rising = sorted(
        (row for row in rows if row.takes_over is not None), key=lambda row: -abs(row.takes_over or 0.0)
    )[:_SHOWN]
    changes = ", ".join(f"{row.head} {signed(row.takes_over or 0.0)}" for row in rising)
    return (
        f"{said}. Of the other heads' direct effects these change most: {changes}." if changes else f"{said}."
    )


def notes(evaluation: Evaluation, paths: Mapping[str, PathResult]) -> list[str]:
    """What a careful reader should know about these numbers."""
    said = [
        "Heads are patched one at a time: heads that only matter together are missed, and which heads are kept depends "
        "on the threshold. Every MLP is in the circuit without having been asked for.",
        "A class is a name for behaviour on these prompts and on random tokens, under the thresholds shown; it does not "
        "say that the head does nothing else.",
        "Heads that are kept under `s2-flip` carry which of the two names is repeated; those kept under `abc` may carry "
        "any name.",
    ]
    return [
        *said,
        *dict.fromkeys(note for result in paths.values() for note in result.notes),
        *evaluation.notes,
    ]
