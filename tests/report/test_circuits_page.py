"""The page of the study of circuits: method by size against the study's numbers, and what it does with gaps in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from patchkit.errors import InputError
from patchkit.report import circuits_page, write_report
from patchkit.report._canvas import to_svg
from patchkit.report._circuits_plots import areas_figure, lines, methods_figure
from patchkit.report._circuits_sections import headline
from patchkit.results.circuit_study import CircuitStudy, MethodRow
from patchkit.results.convention import Convention
from patchkit.results.evaluation import CircuitRun, Curve, Overlap
from patchkit.results.formats import write_model

KEPT = Convention(metric="logit-diff", direction="noise", ablation="resample", positions="all", patching="edge")
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
