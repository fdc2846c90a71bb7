"""Small pieces of HTML, and how numbers are written. Everything that is text goes through `escape` here."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable, Sequence

ABSENT = "–"
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ufffe\uffff\ud800-\udfff]")
_NAMED = {"\n": "⏎", "\t": "⇥", "\r": "␍"}


def visible(text: str) -> str:
    """Text with control characters made visible: a newline as ⏎, others by their code. No document may hold them."""
    return _CONTROL.sub(lambda hit: _NAMED.get(hit.group(), f"\\x{ord(hit.group()):02x}"), text)


def escape(text: object) -> str:
    """Text made safe inside an element or a quoted attribute."""
    return html.escape(visible(str(text)), quote=True)


def breakable(text: object) -> str:
    """Escaped text that a narrow column may break after underscores."""
    return escape(text).replace("_", "_<wbr>")


def arrows(text: object) -> str:
    """Escaped text in which an edge's name stays on one line where it fits, and else breaks behind its arrow."""
    whole = r'<span class="edge"><span class="nb">\1</span><wbr>\2</span>'
    return re.sub(r"(\S+?-&gt;)(\S+)", whole, escape(text))


def percent(value: float | None, sign: bool = False) -> str:
    """A fraction as per cent with one decimal and no unit; a real minus sign; an en dash when there is no value."""
    if value is None or math.isnan(value):
        return ABSENT
    shown = f"{100 * value:+.1f}" if sign else f"{100 * value:.1f}"
    shown = shown.removeprefix("+").removeprefix("-") if float(shown) == 0 else shown
    return shown.replace("-", "−")


def unit(value: float | None) -> str:
    """A fraction as per cent with its unit, which stays on the same line."""
    shown = percent(value)
    return shown if shown == ABSENT else f"{shown}\u00a0%"


def signed(value: float | None, places: int, plus: bool = False) -> str:
    """A number with so many decimals; a real minus sign, none before zero; an en dash when there is no value."""
    if value is None or math.isnan(value):
        return ABSENT
    shown = f"{value:{'+' if plus else ''},.{places}f}"
    return (
        shown.lstrip("+-")
        if not math.isinf(value) and float(shown.replace(",", "")) == 0
        else shown.replace("-", "−")
    )


def decimals(scale: float) -> int:
    """Digits after the point at which numbers up to `scale` show about three digits, at most 4."""
    return min(4, max(0, 2 - math.floor(math.log10(scale)))) if scale > 0 and math.isfinite(scale) else 2


def count(value: int) -> str:
    """A count with thousands separated: 1,640."""
    return f"{value:,}"


def span_of(values: Sequence[float]) -> str:
    """The range of some fractions in per cent: `0.0 to 5.0`."""
    return f"{percent(min(values))} to {percent(max(values))}" if values else ABSENT


def duration(seconds: float) -> str:
    """Seconds in the unit a person would say."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def scroll(inside: str, what: str, css: str = "scroll") -> str:
    """A box that scrolls sideways by itself, reachable by keyboard."""
    attributes = f'class="{css}" tabindex="0" role="group" aria-label="{escape(what)}, scrolls sideways"'
    return f"<div {attributes}>{inside}</div>"


def section(anchor: str, title: str, short: str, *parts: str) -> str:
    """A section of the page with its heading; `short` is its name in the list of links on top."""
    heading = f'<h2 id="{anchor}-t">{escape(title)}</h2>'
    attributes = f'id="{anchor}" data-short="{escape(short)}" aria-labelledby="{anchor}-t"'
    return f"<section {attributes}>{heading}{''.join(parts)}</section>"


def rich(text: str) -> str:
    """A person's sentence: escaped, with `backquoted` pieces set as code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(" ".join(text.split())))


def paragraph(text: str, css: str = "") -> str:
    """Plain text as a paragraph; blank lines in it start new ones."""
    attribute = f' class="{css}"' if css else ""
    return "".join(
        f"<p{attribute}>{rich(piece)}</p>" for piece in re.split(r"\n\s*\n", text) if piece.strip()
    )


def figure(svg: str, caption: str, wide: bool = False) -> str:
    """A picture with its caption (text). It shrinks with the page; a `wide` one keeps its size and scrolls."""
    picture = scroll(svg, "figure") if wide else svg
    css = "fig wide" if wide else "fig"
    said = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f'<figure class="{css}">{picture}{said}</figure>'


def names(chosen: Sequence[str], shown: int = 24) -> str:
    """Component names as a list of tags; past `shown` the rest folds away."""
    if not chosen:
        return '<span class="none">none</span>'
    tags = [f"<code>{escape(name)}</code>" for name in chosen]
    if len(tags) <= shown:
        return f'<span class="names">{" ".join(tags)}</span>'
    rest = (
        f"<details><summary>and {count(len(tags) - shown)} more</summary>{' '.join(tags[shown:])}</details>"
    )
    return f'<span class="names">{" ".join(tags[:shown])}</span>{rest}'


def definitions(entries: Iterable[tuple[str, str]]) -> str:
    """Terms and what they say; the second of each pair is HTML already safe."""
    inside = "".join(f"<div><dt>{escape(term)}</dt><dd>{said}</dd></div>" for term, said in entries)
    return f"<dl>{inside}</dl>" if inside else ""
