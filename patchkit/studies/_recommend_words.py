"""A recommendation in sentences, for a terminal: what to run, what it costs, why, and what it will not see."""

from __future__ import annotations

from collections.abc import Sequence

from patchkit.results.recommendation import Choice, KindMissed, LeftOut, Recommendation

_ASKED = {
    "rank": "which {what} matter more than others",
    "top": "which {what} are the ones that matter",
    "circuit": "which {what}, as many as the true circuit has, behave as the model does",
    "sizes": "which {what} behave as the model does, at every size",
}
# Methods over the budget that are named: those that would have gained most.
_NAMED = 3


def lead_lines(found: Recommendation) -> list[str]:
    """What was asked, what to run, what it costs and how good it was."""
    choice = found.choice
    what = "edges" if found.of == "edges" else f"nodes ({', '.join(found.kinds)})"
    budget = "whatever it takes" if found.budget is None else f"at most {found.budget:,g} forwards a pair"
    evidence = "a single pair" if found.pairs == 1 else f"{found.pairs:,} pairs"
    return [
        f"{found.model}: {found.shape}",
        f"Asked: {_ASKED[found.question].format(what=what)}; from {evidence} of {found.tokens} tokens, {budget}.",
        "",
        f"Recommended: {choice.method} ({choice.told})",
        f"  {choice.command}",
        f"  {_cost(found, choice)}",
        f"  {_first_upper(found.measure)}: {_score(choice)} over {choice.cases} cases, every family weighed alike. "
        + _why(found, choice),
        f"  Of what is known to be true it misses {_missed(choice.missed)}.",
    ]


def _cost(found: Recommendation, choice: Choice) -> str:
    said = f"{choice.cost:,.1f} forwards a pair on this model"
    if found.pairs > 1:
        said += f", {choice.cost * found.pairs:,.0f} for all"
    if choice.cost_with_proof is not None:
        said += f"; {choice.cost_with_proof:,.1f} a pair with the exact check of the top nodes"
    return said + "."


def _why(found: Recommendation, choice: Choice) -> str:
    if choice.method == found.best:
        others = [each.method for each in found.choices if each.like_best and each.method != found.best]
        if not others:
            return "The best within the budget, and told from all others."
        return f"The best within the budget, and the cheapest of those not told from it: {', '.join(others)}."
    best = found.of_method(found.best)
    return (
        f"The best mean is that of {best.method}, {_score(best)} at {best.cost:,.1f} forwards; these cases do not tell "
        "the two apart, and of all such this is the cheapest."
    )


def _missed(missed: Sequence[KindMissed]) -> str:
    said = [
        f"{each.kind or 'where nothing is planted'} {each.missed} of {each.total}"
        for each in missed
        if each.missed
    ]
    return "; ".join(said) if said else "nothing"


def evidence_lines(found: Recommendation) -> list[str]:
    """What stands beside it: the runner-up, what the budget excludes, what nothing sees, and what limits this."""
    return [
        *_runner_up(found),
        *_over(found.over_budget),
        *_unseen(found),
        *_left_out(found.not_compared),
        *found.notes,
        f"Evidence: patchkit study ground-truth of {found.date} "
        f"({', '.join(f'{name} {version}' for name, version in found.versions.items())}).",
    ]


def _runner_up(found: Recommendation) -> list[str]:
    second = found.runner_up
    if second is None:
        return ["Nothing else answers this within the budget."]
    return [
        f"Runner-up: {second.method}, {_score(second)} at {second.cost:,.1f} forwards a pair. It misses "
        f"{_missed(second.missed)}.",
        f"  {second.command}",
    ]


def _over(excluded: Sequence[LeftOut]) -> list[str]:
    if not excluded:
        return []
    better = [each for each in excluded if each.gain is not None and each.gain > 0]
    if not better:
        return [
            f"Over the budget, and no better on these cases: {', '.join(each.method for each in excluded)}."
        ]
    said = "; ".join(
        f"{each.method} ({each.cost or 0.0:,.1f} forwards a pair) would gain {each.gain:.3f}"
        for each in better[:_NAMED]
    )
    others = len(excluded) - len(better[:_NAMED])
    more = f"; {others} other method{'s are' if others > 1 else ' is'} over it too" if others else ""
    return [f"Over the budget: {said}{more}."]


def _unseen(found: Recommendation) -> list[str]:
    if not found.unseen:
        return ["Each kind of failure is seen by some method within the budget more often than not."]
    lines = ["What no method within the budget sees more often than not:"]
    for each in found.unseen:
        why = f" ({each.why})" if each.why else ""
        lines.append(
            f"  {each.kind}{why}: even {each.by} misses {each.missed} of {each.total}. What to do: {each.advice}."
        )
    return lines


def _left_out(left: Sequence[LeftOut]) -> list[str]:
    """Methods that share a reason are named together."""
    by_reason: dict[str, list[str]] = {}
    for each in left:
        by_reason.setdefault(each.reason, []).append(each.method)
    return [f"Not compared: {', '.join(methods)}: {reason}." for reason, methods in by_reason.items()]


def _score(choice: Choice) -> str:
    interval = "" if choice.interval is None else f" [{choice.interval[0]:.3f}, {choice.interval[1]:.3f}]"
    return f"{choice.score:.3f}{interval}"


def _first_upper(text: str) -> str:
    return text[:1].upper() + text[1:]
