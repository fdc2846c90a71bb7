"""The repository's page of a scoreboard: markdown as GitHub shows it, with its pictures in a directory beside it.

The same board gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from patchkit.files import atomic_write
from patchkit.report import _scoreboard_tables as tables
from patchkit.report._canvas import to_png
from patchkit.report._grid import Grid, plain, sentence
from patchkit.report._html import visible
from patchkit.report._scoreboard_page import check
from patchkit.report._scoreboard_pictures import Picture, pictures
from patchkit.report._scoreboard_words import FAMILIES, TITLE, answers, conventions, counted, headline
from patchkit.results.scoreboard import Scoreboard

#: The page's name without its suffix, and that of the directory of its pictures.
NAME = "ground-truth"
# GitHub shows pictures some 900 pixels wide, and each version of them stays in the repository.
_DPI = 110


def write_scoreboard_docs(directory: Path | str, docs: Path | str) -> Path:
    """Writes ground-truth.md and ground-truth/*.png into `docs` from a run's scoreboard.json alone; returns the page.

    Pictures there is no data for any more are removed. Raises InputError for a missing, malformed or empty file and
    RunError when writing fails.
    """
    board, docs = Scoreboard.load(directory), Path(docs)
    check(board)
    shown = pictures(board)
    drawn = {f"{each.name}.png": to_png(each.draw(), dpi=_DPI) for each in shown}
    page = scoreboard_markdown(board, shown)
    beside = docs / NAME
    for old in sorted(beside.glob("*.png")) if beside.is_dir() else ():
        if old.name not in drawn:
            old.unlink()
    for name, picture in drawn.items():
        atomic_write(beside / name, picture)
    atomic_write(docs / f"{NAME}.md", page)
    return docs / f"{NAME}.md"


def scoreboard_markdown(board: Scoreboard, shown: Sequence[Picture]) -> str:
    """The page's text."""
    versions = ", ".join(f"{plain(name)} {plain(number)}" for name, number in board.versions.items())
    blocks = [
        f"# {TITLE}",
        f"{plain(board.date)}; {versions}. {sentence(f'Made by `{board.command}` and')} "
        "`scripts/write_ground_truth_docs.py`; not edited by hand.",
        f"**{plain(headline(board))}**",
        sentence(board.question),
        *_part("What was found", [_bullets(board.findings)]),
        *_part("Which method for which question", _which(board)),
        *_part("Every method in numbers", _means(board)),
        *(block for each in shown for block in _part(each.title, [_image(each), sentence(each.caption)])),
        *_part("What is missed, and why", _missed(board)),
        *_part("The cases", _cases(board)),
        *_part("How to read the numbers", [_terms([*conventions(board), *board.parameters.items()])]),
        "## Make it again",
        f"```\n{visible(board.command)}\n```",
    ]
    return "\n\n".join(block.strip("\n") for block in blocks if block) + "\n"


def _part(title: str, blocks: Iterable[str]) -> list[str]:
    held = [block for block in blocks if block]
    return [f"## {title}", *held] if held else []


def _which(board: Scoreboard) -> list[str]:
    table = tables.leading(board)
    told = _terms(board.best.items() or answers(board))
    ask = "For a model and a budget of your own: `patchkit recommend --model M --budget FORWARDS`."
    return [told, _markdown(table), ask if told else ""]


def _means(board: Scoreboard) -> list[str]:
    blocks = [_markdown(tables.means(board, "all"))]
    blocks += [
        _folded(f"{family} cases alone", _markdown(tables.means(board, family))) for family in board.families
    ]
    return [*blocks, _folded("What each method is", _terms(board.methods.items()))]


def _missed(board: Scoreboard) -> list[str]:
    shown = [_markdown(table) for what in tables.WHATS if (table := tables.missed(board, what)) is not None]
    found = _folded("What AtP misses and AtP* finds", _markdown(tables.recovery(board)))
    return [_terms(board.kinds.items()), *shown, found] if shown else []


def _cases(board: Scoreboard) -> list[str]:
    blocks = []
    for family in board.families:
        held = [case for case in board.cases if case.family == family]
        rules = dict.fromkeys(sentence(case.truth_rule) for case in held if case.truth_rule)
        inside = "\n\n".join([*rules, _markdown(tables.cases(board, family))])
        blocks.append(_folded(f"{counted(len(held), 'case')}, {FAMILIES[family]}", inside))
    return blocks


def _image(drawn: Picture) -> str:
    alt = plain(drawn.alt).replace("\n", " ")
    return f"![{alt}]({NAME}/{drawn.name}.png)"


def _markdown(table: Grid | None) -> str:
    return "" if table is None else table.markdown()


def _bullets(sentences: Iterable[str]) -> str:
    return "\n".join(f"- {sentence(each)}" for each in sentences)


def _terms(entries: Iterable[tuple[str, str]]) -> str:
    return "\n".join(f"- **{plain(term)}**: {sentence(said)}" for term, said in entries)


def _folded(title: str, inside: str) -> str:
    """GitHub shows markdown inside of it as such where blank lines stand around."""
    return (
        f"<details><summary>{plain(title)}</summary>\n\n{inside.strip()}\n\n</details>"
        if inside.strip()
        else ""
    )
