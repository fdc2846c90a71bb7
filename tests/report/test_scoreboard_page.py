"""The page of the ground-truth study and the repository's: their tables against the board, its gaps, its extremes."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from patchkit.errors import InputError
from patchkit.report import scoreboard_page, write_report, write_scoreboard_docs
from patchkit.report._canvas import to_png
from patchkit.report._grid import Entry, Grid, name, plain, sentence
from patchkit.report._scoreboard_docs import scoreboard_markdown
from patchkit.report._scoreboard_maps import heat_figure, mapped
from patchkit.report._scoreboard_pictures import pictures
from patchkit.report._scoreboard_plots import costs_figure, curves_figure, looks
from patchkit.report._scoreboard_tables import cases as cases_table
from patchkit.report._scoreboard_tables import leading, means, missed, recovery
from patchkit.report._scoreboard_words import answers, headline
from patchkit.results.formats import write_model
from patchkit.results.scoreboard import Recovery, Scoreboard
from tests.report import scoreboard_example as made
from tests.report_pages import EVIL, check_page, section, sections, tables, text

EVERY = [
    "findings", "which", "methods", "heat-nodes", "heat-edges", "overlap", "curves", "costs", "missed", "cases", "notes",
    "reading", "again",
]  # fmt: skip
FEW = ("exact", "atp", "atp-star", "exact edges", "eap", "acdc")


def small(**changed: Any) -> Scoreboard:
    """Two programs in two shapes, one forced and one natural case; six methods."""
    kept = [
        made.case(f"{title}-{shape}", title, "handmade", methods=FEW)
        for title in ("lookup", "majority")
        for shape in ("llama", "gqa")
    ]
    kept += [made.case("siit-a", "a", "siit", methods=FEW), made.case("ioi", "ioi", "natural", methods=FEW)]
    fields = {"methods": {method: f"what `{method}` is" for method in FEW}}
    return made.board(changed.pop("cases", kept), **(fields | changed))


@pytest.fixture(scope="module")
def full() -> Scoreboard:
    return made.board()


@pytest.fixture(scope="module")
def page() -> str:
    return scoreboard_page(small())


def test_the_page_is_whole_and_has_the_numbers(page: str) -> None:
    check_page(page)
    assert sections(page) == EVERY
    board, table = small(), tables(page, "methods")[0]
    assert table[0] == [
        "",
        "forwards",
        "AUROC",
        "AUROC of one pair",
        "",
        "circuit at the true size",
        "all sizes",
    ]
    rows = {row[0]: row[1:] for row in table[2:]}
    assert [row.split()[0] for row in rows] == ["exact", "atp", "atp-star", "exact", "eap", "acdc"]
    mean = board.mean_of("atp", "node auroc")
    assert mean is not None and rows["atp nodes"][1].startswith(f"{mean.mean:.3f} ")
    assert rows["acdc edges"][4:7] == ["–", "–", "–"] and rows["acdc edges"][-1] == "–"
    said = text(page)
    for words in (
        "Over 6 cases whose circuit is known, nodes are ranked best by",
        "Of nodes atp-star is nearly as good as exact patching.",
        "patchkit study ground-truth --out DIR",
        "1 h 2 min",
        "2026-11-27",
        "patchkit 0.1.0, torch 2.13.0",
        "what atp is",
        "of siit cases: as it was made",
        "95 % bootstrap over programs or tasks",
    ):
        assert words in said


def test_each_family_has_a_table_of_its_own(page: str) -> None:
    found = tables(page, "methods")
    assert len(found) == 4
    siit = small().mean_of("eap", "edge auroc", "siit")
    assert siit is not None and siit.interval is None
    rows = {row[0]: row[1:] for row in found[2][2:]}
    # One case has no interval.
    assert rows["eap edges"][3] == f"{siit.mean:.3f}"


def test_misses_are_summed_over_cases_and_by_kind(page: str) -> None:
    board, found = small(), tables(page, "missed")
    assert len(found) == 3
    assert found[0][0] == ["method", *made.KINDS, "nothing planted"]
    rows = {row[0]: row[1:] for row in found[0][1:]}
    # Two of a kind in each of six cases.
    assert rows["exact"][list(made.KINDS).index("backup")] == "12/12"
    assert rows["exact"][0] == "0/12" and rows["atp"][0] == "12/12"
    why = text(section(page, "missed"))
    assert all(said in why for said in made.KINDS.values())
    assert "mask" not in rows and missed(board, "inputs") is not None


def test_what_atp_star_finds_of_what_atp_misses_is_listed() -> None:
    one = Recovery(
        case="lookup-gqa",
        kind="backup",
        missed=["a0.h1", "m2"],
        recovered=["m2"],
        left=["a0.h1"],
        why="it waits",
    )
    board = small(recovery=[one])
    table = recovery(board)
    assert table is not None
    shown = [(entry.text, entry.small) for entry in table.rows[0]]
    assert shown == [("lookup-gqa", "backup"), ("a0.h1, m2", ""), ("m2", ""), ("a0.h1", "it waits")]
    assert table.markdown().strip() in scoreboard_markdown(board, []) and recovery(small()) is None


def test_cases_say_what_is_planted(page: str) -> None:
    handmade, siit, natural = tables(page, "cases")
    assert [len(table) - 1 for table in (handmade, siit, natural)] == [4, 1, 1]
    row = handmade[2]
    assert row[:2] == ["lookup-gqa gqa", "what lookup plants"]
    assert row[3:8] == ["3 x 4 (2)", "15", "4", "412", "18"] and row[-1] == "1.000"
    assert "2 silent" in handmade[3][5] and "3 unlabelled" in siit[1][6]


def test_bold_is_the_best_of_a_column() -> None:
    board = small()
    table = means(board, "all")
    assert table is not None
    place = list(table.columns).index("faithful")
    bold = [row[0].text for row in table.rows if row[place].bold]
    by_method = {m: found.mean for m in FEW if (found := board.mean_of(m, "faithfulness")) is not None}
    assert bold == [min(by_method, key=lambda method: abs(1 - by_method[method]))]
    cmd = list(table.columns).index("CMD")
    assert [row[0].text for row in table.rows if row[cmd].bold] == ["exact edges"]


def test_who_leads_follows_from_the_numbers_alone() -> None:
    board = small()
    assert "edges are ranked best by exact edges" in headline(board)
    worse = [
        made.case(c.name, c.title, c.family, methods=("atp", "eap", "random edges")) for c in board.cases
    ]
    other = made.board(worse, methods={m: m for m in ("atp", "eap", "random edges")})
    assert "edges are ranked best by eap" in headline(other)
    table = leading(other)
    assert table is not None and table.rows[2][1].text == "eap"
    assert dict(answers(other))["Which edges matter?"].startswith("eap: AUROC of edges")


def test_the_map_has_a_number_for_each_case_and_method(full: Scoreboard) -> None:
    assert len(full.cases) == 55 and len(full.methods) == 22
    figure = heat_figure(full, "nodes")
    (axes,) = figure.axes
    numbers = [said.get_text() for said in axes.texts if said.get_text().isdigit()]
    assert len(numbers) == 55 * 22
    case = full.cases[0]
    row = case.of("exact")
    assert row is not None and row.nodes is not None and row.nodes.auroc is not None
    assert numbers[0] == f"{100 * row.nodes.auroc:.0f}"
    # Wide enough for its numbers: some 0.3 inches a column, 0.15 a row.
    width, height = figure.get_size_inches()
    assert width > 22 * 0.3 and height > 55 * 0.15
    assert mapped(full, "edges") == list(full.methods)


def test_methods_keep_their_look_and_no_two_share_one(full: Scoreboard) -> None:
    found = looks(full)
    for edges in (False, True):
        drawn = [tuple(found[m].values()) for m in full.methods if full.of_edges(m) == edges]
        assert len(drawn) == len(set(drawn))


def test_curves_are_means_over_what_is_there() -> None:
    board = small()
    axes = curves_figure(board).axes
    line = next(line for line in axes[0].lines if line.get_label() == "eap")
    # The first fraction has no circuit in any case.
    assert np.asarray(line.get_xdata()).tolist() == made.FRACTIONS[1:]
    assert np.asarray(line.get_ydata())[-1] == pytest.approx(0.75)
    assert axes[0].get_xscale() == "log" == costs_figure(board).axes[0].get_xscale()


def test_pictures_are_not_empty() -> None:
    from io import BytesIO

    from PIL import Image

    shown = pictures(small())
    assert [each.name for each in shown] == ["heat-nodes", "heat-edges", "overlap", "curves", "costs"]
    for each in shown:
        with Image.open(BytesIO(to_png(each.draw(), dpi=40))) as image:
            assert len(image.convert("RGB").resize((64, 64)).getcolors(4096) or []) > 20, each.name
        assert each.alt and each.caption


def bare() -> Scoreboard:
    """One case and one method, of which nothing was measured."""
    nothing = made.case("only", "only", "natural", methods=(), truth_faithfulness=None, shows="", silent=[])
    nothing = nothing.model_copy(update={"methods": [made.bare_row("mine")]})
    return made.board(
        [nothing], {"mine": ""}, findings=[], best={}, kinds={}, parameters={}, question="", fractions=[], versions={}
    )  # fmt: skip


@pytest.mark.parametrize(
    "board",
    [
        bare(),
        small(cases=[made.case("one", "one", "handmade", methods=FEW)]),
        small(
            cases=[
                made.case("a", "a", "natural", methods=FEW),
                made.case("b", "b", "natural", methods=("atp",)),
            ]
        ),
        small(methods={**dict.fromkeys(FEW, ""), "never run": "nothing has it"}),
    ],
    ids=["nothing", "one case", "no siit", "a method of no case"],
)
def test_gaps_are_left_out(board: Scoreboard) -> None:
    whole = scoreboard_page(board)
    check_page(whole)
    assert {"reading", "again", "cases"} <= set(sections(whole))
    written = scoreboard_markdown(board, [])
    assert not re.search(r"\b(nan|inf|None)\b", written)


def test_what_was_measured_by_nobody_has_no_section() -> None:
    whole = scoreboard_page(bare())
    assert sections(whole) == ["methods", "cases", "reading", "again"]
    assert "no method ranked anything" in text(whole) and pictures(bare()) == []
    assert cases_table(bare(), "siit") is None and means(bare(), "siit") is None


def evil() -> Scoreboard:
    rows = [made.node_row("atp", random.Random(0)).model_copy(update={"method": EVIL, "note": EVIL})]
    case = made.case(
        EVIL, EVIL, "natural", methods=(), task=EVIL, shows=EVIL, truth_rule=EVIL, architecture=EVIL
    )
    case = case.model_copy(update={"methods": rows})
    return made.board(
        [case], {EVIL: EVIL}, question=EVIL, findings=[EVIL], best={EVIL: EVIL}, kinds={EVIL: EVIL}, date=EVIL,
        versions={EVIL: EVIL}, parameters={EVIL: EVIL}, command=EVIL,
    )  # fmt: skip


def test_text_of_users_is_only_text() -> None:
    check_page(scoreboard_page(evil(), place=EVIL))
    board = evil()
    written = scoreboard_markdown(board, pictures(board))
    fenced = re.sub(r"```.*?```", "", written, flags=re.DOTALL)
    assert "<script" not in re.sub(r"`[^`]*`", "", fenced)


def test_a_grid_is_the_same_table_twice() -> None:
    grid = Grid(
        "A `b` | c",
        ["what", "n"],
        [[name("a|b", "x_y"), Entry("1", heat=0.5, bold=True)]],
        [("", 1), ("g", 1)],
    )
    assert grid.markdown() == (
        "A `b` \\| c\n\n| what | g: n |\n| --- | ---: |\n| a\\|b<br><sub>x\\_y</sub> | **1** |\n"
    )
    assert '<td class="n h key"' in grid.html() and "a|b<br><small>x_y</small>" in grid.html()
    assert plain("<b> & *x*") == "&lt;b&gt; &amp; \\*x\\*" and sentence("`<a>` _x_") == "`<a>` \\_x\\_"


def test_a_directory_of_a_run_gets_its_page_and_pictures(tmp_path: Path, make: Any) -> None:
    run = tmp_path / "run"
    board = small()
    board.save(run)
    assert Scoreboard.load(run) == board
    write_model(run / "manifest.json", make.manifest(command="study"))
    assert write_report(run) == run / "report.html"
    drawn = {"heat-nodes.png", "heat-edges.png", "overlap.png", "curves.png", "costs.png"}
    assert {path.name for path in run.glob("*.png")} == drawn
    assert "patchkit rerun run" in (run / "report.html").read_text(encoding="utf-8")
    bare().save(run)
    write_report(run)
    assert list(run.glob("*.png")) == []
    board.model_copy(update={"cases": []}).save(run)
    with pytest.raises(InputError, match=r"scoreboard\.json: field cases is empty"):
        write_report(run)


def test_the_repositorys_page_is_made_of_the_scoreboard_alone(tmp_path: Path) -> None:
    board = small()
    board.save(tmp_path / "run")
    docs = tmp_path / "docs"
    page = write_scoreboard_docs(tmp_path / "run", docs)
    assert page == docs / "ground-truth.md"
    written = page.read_text(encoding="utf-8")
    assert written.startswith(
        "# Which method finds a circuit that is known?\n\n2026-11-27; patchkit 0.1.0, torch 2.13.0."
    )
    linked = re.findall(r"\]\((ground-truth/[^)]+)\)", written)
    assert sorted(linked) == sorted(f"ground-truth/{path.name}" for path in (docs / "ground-truth").iterdir())
    for words in (
        "## Which method for which question",
        "## What is missed, and why",
        "**backup**",
        "| exact<br>",
    ):
        assert words in written
    first = {path: path.read_bytes() for path in docs.rglob("*") if path.is_file()}
    (docs / "ground-truth" / "old.png").write_bytes(b"")
    write_scoreboard_docs(tmp_path / "run", docs)
    assert {path: path.read_bytes() for path in docs.rglob("*") if path.is_file()} == first
    # Every row of every table has as many cells as its head.
    for block in re.findall(r"(?:^\|.*\|$\n?)+", written, flags=re.MULTILINE):
        counts = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(counts) == 1
