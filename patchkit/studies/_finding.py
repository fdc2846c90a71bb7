"""What studies of several circuits share: scoring edges by any method that scores them all, counting right answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from patchkit.data import Pair
from patchkit.errors import InputError
from patchkit.methods import EDGE_METHODS, EdgeOptions, attribute_edges, patch_edges
from patchkit.methods._mask_triples import OwnAnswers
from patchkit.model import PatchModel
from patchkit.results.edge_scores import EdgeScores
from patchkit.runtime import Journal, Progress, run_program

#: Methods that give every edge a score.
SCORINGS = (*EDGE_METHODS, "exact")


def check_sizes(sizes: Sequence[int]) -> None:
    """Raises InputError unless these are numbers of edges that go up."""
    if not sizes or min(sizes) < 1 or list(sizes) != sorted(set(sizes)):
        raise InputError(
            f"sizes {', '.join(map(str, sizes)) or 'none'}: expected numbers of edges of at least 1, ascending, each once"
        )


def score_edges(
    model: PatchModel,
    pairs: Sequence[Pair],
    method: str,
    options: EdgeOptions,
    *,
    checkpoint: Path | None = None,
    progress: Progress | None = None,
) -> EdgeScores:
    """Scores of every edge.

    Raises:
        InputError: a method that is not one of `SCORINGS`, or what it refuses itself.
    """
    if method == "exact":
        return patch_edges(model, pairs, options, checkpoint=checkpoint, progress=progress)
    for name in EDGE_METHODS:
        if name == method:
            return attribute_edges(model, pairs, options, name, checkpoint=checkpoint, progress=progress)
    raise InputError(f"method '{method}' does not score every edge; expected one of: {', '.join(SCORINGS)}")


def accuracy(
    model: PatchModel, pairs: Sequence[Pair], max_batch_tokens: int, checkpoint: Path | None = None
) -> float:
    """The share of clean prompts whose most likely next token is the answer."""
    found = run_program(
        OwnAnswers(),
        model,
        [pair.clean_ids for pair in pairs],
        max_batch_tokens=max_batch_tokens,
        label="answers",
        journal=None if checkpoint is None else Journal(checkpoint),
    )["answer"].tolist()
    right = [answer == pair.answer_id for answer, pair in zip(found, pairs, strict=True)]
    return sum(right) / len(right)


def part(checkpoint: Path | None, name: str) -> Path | None:
    """Where what is finished of one part is kept."""
    return None if checkpoint is None else checkpoint / name


def renamed(progress: Progress | None, stage: str) -> Progress | None:
    """The same progress under a stage's own name."""
    if progress is None:
        return None
    report = progress
    return lambda _, done, total: report(stage, done, total)
