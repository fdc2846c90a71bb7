"""What the commands that make a run share: opening the model, the manifest's fields, and how a finished run ends."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from patchkit.cli.console import give, hush_loading, say
from patchkit.cli.hosted import note_hosted

if TYPE_CHECKING:
    from patchkit.cli.run_options import RunOptions
    from patchkit.model import PatchModel
    from patchkit.results.manifest import PairCounts, RunDir
    from patchkit.runtime import LeftOut


# Below this width an operation is over before a second thread has been woken.
_SMALL_WIDTH = 512
_SHOWN_FAILURES = 3


def open_model(name: str, shared: RunOptions) -> PatchModel:
    """Opens a model for a command, and starts the processes that share its work: on the GPUs where there are any, with as
    many CPU threads as it can use. With `--backend ndif` it stays on its host.

    A small model runs on one CPU thread unless OMP_NUM_THREADS says otherwise: its operations are too short to share,
    and threads that wait for each other on a busy machine made the study five times slower.
    """
    import torch

    from patchkit.runtime import announce_model, current_execution, load_hosted, placement
    from patchkit.zoo.load import load

    hush_loading()
    if shared.hosted:
        return load_hosted(
            name, shared.host, dtype=shared.dtype, attn_implementation=shared.attn_implementation
        )
    threads_given = "OMP_NUM_THREADS" in os.environ
    shared.start()
    how = {"dtype": shared.dtype, "attn_implementation": shared.attn_implementation}
    announce_model(name, device_map=shared.device_map, **how)
    model = load(name, **how, **placement(current_execution().group, shared.device_map))
    on_cpu = model.embed_device.type == "cpu"
    if on_cpu and model.dims.d_model <= _SMALL_WIDTH and not threads_given:
        torch.set_num_threads(1)
    return model


def begin(run: RunDir, models: Sequence[PatchModel], seed: int, **fields: Any) -> None:
    """Notes the models, and what the numbers will mean, before the work.

    Raises:
        InputError: the run that is gone on with is one of another model.
    """
    from patchkit.results.manifest import ModelRef

    reference = ModelRef(
        id=", ".join(model.name for model in models),
        revision=models[0].revision if len(models) == 1 else None,
        fingerprint=", ".join(model.fingerprint() for model in models),
        content=", ".join(model.content_key() for model in models),
    )
    run.record_model(reference)
    run.record(seed=seed, **fields)
    note_hosted(run, models)


def counted(used: int, left_out: Sequence[LeftOut], excluded: int = 0) -> PairCounts:
    """What became of the pairs, for the manifest; `excluded` were no use, and were left out by the method itself."""
    from patchkit.results.manifest import Failure, PairCounts

    failures = [Failure(id=each.id, reason=each.reason) for each in left_out]
    return PairCounts(total=used + excluded + len(failures), used=used, failures=failures)


def end(run: RunDir, quiet: bool, show: Callable[[], None], pairs: PairCounts, **fields: Any) -> None:
    """The last fields of the manifest, the report, what `show` prints, what failed, and the report's path."""
    from patchkit.report import write_report

    run.record(pairs=pairs, **fields)
    page = write_report(run.path)
    show()
    for line in failure_lines(pairs):
        say(line, quiet)
    say("The report:", quiet)
    give(str(page))


def failure_lines(pairs: PairCounts) -> list[str]:
    """How many gave no numbers, and why the first of them did not; nothing where all went well."""
    failures = pairs.failures
    if not failures:
        return []
    lines = [
        f"Warning: {len(failures):,} of {pairs.total:,} gave no numbers, and the results are without them:"
    ]
    lines += [f"  {failure.id}: {failure.reason}" for failure in failures[:_SHOWN_FAILURES]]
    if len(failures) > _SHOWN_FAILURES:
        lines.append(f"  and {len(failures) - _SHOWN_FAILURES:,} more, all in manifest.json")
    return lines


def finished(run: RunDir, quiet: bool) -> None:
    say("This run was complete already. The report:", quiet)
    give(str(run.path / "report.html"))
