"""The sections of the page of a scoreboard. Each returns HTML, empty when it has nothing to show."""

from __future__ import annotations

from patchkit.report import _scoreboard_tables as tables
from patchkit.report._canvas import to_svg
from patchkit.report._edge_sections import tile_row
from patchkit.report._html import (
    count,
    definitions,
    duration,
    escape,
    figure,
    paragraph,
    rich,
    section,
    signed,
)
from patchkit.report._scoreboard_pictures import Picture
from patchkit.report._scoreboard_words import FAMILIES, answers, conventions, costs
from patchkit.report._study_sections import escape_lines, provenance
from patchkit.results.manifest import Manifest
from patchkit.results.scoreboard import Scoreboard
from patchkit.results.scoreboard_measures import leaders


def tiles(board: Scoreboard) -> str:
    """The numbers one looks for first."""
    shown = [("tile", count(len(board.cases)), "cases"), ("tile", count(len(board.methods)), "methods")]
    for what, measure in (("edges", "edge auroc"), ("nodes", "node auroc")):
        best = leaders(board, [measure], costs(board))
        if best is not None:
            shown.insert(0, ("tile", signed(best.mean, 3), f"highest AUROC of {what}, {best.best}"))
    return tile_row(shown)


def findings(board: Scoreboard) -> str:
    """What was asked, and the study's own sentences."""
    items = "".join(f"<li>{rich(said)}</li>" for said in board.findings)
    asked = paragraph(board.question, "note") if board.question else ""
    inside = asked + (f"<ul>{items}</ul>" if items else "")
    return section("findings", "What was found", "Findings", inside) if inside else ""


def which(board: Scoreboard) -> str:
    """Which method for which question: the study's words, then who leads by each measure."""
    listed = definitions((question, rich(said)) for question, said in (board.best.items() or answers(board)))
    table = tables.leading(board)
    inside = listed + (table.html() if table is not None else "")
    if not inside:
        return ""
    ask = paragraph("For one model and a budget: `patchkit recommend --model M`.", "note")
    return section("which", "Which method for which question?", "Which method", inside, ask)


def means(board: Scoreboard) -> str:
    """All families open, each family folded away; then what each method is."""
    whole = tables.means(board, "all")
    if whole is None:
        return ""
    parts = [whole.html()]
    for family in board.families:
        table = tables.means(board, family)
        if table is not None:
            parts.append(_folded(f"{family} cases alone", table.html()))
    said = definitions((method, rich(what)) for method, what in board.methods.items())
    parts.append(_folded("What each method is", said))
    return section("methods", "Every method in numbers", "Table", *parts)


def picture(drawn: Picture) -> str:
    """One picture in a section of its own."""
    svg = to_svg(drawn.draw(), drawn.alt, drawn.name)
    return section(drawn.name, drawn.title, drawn.short, figure(svg, drawn.caption, wide=True))


def missed(board: Scoreboard) -> str:
    """What is missed by kind of failure, and why."""
    shown = {what: table for what in tables.WHATS if (table := tables.missed(board, what)) is not None}
    if not shown:
        return ""
    why = definitions((kind, rich(said)) for kind, said in board.kinds.items())
    first, *others = shown.items()
    parts = [first[1].html(), *(_folded(f"The same of {what}", table.html()) for what, table in others)]
    found = tables.recovery(board)
    if found is not None:
        parts.append(_folded("What AtP misses and AtP* finds", found.html()))
    return section("missed", "What is missed, and why", "Missed", why, *parts)


def cases(board: Scoreboard) -> str:
    """What is in every case."""
    parts = []
    for family in board.families:
        table = tables.cases(board, family)
        if table is None:
            continue
        held = [case for case in board.cases if case.family == family]
        rules = dict.fromkeys(case.truth_rule for case in held if case.truth_rule)
        title = f"{count(len(held))} cases, {FAMILIES[family]}"
        parts.append(_folded(title, "".join(paragraph(rule, "note") for rule in rules) + table.html()))
    return section("cases", "The cases", "Cases", *parts) if parts else ""


def notes(board: Scoreboard) -> str:
    """What the study noted of single cells, those of many cases once."""
    found: dict[tuple[str, str], list[str]] = {}
    for case in board.cases:
        for row in case.methods:
            if row.note:
                found.setdefault((row.method, row.note), []).append(case.name)
    entries = (
        (method, f"{rich(note)} <small>({count(len(names))} case{'s' if len(names) > 1 else ''})</small>")
        for (method, note), names in found.items()
    )
    return section("notes", "Notes", "Notes", definitions(entries)) if found else ""


def reading(board: Scoreboard) -> str:
    """How to read the numbers."""
    entries = [*conventions(board), *board.parameters.items()]
    inside = definitions((term, escape(said)) for term, said in entries)
    return section("reading", "How to read the numbers", "Reading", inside)


def again(board: Scoreboard, manifest: Manifest | None, place: str) -> str:
    """The command that makes this again, when it was made and with what."""
    commands = [board.command] + ([f"patchkit rerun {place}"] if manifest is not None else [])
    shown = [f'<pre tabindex="0" aria-label="command">{escape_lines(command)}</pre>' for command in commands]
    if len(shown) == 2:
        shown.insert(1, paragraph("or, from this directory's manifest:", "note"))
    entries = [
        ("date", escape(board.date)),
        ("versions", escape(", ".join(f"{name} {number}" for name, number in board.versions.items()))),
        ("study time", escape(duration(board.seconds))),
    ]
    entries += provenance(manifest, "pairs") if manifest is not None else []
    return section("again", "Make it again", "Again", *shown, definitions(entries))


def _folded(title: str, inside: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{inside}</details>"
