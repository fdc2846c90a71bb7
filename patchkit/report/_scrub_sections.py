"""The sections of the page of causal scrubbing. Each returns HTML, empty when it has nothing to show."""

from __future__ import annotations

from patchkit.report._canvas import to_svg
from patchkit.report._edge_sections import tile_row
from patchkit.report._html import (
    ABSENT,
    arrows,
    count,
    decimals,
    definitions,
    duration,
    escape,
    figure,
    names,
    paragraph,
    percent,
    rich,
    section,
    signed,
    unit,
)
from patchkit.report._scrub_plot import one_scale, recovered_figure, spread_figure
from patchkit.report._study_sections import escape_lines, provenance
from patchkit.report._tables import Cell, Table, head_cell, number_cell
from patchkit.results.manifest import Manifest
from patchkit.results.scrubbing import Scrubbing, ScrubNode, ScrubResult

#: Share of draws without a test above which a recovered share says little.
VACUOUS = 0.2


def headline(found: Scrubbing) -> str:
    """What the hypotheses recover, the best first."""
    known = _ranked(found)
    if not known:
        return "No hypothesis recovers a defined share: model and random inputs have one metric."
    first = known[0]
    share = f"{unit(first.recovered)} of the behaviour"
    if len(known) == 1:
        return (
            f"Scrubbed under the hypothesis '{first.hypothesis}', the model keeps {share}{_between(first)}."
        )
    others = "; ".join(f"'{r.hypothesis}' {unit(r.recovered)}" for r in known[1:4])
    more = f"; and {count(len(known) - 4)} more" if len(known) > 4 else ""
    return f"'{first.hypothesis}' recovers {share}{_between(first)}, {others}{more}."


def _ranked(found: Scrubbing) -> list[ScrubResult]:
    """Hypotheses by what they recover; those whose draws tested too little come last, whatever they recover."""
    known = [result for result in found.results if result.recovered is not None]
    return sorted(known, key=lambda result: (result.vacuous > VACUOUS, -(result.recovered or 0.0)))


def _between(result: ScrubResult) -> str:
    if result.recovered_interval is None:
        return ""
    low, high = result.recovered_interval
    return f" (95 % interval {unit(low)} to {unit(high)})"


def warnings(found: Scrubbing) -> list[str]:
    """What limits the numbers: draws that tested nothing, keys without inputs, no behaviour."""
    said = []
    empty = [r.hypothesis for r in found.results if r.vacuous > VACUOUS]
    if empty:
        said.append(
            f"More than {100 * VACUOUS:.0f} % of the draws could give nothing but the prompt that was to be replaced, "
            f"so they tested nothing: {', '.join(empty)}. Take more inputs or coarser keys."
        )
    absent = [r.hypothesis for r in found.results if r.model_metric <= r.random_metric]
    if absent:
        said.append(
            f"This says little: the model's metric is not above that of random inputs ({', '.join(absent)}), so there "
            "is no behaviour to recover."
        )
    if not one_scale(found):
        said.append("Hypotheses were scrubbed on different inputs or metrics: do not compare their shares.")
    return said


def tiles(found: Scrubbing) -> str:
    """The numbers one looks for first."""
    shown = []
    best = next(iter(_ranked(found)), None)
    if best is not None:
        shown.append(("tile main", unit(best.recovered), f"recovered by '{best.hypothesis}'"))
        metric = best.convention.metric
        shown += [
            ("tile", signed(best.model_metric, 2), f"{metric}, model"),
            ("tile", signed(best.random_metric, 2), f"{metric}, random inputs"),
        ]
    first = found.results[0]
    shown += [
        ("tile", count(len(found.results)), "hypotheses" if len(found.results) > 1 else "hypothesis"),
        ("tile", count(len(first.inputs)), "reference inputs"),
        ("tile", count(first.pool), "inputs to draw from"),
        ("tile", f"{sum(r.forwards for r in found.results):,.0f}", "prompts run"),
    ]
    return tile_row(shown)


def question(found: Scrubbing) -> str:
    """What was asked, and what each hypothesis claims."""
    claims = definitions((r.hypothesis, rich(r.claim)) for r in found.results)
    return section("question", "The question", "Question", paragraph(found.question), claims)


def recovered(found: Scrubbing) -> str:
    """Bars of recovered shares, the spread over inputs, and the numbers."""
    said = ", ".join(f"{r.hypothesis} {percent(r.recovered)}" for r in found.results)
    bars = figure(
        to_svg(
            recovered_figure(found), f"Bar chart of the recovered share in per cent: {said}.", "recovered"
        ),
        "Bars with 95 % intervals over reference inputs. 100 %: nothing that the hypothesis leaves free matters.",
    )
    spread = ""
    if one_scale(found):
        alt = "Box plot of the scrubbed metric over reference inputs, one box a hypothesis."
        spread = figure(
            to_svg(spread_figure(found), alt, "spread"),
            "Box: the middle half of inputs; line: 5 to 95 %; cross: the mean. Means can hide inputs that cancel out.",
        )
    return section(
        "recovered",
        "How much is recovered?",
        "Recovered",
        f'<div class="pair">{bars}{spread}</div>',
        _numbers(found),
    )


def _numbers(found: Scrubbing) -> str:
    scale = max((abs(r.model_metric) for r in found.results), default=1.0)
    places = decimals(scale)
    rows = [
        [
            head_cell(r.hypothesis),
            Cell(percent(r.recovered), heat=r.recovered, number=True, mark="key"),
            number_cell(
                ABSENT
                if r.recovered_interval is None
                else f"{percent(r.recovered_interval[0])} to {percent(r.recovered_interval[1])}"
            ),
            number_cell(signed(r.model_metric, places)),
            number_cell(signed(r.random_metric, places)),
            number_cell(signed(r.scrubbed_metric, places)),
            number_cell(percent(r.gap)),
            number_cell(percent(r.kept)),
            number_cell(percent(r.vacuous)),
        ]
        for r in found.results
    ]
    told = (
        "Gap: mean over inputs of |model - scrubbed| in per cent of |model - random|, in which inputs cannot cancel. "
        "Kept: inputs nearer to the model's mean than to the random one. Untested: draws that could give nothing but "
        "the prompt itself."
    )
    columns = [
        "hypothesis",
        "recovered, %",
        "95 % interval",
        "model",
        "random",
        "scrubbed",
        "gap, %",
        "kept, %",
        "untested, %",
    ]
    return Table(told, columns, rows).render()


def findings(found: Scrubbing) -> str:
    """The study's own sentences."""
    items = "".join(f"<li>{rich(said)}</li>" for said in found.findings)
    return section("findings", "What was found", "Findings", f"<ul>{items}</ul>") if items else ""


def nodes(found: Scrubbing) -> str:
    """Interpretation nodes of every hypothesis, and the buckets of inputs that could test them."""
    parts = []
    for place, result in enumerate(found.results):
        if result.nodes:
            listed = _nodes(result)
            said = f"<summary>{escape(result.hypothesis)}: {count(len(result.nodes))} nodes</summary>"
            opened = " open" if place == 0 else ""
            parts.append(f"<details{opened}>{said}{listed}</details>")
    told = (
        "Each node may take its value from any input that has the same key. A bucket holds the inputs of one key: with "
        "one input in it, the draw can only give that input."
    )
    return (
        section("nodes", "What was resampled, from what", "Nodes", paragraph(told), *parts) if parts else ""
    )


def _nodes(result: ScrubResult) -> str:
    rows = [
        [
            head_cell(node.name, ", ".join(node.children)),
            Cell(rich(node.key)),
            Cell(_stands_for(node)),
            number_cell(count(node.occurrences)),
            number_cell(count(node.buckets)),
            number_cell(
                f"{count(node.bucket_sizes[0])} / {node.bucket_sizes[1]:,.0f} / {count(node.bucket_sizes[2])}"
            ),
            number_cell(count(node.singletons)),
            number_cell(count(node.empty)),
            number_cell(percent(node.vacuous / node.draws if node.draws else None)),
        ]
        for node in result.nodes
    ]
    told = (
        f"The output reads {', '.join(result.children) or 'nothing'}. Under a name: what it is computed from."
    )
    columns = [
        "node",
        "key",
        "stands for",
        "paths",
        "buckets",
        "least / median / most",
        "of one",
        "empty",
        "untested, %",
    ]
    return Table(told, columns, rows).render()


def _stands_for(node: ScrubNode) -> str:
    if node.edges:
        return (
            f'<span class="names">{" ".join(f"<code>{arrows(edge)}</code>" for edge in node.edges[:6])}</span>'
            + (f" and {count(len(node.edges) - 6)} more" if len(node.edges) > 6 else "")
        )
    return names(node.nodes, 6)


def notes(found: Scrubbing) -> str:
    """What a reader must know, of the method and of these results."""
    said = [
        f"{r.hypothesis}: {note}" if len(found.results) > 1 else note
        for r in found.results
        for note in r.notes
    ]
    said += [
        "Scrubbing does not reject what is too coarse: a hypothesis that leaves less free recovers no less. It cannot "
        "tell hypotheses apart whose keys agree on all inputs.",
        "A share may exceed 100 % or be negative, and inputs can cancel in a mean: look at the spread.",
    ]
    return section(
        "notes", "To keep in mind", "Notes", f"<ul>{''.join(f'<li>{rich(note)}</li>' for note in said)}</ul>"
    )


def reading(found: Scrubbing, manifest: Manifest | None) -> str:
    """The conventions behind every number."""
    first = found.results[0]
    conventions = dict.fromkeys(r.convention for r in found.results)
    entries = [
        ("recovered", "(scrubbed - random) / (model - random), of means over reference inputs."),
        ("scrubbed", "the metric of a run in which every activation is taken from a drawn input: where the hypothesis "
         "names a node, from an input with the same key; elsewhere from any input. Every path from the output has a "
         "draw of its own."),
        ("random", "the metric of the whole model on an unrelated input, with the reference input's answer."),
        ("runs", f"{count(first.samples)} scrubbed run(s) of each reference input; seed {first.seed}."),
        ("model", ", ".join(dict.fromkeys(r.model for r in found.results))),
        *(("convention", f"metric {kept.metric}, higher is more of the behaviour; positions {kept.positions}")
          for kept in conventions),
    ]  # fmt: skip
    listed = definitions((term, escape(said)) for term, said in entries)
    return section("conventions", "How to read the numbers", "Conventions", listed)


def again(found: Scrubbing, manifest: Manifest | None, place: str) -> str:
    """The command that makes this again."""
    commands = [found.command] if found.command else []
    commands += [f"patchkit rerun {place}"] if manifest is not None else []
    shown = [f'<pre tabindex="0" aria-label="command">{escape_lines(command)}</pre>' for command in commands]
    if len(shown) == 2:
        shown.insert(1, paragraph("or, from this directory's manifest:", "note"))
    entries = [("time", escape(duration(found.seconds)))] if found.seconds else []
    entries += provenance(manifest, "pairs") if manifest is not None else []
    return (
        section("again", "Make it again", "Again", *shown, definitions(entries)) if shown or entries else ""
    )
