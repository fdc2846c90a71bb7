"""What a head does, in words made from its numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from patchkit.results.ioi import Attention, HeadBehaviour, HeadRow, Look, StageShare
from patchkit.studies._ioi_heads import Thresholds

PLACES = {
    "last": "END",
    "s2": "S2",
    "s1+1": "S1+1",
    "io": "IO",
    "s1": "S1",
    "clause": "behind the names",
    "names": "the two names",
    "rest of clause": "the rest of the names' clause",
    "token before": "the token before it",
}
# A head that looks at these has nothing to look at, as far as is known.
_IDLE = ("elsewhere", "first token")


def mass(attention: Attention, query: str, target: str) -> float:
    """Mean attention from one place to another; `names` are both."""
    row = attention[query]
    return row["io"] + row["s1"] if target == "names" else row[target]


def looks(behaviour: HeadBehaviour, even: Attention, thresholds: Thresholds) -> Look:
    """From where to where a head looks most beyond even attention, named places only and not its own.

    Behind the names, where either of them may be IO, only both together count; from S1+1, which is in their clause, the
    rest of the clause does not.
    """
    places = [("clause", "names")]
    for query, row in behaviour.attention.items():
        own = (query, "rest of clause") if query == "s1+1" else (query,)
        if query != "clause":
            places += [(query, target) for target in row if target not in (*_IDLE, *own)]
    query, target = max(places, key=lambda one: mass(behaviour.attention, *one) - mass(even, *one))
    found, usual = mass(behaviour.attention, query, target), mass(even, query, target)
    clear = found >= max(thresholds.attends, thresholds.lift * usual)
    return Look(query=query, target=target, mass=found, clear=clear)


def unnamed(behaviour: HeadBehaviour, even: Attention, thresholds: Thresholds) -> str:
    """What a head does that no class is of."""
    look = looks(behaviour, even, thresholds)
    where = PLACES[look.query], PLACES[look.target]
    said = [f"looks from {where[0]} at {where[1]} ({look.mass:.2f})"]
    if not look.clear:
        usual = mass(even, look.query, look.target)
        at = f"{look.mass:.2f}, where even attention is {usual:.2f}"
        said = [f"spreads its attention (most from {where[0]} to {where[1]}, {at})"]
    for score, words, of in (
        (behaviour.writes_io, "writes IO at END", "prompts"),
        (behaviour.writes_s, "writes S at END", "prompts"),
        (behaviour.copying, "would copy a name", "names"),
        (behaviour.negative_copying, "would push a name down", "names"),
    ):
        if score >= thresholds.copies:
            said.append(f"{words} ({percent(score)} of {of})")
    return "; ".join(said)


def together(rows: Sequence[HeadRow], even: Attention, thresholds: Thresholds) -> list[str]:
    """What the circuit's unnamed heads do, a sentence for those that do the same, from the logits backwards."""
    groups: dict[tuple[str, ...], list[HeadRow]] = {}
    for row in rows:
        if row.in_circuit and not row.classes:
            groups.setdefault(_signature(row), []).append(row)
    order = list(dict.fromkeys(stage.stage for row in rows for stage in row.stages))
    ordered = sorted(
        groups.values(),
        key=lambda group: (
            order.index(strongest(group[0]).stage),
            -max(abs(strongest(row).share) for row in group),
        ),
    )
    return [_sentence(group, even, thresholds) for group in ordered]


def strongest(row: HeadRow) -> StageShare:
    """The stage that kept a head of the circuit for the largest effect."""
    return max((stage for stage in row.stages if stage.chosen), key=lambda stage: abs(stage.share))


def _signature(row: HeadRow) -> tuple[str, str, str, str]:
    most = strongest(row)
    return row.looks.query, row.looks.target, most.stage, most.corruption


def _sentence(rows: Sequence[HeadRow], even: Attention, thresholds: Thresholds) -> str:
    query, target, stage, corruption = _signature(rows[0])
    shares = between([strongest(row).share for row in rows], signed)
    said = f"Heads without a class that act {stage}: {listed([row.head for row in rows])} ({shares}, {corruption})"
    masses = [row.looks.mass for row in rows]
    usual = f"even attention {mass(even, query, target):.2f}"
    said += f"; attention from {PLACES[query]} to {PLACES[target]} {between(masses, two_digits)} ({usual})"
    io = [row.behaviour.writes_io for row in rows]
    if query == "last" and min(io) >= thresholds.copies:
        said += f"; IO is what they write at END in {between(io, percent)} of prompts"
    return f"{said}."


def listed(names: Sequence[str], shown: int = 8) -> str:
    """Names in a sentence, at most so many."""
    if len(names) > shown:
        return f"{', '.join(names[:shown])} and {len(names) - shown} more"
    return ", ".join(names) or "none"


def between(values: Sequence[float], show: Callable[[float], str]) -> str:
    """The range of some numbers; one number where they round to one."""
    low, high = show(min(values)), show(max(values))
    return low if low == high else f"{low} to {high}"


def two_digits(value: float) -> str:
    """A number with two decimals and a real minus sign."""
    return f"{value:.2f}".replace("-", "\N{MINUS SIGN}")


def percent(value: float) -> str:
    """A fraction as per cent, its unit on the same line."""
    return _unit(f"{100 * value:.0f}")


def signed(value: float) -> str:
    """A share with its sign, as per cent; no sign on what rounds to nothing."""
    return _unit(f"{100 * value:+.0f}")


def _unit(shown: str) -> str:
    shown = "0" if shown.lstrip("+-") == "0" else shown.replace("-", "\N{MINUS SIGN}")
    return f"{shown}\N{NO-BREAK SPACE}%"
