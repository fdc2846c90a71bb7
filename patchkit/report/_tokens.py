"""Prompts as rows of token chips: what is patched, what changed, what a head looks at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

from patchkit.errors import InputError
from patchkit.report._html import breakable, escape, visible
from patchkit.report._palette import HEAT_MAX
from patchkit.results.study import AttentionExample, PromptExample, VariableBindingStudy

# Weights below this are not written out: they would fill the page with zeros. The caption says so.
SMALLEST_SHOWN = 0.05


@dataclass(frozen=True)
class AttentionGroup:
    """Heads looking at one prompt from one token; weights per head over `tokens`."""

    tokens: tuple[str, ...]
    query: int
    heads: tuple[tuple[str, tuple[float, ...]], ...]


def check_study(study: VariableBindingStudy) -> None:
    """Refuses examples whose indices or lengths do not fit their tokens (InputError naming the field)."""
    for place, example in enumerate(study.examples):
        _check_index(f"examples[{place}].position", example.position, len(example.original))
    for place, example in enumerate(study.attention):
        _check_index(f"attention[{place}].query", example.query, len(example.tokens))
        if len(example.weights) != len(example.tokens):
            raise InputError(
                f"study.json: field attention[{place}].weights: expected {len(example.tokens)} numbers, one per token, "
                f"found {len(example.weights)}. Run the study again."
            )


def _check_index(field: str, index: int, length: int) -> None:
    if not -length <= index < length:
        raise InputError(
            f"study.json: field {field}: expected an index into {length} tokens, found {index}. Run the study again."
        )


def attention_groups(examples: Sequence[AttentionExample]) -> list[AttentionGroup]:
    """Examples gathered by prompt and attending token, in the order they first appear."""
    gathered: dict[tuple[tuple[str, ...], int], list[tuple[str, tuple[float, ...]]]] = {}
    for example in examples:
        key = (tuple(example.tokens), example.query % len(example.tokens))
        gathered.setdefault(key, []).append((example.head, tuple(example.weights)))
    return [AttentionGroup(tokens, query, tuple(heads)) for (tokens, query), heads in gathered.items()]


def shown_token(token: str) -> str:
    """A token as a person reads it: the word-start signs of tokenizers as a space, control characters by name."""
    shown = visible(token.replace("Ġ", " ").replace("▁", " ").replace("Ċ", "\n"))
    return shown.strip() or ("␣" if shown else "∅")


def changed(original: Sequence[str], alternate: Sequence[str]) -> tuple[set[int], set[int]]:
    """Indices of the tokens that differ between two prompts, in each of them."""
    blocks = SequenceMatcher(a=list(original), b=list(alternate), autojunk=False).get_matching_blocks()
    same_a = {block.a + step for block in blocks for step in range(block.size)}
    same_b = {block.b + step for block in blocks for step in range(block.size)}
    return set(range(len(original))) - same_a, set(range(len(alternate))) - same_b


def prompt_card(example: PromptExample) -> str:
    """One triple: both prompts, the patched token marked, and the model's answers without and with the patch."""
    position = example.position % len(example.original)
    differ, differ_too = changed(example.original, example.alternate)
    hit = example.answer_with_patch == example.target
    verdict = "✓ target" if hit else "✗ not the target"
    answers = [
        ("original says", example.original_answer, ""),
        ("alternate says", example.alternate_answer, ""),
        ("target", example.target, ""),
        (
            "with the patch",
            example.answer_with_patch,
            f'<small class="{"yes" if hit else "no"}">{verdict}</small>',
        ),
    ]
    said = "".join(
        f"<div><dt>{term}</dt><dd><code>{escape(shown_token(token))}</code>{note}</dd></div>"
        for term, token, note in answers
    )
    return (
        f'<article class="card"><h3>{breakable(example.desideratum)}</h3>'
        f'<div class="prompt"><span class="who">original</span>{_chips(example.original, differ, position)}</div>'
        f'<div class="prompt"><span class="who">alternate</span>{_chips(example.alternate, differ_too, None)}</div>'
        f'<dl class="answers">{said}</dl></article>'
    )


def _chips(tokens: Sequence[str], differ: set[int], patched: int | None) -> str:
    chips = []
    for place, token in enumerate(tokens):
        text = escape(shown_token(token))
        if place in differ:
            text = f"<mark>{text}</mark>"
        if place == patched:
            chips.append(f'<span class="tok patched">{text}<small>patched here</small></span>')
        else:
            chips.append(f'<span class="tok">{text}</span>')
    return f'<span class="toks">{" ".join(chips)}</span>'


def attention_block(group: AttentionGroup) -> str:
    """One prompt with a row of chips per head, tinted by attention weight."""
    rows = []
    for head, weights in group.heads:
        chips = " ".join(
            _weighted(token, weight, place == group.query)
            for place, (token, weight) in enumerate(zip(group.tokens, weights, strict=True))
        )
        who = f'<span class="who"><code>{escape(head)}</code></span>'
        rows.append(f'<div class="prompt">{who}<span class="toks">{chips}</span></div>')
    return f'<div class="card">{"".join(rows)}</div>'


def _weighted(token: str, weight: float, query: bool) -> str:
    strength = HEAT_MAX * min(1.0, max(0.0, weight))
    number = f"<small>{100 * weight:.0f}</small>" if weight >= SMALLEST_SHOWN else "<small></small>"
    css = "tok w query" if query else "tok w"
    return f'<span class="{css}" style="--a:{strength:.3f}">{escape(shown_token(token))}{number}</span>'
