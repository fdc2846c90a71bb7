"""How a run that learned a mask begins and ends: what its manifest says, the table, and the failure after a NaN."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from patchkit.cli.console import give, plain_table, results
from patchkit.cli.outcome import begin, counted, end
from patchkit.errors import RunError

if TYPE_CHECKING:
    from patchkit.methods import MaskOptions
    from patchkit.model import PatchModel
    from patchkit.results.manifest import RunDir
    from patchkit.results.mask import MaskResult
    from patchkit.runtime import LeftOut


def begin_mask(run: RunDir, model: PatchModel, options: MaskOptions, seed: int) -> None:
    """Notes the model and what mask values mean."""
    begin(
        run,
        [model],
        seed,
        metric=f"accuracy of the target; trained on {options.objective.loss}",
        direction="noise",
        ablation="resample",
        axes={name: ["layer", "node"] for name in options.components},
        sign="mask values: 1 keeps the original run's activation, 0 puts in the alternate's",
    )


def end_mask(run: RunDir, result: MaskResult, left_out: Sequence[LeftOut], quiet: bool) -> None:
    """The table, the report, and the failure that a mask which ran into NaN still is."""
    used = sum(each.n_train + each.n_test for each in result.desiderata)
    pairs = counted(used, left_out, sum(result.excluded.values()))
    end(run, quiet, lambda: show(result), pairs=pairs, cost=result.forward_equivalents)
    if result.diverged:
        raise RunError(f"{result.stopped}. What is in {run.path} is of the last good mask.")


def show(result: MaskResult) -> None:
    table = plain_table("desideratum", "kind")
    for column in ("chosen", "empty", "all", "complement", "random (mean)", "random (best)"):
        table.add_column(column, justify="right")
    for each in result.desiderata:
        scores = each.test
        row = (
            scores.chosen,
            scores.empty,
            scores.all,
            scores.complement,
            scores.random_mean,
            max(scores.random),
        )
        name = each.name if each.trained else f"{each.name} (not trained on)"
        table.add_row(name, each.kind, *(f"{value:.3f}" for value in row))
    joint = result.joint
    best = max(result.random_joint)
    row = (joint["chosen"], joint["empty"], joint["all"], joint["complement"], joint["random"], best)
    table.add_row("minimum over those trained on", "", *(f"{value:.3f}" for value in row), style="bold")
    console = results()
    console.print(table)
    few = ", ".join(result.chosen[:24]) + (", ..." if len(result.chosen) > 24 else "")
    give(f"{len(result.chosen)} of {result.n_components} components ({result.fraction:.1%}): {few or 'none'}")
