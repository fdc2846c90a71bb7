"""How much the IOI study measures."""

from __future__ import annotations

from dataclasses import dataclass, field

from patchkit.errors import InputError
from patchkit.studies._ioi_heads import Thresholds
from patchkit.tasks.ioi import CORRUPTIONS

_AT_LEAST = {
    "pairs": 2,
    "most": 1,
    "groups": 0,
    "sequences": 1,
    "evaluated": 2,
    "completeness": 1,
    "removals": 0,
    "random": 1,
    "templates": 1,
    "per_template": 2,
}


@dataclass(frozen=True)
class IoiOptions:
    """How much is measured.

    Attributes:
        pairs: prompt pairs that paths are patched on, under each corruption, and heads are watched on.
        corruptions: how the corrupt prompts of path patching differ.
        most: heads that a stage of path patching keeps under one corruption.
        share: least effect of a head that is kept, in units of (clean - corrupt).
        groups: how many groups of heads have their inputs traced.
        sequences, tokens: how many random sequences that come twice, and how long.
        evaluated: other pairs, on which the circuit is evaluated.
        completeness, removals, random, candidates: see `EvaluateOptions`.
        templates, per_template: templates with means of their own, and pairs of each.
        thresholds: from where on a head is called something.
        seed: of everything that is drawn; the pairs of the evaluation have the next.
    """

    pairs: int = 64
    corruptions: tuple[str, ...] = ("s2-flip", "abc")
    most: int = 10
    share: float = 0.02
    groups: int = 3
    sequences: int = 128
    tokens: int = 20
    evaluated: int = 64
    completeness: int = 10
    removals: int = 4
    random: int = 100
    candidates: int = 16
    templates: int = 4
    per_template: int = 32
    thresholds: Thresholds = field(default_factory=Thresholds)
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in _AT_LEAST.items():
            if getattr(self, name) < least:
                raise InputError(f"IOI study: {name} must be at least {least}, found {getattr(self, name)}")
        if not 0 < self.share <= 1:
            raise InputError(f"IOI study: share must be above 0 and at most 1, found {self.share}")
        if not self.corruptions:
            raise InputError(
                f"IOI study: expected at least one corruption of {', '.join(CORRUPTIONS)}, found none"
            )
        for name in self.corruptions:
            if name not in CORRUPTIONS:
                raise InputError(f"IOI study: corruption {name!r} is not one of {', '.join(CORRUPTIONS)}")
        if len(set(self.corruptions)) < len(self.corruptions):
            raise InputError(
                f"IOI study: a corruption comes twice in {', '.join(self.corruptions)}; name each once"
            )

    @property
    def described(self) -> dict[str, str]:
        """Label and value, for a reader."""
        return {
            "pairs for paths and heads": f"{self.pairs} under each of {', '.join(self.corruptions)}",
            "a stage keeps": f"at most {self.most} heads with an effect of at least {self.share:.0%} of the behaviour",
            "groups whose inputs are traced": str(self.groups),
            "random tokens that come twice": f"{self.sequences} sequences of {self.tokens}",
            "pairs for the circuit": str(self.evaluated),
            "pairs of each template": f"{self.per_template}, {self.templates} templates",
            **self.thresholds.described,
        }
