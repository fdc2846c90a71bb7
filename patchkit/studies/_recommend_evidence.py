"""What the scoreboard has measured that bears on a user's question: which numbers, and what each method misses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from patchkit.errors import InputError
from patchkit.results.recommendation import Choice, KindMissed, Question, Unseen
from patchkit.results.scoreboard import Scoreboard
from patchkit.results.scoreboard_measures import MEASURES
from patchkit.zoo.programs.failures import BACKUP, OPPOSED, REDUNDANCY

What = Literal["nodes", "inputs", "edges"]
_INPUTS = frozenset({"q", "k", "v", "q_proj", "k_proj", "v_proj"})
_OUTPUTS = frozenset({"z", "attn_out", "mlp_out"})
_ADVICE = {
    BACKUP: "knock out what was found and look again: `patchkit evaluate --circuit DIR --knockout NODES`",
    REDUNDANCY: "what does the same work as others shows when sets are patched: `patchkit mask`, or "
    "`patchkit evaluate --completeness 10`",
    OPPOSED: "rank by |score| (`patchkit evaluate --absolute`), and look at signs",
}
_OTHERWISE = (
    "patch exactly where you suspect it (`patchkit patch --nodes NAMES`), and test the circuit: "
    "`patchkit evaluate --completeness 10`"
)
#: A kind is unseen where every method misses at least this share of it.
UNSEEN = 0.5


@dataclass(frozen=True)
class Asked:
    """A question in the scoreboard's terms.

    Attributes:
        whats: what is ranked; of several the mean is taken.
        measures: names in MEASURES.
        notes: where the scoreboard did not measure quite what is asked.
    """

    whats: tuple[What, ...]
    measures: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def said(self) -> str:
        return " and ".join(MEASURES[measure].said for measure in self.measures)

    @property
    def higher(self) -> bool:
        return MEASURES[self.measures[0]].higher


def asked_of(question: Question, kinds: Sequence[str] | None, single: bool) -> Asked:
    """The measures that answer a question about nodes of some kinds, or about edges.

    Args:
        kinds: of nodes; None for edges.
        single: whether there is one pair of prompts alone.
    """
    whats = ("edges",) if kinds is None else _whats(kinds)
    notes = []
    strange = sorted(set(kinds or ()) - _INPUTS - _OUTPUTS)
    if strange:
        notes.append(
            f"No case of the scoreboard ranks nodes of kind {', '.join(strange)}: the evidence is of heads and MLPs."
        )
    match question:
        case "rank":
            begun = "single " if single else ""
            measures = tuple(f"{begun}{what[:-1]} auroc" for what in whats)
        case "top":
            measures = tuple(f"{what[:-1]} precision" for what in whats)
        case "circuit":
            measures = ("faithfulness gap",)
        case "sizes":
            measures = ("cmd",)
    if single and question != "rank":
        notes.append(
            "Of one pair alone only ranks were measured (--question rank): the evidence is of many pairs, and too good."
        )
    return Asked(whats, measures, tuple(notes))


def _whats(kinds: Sequence[str]) -> tuple[What, ...]:
    inputs, others = _INPUTS & set(kinds), set(kinds) - _INPUTS
    return (*(("nodes",) if others else ()), *(("inputs",) if inputs else ()))


def missed_by(board: Scoreboard, method: str, whats: Sequence[What]) -> list[KindMissed]:
    """What a method misses of each kind, over all cases; what nothing was planted at comes last."""
    found: dict[str, tuple[int, int]] = {}
    for what in whats:
        for kind, (missed, total) in board.missed(method, what).items():
            before = found.get(kind, (0, 0))
            found[kind] = (before[0] + missed, before[1] + total)
    ordered = [kind for kind in board.kinds if kind in found]
    ordered += [kind for kind in found if kind not in ordered and kind] + [""] * ("" in found)
    return [KindMissed(kind=kind, missed=found[kind][0], total=found[kind][1]) for kind in ordered]


def unseen_by(board: Scoreboard, choices: Sequence[Choice]) -> list[Unseen]:
    """Kinds that even the best of the choices misses more often than not, and what to do about them."""
    found: dict[str, tuple[float, str, KindMissed]] = {}
    for choice in choices:
        for each in choice.missed:
            if each.kind and each.total:
                share = each.missed / each.total
                if each.kind not in found or share < found[each.kind][0]:
                    found[each.kind] = (share, choice.method, each)
    return [
        Unseen(
            kind=kind,
            why=board.kinds.get(kind, ""),
            by=method,
            missed=each.missed,
            total=each.total,
            advice=_ADVICE.get(kind, _OTHERWISE),
        )
        for kind, (share, method, each) in found.items()
        if share >= UNSEEN
    ]


def check_measured(board: Scoreboard, asked: Asked, scores: Mapping[str, object]) -> None:
    """InputError where no method has what the question asks for."""
    if not scores:
        raise InputError(
            f"the scoreboard of {board.date} has no {asked.said} of any method that could answer this; ask another "
            "--question, or give another --scoreboard"
        )
