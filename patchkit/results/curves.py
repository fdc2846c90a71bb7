"""Faithfulness against the size of a circuit, as areas: CPR and CMD of MIB (Mueller et al. 2025, arXiv 2504.13151)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from patchkit.errors import InputError
from patchkit.results.evaluation import Curve

#: MIB's sizes, as shares of all edges.
FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


def curve(
    fractions: Sequence[float],
    requested: Sequence[int],
    n_edges: Sequence[int],
    f: Sequence[float | None],
    absolute: bool,
    selection: str,
    ablation: str,
    patching: Literal["edge", "node"],
) -> Curve:
    """The curve and its areas: CPR that under f, CMD that under |1 - f|, each from the smallest fraction to the largest.

    Areas are by trapezoid over nominal fractions, pruned or not, as in MIB; on the linear axis and, divided by the axis's
    length, on the logarithmic one. None where f is None at any fraction: the others make another curve.

    Args:
        fractions: of all edges, ascending, in (0, 1].
        requested: edges asked for at each.
        n_edges: those left after pruning.
        f: faithfulness at each.

    Raises:
        InputError: lists of different lengths, fewer than two points, or fractions that do not ascend within (0, 1].
    """
    lengths = {
        "fractions": len(fractions),
        "requested": len(requested),
        "n_edges": len(n_edges),
        "f": len(f),
    }
    if len(set(lengths.values())) > 1 or len(fractions) < 2:
        found = ", ".join(f"{length} {name}" for name, length in lengths.items())
        raise InputError(f"a curve: expected as many points of each kind, two at least, found {found}")
    ascending = all(low < high for low, high in zip(fractions, fractions[1:], strict=False))
    if not ascending or not 0 < fractions[0] or not fractions[-1] <= 1:
        raise InputError(
            f"a curve: expected fractions that ascend within (0, 1], found {', '.join(map(str, fractions))}"
        )
    if any(value is not None and not math.isfinite(value) for value in f):
        raise InputError(f"a curve: expected finite numbers or None, found {', '.join(map(str, f))}")
    gaps = [None if value is None else abs(1 - value) for value in f]
    logs = [math.log(fraction) for fraction in fractions]
    length = logs[-1] - logs[0]
    return Curve(
        absolute=absolute,
        selection=selection,
        ablation=ablation,
        patching=patching,
        fractions=list(fractions),
        requested=list(requested),
        n_edges=list(n_edges),
        f=list(f),
        cpr=area(fractions, f),
        cmd=area(fractions, gaps),
        cpr_log=area(logs, f, length),
        cmd_log=area(logs, gaps, length),
    )


def area(at: Sequence[float], values: Sequence[float | None], unit: float = 1.0) -> float | None:
    """The area under values at ascending places, by trapezoid, in units of `unit`; None where a value is."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return None
    steps = zip(at, at[1:], known, known[1:], strict=False)
    return math.fsum((right - left) * (low + high) / 2 for left, right, low, high in steps) / unit
