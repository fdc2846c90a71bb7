"""From a matplotlib Figure to PNG bytes or to an inline SVG that follows the page's theme.

Figures are made without pyplot, so nothing global is kept: no current figure, no backend, and the style is
in force only inside `style()`.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from patchkit.report._html import escape, visible
from patchkit.report._palette import LIGHT

PNG_DPI = 160

_RC: dict[Any, Any] = {
    "font.family": ["DejaVu Sans"],
    "font.size": 9.0,
    "text.color": LIGHT["ink"],
    "text.usetex": False,
    "text.parse_math": False,
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "axes.facecolor": "none",
    "axes.edgecolor": LIGHT["line"],
    "axes.labelcolor": LIGHT["soft"],
    "axes.labelsize": 9.0,
    "axes.titlesize": 9.5,
    "axes.titlecolor": LIGHT["ink"],
    "axes.titlelocation": "left",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "grid.color": LIGHT["grid"],
    "grid.linewidth": 0.8,
    "xtick.color": LIGHT["soft"],
    "ytick.color": LIGHT["soft"],
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "xtick.major.size": 0.0,
    "ytick.major.size": 0.0,
    "xtick.minor.size": 0.0,
    "ytick.minor.size": 0.0,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "patchkit",
}

_SVG_METADATA = ("Date", "Creator", "Format", "Type")

_TAG = re.compile(r"<[^>]*>")
_STYLE = re.compile(r'style="[^"]*"')
_ROLE_OF = {value: role for role, value in LIGHT.items()}
_ROLE = re.compile("|".join(_ROLE_OF))
_ID = re.compile(r' id="([^"]*)"')
_REFERENCE = re.compile(r'(href="#|url\(#)([^")]*)')


@contextmanager
def style() -> Iterator[None]:
    """The house style of pictures, restored on the way out; usable as a decorator too."""
    with matplotlib.rc_context(_RC):
        yield


def label(text: str, limit: int = 40) -> str:
    """A user's text as a label: control characters made visible, at most `limit` characters."""
    shown = visible(text)
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


def figure_of(width: float, height: float) -> Figure:
    """An empty figure of so many inches, laid out so that labels fit."""
    return Figure(figsize=(width, height), layout="constrained")


def quiet_axes(axes: Axes, grid: str = "y") -> None:
    """Light grid lines behind the data along one axis, or "both"."""
    axes.grid(True, axis="both" if grid == "both" else "x" if grid == "x" else "y")
    axes.set_axisbelow(True)


def log_axis(axes: Axes, which: str) -> None:
    """A logarithmic axis, "x" or "y", with its numbers in plain text."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}"))


def ticks(count: int) -> list[int]:
    """At most 20 of the numbers 0 to `count` - 1, evenly apart."""
    step = next(
        step for step in (1, 2, 4, 8, 16, 32, 64, 128, 512, 2048, 8192, 32768, 131072) if count / step <= 20
    )
    return list(range(0, count, step))


def to_png(figure: Figure, dpi: int = PNG_DPI) -> bytes:
    """The figure as PNG on white paper."""
    buffer = io.BytesIO()
    with style(), _any_script():
        figure.savefig(buffer, format="png", dpi=dpi, facecolor=LIGHT["panel"], metadata={"Software": None})
    return buffer.getvalue()


def to_svg(figure: Figure, alt: str, prefix: str) -> str:
    """The figure as an `<svg>` element to put into a page.

    `alt` says in words what the picture shows. `prefix` keeps its ids apart from those of other pictures of
    the page. Colours become `var(--role)`; text stays text, in the page's font. A figure drawn anew from the
    same numbers gives the same bytes.
    """
    buffer = io.StringIO()
    with style(), _any_script():
        figure.savefig(buffer, format="svg", facecolor="none", metadata=dict.fromkeys(_SVG_METADATA))
    # matplotlib's own style element would hold for the whole page: the page's style sheet says the same for `.fig`.
    unwanted = r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->"
    svg = re.sub(unwanted, "", buffer.getvalue(), flags=re.DOTALL)
    svg = svg[svg.index("<svg") :].strip()
    # Only tags are rewritten: what stands between them may be a user's text that looks like an attribute.
    used = {hit.group(2) for tag in _TAG.finditer(svg) for hit in _REFERENCE.finditer(tag.group())}
    svg = _TAG.sub(lambda tag: _page_tag(tag.group(), prefix, used), svg)
    width, height = figure.get_size_inches()
    size = f'width="{width * 96:.0f}" height="{height * 96:.0f}" viewBox="0 0 {width * 72:g} {height * 72:g}"'
    return f'<svg {size} role="img" aria-label="{escape(alt)}">{svg[svg.index(">") + 1 :]}'


def _page_tag(tag: str, prefix: str, used: set[str]) -> str:
    """One SVG tag with theme colours, and with its id and references made the page's own; unused ids go."""
    tag = _STYLE.sub(
        lambda found: _ROLE.sub(lambda hit: f"var(--{_ROLE_OF[hit.group()]})", found.group()), tag
    )
    tag = _ID.sub(lambda hit: f' id="{prefix}-{hit.group(1)}"' if hit.group(1) in used else "", tag)
    return _REFERENCE.sub(lambda hit: f"{hit.group(1)}{prefix}-{hit.group(2)}", tag).replace(
        "xlink:href", "href"
    )


@contextmanager
def _any_script() -> Iterator[None]:
    """A token in a script the font lacks is drawn as a box in the PNG; that is no reason to warn the reader."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph \d+ .* missing from font", category=UserWarning)
        yield
