"""The tables of the page of the IOI study: heads, classes, protocols, and what is published. Each returns a section."""

from __future__ import annotations

from collections.abc import Sequence

from patchkit.report._html import ABSENT, count, escape, names, paragraph, percent, section, signed
from patchkit.report._tables import Cell, Table, head_cell, heat_cell, number_cell, text_cell
from patchkit.results.ioi import HeadRow, IoiStudy


def classes(study: IoiStudy) -> str:
    """The rules, and who meets them."""
    rows = [
        [
            head_cell(rule.name),
            text_cell(rule.criterion),
            Cell(names(rule.heads, 12)),
            text_cell(rule.nearest or ""),
        ]
        for rule in study.rules
    ]
    told = "A head is called by a class if it meets every condition, wherever it is in the model."
    return section(
        "classes",
        "Which classes are there?",
        "Classes",
        Table(told, ["class", "conditions", "heads", "where there is none"], rows).render(),
    )


def heads(study: IoiStudy) -> str:
    """Every head of the circuit, and those outside that a class is of; the others, and all numbers, fold away."""
    shown = [row for row in study.heads if row.in_circuit or row.classes]
    rest = [row for row in study.heads if not (row.in_circuit or row.classes)]
    told = (
        "Heads of the circuit, by layer; tinted rows are outside it and have a class. Acts: the largest effect along the "
        "paths of one stage, per cent of the behaviour. Takes over: what its direct effect helps more without the movers."
    )
    parts = [
        _heads_table(told, shown) if shown else paragraph("No head is in the circuit, and none has a class.")
    ]
    if rest:
        other = _heads_table("Heads outside the circuit that no class is of.", rest)
        parts.append(f"<details><summary>The other {count(len(rest))} heads</summary>{other}</details>")
    parts.append(f"<details><summary>All numbers of all heads</summary>{_numbers_table(study)}</details>")
    return section("heads", "What does each head do?", "Heads", *parts)


def _heads_table(told: str, rows: Sequence[HeadRow]) -> str:
    cells = []
    for row in rows:
        most = max(row.stages, key=lambda one: abs(one.share), default=None)
        named = f"<b>{escape(', '.join(row.classes))}</b>: " if row.classes else ""
        cells.append(
            [
                head_cell(row.head),
                Cell(f"{named}{escape(row.evidence)}"),
                number_cell(percent(most.share, sign=True) if most is not None else ABSENT, "key"),
                text_cell(f"{most.stage}, {most.corruption}" if most is not None else ""),
                number_cell(percent(row.takes_over, sign=True)),
            ]
        )
    inside = any(row.in_circuit for row in rows)
    marks = ["mine" if inside and not row.in_circuit else "" for row in rows]
    columns = ["head", "class, or what it does", "acts, %", "where", "takes over, %"]
    return Table(told, columns, cells, row_marks=marks).render()


_LOOKS = (
    ("IO", "last", "io"),
    ("S1", "last", "s1"),
    ("S2", "last", "s2"),
    ("S1", "s2", "s1"),
    ("S1+1", "s2", "s1+1"),
    ("clause", "s2", "rest of clause"),
    ("S1", "s1+1", "s1"),
    ("IO", "clause", "io"),
    ("S1", "clause", "s1"),
)
_SCORES = ("copying", "negative_copying", "writes_io", "writes_s", "previous", "duplicate", "induction")


def _numbers_table(study: IoiStudy) -> str:
    cells = [
        [
            head_cell(row.head),
            *(heat_cell(row.behaviour.attention[query][target]) for _, query, target in _LOOKS),
            *(heat_cell(getattr(row.behaviour, field)) for field in _SCORES),
        ]
        for row in study.heads
    ]
    usual = [heat_cell(study.even[query][target]) for _, query, target in _LOOKS]
    total = [Cell("even attention", head=True), *usual, *[number_cell("")] * len(_SCORES)]
    columns = ["head", *(title for title, _, _ in _LOOKS), "copies", "pushes down", "writes IO", "writes S", "before",
               "same", "after"]  # fmt: skip
    groups = [
        ("", 1),
        ("from END", 3),
        ("from S2", 3),
        ("S1+1", 1),
        ("behind names", 2),
        ("names", 4),
        ("random", 3),
    ]
    told = (
        "Means over prompts, per cent: attention from place to place, scores of names, attention on random tokens. Even "
        "attention: all tokens get the same."
    )
    return Table(told, columns, cells, total, groups=groups).render()


def protocols(study: IoiStudy) -> str:
    """The circuit under other protocols."""
    if not study.protocols:
        return ""
    rows = [
        [
            head_cell(one.circuit, f"{count(one.n_edges)} edges, {one.patching} patching"),
            text_cell(one.corruption),
            text_cell(one.ablation if one.template is None else f"{one.ablation}, of the template"),
            text_cell(one.template if one.template is not None else "all"),
            number_cell(count(one.pairs)),
            number_cell(signed(one.clean_metric, 2)),
            number_cell(signed(one.circuit_metric, 2)),
            number_cell(signed(one.corrupt_metric, 2)),
            number_cell(percent(one.faithfulness), "key"),
            number_cell(
                ABSENT
                if one.interval is None
                else f"{percent(one.interval[0])} to {percent(one.interval[1])}"
            ),
        ]
        for one in study.protocols
    ]
    told = (
        "The same heads and MLPs. All edges: every edge among them; traced edges: between heads, and from heads to the "
        "logits, only those that a stage found. What is outside carries the other prompt's activations (resample), or "
        "the mean over the template's prompts at that token (mean-positional)."
    )
    columns = [
        "circuit", "corruption", "outside carries", "template", "pairs", "model", "circuit", "all replaced",
        "faithfulness, %", "95 % interval",
    ]  # fmt: skip
    return section(
        "protocols", "Does it hold under other protocols?", "Protocols", Table(told, columns, rows).render()
    )


def comparison(study: IoiStudy) -> str:
    """Published figures beside ours."""
    if not study.comparison:
        return ""
    rows = [[text_cell(theirs), text_cell(ours)] for theirs, ours in study.comparison.items()]
    table = Table("The published outcome for this model beside this run.", ["published", "this run"], rows)
    return section("comparison", "Beside the published result", "Published", table.render())
