"""What the commands that make a run share: opening the model, the manifest's fields, and how a finished run ends."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from patchkit.cli.console import give, hush_loading, say

if TYPE_CHECKING:
    from patchkit.model import PatchModel
    from patchkit.results.manifest import RunDir


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


def begin(run: RunDir, models: Sequence[PatchModel], seed: int, **fields: Any) -> None:
    """Notes the models, and what the numbers will mean, before the work."""
    from patchkit.results.manifest import ModelRef

    reference = ModelRef(
        id=", ".join(model.name for model in models),
        revision=models[0].revision if len(models) == 1 else None,
        fingerprint=", ".join(model.fingerprint() for model in models),
    )
    run.record(model=reference, seed=seed, **fields)


def end(run: RunDir, quiet: bool, show: Callable[[], None], **fields: Any) -> None:
    """The last fields of the manifest, the report, what `show` prints, and the report's path.

    What is in the checkpoint is in the results now.
    """
    from patchkit.report import write_report

    shutil.rmtree(run.checkpoint, ignore_errors=True)
    run.record(**fields)
    page = write_report(run.path)
    show()
    say("The report:", quiet)
    give(str(page))


def finished(run: RunDir, quiet: bool) -> None:
    say("This run was complete already. The report:", quiet)
    give(str(run.path / "report.html"))
