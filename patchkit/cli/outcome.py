"""What `mask`, `demo` and `study` share: opening the model, the manifest's fields, the table and the report."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING

from patchkit.cli.console import give, hush_loading, plain_table, results, say
from patchkit.errors import RunError

if TYPE_CHECKING:
    from patchkit.methods import MaskOptions
    from patchkit.model import PatchModel
    from patchkit.results.manifest import RunDir
    from patchkit.results.mask import MaskResult


# Below this width an operation is over before a second thread has been woken.
_SMALL_WIDTH = 512


def open_model(
    name: str, dtype: str | None = None, device_map: str | None = None, attn_implementation: str | None = None
) -> PatchModel:
    """Opens a model for a command: on the GPUs where there are any, with as many CPU threads as it can use.

    A small model runs on one CPU thread unless OMP_NUM_THREADS says otherwise: its operations are too short to share,
    and threads that wait for each other on a busy machine made the study five times slower.
    """
    import torch

    from patchkit.zoo.load import load

    hush_loading()
    if device_map is None and torch.cuda.is_available():
        device_map = "auto"
    model = load(name, dtype=dtype, device_map=device_map, attn_implementation=attn_implementation)
    on_cpu = model.embed_device.type == "cpu"
    if on_cpu and model.dims.d_model <= _SMALL_WIDTH and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    return model


def record(run: RunDir, model: PatchModel, options: MaskOptions, seed: int) -> None:
    from patchkit.results.manifest import ModelRef

    run.record(
        model=ModelRef(id=model.name, revision=model.revision, fingerprint=model.fingerprint()),
        seed=seed,
        metric=f"accuracy of the target; trained on {options.objective.loss}",
        direction="noise",
        ablation="resample",
        axes={name: ["layer", "node"] for name in options.components},
        sign="mask values: 1 keeps the original run's activation, 0 puts in the alternate's",
    )


def end(run: RunDir, result: MaskResult, quiet: bool) -> None:
    """The table, the report, and the failure that a mask which ran into NaN still is."""
    from patchkit.report import write_report
    from patchkit.results.manifest import PairCounts

    shutil.rmtree(run.path / "checkpoint", ignore_errors=True)
    used = sum(each.n_train + each.n_test for each in result.desiderata)
    run.record(
        pairs=PairCounts(total=used + sum(result.excluded.values()), used=used),
        cost=result.forward_equivalents,
    )
    page = write_report(run.path)
    show(result)
    say("The report:", quiet)
    give(str(page))
    if result.diverged:
        raise RunError(f"{result.stopped}. What is in {run.path} is of the last good mask.")


def finished(run: RunDir, quiet: bool) -> None:
    say("This run was complete already. The report:", quiet)
    give(str(run.path / "report.html"))


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
