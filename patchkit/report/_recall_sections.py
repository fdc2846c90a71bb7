"""The sections of the page of the attribution-recall study. Each returns HTML, empty when it has nothing to show."""

from __future__ import annotations

import math
from collections.abc import Sequence

from patchkit.report._canvas import to_svg
from patchkit.report._html import (
    ABSENT,
    count,
    definitions,
    duration,
    escape,
    figure,
    paragraph,
    rich,
    section,
)
from patchkit.report._recall_plots import method_names, setting_figure
from patchkit.report._study_sections import escape_lines, provenance
from patchkit.report._tables import Cell, Table, head_cell, number_cell
from patchkit.results.manifest import Manifest
from patchkit.results.recall import RecallSetting, RecallStudy

_SPOKEN = {
    "atp": "AtP",
    "atp-qk": "AtP with the QK fix",
    "atp-graddrop": "AtP with GradDrop",
    "atp-star": "AtP*",
}


def headline(study: RecallStudy) -> str:
    """What AtP and AtP* pay for each class of nodes, and where the plain one is the cheaper."""
    said = []
    for node_class, settings in _classes(study):
        means = _means(settings, method_names(study))
        known = [f"{_SPOKEN[name]} {means[name]:.2f}" for name in ("atp-star", "atp") if name in means]
        best = min(means, key=lambda name: means[name])
        others = "" if best in ("atp", "atp-star") else f" (least: {best} {means[best]:.2f})"
        said.append(f"{' and '.join(known)} on {node_class}{others}")
    return f"Forwards paid until the nodes that matter are verified, over the oracle's: {'; '.join(said)}."


def beaten(study: RecallStudy) -> str:
    """The sentence that says where AtP is cheaper than AtP*."""
    both = [s for s in study.settings if {"atp", "atp-star"} <= {method.name for method in s.methods}]
    if not both:
        return "AtP and AtP* were not run on the same setting, so nothing here compares them."
    wins = study.cheaper("atp", "atp-star")
    if not wins:
        return f"AtP is not cheaper than AtP* in any of {count(len(both))} settings."
    named = "; ".join(
        f"{setting.name} ({setting.aggregate('atp'):.2f} against {setting.aggregate('atp-star'):.2f})"
        for setting in wins
    )
    return f"AtP beats AtP* in {count(len(wins))} of {count(len(both))} settings: {named}."


def aggregates(study: RecallStudy) -> str:
    """A table a class of nodes: the aggregate of every method on every setting."""
    tables = [_aggregate_table(node_class, settings) for node_class, settings in _classes(study)]
    return section("aggregates", "What does each method cost?", "Costs", *tables) if tables else ""


def _aggregate_table(node_class: str, settings: Sequence[RecallSetting]) -> str:
    methods = list(dict.fromkeys(method.name for setting in settings for method in setting.methods))
    rows = []
    for setting in settings:
        found = {method.name: method for method in setting.methods}
        least = min(method.aggregate for method in setting.methods)
        of = f"{setting.evidence}, {count(setting.nodes)} nodes, {_pairs(setting)}"
        cells = [head_cell(f"{setting.model}, {setting.material}", of)]
        for name in methods:
            method = found.get(name)
            if method is None:
                cells.append(number_cell(ABSENT))
                continue
            remarks = [f"order {method.unprepared:.2f}"] if method.preparation else []
            remarks += [method.parameters] if method.parameters else []
            inside = f"{method.aggregate:.2f}" + "".join(
                f"<br><small>{escape(said)}</small>" for said in remarks
            )
            cells.append(Cell(inside, number=True, mark="key" if method.aggregate == least else ""))
        rows.append(cells)
    means = _means(settings, methods)
    total: list[Cell] = []
    if len(settings) > 1:
        total = [Cell("geometric mean", head=True)]
        total += [number_cell(f"{means[name]:.2f}" if name in means else ABSENT) for name in methods]
    told = (
        f"{node_class.capitalize()}: forwards of each method over those of the oracle, averaged over ranks with weight "
        "1/rank; 1.00 is a method that knows the answer, bold the cheapest. Order: the same without the preparation."
    )
    return Table(told, ["setting", *methods], rows, total).render()


def curves(study: RecallStudy) -> str:
    """A picture a setting: cost against rank."""
    names = method_names(study)
    drawn = []
    for place, setting in enumerate(study.settings):
        listed = ", ".join(f"{method.name} {method.aggregate:.2f}" for method in setting.ranking())
        alt = f"Line chart on logarithmic axes, {setting.name}: cost over the oracle's is {listed}."
        svg = to_svg(setting_figure(setting, names), alt, f"recall{place}")
        drawn.append(f"<div><h3>{escape(setting.name)}</h3>{figure(svg, _caption(setting))}</div>")
    told = (
        "How many forwards a method has paid when the true top nodes, up to the rank below, are all verified. The dotted "
        "diagonal is the oracle, which verifies the true order. Numbers in the key: the aggregates of the table."
    )
    inside = f'<div class="pair">{"".join(drawn)}</div>'
    return (
        section("curves", "Cost of verified recall", "Curves", paragraph(told, "note"), inside)
        if drawn
        else ""
    )


def _caption(setting: RecallSetting) -> str:
    return f"{count(setting.nodes)} nodes of kinds {', '.join(setting.kinds)}; {_pairs(setting)}."


def _pairs(setting: RecallSetting) -> str:
    return f"{count(setting.pairs)} pair{'s' if setting.pairs != 1 else ''}"


def rivals(study: RecallStudy) -> str:
    """AtP against AtP*, setting by setting; rows where AtP is cheaper are tinted."""
    both = [s for s in study.settings if {"atp", "atp-star"} <= {method.name for method in s.methods}]
    if not both:
        return ""
    rows, marks = [], []
    for setting in both:
        plain, star = setting.method("atp"), setting.method("atp-star")
        single = setting.evidence == "pair" and len(plain.per_pair) == len(star.per_pair)
        wins = sum(a < b for a, b in zip(plain.per_pair, star.per_pair, strict=True)) if single else 0
        cheaper = plain.aggregate < star.aggregate
        marks.append("mine" if cheaper else "")
        rows.append(
            [
                head_cell(
                    f"{setting.model}, {setting.material}", f"{setting.evidence}, {setting.node_class}"
                ),
                number_cell(f"{plain.aggregate:.2f}", "key" if cheaper else ""),
                number_cell(f"{star.aggregate:.2f}", "key" if star.aggregate < plain.aggregate else ""),
                number_cell(f"{plain.unprepared:.2f}"),
                number_cell(f"{star.unprepared:.2f}"),
                number_cell(f"{count(wins)} of {count(len(plain.per_pair))}" if single else ABSENT),
            ]
        )
    told = "Tinted: AtP is the cheaper. Order alone: the same without what the estimates themselves cost."
    made = Table(
        told,
        ["setting", "AtP", "AtP*", "AtP", "AtP*", "pairs with AtP cheaper"],
        rows,
        groups=[("", 1), ("all counted", 2), ("order alone", 2), ("", 1)],
        row_marks=marks,
    )
    return section("rivals", "Is AtP* worth it?", "AtP and AtP*", paragraph(beaten(study)), made.render())


def findings(study: RecallStudy) -> str:
    """The study's own sentences."""
    items = "".join(f"<li>{rich(said)}</li>" for said in study.findings)
    return section("findings", "What was found", "Findings", f"<ul>{items}</ul>") if items else ""


def reading(study: RecallStudy) -> str:
    """What the numbers mean, the searches' parameters, and what was left out."""
    entries = [
        ("truth", "every node of a setting patched by itself; nodes in the order of |effect|, over pairs of its mean."),
        ("cost at a rank", "all that a method has paid, in forwards per pair, when the last of the true top nodes up to "
         "that rank is verified: its preparation, and one forward for every node it verified on the way."),
        ("aggregate", "the geometric mean of cost / rank over ranks, weighted by 1/rank; over pairs the geometric mean."),
        ("oracle", "verifies the true order without preparation: cost = rank."),
        ("pair, distribution", "pair: the effects of one pair, at every position; distribution: mean |effect| over "
         "pairs, positions patched together."),
        *study.parameters.items(),
        *((f"seed of {name}", str(seed)) for name, seed in study.seeds.items()),
    ]  # fmt: skip
    for kept in dict.fromkeys(setting.convention for setting in study.settings):
        entries.append(
            ("convention", f"metric {kept.metric}, direction {kept.direction}, ablation {kept.ablation}, positions "
             f"{kept.positions}")
        )  # fmt: skip
    left = "".join(f"<li>{rich(said)}</li>" for said in study.left_out)
    out = f"<h3>Left out</h3><ul>{left}</ul>" if left else ""
    listed = definitions((term, escape(said)) for term, said in entries)
    return section("conventions", "How to read the numbers", "Conventions", listed, out)


def again(study: RecallStudy, manifest: Manifest | None, place: str) -> str:
    """The command that makes this again."""
    commands = [study.command] + ([f"patchkit rerun {place}"] if manifest is not None else [])
    shown = [f'<pre tabindex="0" aria-label="command">{escape_lines(command)}</pre>' for command in commands]
    if len(shown) == 2:
        shown.insert(1, paragraph("or, from this directory's manifest:", "note"))
    entries = [("study time", escape(duration(study.seconds)))]
    if manifest is not None:
        entries += provenance(manifest, "pairs")
    return section("again", "Make it again", "Again", *shown, definitions(entries))


def _classes(study: RecallStudy) -> list[tuple[str, list[RecallSetting]]]:
    """The settings of each class of nodes, in the study's order."""
    found: dict[str, list[RecallSetting]] = {}
    for setting in study.settings:
        found.setdefault(setting.node_class, []).append(setting)
    return list(found.items())


def _means(settings: Sequence[RecallSetting], methods: Sequence[str]) -> dict[str, float]:
    """Geometric mean of the aggregates of the methods that every one of the settings has."""
    known = [name for name in methods if all(name in {m.name for m in s.methods} for s in settings)]
    return {
        name: math.exp(sum(math.log(setting.aggregate(name)) for setting in settings) / len(settings))
        for name in known
    }
