"""The page of causal scrubbing: bars, buckets and warnings against the numbers of the hypotheses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from patchkit.errors import InputError
from patchkit.report import scrubbing_page, write_report
from patchkit.report._scrub_plot import one_scale, recovered_figure, spread_figure
from patchkit.report._scrub_sections import headline, warnings
from patchkit.results.convention import Convention
from patchkit.results.formats import write_model
from patchkit.results.scrubbing import ScrubbedInput, Scrubbing, ScrubNode, ScrubResult
from tests.report_pages import EVIL, check_page, pictures, sections, tables, text

KEPT = Convention(metric="logit-diff", direction="noise", ablation="resample", positions="of each node")


def node(name: str, **changed: Any) -> ScrubNode:
    fields: dict[str, Any] = {
        "name": name, "key": f"the `{name}` of a prompt", "nodes": ["a1.h0@last", "a1.h3@last"], "edges": [],
        "positions": "last", "children": [], "occurrences": 1, "buckets": 10, "bucket_sizes": (2, 7.5, 21),
        "singletons": 0, "empty": 0, "draws": 40, "vacuous": 0,
    }  # fmt: skip
    return ScrubNode(**(fields | changed))


def result(name: str, recovered: float | None, **changed: Any) -> ScrubResult:
    scrubbed = -1.0 + 5.0 * (recovered or 0.0)
    fields: dict[str, Any] = {
        "hypothesis": name,
        "claim": f"heads carry the {name}",
        "model": "varbind-llama",
        "convention": KEPT,
        "samples": 2,
        "seed": 3,
        "children": ["answer"],
        "nodes": [node("answer", children=["carried"]), node("carried", singletons=4, vacuous=3)],
        "pool": 40,
        "inputs": [
            ScrubbedInput(id=f"p{i}", model=4.0, random=-1.0, scrubbed=scrubbed, spread=0.5)
            for i in range(20)
        ],
        "model_metric": 4.0,
        "random_metric": -1.0,
        "scrubbed_metric": scrubbed,
        "scrubbed_interval": (scrubbed - 0.2, scrubbed + 0.2),
        "recovered": recovered,
        "recovered_interval": None if recovered is None else (recovered - 0.04, recovered + 0.04),
        "gap": 0.17,
        "kept": 0.95,
        "quantiles": (scrubbed - 2, scrubbed - 1, scrubbed, scrubbed + 1, scrubbed + 2),
        "forwards": 120.0,
        "notes": [],
    }
    return ScrubResult(**(fields | changed))


def build(**changed: Any) -> Scrubbing:
    everything = result("everything", 1.0, nodes=[node("prompt", vacuous=40)], notes=["nothing was tested"])
    fields: dict[str, Any] = {
        "question": "What do `heads` carry?",
        "results": [result("value", 0.9), result("name", -0.03), result("place", 0.08), everything],
        "findings": ["The intervals lie apart."],
        "command": "patchkit study scrubbing --out DIR",
        "seconds": 12.0,
    }
    return Scrubbing(**(fields | changed))


def test_the_page_is_whole_and_has_the_numbers() -> None:
    page = scrubbing_page(build())
    check_page(page)
    assert sections(page) == ["question", "recovered", "findings", "nodes", "notes", "conventions", "again"]
    assert len(pictures(page, "recovered")) == 2
    (table,) = tables(page, "recovered")
    assert table[1] == ["value", "90.0", "86.0 to 94.0", "4.00", "−1.00", "3.50", "17.0", "95.0", "3.8"]
    assert table[4][-1] == "100.0"
    buckets = tables(page, "nodes")
    assert len(buckets) == 4
    assert buckets[0][2] == [
        "carried",
        "the carried of a prompt",
        "a1.h0@last a1.h3@last",
        "1",
        "10",
        "2 / 8 / 21",
        "4",
        "0",
        "7.5",
    ]
    said = text(page)
    for words in (
        "Causal scrubbing of varbind-llama",
        "'value' recovers 90.0 % of the behaviour (95 % interval 86.0 % to 94.0 %), 'place' 8.0 %; 'name' −3.0 %; "
        "'everything' 100.0 %.",
        "so they tested nothing: everything.",
        "everything: nothing was tested",
        "heads carry the value",
        "patchkit study scrubbing --out DIR",
        "2 scrubbed run(s) of each reference input; seed 3.",
    ):
        assert words in said


def test_bars_and_boxes_stand_at_their_numbers() -> None:
    bars = recovered_figure(build()).axes[0]
    widths = [bar.get_width() for bar in bars.patches]
    assert widths == pytest.approx([90.0, -3.0, 8.0, 100.0])
    ends = [
        np.asarray(line.get_xdata()).tolist() for line in bars.lines if len(np.asarray(line.get_xdata())) == 2
    ]
    assert ends[0] == pytest.approx([86.0, 94.0])
    boxes = spread_figure(build()).axes[0]
    assert [(bar.get_x(), bar.get_width()) for bar in boxes.patches][0] == pytest.approx((2.5, 2.0))


def test_one_hypothesis_and_an_undefined_share() -> None:
    one = build(results=[result("value", 0.9)], findings=[])
    check_page(scrubbing_page(one))
    assert headline(one).startswith("Scrubbed under the hypothesis 'value', the model keeps 90.0")
    none = build(results=[result("value", None, model_metric=-1.0, gap=None, kept=None, nodes=[])])
    page = scrubbing_page(none)
    check_page(page)
    assert "No hypothesis recovers a defined share" in text(page)
    assert any("This says little" in each for each in warnings(none))
    assert "nodes" not in sections(page)
    assert "undefined" in pictures(page, "recovered")[0]


def test_hypotheses_on_other_inputs_are_not_drawn_on_one_axis() -> None:
    other = build(results=[result("value", 0.9), result("name", 0.1, pool=99)])
    assert one_scale(build()) and not one_scale(other)
    page = scrubbing_page(other)
    assert len(pictures(page, "recovered")) == 1
    assert any("do not compare" in each for each in warnings(other))


def test_edges_that_a_node_stands_for_are_listed() -> None:
    edges = [f"a0.h{i}->a1.h0<q>" for i in range(9)]
    page = scrubbing_page(build(results=[result("value", 0.9, nodes=[node("x", nodes=[], edges=edges)])]))
    check_page(page)
    row = tables(page, "nodes")[0][1]
    assert row[2].startswith("a0.h0->a1.h0<q>") and row[2].endswith("and 3 more")


def test_text_of_users_is_only_text() -> None:
    evil = result(EVIL, 0.5, claim=EVIL, model=EVIL, notes=[EVIL], children=[EVIL],
                  convention=KEPT.model_copy(update={"metric": EVIL}),
                  nodes=[node(EVIL, key=EVIL, nodes=[EVIL], children=[EVIL])])  # fmt: skip
    check_page(
        scrubbing_page(build(question=EVIL, results=[evil], findings=[EVIL], command=EVIL), place=EVIL)
    )


def test_a_directory_of_scrubbing_gets_its_page_and_picture(tmp_path: Path, make: Any) -> None:
    run = tmp_path / "run"
    build().save(run)
    write_model(run / "manifest.json", make.manifest(command="study"))
    assert write_report(run) == run / "report.html"
    assert {path.name for path in run.glob("*.png")} == {"scrubbing.png"}
    build(results=[]).save(run)
    with pytest.raises(InputError, match=r"scrubbing\.json: field results is empty"):
        write_report(run)
