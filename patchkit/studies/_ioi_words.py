"""What the IOI study says in words, made from numbers: what is found, what is not, and what is there instead."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from patchkit.results.ioi import HeadBehaviour, HeadRow, Rule, StageShare
from patchkit.studies._ioi_heads import Thresholds

PLACES = {
    "last": "END",
    "s2": "S2",
    "s1+1": "S1+1",
    "io": "IO",
    "s1": "S1",
    "rest of clause": "the rest of the names' clause",
    "token before": "the token before it",
    "first token": "the first token",
}
# A head that looks at these has nothing to look at, as far as is known.
_IDLE = ("elsewhere", "first token")


def looks(behaviour: HeadBehaviour, thresholds: Thresholds) -> tuple[str, str, float] | None:
    """(from, to, mass) of the strongest attention of a head to a named place that is not its own; None for none."""
    named = [
        (query, target, mass)
        for query, row in behaviour.attention.items()
        for target, mass in row.items()
        if target not in (*_IDLE, query)
    ]
    best = max(named, key=lambda found: found[2])
    return best if best[2] >= thresholds.attends else None


def unnamed(behaviour: HeadBehaviour, stages: Iterable[StageShare], thresholds: Thresholds) -> str:
    """What a head does that no class is of."""
    found = looks(behaviour, thresholds)
    if found is None:
        said = [f"looks at no named token with {thresholds.attends:g} or more of its attention"]
    else:
        query, target, mass = found
        said = [f"looks from {PLACES[query]} at {PLACES[target]} ({mass:.2f})"]
    for score, words in (
        (behaviour.writes_io, "writes IO at END"),
        (behaviour.writes_s, "writes S at END"),
    ):
        if score >= thresholds.copies:
            said.append(f"{words} ({score:.0%} of prompts)")
    for score, words in (
        (behaviour.copying, "copies the names it looks at"),
        (behaviour.negative_copying, "pushes down the names it looks at"),
    ):
        if score >= thresholds.copies:
            said.append(f"{words} ({score:.0%} of names)")
    strongest = max(stages, key=lambda stage: abs(stage.share), default=None)
    if strongest is not None and abs(strongest.share) >= thresholds.effect:
        said.append(f"its effect {strongest.stage} is {signed(strongest.share)} of the behaviour")
    return "; ".join(said)


def signed(share: float) -> str:
    """A share with its sign, as per cent; no sign on what rounds to nothing."""
    shown = f"{share:+.0%}"
    return "0%" if shown in ("+0%", "-0%") else shown


def listed(names: Sequence[str], shown: int = 8) -> str:
    """Names in a sentence, at most so many."""
    if len(names) > shown:
        return f"{', '.join(names[:shown])} and {len(names) - shown} more"
    return ", ".join(names) or "none"


def class_findings(rules: Sequence[Rule], rows: Sequence[HeadRow]) -> list[str]:
    """A sentence a class: its heads in the circuit and outside, or that there is none, and the nearest."""
    inside = {row.head for row in rows if row.in_circuit}
    said = []
    for rule in rules:
        if rule.heads:
            outside = [head for head in rule.heads if head not in inside]
            also = f" ({listed(outside)} not in the circuit)" if outside else ""
            said.append(f"{rule.name}: {listed(rule.heads)}{also}.")
        else:
            near = f"; nearest is {rule.nearest}" if rule.nearest else ""
            said.append(f"No head is a {rule.name} head ({rule.criterion}){near}.")
    return said


def instead(rows: Sequence[HeadRow], thresholds: Thresholds) -> list[str]:
    """What the circuit's unnamed heads do, those that do the same together, the strongest first."""
    groups: dict[tuple[str, ...], list[HeadRow]] = {}
    for row in rows:
        if row.in_circuit and not row.classes:
            groups.setdefault(_signature(row, thresholds), []).append(row)
    ordered = sorted(groups.values(), key=lambda group: -sum(abs(_strongest(row)) for row in group))
    return [_together(group, thresholds) for group in ordered]


def _signature(row: HeadRow, thresholds: Thresholds) -> tuple[str, ...]:
    found = looks(row.behaviour, thresholds)
    where = found[:2] if found is not None else ()
    chosen = [stage for stage in row.stages if stage.chosen]
    most = max(chosen, key=lambda stage: abs(stage.share), default=None)
    return (*where, "" if most is None else most.stage)


def _strongest(row: HeadRow) -> float:
    return max((stage.share for stage in row.stages if stage.chosen), key=abs, default=0.0)


def _together(rows: Sequence[HeadRow], thresholds: Thresholds) -> str:
    found = [looks(row.behaviour, thresholds) for row in rows]
    known = [one for one in found if one is not None]
    if known:
        masses = [one[2] for one in known]
        look = f"from {PLACES[known[0][0]]} at {PLACES[known[0][1]]} ({_span(masses)} of the attention)"
    else:
        look = f"at no named token with {thresholds.attends:g} or more of their attention"
    io = [row.behaviour.writes_io for row in rows]
    does = (
        f", write IO at END in {_span(io, percent=True)} of prompts" if max(io) >= thresholds.copies else ""
    )
    chosen = [
        stage.stage for row in rows for stage in row.stages if stage.chosen and stage.share == _strongest(row)
    ]
    where = f", and have their largest effect {chosen[0]} ({_span([_strongest(row) for row in rows], percent=True)})"
    plural = f"{len(rows)} heads that no class is of" if len(rows) > 1 else "1 head that no class is of"
    names = listed([row.head for row in rows])
    return f"{plural} ({names}) look{'s' if len(rows) == 1 else ''} {look}{does}{where if chosen else ''}."


def _span(values: Sequence[float], percent: bool = False) -> str:
    low, high = min(values), max(values)
    one, other = ((f"{v:.0%}" if percent else f"{v:.2f}") for v in (low, high))
    return one if one == other else f"{one} to {other}"
