"""The page of the attribution-recall study: its tables against the study's numbers, and where AtP beats AtP*."""

from __future__ import annotations

import html
import math
import re
from pathlib import Path
from typing import Any

import pytest

from patchkit.errors import InputError
from patchkit.report import recall_page, write_report
from patchkit.report._canvas import to_svg
from patchkit.report._recall_plots import setting_figure
from patchkit.results.convention import Convention
from patchkit.results.formats import write_model
from patchkit.results.recall import MethodRecall, RecallSetting, RecallStudy, thin

EVIL = "<script>alert('x')</script> & \"q\" $x$ --> </style>"
CONVENTION = Convention(metric="logit-diff", direction="noise", ablation="resample", positions="each")


def method(name: str, aggregate: float, preparation: float, nodes: int = 400, pairs: int = 4) -> MethodRecall:
    ranks, cost = thin([preparation + min(nodes, rank**0.9 * aggregate) for rank in range(1, nodes + 1)])
    return MethodRecall(
        name=name, preparation=preparation, aggregate=aggregate, unprepared=0.875 * aggregate,
        parameters="p = 0.25" if name == "subsampling" else "",
        per_pair=[aggregate * (1 + 0.5 * (i % 2 == (name == "atp"))) for i in range(pairs)], ranks=ranks, cost=cost,
    )  # fmt: skip


def setting(node_class: Any, evidence: Any, atp: float, star: float, **changed: Any) -> RecallSetting:
    pairs = 4 if evidence == "pair" else 1
    methods = [
        method("iterative", 60.0, 0.0, pairs=pairs),
        method("subsampling", 9.5, 256.0, pairs=pairs),
        method("atp", atp, 3.0, pairs=pairs),
        method("atp-star", star, 8.5, pairs=pairs),
    ]
    fields: dict[str, Any] = {
        "model": "ioi-gpt2",
        "material": "ioi",
        "evidence": evidence,
        "node_class": node_class,
        "kinds": ["q", "k", "v", "z"] if node_class == "attention nodes" else ["neuron"],
        "convention": CONVENTION,
        "nodes": 400,
        "recalled": [400] * pairs,
        "pairs": 4,
        "methods": methods,
    }
    return RecallSetting(**(fields | changed))


def study(**changed: Any) -> RecallStudy:
    fields: dict[str, Any] = {
        "settings": [
            setting("attention nodes", "pair", 4.0, 2.0),
            setting("attention nodes", "distribution", 3.0, 3.5, material="random-text"),
            setting("neuron nodes", "pair", 1.5, 1.25),
        ],
        "seeds": {"pairs": 7},
        "parameters": {"subsampling": "p = 0.01, 256 draws"},
        "left_out": ["nothing but `this`"],
        "findings": ["AtP* is the better order."],
        "command": "patchkit study attribution-recall --out DIR",
        "seconds": 75.0,
    }
    return RecallStudy(**(fields | changed))


def text(page: str) -> str:
    body = re.sub(r"<svg.*?</svg>|<style.*?</style>", "", page, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", body)).split())


def tables(page: str, anchor: str) -> list[list[list[str]]]:
    found = page.split(f'<section id="{anchor}"')[1].split("</section>")[0].split("<table")[1:]
    return [
        [
            [
                html.unescape(re.sub(r"<[^>]*>", " ", cell)).strip()
                for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)
            ]
            for row in re.findall(r"<tr.*?</tr>", table.split("</table>")[0])
        ]
        for table in found
    ]


def test_sections_and_pictures() -> None:
    page = recall_page(study())
    assert re.findall(r'<section id="([^"]+)"', page) == [
        "aggregates",
        "curves",
        "rivals",
        "findings",
        "conventions",
        "again",
    ]
    assert page.count("<svg") == 3
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    said = text(page)
    for words in (
        "AtP* is the better order.",
        "p = 0.01, 256 draws",
        "seed of pairs 7",
        "nothing but this",
        "1 min 15 s",
    ):
        assert words in said


def test_where_plain_atp_wins_is_said_on_top() -> None:
    said = text(recall_page(study()))
    assert (
        "AtP beats AtP* in 1 of 3 settings: ioi-gpt2, random-text, distribution, attention nodes (3.00 against 3.50)."
    ) in said
    means = [math.sqrt(2.0 * 3.5), math.sqrt(4.0 * 3.0)]
    assert (
        f"over the oracle's: AtP* {means[0]:.2f} and AtP {means[1]:.2f} on attention nodes; AtP* 1.25" in said
    )
    never = study(settings=[setting("neuron nodes", "pair", 2.0, 1.5)])
    assert "AtP is not cheaper than AtP* in any of 1 settings." in text(recall_page(never))


def test_a_search_that_is_best_is_named() -> None:
    best = study(settings=[setting("neuron nodes", "pair", 20.0, 15.0)])
    assert "AtP* 15.00 and AtP 20.00 on neuron nodes (least: subsampling 9.50)." in text(recall_page(best))


def test_the_tables_hold_the_aggregates() -> None:
    page = recall_page(study())
    attention, neurons = tables(page, "aggregates")
    assert attention[0] == ["setting", "iterative", "subsampling", "atp", "atp-star"]
    assert [cell.split()[0] for cell in attention[1][1:]] == ["60.00", "9.50", "4.00", "2.00"]
    assert attention[1][1] == "60.00"
    assert "order 3.50" in attention[1][3]
    assert "p = 0.25" in attention[1][2]
    assert attention[-1] == [
        "geometric mean",
        "60.00",
        "9.50",
        f"{math.sqrt(12):.2f}",
        f"{math.sqrt(7):.2f}",
    ]
    assert len(neurons) == 2
    bold = re.findall(
        r'<td class="n key">([\d.]+)<br>', page.split('<section id="aggregates"')[1].split("</section>")[0]
    )
    assert bold == ["2.00", "3.00", "1.25"]
    (rivals,) = tables(page, "rivals")
    assert [row[1:] for row in rivals[2:]] == [
        ["4.00", "2.00", "3.50", "1.75", "0 of 4"],
        ["3.00", "3.50", "2.62", "3.06", "–"],
        ["1.50", "1.25", "1.31", "1.09", "2 of 4"],
    ]


def test_a_method_that_was_not_run_is_a_dash() -> None:
    full = setting("neuron nodes", "pair", 2.0, 1.5)
    part = full.model_copy(update={"methods": full.methods[:3], "model": "varbind-llama"})
    page = recall_page(study(settings=[full, part]))
    (table,) = tables(page, "aggregates")
    assert table[2][-1] == "–" and table[-1][-1] == "–"
    only = text(recall_page(study(settings=[part])))
    assert "AtP and AtP* were not run on the same setting" in only


def test_each_method_keeps_its_line_in_every_picture() -> None:
    one = setting("neuron nodes", "pair", 2.0, 1.5)
    names = ["iterative", "subsampling", "atp", "atp-star"]
    whole = to_svg(setting_figure(one, names), "alt", "a")
    assert "oracle, 1.00" in whole and "atp-star, 1.50" in whole and "$" not in whole
    colours = re.findall(r"stroke: var\(--(s\d)\)", to_svg(
        setting_figure(one.model_copy(update={"methods": one.methods[2:3]}), names), "alt", "b"))  # fmt: skip
    assert set(colours) == {"s2"}


def test_text_is_only_text(tmp_path: Path) -> None:
    page = recall_page(
        study(
            settings=[setting("neuron nodes", "pair", 2.0, 1.5, model=EVIL, kinds=[EVIL])],
            findings=[EVIL], left_out=[EVIL], parameters={EVIL: EVIL}, seeds={EVIL: 1}, command=EVIL,
        ),
        place=EVIL,
    )  # fmt: skip
    assert "<script" not in page and page.count("</style>") == 1


def test_a_directory_of_a_study_gets_its_page(tmp_path: Path, make: Any) -> None:
    run = tmp_path / "run"
    study().save(run)
    write_model(run / "manifest.json", make.manifest(command="study"))
    assert write_report(run) == run / "report.html"
    assert {path.name for path in run.iterdir()} == {
        "recall.json",
        "manifest.json",
        "report.html",
        "recall.png",
    }
    assert "patchkit rerun run" in (run / "report.html").read_text(encoding="utf-8")


def test_a_study_of_nothing_is_refused(tmp_path: Path) -> None:
    study(settings=[]).save(tmp_path)
    with pytest.raises(InputError, match=r"recall\.json: field settings is empty"):
        write_report(tmp_path)
