"""What the page and the repository's page of a scoreboard say in words: who is best at what, and how numbers are read."""

from __future__ import annotations

from collections.abc import Sequence

from patchkit.report._edge_words import put_in
from patchkit.report._html import count, signed
from patchkit.results.scoreboard import Scoreboard
from patchkit.results.scoreboard_measures import MEASURES, Leaders, leaders

TITLE = "Which method finds a circuit that is known?"
FAMILIES = {
    "handmade": "handmade: written into the weights",
    "siit": "siit: forced by training",
    "natural": "natural: what exhaustive exact patching finds",
    "all": "all families, each weighed alike",
}
#: What is asked of a method, and the measure that answers it.
ASKED = {
    "Which heads and MLPs matter?": "node auroc",
    "Which queries, keys and values matter?": "input auroc",
    "Which edges matter?": "edge auroc",
    "Which heads and MLPs matter in one pair of prompts?": "single node auroc",
    "Which queries, keys and values matter in one pair?": "single input auroc",
    "Which edges matter in one pair?": "single edge auroc",
    "Which circuit, of a size that is known, behaves as the model does?": "faithfulness gap",
    "Which circuits do at every size?": "cmd",
}


def costs(board: Scoreboard) -> dict[str, float]:
    """Method -> forwards a pair, the mean of the families' means; of those that were run at all."""
    found = {method: board.mean_of(method, "cost") for method in board.methods}
    return {method: mean.mean for method, mean in found.items() if mean is not None}


def led(board: Scoreboard) -> dict[str, Leaders]:
    """Question -> who is best by its measure; without those that nothing was measured for."""
    known = costs(board)
    found = {question: leaders(board, [measure], known) for question, measure in ASKED.items()}
    return {question: each for question, each in found.items() if each is not None}


def headline(board: Scoreboard) -> str:
    """Who ranks nodes and edges best, and what is as good for less."""
    known, parts = costs(board), []
    for what, measure in (("nodes", "node auroc"), ("edges", "edge auroc")):
        best = leaders(board, [measure], known)
        if best is not None:
            said = f"{what} are ranked best by {best.best} (AUROC {signed(best.mean, 3)}, {forwards(known[best.best])})"
            if best.cheapest != best.best:
                said += (
                    f", no worse for all one can tell by {best.cheapest} ({forwards(known[best.cheapest])})"
                )
            parts.append(said)
    over = f"Over {counted(len(board.cases), 'case')} whose circuit is known"
    return f"{over}, {'; '.join(parts)}." if parts else f"{over}, no method ranked anything."


def forwards(cost: float) -> str:
    """A cost with its unit."""
    return f"{cost:,.1f} forwards a pair"


def counted(number: int, word: str) -> str:
    return f"{count(number)} {word}{'' if number == 1 else 's'}"


def listed(words: Sequence[str]) -> str:
    """`a, b and c`."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}" if words else "none"


def conventions(board: Scoreboard) -> list[tuple[str, str]]:
    """What is counted, and how: term and explanation."""
    kept = board.convention
    base, source = ("clean", "corrupt") if kept.direction == "noise" else ("corrupt", "clean")
    return [
        ("what is true", "the nodes and edges that the behaviour was built, trained or found to run through; see the "
         "cases for the rule of each."),
        ("AUROC", "how often a true item's |score| is above another's; ties count half, so that 0.5 knows nothing. Signs "
         "do not count. An edge of a node method has its weaker end's score."),
        ("inputs", "queries, keys and values of each head, by KV head; empty for methods that do not rank them."),
        ("one pair", "the same AUROC of scores of a single pair of prompts, the mean over pairs."),
        ("precision", "share of true items among the top ones, as many as the truth has: of nodes for node methods, of "
         "edges for edge methods. What has no score, or one that is rounding, is not found."),
        ("silent nodes", "true nodes and edges that change nothing when they alone are patched, since others do the same "
         "work or since they wait for another to fail. They count as true: who patches one thing at a time misses them."),
        ("unlabelled edges", "edges of which nothing is known; counted neither way."),
        ("faithfulness", "of the method's circuit of as many nodes or edges as the truth has, on pairs it was not found "
         "with: (circuit - everything cut) / (model - everything cut)."),
        ("overlap", "Jaccard index of that circuit with the true one."),
        ("CPR, CMD", f"area under faithfulness against size, and area between it and 1, at {len(board.fractions)} "
         "fractions of all edges (MIB)."),
        ("cost", "of the scores alone, in forwards a pair; a backward counts 1."),
        ("means", "of each family over its cases; of all families over the families' means, so that many handmade cases "
         "do not outweigh few others."),
        ("intervals", "95 % bootstrap over programs or tasks within each family: shapes of one program are drawn "
         "together. Where it has only one, there is none. Two methods are told apart where the interval of their "
         "difference, case by case, leaves out 0."),
        ("runs", f"the {base} prompt is run, {kept.ablation}: what is cut or patched carries "
         f"{put_in(kept.ablation, source)}. Metric {kept.metric}, positions {kept.positions}."),
    ]  # fmt: skip


def answers(board: Scoreboard) -> list[tuple[str, str]]:
    """Question -> who is best, who cannot be told from it, and which of these is the cheapest."""
    known, told = costs(board), []
    for question, best in led(board).items():
        said = f"{best.best}: {MEASURES[ASKED[question]].said} {signed(best.mean, 3)}"
        if best.interval is not None:
            said += f" [{signed(best.interval[0], 3)}, {signed(best.interval[1], 3)}]"
        said += f" over {counted(best.cases, 'case')}, at {forwards(known[best.best])}."
        others = [method for method in best.like if method != best.best]
        if others:
            said += f" These cases do not tell {listed(others)} from it."
        if best.cheapest != best.best:
            said += f" The cheapest of them is {best.cheapest}, at {forwards(known[best.cheapest])}."
        told.append((question, said))
    return told
