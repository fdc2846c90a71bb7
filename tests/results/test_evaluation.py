"""What an evaluation says of itself, and the file it is kept in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from patchkit.errors import InputError
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


def circuit(**changes: Any) -> CircuitRun:
    given: dict[str, Any] = {
        "requested": 10,
        "n_edges": 8,
        "n_nodes": 4,
        "circuit_metric": 1.5,
        "faithfulness": 0.75,
        "gap": 0.5,
        "per_pair": [1.0, 2.0],
        "absolute": False,
        "ablation": "resample",
        "patching": "edge",
        "selection": "top",
        "interval": (1.0, 2.0),
        "faithfulness_interval": (0.5, 1.0),
    }
    return CircuitRun(**(given | changes))


def evaluation(**changes: Any) -> Evaluation:
    given: dict[str, Any] = {
        "convention": Convention(
            metric="logit-diff", direction="noise", ablation="resample", positions="all", patching="edge"
        ),
        "model": "m",
        "source": "out/eap",
        "method": "eap",
        "graph_edges": 100,
        "pair_ids": ["a", "b"],
        "clean_metric": 2.0,
        "corrupt_metric": 0.0,
        "circuits": [circuit()],
        "cost": 3.5,
    }
    return Evaluation(**(given | changes))


def whole() -> Evaluation:
    removal = Removal(nodes=["a0.h0"], how="greedy", circuit_metric=1.0, model_metric=-0.5)
    return evaluation(
        circuits=[circuit(), circuit(requested=None, n_edges=0, faithfulness=None, interval=None)],
        curves=[
            Curve(
                absolute=True,
                selection="greedy",
                ablation="zero",
                patching="node",
                fractions=[0.5, 1.0],
                requested=[50, 100],
                n_edges=[40, 100],
                f=[None, 1.0],
                cpr=None,
                cmd=None,
                cpr_log=None,
                cmd_log=None,
            )
        ],
        completeness=Completeness(removals=[removal], worst=1.5, worst_share=0.75),
        minimality=Minimality(
            limit=0.01,
            nodes=[
                MinimalNode(node="a0.h0", change=-1.0, share=-0.5, removed=["m1"]),
                MinimalNode(node="m1", change=0.01, share=0.005, removed=[]),
                MinimalNode(node="m2", change=0.0, share=None, removed=[]),
            ],
        ),
        random=RandomTest(
            count=2, faithfulness=[0.1, None], n_edges=[8, 8], matched="number of edges", p_value=1 / 3
        ),
        overlaps=[
            Overlap(
                reference="exact",
                level="node",
                found=3,
                truth=0,
                common=0,
                precision=0.0,
                recall=None,
                jaccard=0.0,
                requested=10,
            )
        ],
        stability=Stability(
            draws=5, requested=10, jaccard=0.5, interval=(0.25, 0.75), frequency=[("input->logits", 1.0)]
        ),
        repair=SelfRepair(
            group=["a0.h0"],
            clean=2.0,
            knocked_out=1.0,
            expected=0.0,
            repaired=0.5,
            nodes=[Repair(node="m1", before=0.0, after=-1.0, change=-1.0, interval=(-1.5, -0.5))],
        ),
        tested=0,
        clean_per_pair=[1.0, 3.0],
        corrupt_per_pair=[0.0, 0.0],
        notes=["One pair: there are no intervals."],
    )


def test_it_comes_back_as_it_was(tmp_path: Path) -> None:
    for each in (evaluation(), whole()):
        each.save(tmp_path / "out")
        assert Evaluation.load(tmp_path / "out") == each


def test_the_fields_of_the_contract_are_there(tmp_path: Path) -> None:
    """Other programs read these."""
    evaluation().save(tmp_path)
    found = json.loads((tmp_path / "evaluation.json").read_text())
    assert {"clean_metric", "corrupt_metric", "circuits"} <= found.keys()
    promised = {
        "requested",
        "n_edges",
        "circuit_metric",
        "faithfulness",
        "per_pair",
        "absolute",
        "ablation",
        "patching",
    }
    assert promised <= found["circuits"][0].keys()


def test_files_that_are_no_evaluation(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="evaluation.json"):
        Evaluation.load(tmp_path)
    evaluation().save(tmp_path)
    file = tmp_path / "evaluation.json"
    file.write_text(file.read_text().replace('"graph_edges": 100', '"graph_edges": "many"'))
    with pytest.raises(InputError, match="graph_edges"):
        Evaluation.load(tmp_path)


def test_what_follows_from_the_numbers() -> None:
    found = whole()
    assert [each.empty for each in found.circuits] == [False, True]
    assert found.completeness is not None and found.completeness.removals[0].gap == 1.5
    # A node without a share cannot be shown to be needed.
    assert found.minimality is not None and found.minimality.superfluous == ["m1", "m2"]


def test_an_evaluation_from_before_the_fields_that_came_later(tmp_path: Path) -> None:
    whole().save(tmp_path)
    file = tmp_path / "evaluation.json"
    data = json.loads(file.read_text())
    for name in ("tested", "clean_per_pair", "corrupt_per_pair"):
        del data[name]
    del data["overlaps"][0]["requested"]
    file.write_text(json.dumps(data))
    older = Evaluation.load(tmp_path)
    assert older.tested is None and older.clean_per_pair == [] and older.overlaps[0].requested is None
