"""The pages of comparison and generalisation: the numbers of the result, gaps in it, names that would break a page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from patchkit.errors import InputError
from patchkit.report import comparison_page, generalisation_page, write_report
from patchkit.report._comparison_plots import across_maps, gap_figure
from patchkit.report._generalisation_sections import generalisation_figure
from patchkit.results.comparison import (
    WHICH,
    Across,
    Behaviour,
    Comparison,
    FoundCircuit,
    GroupScores,
    GroupShift,
    NodeShift,
)
from patchkit.results.convention import Convention
from patchkit.results.evaluation import CircuitRun, Overlap
from patchkit.results.generalisation import CircuitRow, Generalisation, PromptSet, RandomRow, SizeMatrix
from patchkit.studies._comparison_findings import findings
from patchkit.studies._generalisation_findings import findings as matrix_findings
from patchkit.studies._generalisation_findings import notes
from tests.report_pages import EVIL, check_page, section, sections, tables, text

KEPT = Convention(
    metric="logit-diff", direction="noise", ablation="resample", positions="all", patching="edge"
)


def run(asked: int, share: float | None, **changed: Any) -> CircuitRun:
    fields: dict[str, Any] = {
        "requested": asked, "n_edges": asked - 1, "n_nodes": 9, "circuit_metric": 1.0, "faithfulness": share, "gap": 0.5,
        "per_pair": [1.0], "absolute": True, "ablation": "resample", "patching": "edge", "selection": "top",
        "faithfulness_interval": None if share is None else (share - 0.04, share + 0.04),
    }  # fmt: skip
    return CircuitRun(**(fields | changed))


def shared(jaccard: float | None, level: Any = "edge", asked: int | None = 20) -> Overlap:
    return Overlap(
        reference="late", level=level, found=19, truth=18, common=15, precision=0.79, recall=0.83, jaccard=jaccard,
        requested=asked,
    )  # fmt: skip


def across(model: Any, donor: Any, sign: float, share: float | None) -> Across:
    nodes = [
        NodeShift(node=f"a{layer}.h{head}", kind="z", layer=layer, unit=head, effect=sign * (layer + 0.1 * head),
                  effect_abs=0.5, share=share)
        for layer in range(2)
        for head in range(3)
    ]  # fmt: skip
    nodes.append(
        NodeShift(node="m1", kind="mlp_out", layer=1, unit=0, effect=3.5 * sign, effect_abs=3.6, share=share)
    )
    groups = [
        GroupShift(group=name, nodes=["a0.h1", "m1"], effect=sign, interval=(sign - 0.1, sign + 0.1), share=share,
                   share_interval=None if share is None else (share - 0.1, share + 0.1), random=random)
        for name, random in (("circuit of the first", [0.1, 0.2]), ("MLPs", []), ("every head and MLP", []))
    ]  # fmt: skip
    return Across(model=model, donor=donor, model_metric=3.0, donor_metric=9.0, nodes=nodes, groups=groups)


def comparison(share: float | None = 0.4, **changed: Any) -> Comparison:
    fields: dict[str, Any] = {
        "task": "variable-binding", "convention": KEPT, "method": "eap-ig-inputs", "absolute": True, "positions": "all",
        "pairs": 8, "held_out": ["a", "b"],
        "models": [Behaviour(model="early", clean=3.0, corrupt=-2.0, accuracy=0.7, clean_interval=(2.0, 4.0)),
                   Behaviour(model="late", clean=9.0, corrupt=-8.0, accuracy=1.0)],
        "circuits": [FoundCircuit(found_in=source, run_in=place, run=run(20, 0.9 if source == place else 0.6))
                     for place in WHICH for source in WHICH],
        "overlaps": [shared(0.62), shared(0.8, "node")],
        "rank_correlation": 0.91, "rank_correlation_abs": 0.95,
        "across": [across("first", "second", 1.0, share), across("second", "first", -1.0, share)],
        "desiderata": [GroupScores(group=name, model=model, donor=donor, scores={"value_dependence": value, "other": 0.9})
                       for name, value in (("nothing", 0.0), ("MLPs", 0.85))
                       for model in WHICH for donor in WHICH],
        "triples": {"value_dependence": 6, "other": 6}, "cost": 120.0, "command": "patchkit compare early late",
        "seconds": 3.0,
    }  # fmt: skip
    found = Comparison(**(fields | changed))
    return found.model_copy(update={"findings": findings(found)})


def matrix(asked: int, share: float | None = 0.8, **changed: Any) -> SizeMatrix:
    names = ("symbol", "order", "all sets")
    fields: dict[str, Any] = {
        "requested": asked,
        "rows": [CircuitRow(circuit=name, kind="together" if place == 2 else "set",
                            runs=[run(asked, share), run(asked, None if share is None else share - 0.3)])
                 for place, name in enumerate(names)],
        "random": RandomRow(count=2, n_edges=19, faithfulness=[[0.1, 0.3], [None, None]]),
        "overlaps": [[shared(1.0 if one == other else 0.4) for other in names] for one in names],
        "node_overlaps": [[shared(0.7, "node") for _ in names] for _ in names],
    }  # fmt: skip
    return SizeMatrix(**(fields | changed))


def generalisation(**changed: Any) -> Generalisation:
    fields: dict[str, Any] = {
        "model": "late", "task": "variable-binding", "convention": KEPT, "method": "eap", "absolute": True,
        "sets": [PromptSet(name=name, pairs=4, held_out=["x"], clean=5.0, corrupt=-4.0, accuracy=0.9, defined=True)
                 for name in ("symbol", "order")],
        "sizes": [matrix(10), matrix(20)], "rank_correlations": [[1.0, 0.9], [0.9, 1.0]], "cost": 40.0,
        "command": "patchkit generalise", "seconds": 2.0,
    }  # fmt: skip
    found = Generalisation(**(fields | changed))
    return found.model_copy(update={"findings": matrix_findings(found), "notes": notes(found)})


# Comparison.


def test_the_page_of_a_comparison_says_its_numbers() -> None:
    page = comparison_page(comparison())
    check_page(page)
    assert sections(page) == [
        *(
            "question",
            "findings",
            "behaviour",
            "circuits",
            "overlap",
            "across",
            "groups",
            "desiderata",
            "protocol",
        )
    ]
    (behaviour,) = tables(page, "behaviour")
    assert behaviour[1][:2] == ["the first early", "3.000"] and behaviour[2][-1] == "100.0"
    (circuits,) = tables(page, "circuits")
    assert circuits[1][0] == "of the first" and circuits[1][3].startswith("90.0 86.0 to 94.0")
    assert circuits[1][4].startswith("60.0") and circuits[2][3].startswith("60.0")
    (groups,) = tables(page, "groups")
    assert groups[1][0] == "circuit of the first second into first" and groups[1][-1] == "15.0 10.0 to 20.0"
    assert groups[4][2] == "−1.000"
    (desiderata,) = tables(page, "desiderata")
    assert len(desiderata) == 9 and desiderata[0][1] == "value dependence"
    assert "62.0 % of their edges" in text(page).replace("\u00a0", " ")
    assert "the first's circuit has faithfulness 0.90 in its own model and 0.60 in the second" in text(page)


def test_without_a_gap_or_desiderata() -> None:
    page = comparison_page(comparison(share=None, desiderata=[], triples={}))
    check_page(page)
    assert "desiderata" not in sections(page) and "no gap to close" in text(page)


def test_words_follow_the_numbers() -> None:
    assert "neither is enough in the other model" in comparison().findings[2]
    alike = comparison(
        circuits=[
            FoundCircuit(found_in=source, run_in=place, run=run(20, 0.95))
            for place in WHICH
            for source in WHICH
        ]
    )
    assert "each works in the other model as well" in alike.findings[2]
    assert "unlike" in comparison(overlaps=[shared(0.1), shared(0.2, "node")]).findings[1]
    assert "much alike" in comparison(overlaps=[shared(0.9), shared(0.9, "node")]).findings[1]
    assert "what is left lies in embeddings" in comparison().findings[4]
    assert "what is left" not in comparison(positions="last").findings[4]
    assert "Of the groups, MLPs closes most: 40%" in comparison().findings[4]


def test_maps_have_layers_down_and_heads_across() -> None:
    maps, rows = across_maps(comparison())
    assert rows == ["0", "1"] and [each.title for each in maps][:2] == ["heads, second into first", "MLP"]
    assert maps[0].cells.tolist() == pytest.approx(np.array([[0.0, 0.1, 0.2], [1.0, 1.1, 1.2]]))
    assert maps[1].cells[0].isnan().all() and float(maps[3].cells[1, 0]) == -3.5
    drawn = gap_figure(comparison())
    assert len(drawn.axes[0].get_yticklabels()) == 3


def test_names_that_would_break_the_page(tmp_path: Path) -> None:
    found = comparison(models=[Behaviour(model=EVIL, clean=1.0, corrupt=0.0, accuracy=0.5)] * 2)
    check_page(comparison_page(found))
    found.save(tmp_path)
    page = write_report(tmp_path)
    assert page.name == "report.html" and (tmp_path / "across.png").stat().st_size > 1000
    assert (tmp_path / "gap.png").stat().st_size > 1000


@pytest.mark.parametrize(("field", "value"), [("models", []), ("circuits", []), ("across", [])])
def test_a_comparison_with_a_part_missing(field: str, value: list[Any]) -> None:
    with pytest.raises(InputError, match=f"field {field}"):
        comparison_page(comparison().model_copy(update={field: value}))


# Generalisation.


def test_the_page_of_generalisation_says_its_numbers() -> None:
    page = generalisation_page(generalisation())
    check_page(page)
    assert sections(page) == ["findings", "matrix", "overlap", "sets", "protocol"]
    small, large = tables(page, "matrix")
    assert large[0] == ["circuit found on", "edges left", "symbol", "order"]
    assert large[1] == ["symbol", "19", "80.0 76.0 to 84.0", "50.0 46.0 to 54.0"]
    assert large[4] == ["random 2 circuits", "19", "20.0 10.0 to 30.0", "–"]
    assert len(small) == 5 and len(tables(page, "overlap")) == 3
    assert "50.0 % at worst" in text(page).replace("\u00a0", " ")


def test_sets_that_say_nothing_and_circuits_that_are_empty() -> None:
    flat = PromptSet(
        name="flat", pairs=1, held_out=["x"], clean=0.0, corrupt=0.0, accuracy=0.1, defined=False
    )
    first = generalisation().sets[0]
    rows = [
        CircuitRow(circuit=name, kind=kind, runs=[run(20, 0.0, n_edges=0), run(20, None, n_edges=0)])
        for name, kind in (("symbol", "set"), ("flat", "set"), ("all sets", "together"))
    ]
    found = generalisation(sets=[first, flat], sizes=[matrix(20, rows=rows, random=None)])
    page = generalisation_page(found)
    check_page(page)
    assert "On flat clean prompts" in section(page, "findings") and "nothing is left after pruning" in text(
        page
    )
    assert tables(page, "matrix")[0][1][-1] == "– empty"


def test_the_picture_has_a_map_of_shares_and_one_of_edges(tmp_path: Path) -> None:
    found = generalisation()
    left, right = generalisation_figure(found, found.sizes[-1]).axes[:2]
    assert "faithfulness" in left.get_title("left") and "Jaccard" in right.get_title("left")
    assert [label.get_text() for label in left.get_yticklabels()][-1] == "random, mean of 2"
    found.save(tmp_path)
    write_report(tmp_path)
    assert (tmp_path / "generalisation.png").stat().st_size > 1000


@pytest.mark.parametrize("field", ["sets", "sizes"])
def test_generalisation_with_a_part_missing(field: str) -> None:
    with pytest.raises(InputError, match=f"field {field} is empty"):
        generalisation_page(generalisation().model_copy(update={field: []}))
