"""How well scores tell what is true from what is not: AUROC, precision at the true size, and what is missed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from patchkit.results.overlap import auroc
from patchkit.results.scoreboard import Missed, Ranking

#: Scores up to this share of a method's largest, of any kind of item, are rounding, and no score.
ROUNDING = 1e-6


@dataclass(frozen=True, eq=False)
class Labels:
    """What is true of some items that a method ranks.

    Attributes:
        names: of the items.
        true: which of them belong to the circuit.
        known: which are labelled at all; the others are left out.
        kinds: why a method may miss an item, by name.
        alone: which true items do something in each pair when they alone are patched there, or are known not to
            (`silent`): what can be asked of scores of that pair.
    """

    names: tuple[str, ...]
    true: Bool[Tensor, " items"]
    known: Bool[Tensor, " items"]
    kinds: Mapping[str, str]
    alone: Bool[Tensor, "pairs items"]


def floored(scores: Float[Tensor, "*lead items"], scale: float) -> Float[Tensor, "*lead items"]:
    """|scores| with rounding, and what has no score, as 0; `scale` is the method's largest score of all."""
    size = scores.double().abs().nan_to_num(0.0)
    return size.where(size > ROUNDING * scale, 0.0)


def ranking(
    labels: Labels,
    scores: Float[Tensor, " items"],
    scale: float,
    per_pair: Float[Tensor, "pairs items"] | None = None,
    drawn: Float[Tensor, "draws items"] | None = None,
) -> Ranking | None:
    """A method's ranking against the truth; None where everything or nothing is true.

    Args:
        scores: sizes over all pairs, higher = matters more; NaN counts as no score.
        scale: the method's largest score of all, by which rounding is told.
        per_pair: the same of each pair alone; None where there are none.
        drawn: the same of bootstraps of the pairs.
    """
    true, known = labels.true[labels.known], labels.known
    value = auroc(floored(scores, scale)[known], true)
    if value is None:
        return None
    interval = single = None
    if drawn is not None:
        interval = _interval(floored(drawn, scale), labels)
    if per_pair is not None:
        single = _single(floored(per_pair, scale), labels)
    share, missed = _at_true_size(floored(scores, scale), labels)
    return Ranking(
        auroc=round(value, 4), interval=interval, single=single, precision=round(share, 4), missed=missed
    )


def _interval(drawn: Float[Tensor, "draws items"], labels: Labels) -> tuple[float, float]:
    true = labels.true[labels.known]
    values = torch.tensor([auroc(row[labels.known], true) or 0.0 for row in drawn])
    low, high = values.quantile(torch.tensor([0.025, 0.975])).tolist()
    return round(low, 4), round(high, 4)


def _single(per_pair: Float[Tensor, "pairs items"], labels: Labels) -> float | None:
    """The mean over pairs of the AUROC of that pair's scores alone, against what it can show."""
    values: list[float] = []
    for scores, alone in zip(per_pair, labels.alone, strict=True):
        # A true item that does nothing in this pair is neither hit nor miss.
        asked = labels.known & (alone | ~labels.true)
        value = auroc(scores[asked], labels.true[asked])
        values += [] if value is None else [value]
    return round(sum(values) / len(values), 4) if values else None


def _at_true_size(scores: Float[Tensor, " items"], labels: Labels) -> tuple[float, list[Missed]]:
    """Precision among as many top items as are true, and the true items that are not among them.

    Items that tie at the cut are there by share; those whose score is 0 are never there.
    """
    scores = scores.where(labels.known, -1.0)
    asked = labels.true & labels.known
    size = int(asked.sum())
    cut = float(scores.topk(size).values[-1])
    above, level = scores > max(cut, 0.0), (scores == cut) & (scores > 0)
    room = size - int(above.sum())
    share = min(1.0, room / int(level.sum())) if bool(level.any()) else 0.0
    hits = int((above & asked).sum()) + share * int((level & asked).sum())
    there = above | level if share == 1.0 else above
    counted: dict[str, list[str]] = {}
    totals: dict[str, int] = {}
    for item in asked.nonzero()[:, 0].tolist():
        name = labels.names[item]
        kind = labels.kinds.get(name, "")
        totals[kind] = totals.get(kind, 0) + 1
        counted.setdefault(kind, [])
        if not bool(there[item]):
            counted[kind].append(name)
    missed = [
        Missed(kind=kind, missed=len(names), total=totals[kind], names=names)
        for kind, names in sorted(counted.items())
    ]
    return hits / size, missed
