"""The loop that runs a Program over items of any lengths, wherever the work is shared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from torch import Tensor

from patchkit.model import PatchModel
from patchkit.runtime.batching import MAX_BATCH_TOKENS
from patchkit.runtime.journal import Journal
from patchkit.runtime.program import Program, Progress
from patchkit.runtime.sessions import Session

Item = TypeVar("Item")


def run_program(
    program: Program[Item],
    model: PatchModel,
    items: Sequence[Item],
    *,
    max_batch_tokens: int = MAX_BATCH_TOKENS,
    progress: Progress | None = None,
    label: str = "",
    journal: Journal | None = None,
) -> dict[str, Tensor]:
    """Runs a Program over items of any lengths and returns its tensors in the order of the items; sums are added up.

    Batches are of similar length, within `max_batch_tokens` and what memory is free; where that runs out they are halved.
    In a group of processes (`Execution.group`) all of them take part.

    Args:
        max_batch_tokens: the most padded tokens of a batch, and of what the Program itself runs at once.
        journal: where finished batches are noted, by `content_digest` of Program, model and item, and taken from when the
            run was interrupted before.

    Raises:
        InputError: there is nothing to run.
        ItemsFailed: some items did not fit into memory even alone; all others were run and are in the journal.
        RunError: more items failed than the execution allows, or another process met an error.
        KeyboardInterrupt: asked by Ctrl-C or SIGTERM, after the batch in hand.
    """
    label = label or type(program).__name__
    with Session(program, model, items, max_batch_tokens=max_batch_tokens, label=label) as session:
        return session.run(program, progress=progress, label=label, journal=journal)
