"""The tables of a scoreboard, for its page and for the repository's: means, what is missed, who leads, the cases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from patchkit.report._grid import Entry, Grid, name
from patchkit.report._html import ABSENT, count, signed
from patchkit.report._scoreboard_words import ASKED, FAMILIES, costs, counted, led, listed
from patchkit.results.scoreboard import Case, Interval, Mean, Scoreboard
from patchkit.results.scoreboard_measures import MEASURES

What = Literal["nodes", "inputs", "edges"]
WHATS: tuple[What, ...] = ("nodes", "inputs", "edges")

_WEAK = 0.55
# Measures of the columns, under their groups. Precision is of what a method itself scores.
_GROUPS = (
    ("forwards", ("cost",)),
    ("AUROC", ("node auroc", "input auroc", "edge auroc")),
    ("AUROC of one pair", ("single node auroc", "single input auroc", "single edge auroc")),
    ("", ("precision",)),
    ("circuit at the true size", ("faithfulness", "overlap")),
    ("all sizes", ("cpr", "cmd")),
)


def of_kind(board: Scoreboard, edges: bool) -> list[str]:
    """The methods that score edges, or those that score nodes, in the board's order."""
    return [method for method in board.methods if board.of_edges(method) == edges]


def means(board: Scoreboard, family: str) -> Grid | None:
    """Method by measure, with intervals; None where a family has no means."""
    rows = [_means_row(board, method, family) for edges in (False, True) for method in of_kind(board, edges)]
    held = [row for row in rows if any(entry.text != ABSENT for entry in row[1:])]
    if not held:
        return None
    columns = ["method"] + [_title(measure) for _, measures in _GROUPS for measure in measures]
    groups = [("", 1), *((title, len(measures)) for title, measures in _GROUPS)]
    cases = sum(case.family == family or family == "all" for case in board.cases)
    told = (
        f"{FAMILIES[family].capitalize()}; {counted(cases, 'case')}. Under each mean its 95 % interval over programs or "
        "tasks; bold: the best of a column. Methods that score nodes come first, then those that score edges."
    )
    return Grid(told, columns, _bolded(board, held, family), groups)


def _title(measure: str) -> str:
    return measure if measure == "precision" else MEASURES[measure].title


def _means_row(board: Scoreboard, method: str, family: str) -> list[Entry]:
    kind = "edges" if board.of_edges(method) else "nodes"
    cells = [name(method, kind)]
    for _, measures in _GROUPS:
        for measure in measures:
            found = board.mean_of(method, _asked(board, method, measure), family)
            cells.append(_mean_entry(found, measure))
    return cells


def _asked(board: Scoreboard, method: str, measure: str) -> str:
    own = "edge" if board.of_edges(method) else "node"
    return f"{own} precision" if measure == "precision" else measure


def _mean_entry(found: Mean | None, measure: str) -> Entry:
    if found is None:
        return Entry(ABSENT)
    if measure == "cost":
        return Entry(f"{found.mean:,.1f}")
    small = _span(found.interval)
    # Weak, since the interval under it is small and grey.
    heat = _WEAK * (2 * found.mean - 1) if measure.endswith("auroc") else None
    return Entry(signed(found.mean, 3), small, heat)


def _span(interval: Interval | None) -> str:
    """An interval that stays on one line."""
    return "" if interval is None else "\u00a0to\u00a0".join(signed(end, 2) for end in interval)


def _bolded(board: Scoreboard, rows: Sequence[list[Entry]], family: str) -> list[list[Entry]]:
    """The best of each column in bold: of faithfulness what is nearest to 1, of cost nothing."""
    measures = [measure for _, measures in _GROUPS for measure in measures]
    for place, measure in enumerate(measures, 1):
        if measure == "cost":
            continue
        known = {
            row[0].text: found.mean
            for row in rows
            if (found := board.mean_of(row[0].text, _asked(board, row[0].text, measure), family)) is not None
        }
        distance = {method: _distance(value, measure) for method, value in known.items()}
        best = min(distance.values(), default=None)
        for row in rows:
            if best is not None and row[0].text in distance and distance[row[0].text] <= best + 1e-9:
                row[place] = Entry(row[place].text, row[place].small, row[place].heat, bold=True)
    return list(rows)


def _distance(value: float, measure: str) -> float:
    if measure == "faithfulness":
        return abs(1 - value)
    return -value if measure == "precision" or MEASURES[measure].higher else value


def leading(board: Scoreboard) -> Grid | None:
    """Question by who is best at it, who is as good for all one can tell, and the cheapest of these."""
    known, rows = costs(board), []
    for question, best in led(board).items():
        others = [method for method in best.like if method != best.best]
        rows.append(
            [
                name(question, MEASURES[ASKED[question]].said),
                name(best.best),
                Entry(signed(best.mean, 3), _span(best.interval)),
                name(listed(others) if others else ABSENT),
                name(best.cheapest),
                Entry(f"{known[best.cheapest]:,.1f}"),
                Entry(count(best.cases)),
            ]
        )
    columns = [
        "question",
        "best",
        "mean",
        "not told from it",
        "cheapest of these",
        "forwards a pair",
        "cases",
    ]
    told = (
        "All families weigh alike. Not told from it: the 95 % interval of the difference, case by case, holds 0. Methods "
        "that lack a family that others have are not compared."
    )
    return Grid(told, columns, rows) if rows else None


def missed(board: Scoreboard, what: What) -> Grid | None:
    """Method by kind of failure: of the true items of that kind how many are not among the top ones."""
    found = {method: board.missed(method, what) for method in board.methods}
    held = {method: kinds for method, kinds in found.items() if kinds}
    seen = {kind for kinds in held.values() for kind in kinds}
    kinds = [kind for kind in board.kinds if kind in seen]
    kinds += sorted(seen - {*kinds, ""}) + ([""] if "" in seen else [])
    if not held:
        return None
    rows = [
        [name(method), *(_missed_entry(each.get(kind)) for kind in kinds)] for method, each in held.items()
    ]
    told = f"{what.capitalize()} of the truth that a method misses, of how many; summed over all cases."
    return Grid(told, ["method", *(kind or "nothing planted" for kind in kinds)], rows)


def _missed_entry(found: tuple[int, int] | None) -> Entry:
    if found is None or not found[1]:
        return Entry(ABSENT)
    return Entry(f"{count(found[0])}/{count(found[1])}", heat=-found[0] / found[1])


def recovery(board: Scoreboard) -> Grid | None:
    """Case by kind: what is planted that AtP misses, and which of it AtP* finds."""
    rows = [
        [
            name(each.case, each.kind),
            name(", ".join(each.missed) or ABSENT),
            name(", ".join(each.recovered) or ABSENT),
            name(", ".join(each.left) or ABSENT, each.why),
        ]
        for each in board.recovery
    ]
    told = "Planted nodes and inputs that AtP misses, case by case: which of them AtP* finds, and why not the others."
    return Grid(told, ["case", "missed by AtP", "found by AtP*", "left"], rows) if rows else None


def cases(board: Scoreboard, family: str) -> Grid | None:
    """What is planted in each case of a family, how large it is, and how faithful its true circuit."""
    held = [case for case in board.cases if case.family == family]
    columns = [
        "case", "what is in it", "task", "layers x heads", "nodes", "true", "edges", "true", "pairs", "held out",
        "faithful",
    ]  # fmt: skip
    told = (
        f"{FAMILIES[family].capitalize()}. KV heads in brackets where heads share them; faithful: of the true circuit "
        "itself, on held-out pairs."
    )
    return Grid(told, columns, [_case_row(case) for case in held]) if held else None


def _case_row(case: Case) -> list[Entry]:
    shared = f" ({case.kv_heads})" if case.kv_heads != case.heads else ""
    silent = f"{len(case.silent)} silent" if case.silent else ""
    open_ones = f"{case.unlabelled_edges} unlabelled" if case.unlabelled_edges else ""
    return [
        name(case.name, case.architecture),
        name(case.shows),
        name(case.task.replace("`", "")),
        Entry(f"{case.layers} x {case.heads}{shared}"),
        Entry(count(case.n_nodes)),
        Entry(count(case.true_nodes), silent),
        Entry(count(case.n_edges), open_ones),
        Entry(count(case.true_edges)),
        Entry(count(case.pairs)),
        Entry(count(case.test_pairs)),
        Entry(signed(case.truth_faithfulness, 3)),
    ]
