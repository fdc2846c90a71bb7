"""Learning one mask along a path of sparsity weights: here, or in jobs where the model is hosted."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from patchkit.methods._mask_checkpoint import Checkpoint
from patchkit.methods._mask_jobs import advance_hosted
from patchkit.methods._mask_layout import Layout
from patchkit.methods._mask_objective import Objective
from patchkit.methods._mask_path import PathResult, PathTraining, Recipe
from patchkit.methods._mask_prepared import Prepared
from patchkit.methods._mask_schedule import Schedule

Report = Callable[[int, int], None]


def train_path(
    layout: Layout,
    training: Sequence[Prepared],
    validation: Prepared,
    objective: Objective,
    schedule: Schedule,
    seed: int,
    report: Report | None = None,
    checkpoint: Checkpoint | None = None,
    name: str = "",
) -> PathResult:
    """Learns a mask at every lambda of the path.

    Args:
        training: one entry a group of desiderata that is stepped on together.
        validation: triples not trained on; early stopping looks at them.
        report: called with the steps that are done, and those of the whole path.
        checkpoint: where the path is kept under this name, lambda by lambda, and found again; of a hosted model also
            where it stood after each job.

    Returns:
        The path; see `PathTraining.advance`.
    """
    kept = checkpoint or Checkpoint(None, "")
    recipe = Recipe(layout, objective, schedule, seed)
    state = kept.load_state(name)
    if state is not None:
        path = PathTraining.restored(recipe, state)
    else:
        path = PathTraining.begin(recipe, training, kept.load(name))
    hosted = validation.sessions[0].model.hosted
    while not path.result.stopped:
        before = len(path.result.points)
        if hosted is not None:
            path = advance_hosted(
                path,
                training,
                validation,
                f"training {name}",
                kept.notes(hosted.url),
                kept.job_key(name, path.state()),
            )
        else:
            path.advance(training, validation, _as_long_as(path, before))
        if path.result.diverged:
            kept.drop_state(name)
            break
        if len(path.result.points) > before:
            kept.save(name, path.result)
        if hosted is not None and not path.result.stopped:
            kept.save_state(name, path.state())
        if report is not None:
            report(path.done, schedule.total_steps)
    return path.result


def _as_long_as(path: PathTraining, points: int) -> Callable[[], bool]:
    """Whether the path still has so many points: what is done is kept after every lambda."""
    return lambda: len(path.result.points) == points
