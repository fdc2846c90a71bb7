"""What tests of report pages look at: whether tags close and load nothing, the text, the tables, the sections."""

from __future__ import annotations

import html
import re
from html.parser import HTMLParser

EVIL = "<script>alert('x')</script> & \"q\" $x$ --> </style>"
_LONE = {"meta", "br", "wbr", "link", "img", "input", "hr"}


class Tags(HTMLParser):
    """Checks that tags close in order, and keeps what would load or run something."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.feed(source)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = dict(attrs)
        wanted = [value for name, value in attrs if name in ("src", "href") and value]
        self.loads += [value for value in wanted if not value.startswith(("#", "data:image/png"))]
        self.loads += [name for name in names if name.startswith("on")] + [tag] * (
            tag in ("script", "iframe")
        )
        if tag not in _LONE:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def check_page(page: str) -> None:
    """Fails where a page is not well formed, would load or run something, or has an id twice."""
    assert Tags(page).loads == []
    assert "<script" not in page and page.count("</style>") == 1
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert not re.search(r"\b(nan|inf|None(?! of))\b", text(page))


def text(page: str) -> str:
    """What a reader reads, without the pictures."""
    body = re.sub(r"<svg.*?</svg>|<style.*?</style>", "", page, flags=re.DOTALL)
    # An edge's name is one word, whatever tags are in it.
    body = re.sub(r'<span class="(edge|nb)">|<wbr>|(?<=;)</span>', "", body)
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", body)).split())


def section(page: str, anchor: str) -> str:
    """The HTML of one section."""
    return page.split(f'<section id="{anchor}"')[1].split("</section>")[0]


def sections(page: str) -> list[str]:
    """Ids of the sections, in order."""
    return re.findall(r'<section id="([^"]+)"', page)


def tables(page: str, anchor: str) -> list[list[list[str]]]:
    """Tables of a section, as rows of cells; a line break in a cell is a space."""
    found = []
    for table in section(page, anchor).split("<table")[1:]:
        rows = re.findall(r"<tr.*?</tr>", table.split("</table>")[0])
        cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in rows]
        found.append([[_plain(cell) for cell in row] for row in cells])
    return found


def pictures(page: str, anchor: str) -> list[str]:
    """The SVG elements of a section."""
    return re.findall(r"<svg.*?</svg>", section(page, anchor), flags=re.DOTALL)


def _plain(cell: str) -> str:
    return " ".join(html.unescape(re.sub(r"<[^>]*>", "", cell.replace("<br>", " "))).split())
