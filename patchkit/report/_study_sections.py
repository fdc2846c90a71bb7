"""The sections of the page that come from the study and the manifest. Each returns HTML, empty without content."""

from __future__ import annotations

from patchkit.report._html import count, definitions, duration, escape, paragraph, rich, section
from patchkit.report._tables import Cell, Table, head_cell, heat_cell, number_cell, score_cell, text_cell
from patchkit.report._tokens import SMALLEST_SHOWN, attention_block, attention_groups, prompt_card
from patchkit.report._words import conventions, where
from patchkit.results.manifest import Manifest
from patchkit.results.mask import MaskResult
from patchkit.results.study import VariableBindingStudy


def question(study: VariableBindingStudy, result: MaskResult) -> str:
    """The question in words, and example prompts with the patched position marked."""
    cards = "".join(prompt_card(example) for example in study.examples)
    how = (
        "The original prompt is run while the chosen components take the values they have on the alternate prompt, "
        f"{where(result.position)} (outlined). Underlined tokens differ between the two."
    )
    shown = paragraph(how, "note") + f'<div class="cards">{cards}</div>' if cards else ""
    return section("question", "The question", "Question", paragraph(study.question), shown)


def forms(study: VariableBindingStudy) -> str:
    """Held-out scores of the chosen set per surface form; the forms it was trained on are marked."""
    if not study.forms:
        return ""
    asked = list(dict.fromkeys(name for form in study.forms for name in form.scores))
    rows = [
        [
            head_cell(form.form),
            text_cell("yes" if form.trained else "no"),
            *(score_cell(form.scores.get(name)) for name in asked),
            score_cell(min(form.scores.values(), default=None), "key"),
        ]
        for form in study.forms
    ]
    table = Table(
        "The chosen set on every surface form, per cent of held-out triples. The mask saw only the tinted rows in "
        "training. Lowest: over all columns, trained or not.",
        ["form", "trained on", *asked, "lowest"],
        rows,
        row_marks=["mine" if form.trained else "" for form in study.forms],
    )
    return section("forms", "Does it hold in other wordings?", "Wordings", table.render())


def attention(study: VariableBindingStudy) -> str:
    """What the chosen heads look at: examples as tinted tokens, and means over many prompts."""
    blocks = "".join(attention_block(group) for group in attention_groups(study.attention))
    note = (
        "The outlined token attends; the stronger the tint, the more. Numbers are per cent, "
        f"written from {100 * SMALLEST_SHOWN:.0f} up; they sum to 100 over a row."
    )
    examples = paragraph(note, "note") + f'<div class="stack">{blocks}</div>' if blocks else ""
    summary = _attention_summary(study)
    if not (examples or summary):
        examples = paragraph("No attention was recorded: no attention head was chosen.", "note")
    return section("attention", "Where the chosen heads look", "Attention", summary, examples)


def _attention_summary(study: VariableBindingStudy) -> str:
    if not study.attention_summary:
        return ""
    targets = list(dict.fromkeys(name for row in study.attention_summary.values() for name in row))
    rows = [
        [head_cell(head), *(heat_cell(row.get(name)) for name in targets)]
        for head, row in study.attention_summary.items()
    ]
    caption = "Mean attention of each chosen head, in per cent, over held-out prompts."
    return Table(caption, ["head", *targets], rows).render()


def comparison(study: VariableBindingStudy) -> str:
    """Published figures beside ours."""
    if not study.comparison:
        return ""
    rows = [[text_cell(theirs), text_cell(ours)] for theirs, ours in study.comparison.items()]
    table = Table("The published outcome beside this run.", ["published", "this run"], rows)
    return section("comparison", "Beside the published result", "Published", table.render())


def notes(result: MaskResult, study: VariableBindingStudy | None) -> str:
    """Triples that were left out, and the study's remarks."""
    parts = []
    if result.excluded:
        rows = [[head_cell(reason), number_cell(count(number))] for reason, number in result.excluded.items()]
        total = [Cell("in all", head=True), number_cell(count(sum(result.excluded.values())))]
        caption = "Triples that could not tell success from failure, and were neither trained nor scored on."
        parts.append(Table(caption, ["left out because", "triples"], rows, total).render())
    if study is not None and study.notes:
        parts.append(f"<ul>{''.join(f'<li>{rich(note)}</li>' for note in study.notes)}</ul>")
    return section("notes", "Left out, and to keep in mind", "Left out", *parts) if parts else ""


def reading(result: MaskResult, manifest: Manifest | None) -> str:
    """The conventions behind every number."""
    entries = [(term, escape(said)) for term, said in conventions(result, manifest)]
    return section("conventions", "How to read the numbers", "Conventions", definitions(entries))


def again(
    study: VariableBindingStudy | None, manifest: Manifest | None, place: str, counted: str = "triples"
) -> str:
    """The command that makes this again, the model, and the versions it was made with."""
    parts = []
    commands = [study.command] if study is not None and study.command else []
    if manifest is not None:
        commands.append(f"patchkit rerun {place}")
    for command in commands:
        parts.append(f'<pre tabindex="0" aria-label="command">{escape_lines(command)}</pre>')
    if len(commands) == 2:
        parts.insert(1, paragraph("or, from this directory's manifest:", "note"))
    entries: list[tuple[str, str]] = []
    if study is not None:
        entries.append(("model", f"<code>{escape(study.model)}</code>"))
        entries += [(term, escape(said)) for term, said in study.model_card.items()]
        entries.append(("study time", escape(duration(study.seconds))))
    if manifest is not None:
        entries += provenance(manifest, counted)
    parts.append(definitions(entries))
    if manifest is not None and manifest.options:
        listed = ((name, f"<code>{escape(value)}</code>") for name, value in manifest.options.items())
        parts.append(f"<details><summary>All options</summary>{definitions(listed)}</details>")
    return section("again", "Make it again", "Again", *parts) if any(parts) else ""


def escape_lines(command: str) -> str:
    """A command safe in `<pre>`, its line breaks kept."""
    return "\n".join(escape(line) for line in command.strip().splitlines())


def provenance(manifest: Manifest, counted: str) -> list[tuple[str, str]]:
    """What the manifest says of versions, weights and input, as terms and safe HTML; `counted` are pairs or triples."""
    entries = [
        ("versions", escape(", ".join(f"{name} {number}" for name, number in manifest.versions.items())))
    ]
    if manifest.model is not None:
        revision = f", revision {manifest.model.revision}" if manifest.model.revision else ""
        entries.append(
            ("weights", escape(f"{manifest.model.id}{revision}, fingerprint {manifest.model.fingerprint}"))
        )
    entries.append(("started", escape(manifest.started)))
    if manifest.pairs is not None:
        entries.append((f"{counted} used", f"{count(manifest.pairs.used)} of {count(manifest.pairs.total)}"))
    return entries
