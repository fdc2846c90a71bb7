"""Names for heads by what they do: rules with thresholds that a head meets or does not.

The classes are those of Wang et al. 2022. A head is called by one because it was measured to behave so in this model;
where no head does, the nearest one and what it lacks can be told.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from patchkit.errors import InputError
from patchkit.results.ioi import Attention, HeadBehaviour, Rule


@dataclass(frozen=True)
class Thresholds:
    """From where on a head is said to do something.

    Attributes:
        attends: mean attention mass on the prompts.
        lift: how many times the mass that even attention would give, besides.
        copies: share of names (or of prompts) that are among the top 5 tokens.
        repeats: mean attention on random tokens that come twice.
        effect: size of an effect, in units of clean - corrupt.
    """

    attends: float = 0.25
    lift: float = 2.0
    copies: float = 0.5
    repeats: float = 0.25
    effect: float = 0.02

    def __post_init__(self) -> None:
        for name in ("attends", "copies", "repeats", "effect"):
            if not 0 < getattr(self, name) <= 1:
                raise InputError(
                    f"IOI study: the threshold {name} must be above 0 and at most 1, found {getattr(self, name)}"
                )
        if self.lift < 1:
            raise InputError(f"IOI study: the threshold lift must be at least 1, found {self.lift}")

    @property
    def described(self) -> dict[str, str]:
        """Label and value, for a reader."""
        return {
            "attends from": f"{self.attends:g} of the attention, and {self.lift:g} times what even attention gives",
            "copies, or writes a name, from": f"{self.copies:g} of the names or prompts",
            "attends on random tokens from": f"{self.repeats:g} of the attention",
            "has an effect from": f"{self.effect:g} of (clean - corrupt)",
        }


@dataclass(frozen=True)
class Known:
    """What the rules look at, of one head.

    Attributes:
        even: the attention of a head that looks at all tokens alike.
        inhibits: largest |share| of its effect along paths to the queries of a group with a name mover in it; None where
            no stage asked for that.
        takes_over: what its direct effect helps more, in units of clean - corrupt, when the movers are knocked out; None
            for a mover, and for a head that comes before all of them: nothing but the final norm can have changed that.
    """

    behaviour: HeadBehaviour
    even: Attention
    inhibits: float | None = None
    takes_over: float | None = None

    def attention(self, query: str, target: str) -> float:
        return self.behaviour.attention[query][target]


@dataclass(frozen=True)
class Need:
    """A number of a head that must reach a threshold.

    Attributes:
        threshold: its name.
        even: what even attention would give, which must be passed by far; None for what is no attention.
        absent: why no head may have the number.
    """

    label: str
    threshold: str
    value: Callable[[Known], float | None]
    even: Callable[[Known], float] | None = None
    absent: str = ""

    def least(self, known: Known, thresholds: Thresholds) -> float:
        """What the number must reach."""
        least = getattr(thresholds, self.threshold)
        return least if self.even is None else max(least, thresholds.lift * self.even(known))

    def closeness(self, known: Known, thresholds: Thresholds) -> float:
        """value / least: met from 1 on; 0 for what was not measured."""
        value = self.value(known)
        return 0.0 if value is None else value / self.least(known, thresholds)

    def said(self, known: Known) -> str:
        value = self.value(known)
        return f"{self.label} {'not measured' if value is None else f'{value:.2f}'}"


@dataclass(frozen=True)
class HeadClass:
    """A class: its name, and what a head needs to be called so, all of it."""

    name: str
    needs: tuple[Need, ...]

    def closeness(self, known: Known, thresholds: Thresholds) -> float:
        """How near a head comes, by what it lacks most; met from 1 on."""
        return min(need.closeness(known, thresholds) for need in self.needs)

    def criterion(self, known: Known, thresholds: Thresholds) -> str:
        """The rule in words; what even attention gives is the same for every head."""
        return ", ".join(f"{need.label} at least {need.least(known, thresholds):.2g}" for need in self.needs)

    def said(self, known: Known) -> str:
        """The numbers that the rule looks at."""
        return ", ".join(need.said(known) for need in self.needs)


def _attends(query: str, target: str, label: str) -> Need:
    return Need(
        f"attention {label}",
        "attends",
        lambda known: known.attention(query, target),
        lambda known: known.even[query][target],
    )


NAME_MOVER = HeadClass(
    "name mover",
    (
        _attends("last", "io", "END → IO"),
        Need("copying score", "copies", lambda known: known.behaviour.copying),
    ),
)
CLASSES = (
    NAME_MOVER,
    HeadClass(
        "negative name mover",
        (
            _attends("last", "io", "END → IO"),
            Need("copying score of the negated output", "copies", lambda known: known.behaviour.negative_copying),
        ),
    ),
    HeadClass(
        "S-inhibition",
        (
            _attends("last", "s2", "END → S2"),
            Need(
                "effect through the queries of name movers",
                "effect",
                lambda known: known.inhibits,
                absent="there are no name movers whose queries heads could act on",
            ),
        ),
    ),
    HeadClass(
        "duplicate token",
        (
            _attends("s2", "s1", "S2 → S1"),
            Need("duplicate score on random tokens", "repeats", lambda known: known.behaviour.duplicate),
        ),
    ),
    HeadClass(
        "induction",
        (
            _attends("s2", "s1+1", "S2 → S1+1"),
            Need("induction score on random tokens", "repeats", lambda known: known.behaviour.induction),
        ),
    ),
    HeadClass(
        "previous token",
        (
            _attends("s1+1", "s1", "S1+1 → S1"),
            Need("previous-token score on random tokens", "repeats", lambda known: known.behaviour.previous),
        ),
    ),
    HeadClass(
        "backup",
        (
            Need(
                "rise of its direct effect without the movers before it",
                "effect",
                lambda known: known.takes_over,
                absent="no head comes after a mover that was knocked out",
            ),
        ),
    ),
)  # fmt: skip


def classes_of(known: Known, thresholds: Thresholds) -> list[HeadClass]:
    """Every class whose needs a head meets."""
    return [one for one in CLASSES if one.closeness(known, thresholds) >= 1]


def rules(heads: Mapping[str, Known], thresholds: Thresholds) -> list[Rule]:
    """Every class with its rule in words, the heads that meet it and, where none does, the one that comes nearest."""
    found = []
    for one in CLASSES:
        near = nearest(one, heads, thresholds)
        absent = [
            need.absent for need in one.needs if all(need.value(known) is None for known in heads.values())
        ]
        said = f"nearest {near}: {one.said(heads[near])}" if near is not None else None
        found.append(
            Rule(
                name=one.name,
                criterion=one.criterion(next(iter(heads.values())), thresholds),
                heads=members(one, heads, thresholds),
                nearest=absent[0] if absent else said,
            )
        )
    return found


def members(one: HeadClass, heads: Mapping[str, Known], thresholds: Thresholds) -> list[str]:
    """The heads that a class is of."""
    return [name for name, known in heads.items() if one.closeness(known, thresholds) >= 1]


def nearest(one: HeadClass, heads: Mapping[str, Known], thresholds: Thresholds) -> str | None:
    """The head that comes nearest to a class that no head meets; None where one does, or nothing was measured."""
    by_closeness = {name: one.closeness(known, thresholds) for name, known in heads.items()}
    best = max(by_closeness, key=lambda name: by_closeness[name], default=None)
    return None if best is None or not 0 < by_closeness[best] < 1 else best


def evidence(classes: Iterable[HeadClass], known: Known) -> str:
    """The numbers for which a head is called by its classes."""
    return "; ".join(one.said(known) for one in classes)
