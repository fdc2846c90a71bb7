"""The page of the study of circuits: method by size against the study's numbers, and what it does with gaps in them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from patchkit.errors import InputError
from patchkit.report import circuits_page, write_report
from patchkit.report._circuits_plots import areas_figure, lines, methods_figure, spoken
from patchkit.report._circuits_sections import headline
from patchkit.results.circuit_study import CircuitStudy, MethodRow
from patchkit.results.convention import Convention
from patchkit.results.evaluation import CircuitRun, Curve, Overlap
from patchkit.results.formats import write_model
from tests.report_pages import EVIL, check_page, section, sections, tables, text

KEPT = Convention(
    metric="logit-diff", direction="noise", ablation="resample", positions="all", patching="edge"
)
SIZES = (10, 25, 50, 100, 200)


def run(asked: int, share: float | None, **changed: Any) -> CircuitRun:
    fields: dict[str, Any] = {
        "requested": asked, "n_edges": asked - asked // 10, "n_nodes": asked // 4, "circuit_metric": 1.0,
        "faithfulness": share, "gap": 0.5, "per_pair": [1.0], "absolute": True, "ablation": "resample",
        "patching": "edge", "selection": "top",
        "faithfulness_interval": None if share is None else (share - 0.04, share + 0.04),
    }  # fmt: skip
    return CircuitRun(**(fields | changed))


def curve(absolute: bool, cpr: float, cmd: float) -> Curve:
    return Curve(
        absolute=absolute, selection="top", ablation="resample", patching="edge", fractions=[0.01, 0.1, 1.0],
        requested=[15, 152, 1519], n_edges=[12, 140, 1519], f=[0.2, 0.8, 1.0], cpr=cpr, cmd=cmd, cpr_log=cpr - 0.3,
        cmd_log=cmd + 0.3,
    )  # fmt: skip


def method(name: str, quality: float, **changed: Any) -> MethodRow:
    runs = [run(size, min(1.05, quality * (size / 100) ** 0.5)) for size in SIZES]
    fields: dict[str, Any] = {
        "method": name,
        "cost": 11.5 * quality,
        "runs": runs,
        "curves": [curve(False, 0.9 * quality, 0.2), curve(True, 0.8, 1 - 0.9 * quality)],
        "overlap": [] if name == "exact" else [
            Overlap(reference="exact", level="edge", found=each.n_edges, truth=90, common=each.n_edges // 2,
                    precision=0.5, recall=0.4, jaccard=min(0.95, quality * 0.2 * (1 + i)), auroc=0.9,
                    requested=each.requested)
            for i, each in enumerate(runs)
        ],
        "rank_correlation": None if name == "exact" else 0.9 * quality,
    }  # fmt: skip
    return MethodRow(**(fields | changed))


def study(**changed: Any) -> CircuitStudy:
    fields: dict[str, Any] = {
        "question": "Which scores find a circuit that is `faithful`?",
        "model": "varbind-llama",
        "task": "variable-binding",
        "pairs": 24,
        "convention": KEPT,
        "exact_size": 100,
        "methods": [
            method("exact", 1.0),
            method("eap-ig-inputs", 0.93),
            method("eap", 0.71),
            method("acdc", 0.85, runs=[run(60, 0.88)], curves=[], overlap=[]),
            method("random", 0.1, runs=[run(size, 0.0, n_edges=0) for size in SIZES], rank_correlation=0.01),
        ],
        "findings": ["EAP-IG needs `110` edges."],
        "command": "patchkit study circuits --out DIR",
        "seconds": 75.0,
    }
    return CircuitStudy(**(fields | changed))


@pytest.fixture(scope="module")
def page() -> str:
    return circuits_page(study())


def test_the_page_is_whole_and_has_the_numbers(page: str) -> None:
    check_page(page)
    assert sections(page) == [
        "question",
        "methods",
        "faithfulness",
        "areas",
        "overlap",
        "findings",
        "protocol",
        "again",
    ]
    (table,) = tables(page, "methods")
    assert table[1] == [
        "method",
        "10",
        "25",
        "50",
        "60",
        "100",
        "200",
        "CPR",
        "CMD",
        "Jaccard",
        "rank",
        "cost",
    ]
    rows = {row[0]: row[1:] for row in table[2:]}
    assert rows["exact edge patching"] == [
        "31.6 9", "50.0 23", "70.7 45", "–", "100.0 90", "105.0 180", "0.900", "0.100", "–", "–", "11.5",
    ]  # fmt: skip
    assert rows["EAP-IG (inputs)"][-5:] == ["0.837", "0.163", "0.74 (0.90)", "0.84", "10.7"]
    assert rows["random"][:2] == ["0.0 empty", "0.0 empty"]
    assert rows["ACDC"] == ["–", "–", "–", "88.0 54", "–", "–", "–", "–", "–", "0.77", "9.8"]
    said = text(page)
    for words in (
        "Edges needed to come within 20 points of the whole model: ACDC 54, exact edge patching 90, EAP-IG (inputs) 90, "
        "EAP 180; not at any size: random.",
        "EAP-IG needs 110 edges.",
        "Which scores find a faithful circuit? varbind-llama, variable-binding",
        "patchkit study circuits --out DIR",
        "1 min 15 s",
    ):
        assert words in said
    # Bold: the circuit of a size that comes nearest to the model.
    bold = re.findall(r'<td class="n h key"[^>]*>([\d.]+)<br>', section(page, "methods"))
    assert bold == ["31.6", "50.0", "70.7", "100.0", "100.4", "88.0"]


def test_each_method_is_a_line_and_selections_are_told_apart() -> None:
    made = study()
    assert [line.name for line in lines(made)] == [
        "exact edge patching",
        "EAP-IG (inputs)",
        "EAP",
        "ACDC",
        "random",
    ]
    left, right = methods_figure(made).axes
    assert left.get_xscale() == right.get_xscale() == "log"
    drawn = {str(line.get_label()): line for line in left.lines}
    assert np.asarray(drawn["EAP"].get_xdata()).tolist() == [9, 23, 45, 90, 180]
    # What is empty has no place on a logarithmic axis, and exact no overlap with itself.
    assert len(np.asarray(drawn["random"].get_xdata())) == 0
    overlap = {str(line.get_label()): line for line in right.lines}
    assert len(np.asarray(overlap["exact edge patching"].get_xdata())) == 0
    assert np.asarray(overlap["EAP"].get_ydata()).tolist() == pytest.approx(
        [0.142, 0.284, 0.426, 0.568, 0.71]
    )
    both = method("eap", 0.7, runs=[run(10, 0.2), run(10, 0.3, absolute=False)])
    names = [line.name for line in lines(study(methods=[both]))]
    assert names == ["EAP: top, |score|, resample, edge", "EAP: top, signed score, resample, edge"]
    assert spoken("eap, QK fix") == "EAP, QK fix" and spoken("mine") == "mine"


def test_areas_show_both_axes() -> None:
    cpr, cmd = areas_figure(study()).axes
    full = [float(np.asarray(line.get_xdata())[0]) for line in cpr.lines if line.get_marker() == "o"]
    assert full == pytest.approx([0.9, 0.837, 0.639, 0.09])
    hollow = [float(np.asarray(line.get_xdata())[0]) for line in cmd.lines if line.get_marker() == "D"]
    assert hollow == pytest.approx([0.4, 0.463, 0.661, 1.21])


def test_many_methods_are_counted_and_none_is_said() -> None:
    many = study(methods=[method(f"m{i}", 1.0 - i / 100) for i in range(7)])
    assert "m0 90, m1 90, m2 90, m3 90 and 3 more with up to 90." in headline(many)
    weak = study(methods=[method("eap", 0.1)])
    assert (
        headline(weak)
        == "No method's circuit comes within 20 points of the whole model at any size that was run."
    )


def test_gaps_are_left_out() -> None:
    bare = circuits_page(
        study(
            question="",
            findings=[],
            methods=[method("eap", 0.5, curves=[], overlap=[], rank_correlation=None, runs=[])],
        )
    )
    check_page(bare)
    assert sections(bare) == ["methods", "protocol", "again"]
    unknown = circuits_page(
        study(methods=[method("eap", 0.5, runs=[run(10, None), run(20, 0.0, n_edges=0)])])
    )
    check_page(unknown)


def test_text_of_users_is_only_text() -> None:
    evil = study(
        question=EVIL, model=EVIL, task=EVIL, findings=[EVIL], command=EVIL, methods=[method(EVIL, 0.5)]
    )
    check_page(circuits_page(evil, place=EVIL))


def test_a_directory_of_a_study_gets_its_page_and_pictures(tmp_path: Path, make: Any) -> None:
    run_dir = tmp_path / "run"
    study().save(run_dir)
    assert CircuitStudy.load(run_dir) == study()
    write_model(run_dir / "manifest.json", make.manifest(command="study"))
    assert write_report(run_dir) == run_dir / "report.html"
    assert {path.name for path in run_dir.glob("*.png")} == {"circuits.png", "areas.png"}
    assert "patchkit rerun run" in (run_dir / "report.html").read_text(encoding="utf-8")
    study(methods=[]).save(run_dir)
    with pytest.raises(InputError, match=r"circuits\.json: field methods is empty"):
        write_report(run_dir)
