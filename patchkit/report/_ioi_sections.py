"""The sections of the page of the IOI study. Each returns HTML, empty when it has nothing to show."""

from __future__ import annotations

from patchkit.report._canvas import to_svg
from patchkit.report._edge_sections import tile_row
from patchkit.report._html import (
    count,
    definitions,
    duration,
    escape,
    figure,
    names,
    paragraph,
    rich,
    section,
    signed,
    unit,
)
from patchkit.report._ioi_plots import MOST_HEADS, attention_maps, number_maps, stages_figure
from patchkit.report._matrix_plot import matrix_figure
from patchkit.report._study_sections import escape_lines, provenance
from patchkit.report._tables import Cell, Table, head_cell, number_cell
from patchkit.report._tokens import SMALLEST_SHOWN, attention_block, attention_groups
from patchkit.results.ioi import IoiStudy
from patchkit.results.manifest import Manifest


def headline(study: IoiStudy) -> str:
    """How much of the behaviour the circuit keeps, and which classes of heads are in it."""
    kept = [row for row in study.heads if row.in_circuit]
    run = study.evaluation.circuits[-1] if study.evaluation.circuits else None
    share = "an undefined share" if run is None or run.faithfulness is None else unit(run.faithfulness)
    there = [rule.name for rule in study.rules if any(row.head in rule.heads for row in kept)]
    found = (
        f"Classes with heads in it: {', '.join(there)}"
        if there
        else (f"None of the {count(len(study.rules))} published classes of heads has a member in it")
    )
    return f"{count(len(kept))} of {count(len(study.heads))} heads and every MLP keep {share} of the behaviour. {found}."


def warnings(study: IoiStudy) -> list[str]:
    """What forbids reading the page as a finding."""
    said = []
    if study.accuracy.prefers_io < 0.75:
        said.append(
            f"The model prefers IO to S in only {unit(study.accuracy.prefers_io)} of the prompts: it hardly does the "
            "task, and nothing here says how it is done."
        )
    if not any(row.in_circuit for row in study.heads):
        said.append("Path patching kept no head, so the circuit is the MLPs alone.")
    chance = study.evaluation.random
    if chance is not None and chance.p_value >= 0.05:
        said.append(f"Random circuits of equal size do as well (p = {chance.p_value:.2g}).")
    return said


def tiles(study: IoiStudy) -> str:
    """The numbers one looks for first."""
    found, metric = study.evaluation, study.convention.metric
    shown = []
    if found.circuits:
        shown.append(("tile main", unit(found.circuits[-1].faithfulness), "faithfulness of the circuit"))
    shown += [
        (
            "tile",
            count(sum(row.in_circuit for row in study.heads)),
            f"of {count(len(study.heads))} heads in it",
        ),
        ("tile", unit(study.accuracy.prefers_io), "of prompts: IO before S"),
        ("tile", signed(found.clean_metric, 2), f"{metric}, whole model"),
        ("tile", signed(found.corrupt_metric, 2), f"{metric}, all replaced"),
    ]
    if found.random is not None:
        shown.append(("tile", f"{found.random.p_value:.2g}", "p against random circuits"))
    if found.repair is not None:
        shown.append(("tile", signed(found.repair.knocked_out, 2), f"{metric} without the movers"))
    return tile_row(shown)


def question(study: IoiStudy) -> str:
    """The question in words, and example prompts."""
    cards = "".join(_card(one) for one in study.examples)
    note = "Prompts of the study; under the name of a corruption, the corrupt prompt." if cards else ""
    shown = f'{paragraph(note, "note")}<div class="cards">{cards}</div>' if cards else ""
    return section("question", "The question", "Question", paragraph(study.question), shown)


def _card(example: dict[str, str]) -> str:
    titles = {"clean": "clean prompt", "answer": "IO", "wrong": "S"}
    said = definitions(
        (titles.get(name, name), f"<code>{escape(text)}</code>") for name, text in example.items()
    )
    return f'<article class="card">{said}</article>'


def found(study: IoiStudy) -> str:
    """The findings, in words."""
    items = "".join(f"<li>{rich(said)}</li>" for said in study.findings)
    return section("findings", "What was found", "Findings", f"<ul>{items}</ul>") if items else ""


def picture(study: IoiStudy) -> str:
    """The groups of heads, from the names to the logits."""
    if not study.groups:
        return ""
    alt = "Groups of heads from the logits backwards. " + "; ".join(
        f"group {number}: {', '.join(group[:8])}" for number, group in enumerate(study.groups, 1)
    )
    caption = (
        "Group 1 acts on the logits, group 2 on the queries, keys or values of group 1, and so on. In each head: its "
        "class, or where it looks most (in brackets where that is not far above even attention); and its largest effect "
        "along such paths, as a share of the difference between the clean and the corrupt run. At "
        "\N{MINUS SIGN}100 % all of the behaviour is lost."
    )
    if any(len(group) > MOST_HEADS for group in study.groups):
        caption += f" At most {MOST_HEADS} heads a column."
    return section(
        "stages",
        "From the names to the logits",
        "Picture",
        figure(to_svg(stages_figure(study), alt, "stages"), caption, wide=True),
        *(_stage_table(study, corruption) for corruption in study.paths),
    )


def _stage_table(study: IoiStudy, corruption: str) -> str:
    """What each stage kept under one corruption."""
    result = study.paths[corruption]
    rows = []
    for stage in result.stages:
        share = {one.sender: one.share for one in stage.effects}
        said = [f"{head} {signed(100 * (share[head] or 0.0), 1, plus=True)} %" for head in stage.chosen]
        rows.append([head_cell(stage.name), number_cell(count(len(stage.effects))), Cell(names(said, 16))])
    told = (
        f"Corruption {corruption}: {study.convention.metric} falls from {signed(result.base_metric, 2)} to "
        f"{signed(result.source_metric, 2)} when the whole prompt is replaced."
    )
    table = Table(told, ["heads that act ...", "patched", "kept, with their share"], rows).render()
    return f"<details><summary>Stage by stage under {escape(corruption)}</summary>{table}</details>"


def maps(study: IoiStudy) -> str:
    """The same numbers as maps, layer by head."""
    layers = [str(layer) for layer in range(1 + max(int(row.head[1:].split(".")[0]) for row in study.heads))]
    drawn = []
    for what, panels, prefix in (
        ("Attention on the prompts", attention_maps(study), "looks"),
        ("Names, and attention on random tokens that come twice", number_maps(study), "does"),
    ):
        alt = f"{what}: heat maps by layer and head: {', '.join(panel.title for panel in panels)}."
        svg = to_svg(
            matrix_figure(panels, layers, down="layer", outline="in the circuit", percent=True, widest=0.3),
            alt,
            prefix,
        )
        drawn.append(figure(svg, f"{what}.", wide=True))
    return section("maps", "All heads at a glance", "Maps", *drawn)


def attention(study: IoiStudy) -> str:
    """One prompt with what heads of the circuit look at."""
    blocks = "".join(attention_block(group) for group in attention_groups(study.attention))
    if not blocks:
        return ""
    note = (
        "Each head from the place from which it looks at something most; the outlined token attends. The stronger the "
        f"tint, the more; numbers are per cent, written from {100 * SMALLEST_SHOWN:.0f} up."
    )
    return section(
        "attention",
        "Where heads look, in one prompt",
        "Attention",
        paragraph(note, "note"),
        f'<div class="stack">{blocks}</div>',
    )


def notes(study: IoiStudy) -> str:
    """What a reader must know."""
    items = "".join(f"<li>{rich(said)}</li>" for said in study.notes)
    return section("notes", "To keep in mind", "Notes", f"<ul>{items}</ul>") if items else ""


def reading(study: IoiStudy) -> str:
    """The conventions behind every number."""
    kept = study.convention
    entries = [
        (
            "IO, S1, S2, END",
            "The indirect object, the subject's two mentions, and the last token; S1+1 is the token after S1. The "
            "clause is the one that names both; its rest is its other tokens, and behind the names are those after both.",
        ),
        (
            "s2-flip, abc",
            "How the corrupt prompt differs: the second mention is of the other of the two; all three mentions are of "
            "other people.",
        ),
        (
            "acts",
            "Effect of a head, replaced by its value in the corrupt run, along its paths to the receivers of a stage "
            "(other heads held, MLPs recomputed), over (clean - corrupt).",
        ),
        (
            "copies, pushes down",
            "Share of names that a head's W_V W_O and the unembedding put among the top 5 tokens when it attends to the "
            "name alone; the same of its negated output.",
        ),
        (
            "writes IO",
            "Share of prompts whose IO is among the top 5 tokens that the head's output at END raises, above S.",
        ),
        (
            "random tokens",
            "Mean attention from the second copy of random tokens to the token before, to the same token's first place, "
            "and to the one after that.",
        ),
        (
            "takes over",
            "What the direct effect of a head helps more once the movers are knocked out "
            f"({study.knocked_out or 'there are none'}).",
        ),
        ("metric", f"{kept.metric}: logit of IO less that of S, at the last token."),
        *study.parameters.items(),
        *((f"seed of {name}", str(seed)) for name, seed in study.seeds.items()),
    ]
    listed = definitions((term, escape(said)) for term, said in entries)
    return section("conventions", "How to read the numbers", "Conventions", listed)


def again(study: IoiStudy, manifest: Manifest | None, place: str) -> str:
    """The command that makes this again."""
    commands = [study.command] + ([f"patchkit rerun {place}"] if manifest is not None else [])
    shown = [f'<pre tabindex="0" aria-label="command">{escape_lines(command)}</pre>' for command in commands]
    if len(shown) == 2:
        shown.insert(1, paragraph("or, from this directory's manifest:", "note"))
    entries = [("model", f"<code>{escape(study.model)}</code>")]
    entries += [(term, escape(said)) for term, said in study.model_card.items()]
    entries.append(("study time", escape(duration(study.seconds))))
    if manifest is not None:
        entries += provenance(manifest, "pairs")
    return section("again", "Make it again", "Again", *shown, definitions(entries))
