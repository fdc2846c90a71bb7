"""The page of an evaluation: its verdicts, tables and pictures against the numbers, and what it leaves out."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from patchkit.report import evaluation_page, write_report
from patchkit.report._canvas import to_svg
from patchkit.report._evaluation_plots import curve_figure, faithfulness_figure
from patchkit.report._evaluation_words import checks, headline, main_run
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

PAIRS = 16
KEPT = Convention(metric="logit-diff", direction="noise", ablation="resample", positions="all", patching="edge")


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
