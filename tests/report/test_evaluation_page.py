"""The page of an evaluation: its verdicts, tables and pictures against the numbers, and what it leaves out."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from patchkit.report import _circuit_tests_sections as sections_of
from patchkit.report import evaluation_page, write_report
from patchkit.report._circuit_tests_plots import MOST_NODES, minimality_figure, repair_figure
from patchkit.report._evaluation_plots import curve_figure, faithfulness_figure
from patchkit.report._evaluation_words import checks, headline, main_run, warnings
from patchkit.report._palette import LIGHT
from patchkit.results.convention import Convention
from patchkit.results.evaluation import (
    CircuitRun,
    Completeness,
    Curve,
    Evaluation,
    Minimality,
    MinimalNode,
    Overlap,
    RandomTest,
    Removal,
    Repair,
    SelfRepair,
    Stability,
)
from patchkit.results.formats import write_model
from tests.report_pages import EVIL, check_page, pictures, sections, tables, text

PAIRS = 16
KEPT = Convention(
    metric="logit-diff", direction="noise", ablation="resample", positions="all", patching="edge"
)


def run(asked: int | None, left: int, share: float | None, width: float = 0.05, **changed: Any) -> CircuitRun:
    metric = -1.0 + 5.0 * (share or 0.0)
    fields: dict[str, Any] = {
        "requested": asked,
        "n_edges": left,
        "n_nodes": left // 3 + bool(left),
        "circuit_metric": metric,
        "faithfulness": share,
        "gap": abs(4.0 - metric),
        "per_pair": [metric] * PAIRS,
        "absolute": True,
        "ablation": "resample",
        "patching": "edge",
        "selection": "top",
        "interval": (metric - 5 * width, metric + 5 * width),
        "faithfulness_interval": None if share is None else (share - width, share + width),
    }
    return CircuitRun(**(fields | changed))


def curve(absolute: bool, **changed: Any) -> Curve:
    fractions = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0]
    asked = [round(1519 * k) for k in fractions]
    f = [0.0, 0.0, 0.11, 0.35, 0.62, 0.83, 0.91, 0.97, 0.99 if absolute else 1.21, 1.0]
    fields: dict[str, Any] = {
        "absolute": absolute, "selection": "top", "ablation": "resample", "patching": "edge", "fractions": fractions,
        "requested": asked, "n_edges": [0, 0, *asked[2:]], "f": f, "cpr": 1.034 if not absolute else 0.951,
        "cmd": 0.048 if absolute else 0.117, "cpr_log": 0.612, "cmd_log": 0.391,
    }  # fmt: skip
    return Curve(**(fields | changed))


def build(**changed: Any) -> Evaluation:
    """Six circuits, the smallest empty, every test run on the one of 200 edges."""
    rng = random.Random(0)
    nodes = [f"a{layer}.h{head}" for layer in range(3) for head in range(6)]
    fields: dict[str, Any] = {
        "convention": KEPT,
        "model": "varbind-llama",
        "source": "runs/edges",
        "method": "eap-ig-inputs",
        "graph_edges": 1519,
        "pair_ids": [f"p{i}" for i in range(PAIRS)],
        "clean_metric": 4.0,
        "corrupt_metric": -1.0,
        "circuits": [
            run(5, 0, 0.0),
            run(20, 9, 0.13, 0.08),
            run(50, 41, 0.56, 0.07),
            run(100, 92, 0.823),
            run(200, 190, 0.91, 0.03),
            run(400, 392, 1.12, 0.02),
        ],
        "curves": [curve(False), curve(True)],
        "completeness": Completeness(
            removals=[
                Removal(nodes=rng.sample(nodes, 4), how="random", circuit_metric=m - rng.random(), model_metric=m)
                for m in [3.5 * rng.random() for _ in range(20)]
            ]
            + [Removal(nodes=nodes[:3], how="greedy", circuit_metric=0.25, model_metric=3.5)],
            worst=3.25,
            worst_share=0.65,
        ),
        "minimality": Minimality(
            limit=0.01,
            nodes=[
                MinimalNode(node=name, change=-5 * 0.5 ** (i / 2), share=-(0.5 ** (i / 2)), removed=nodes[:2])
                for i, name in enumerate(nodes)
            ],
        ),
        "random": RandomTest(
            count=99,
            faithfulness=[0.12 * rng.random() - 0.03 for _ in range(97)] + [None, 0.3],
            n_edges=[0, 0, *range(97)],
            matched="the number of edges, before pruning",
            p_value=0.01,
        ),
        "overlaps": [
            Overlap(reference="exact", level="edge", found=190, truth=200, common=150, precision=0.789, recall=0.75,
                    jaccard=0.625, auroc=0.981),
            Overlap(reference="exact", level="node", found=30, truth=31, common=29, precision=0.967, recall=0.935,
                    jaccard=0.906),
        ],
        "stability": Stability(
            draws=12, requested=200, jaccard=0.843, interval=(0.71, 0.93),
            frequency=[(f"a0.h{i}->a1.h{i}<v>", 1 - i / 12) for i in range(8)],
        ),
        "repair": SelfRepair(
            group=["a2.h0", "a2.h1"], clean=4.0, knocked_out=3.1, expected=1.5, repaired=0.64,
            nodes=[
                Repair(node=name, before=-0.2, after=-0.2 - c, change=-c, interval=(-c - 0.1, -c + 0.1))
                for name, c in (("a2.h5", 0.9), ("a2.h4", 0.5), ("m2", -0.3), ("a1.h1", 0.01))
            ],
        ),
        "tested": 4,
        "cost": 812.5,
        "notes": ["The circuit of 5 edges asked for is empty after pruning."],
    }  # fmt: skip
    return Evaluation(**(fields | changed))


ALL = ["belief", "sizes", "curve", "random", "completeness", "minimality", "overlap", "stability", "repair", "notes",
       "protocol"]  # fmt: skip
TESTS = ("completeness", "minimality", "random", "stability", "repair")
BARE: dict[str, Any] = {name: None for name in TESTS} | {
    "curves": [],
    "overlaps": [],
    "notes": [],
    "tested": None,
}


@pytest.fixture(scope="module")
def page() -> str:
    return evaluation_page(build())


def test_the_page_is_whole_and_has_the_numbers(page: str) -> None:
    check_page(page)
    assert sections(page) == ALL
    assert [len(pictures(page, name)) for name in ("sizes", "curve", *TESTS)] == [1, 1, 1, 1, 1, 0, 1]
    (table,) = tables(page, "sizes")
    assert table[1] == ["5", "empty", "0.0 %", "0", "−1.00", "−1.25 to −0.75", "5.00", "0.0", "−5.0 to 5.0"]
    assert table[4] == ["100", "92", "6.1 %", "31", "3.12", "2.87 to 3.37", "0.88", "82.3", "77.3 to 87.3"]
    assert tables(page, "overlap")[0][1:] == [
        ["exact", "edges", "190", "200", "150", "78.9", "75.0", "0.625", "0.981"],
        ["exact", "nodes", "30", "31", "29", "96.7", "93.5", "0.906", "–"],
    ]
    areas, *points = tables(page, "curve")
    assert areas[2:] == [
        ["ranked by signed score", "1.034", "0.117", "0.612", "0.391"],
        ["ranked by |score|", "0.951", "0.048", "0.612", "0.391"],
    ]
    assert [row[-1] for row in points[0][1:]] == [
        "0.0",
        "0.0",
        "11.0",
        "35.0",
        "62.0",
        "83.0",
        "91.0",
        "97.0",
        "121.0",
        "100.0",
    ]
    assert [row[2] for row in points[0][1:3]] == ["empty", "empty"]
    said = text(page)
    for words in (
        "Is the circuit enough? varbind-llama: EAP-IG (inputs)",
        "92 of 1,519 edges (6.1 %) are enough for 82.3 % of logit-diff (95 % interval 77.3 % to 87.3 %); random "
        "circuits of the size of the one with 190 keep",
        "1 of 6 circuits is empty after pruning (asked for: 5 edges)",
        "Of 99 random circuits none is at least as close to 100 % as the circuit: p = 0.01.",
        "They differ by up to 3.25, 65.0 % of the behaviour.",
        "4 of 18 nodes change less than 1 % of the behaviour in every context tried",
        "Superfluous: a2.h2 a2.h3 a2.h4 a2.h5",
        "share 0.84 of their edges on average",
        "Edges of the circuit that every draw holds: 1 of 8; that fewer than half hold: 1.",
        "moves logit-diff from 4.00 to 3.10. If the others had not moved, it would be 1.50. The others made up 64.0 % of",
        "The circuit of 5 edges asked for is empty after pruning.",
        "edge: every edge outside the circuit is cut by itself",
        "top: the edges with the highest scores, ranked by |score|.",
    ):
        assert words in said


def test_what_was_not_tested_is_left_out_and_said() -> None:
    bare = evaluation_page(build(**BARE))
    check_page(bare)
    assert sections(bare) == ["belief", "sizes", "protocol"]
    rows = {row[0]: row[1:] for row in tables(bare, "belief")[0][1:]}
    for question, option in (
        ("Is it better than chance?", "--random 100"),
        ("Does it hold all that the model uses?", "--completeness"),
        ("Is every node needed?", "--minimality"),
        ("Would other pairs have given the same circuit?", "--stability"),
    ):
        assert rows[question][0] == "–" and option in rows[question][1]


def verdicts(found: Evaluation) -> dict[str, bool | None]:
    return {check.question: check.good for check in checks(found)}


def test_verdicts_follow_the_numbers() -> None:
    assert verdicts(build()) == {
        "Does it do what the model does?": True,
        "Would other prompts say the same?": True,
        "Do its edges hang together?": True,
        "Is it better than chance?": True,
        "Does it hold all that the model uses?": False,
        "Is every node needed?": False,
        "Would other pairs have given the same circuit?": True,
        "Does it agree with a reference?": None,
    }
    weak = build(
        circuits=[run(200, 60, 0.31, 0.2)],
        tested=0,
        random=RandomTest(count=9, faithfulness=[0.5] * 9, n_edges=[60] * 9, matched="size", p_value=1.0),
        completeness=Completeness(removals=[], worst=0.5, worst_share=0.1),
        minimality=Minimality(limit=0.01, nodes=[MinimalNode(node="m0", change=1.0, share=0.2, removed=[])]),
        stability=Stability(draws=5, requested=200, jaccard=0.4, interval=(0.3, 0.5), frequency=[]),
    )
    assert list(verdicts(weak).values()) == [False, False, False, False, True, True, False, None]
    assert any(
        "Chance does as well: Of 9 random circuits 9 are at least as close" in each for each in warnings(weak)
    )
    few = build(
        random=RandomTest(count=5, faithfulness=[0.1] * 5, n_edges=[60] * 5, matched="size", p_value=1 / 6)
    )
    assert verdicts(few)["Is it better than chance?"] is None
    assert not any("Chance" in each for each in warnings(few))
    above = build(circuits=[run(None, 60, 1.4)], tested=0)
    assert verdicts(above)["Does it do what the model does?"] is False
    assert "more than the whole model" in checks(above)[0].found


@pytest.mark.parametrize(
    ("circuits", "n_edges", "words"),
    [
        ([run(10, 8, 0.85), run(20, 18, 0.95)], 8, "8 of 1,519 edges (0.5 %) are enough for 85.0 % of logit-diff"),
        ([run(10, 8, 0.3), run(20, 18, 0.5)], 18, "No circuit of up to 18 edges comes within 20 points of the whole "
         "model: the nearest, of 18 of 1,519 edges (1.2 %), keeps 50.0 %"),
        ([run(10, 8, 1.6), run(20, 18, 1.3)], 18, "No circuit of up to 18 edges comes within 20 points"),
        ([run(None, 40, 0.9, faithfulness_interval=None)], 40, "The circuit of 40 of 1,519 edges (2.6 %) keeps 90.0 %"),
        ([run(5, 0, 0.0)], None, "The circuit is empty: no edge lies on a path from the input to the logits"),
        ([run(5, 0, 0.0), run(6, 0, 0.0)], None, "All 2 circuits are empty"),
        ([run(5, 4, None)], None, "Faithfulness is not defined: logit-diff is 4.00 whether all edges are whole"),
        ([], None, "No circuit was run; the whole model has logit-diff 4.00."),
    ],
)  # fmt: skip
def test_the_headline_names_the_smallest_circuit_that_is_enough(
    circuits: list[CircuitRun], n_edges: int | None, words: str
) -> None:
    found = build(**(BARE | {"circuits": circuits}))
    main = main_run(found)
    assert (None if main is None else main.n_edges) == n_edges
    assert headline(found).replace("\u00a0", " ").startswith(words)


@pytest.mark.parametrize("circuits", [[run(5, 0, 0.0)], [run(5, 4, None, faithfulness_interval=None)], []])
def test_circuits_without_a_number_still_have_a_page(circuits: list[CircuitRun], tmp_path: Path) -> None:
    found = build(**(BARE | {"circuits": circuits}))
    bare = evaluation_page(found)
    check_page(bare)
    assert bare.count("<svg") == 0 and "belief" not in sections(bare)
    found.save(tmp_path)
    write_report(tmp_path)
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.parametrize(
    ("changed", "warned"),
    [
        ({}, False),
        ({"clean_metric": -2.0}, True),
        ({"convention": KEPT.model_copy(update={"direction": "denoise"})}, True),
        ({"convention": KEPT.model_copy(update={"direction": "denoise"}), "clean_metric": -4.0}, False),
        ({"convention": KEPT.model_copy(update={"direction": "denoise", "ablation": "mean"})}, False),
    ],
)
def test_pairs_without_the_behaviour_are_warned_of(changed: dict[str, Any], warned: bool) -> None:
    assert any("This says little" in each for each in warnings(build(**changed))) == warned


def test_one_pair_has_no_interval() -> None:
    one = build(
        **(
            BARE
            | {"pair_ids": ["p"], "circuits": [run(50, 41, 0.9, interval=None, faithfulness_interval=None)]}
        )
    )
    bare = evaluation_page(one)
    check_page(bare)
    assert "Not known: one pair." in text(bare)
    assert tables(bare, "sizes")[0][1][-1] == "–"


def test_lines_hold_the_circuits_at_their_sizes() -> None:
    figure = faithfulness_figure(build())
    lines = {str(line.get_label()): line for line in figure.axes[0].lines}
    assert np.asarray(lines["circuit"].get_xdata()).tolist() == [9, 41, 92, 190, 392]
    assert np.asarray(lines["circuit"].get_ydata()).tolist() == pytest.approx([13, 56, 82.3, 91, 112])
    assert np.asarray(lines["empty after pruning"].get_xdata()).tolist() == [5]
    assert figure.axes[0].get_xscale() == "log"
    linear, log = curve_figure(build().curves).axes
    assert [axes.get_xscale() for axes in (linear, log)] == ["linear", "log"]
    gaps = curve_figure([curve(True, f=[None, None, 0.1, None, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])])
    by_name = {str(line.get_label()): line for line in gaps.axes[0].lines}
    assert len(np.asarray(by_name["ranked by |score|"].get_xdata())) == 7


def test_repair_says_who_helps_more(page: str) -> None:
    # Under noise a helping node has a negative direct effect: a2.h5 helps more, m2 less.
    (svg,) = pictures(page, "repair")
    assert "negative helps" in svg
    turned = sections_of.repair(build(convention=KEPT.model_copy(update={"direction": "denoise"})))
    assert "positive helps" in turned
    figure = repair_figure(build().repair, "logit-diff", -1)  # type: ignore[arg-type]
    after = [
        line
        for line in figure.axes[0].lines
        if line.get_marker() in ("o", "D") and line.get_label().startswith("_")
    ]
    full = [line.get_marker() for line in after if line.get_markerfacecolor() not in (LIGHT["panel"],)]
    assert full == ["o", "o", "D", "o"]
    lost = build(repair=build().repair.model_copy(update={"repaired": -0.25}))  # type: ignore[union-attr]
    assert "what they lost is another 25.0 % of the direct loss" in text(sections_of.repair(lost))


def test_many_nodes_are_drawn_from_both_ends() -> None:
    nodes = [MinimalNode(node=f"a0.h{i}", change=1.0, share=0.9**i, removed=[]) for i in range(100)]
    figure = minimality_figure(Minimality(limit=0.01, nodes=nodes))
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert len(names) == MOST_NODES and names[0] == "a0.h0" and names[-1] == "a0.h99"


def test_text_of_users_is_only_text(make: Any) -> None:
    evil = build(
        model=EVIL, source=EVIL, method=EVIL, notes=[EVIL], convention=KEPT.model_copy(update={"metric": EVIL}),
        circuits=[run(50, 41, 0.9, ablation=EVIL, selection=EVIL)], tested=0,
        overlaps=[Overlap(reference=EVIL, level="edge", found=1, truth=1, common=1, precision=1, recall=1, jaccard=1)],
    )  # fmt: skip
    check_page(evaluation_page(evil, make.manifest(options={"model": EVIL}), place=EVIL))


def test_a_directory_of_an_evaluation_gets_its_page_and_pictures(tmp_path: Path, make: Any) -> None:
    run_dir = tmp_path / "run"
    build(**(BARE | {"curves": [curve(True)]})).save(run_dir)
    write_model(run_dir / "manifest.json", make.manifest(command="evaluate"))
    assert write_report(run_dir) == run_dir / "report.html"
    first = (run_dir / "report.html").read_bytes()
    assert {path.name for path in run_dir.glob("*.png")} == {"faithfulness.png", "curve.png"}
    assert "patchkit rerun run" in first.decode()
    build(**BARE).save(run_dir)
    write_report(run_dir)
    assert {path.name for path in run_dir.glob("*.png")} == {"faithfulness.png"}
    assert (run_dir / "report.html").read_bytes() != first
