"""`plan`: what a command will take, before it is run, on a model of which only the config need be there."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from patchkit.cli.console import hush_loading, say
from patchkit.cli.options import one_of
from patchkit.cli.outcome import open_model
from patchkit.cli.plan_stages import models_of, shared_options, stages_of
from patchkit.cli.plan_table import show_plan
from patchkit.errors import InputError

if TYPE_CHECKING:
    from patchkit.cli.run_options import RunOptions
    from patchkit.runtime.plan_words import Machine

PLANNED = (
    "demo",
    "patch",
    "attribute",
    "mask",
    "edges",
    "paths",
    "evaluate",
    "compare",
    "generalise",
    "study",
)


def plan(
    ctx: typer.Context,
    command: Annotated[str, typer.Argument(help=f"{', '.join(PLANNED)}, with its own options.")],
    tokens: Annotated[
        int,
        typer.Option(
            "--tokens", min=2, help="Length of a prompt, where no data is given (--n says how many)."
        ),
    ] = 32,
    measure: Annotated[
        bool,
        typer.Option("--measure/--no-measure", help="Run two batches for the time, if the weights are here."),
    ] = True,
    flops: Annotated[
        float | None, typer.Option("--flops", help="Operations a second that are reached, as 3e14.")
    ] = None,
    memory: Annotated[
        float | None,
        typer.Option("--memory", help="GB of a device; default: of the GPU here, if there is one."),
    ] = None,
) -> None:
    """Forwards, memory, time and disk of a command, without running it: patchkit plan edges --model DIR --method eap.

    With --backend ndif also its jobs and what they send and bring back; the host is not asked.
    """
    one_of(PLANNED, command, "plan")
    for option, value in (("--flops", flops), ("--memory", memory)):
        if value is not None and not value > 0:
            raise InputError(f"{option} {value:g}: expected a number above 0")
    group: Any = ctx.find_root().command
    inner = _parsed(ctx, group.get_command(ctx, command), list(ctx.args))
    shared = shared_options(inner)
    from patchkit.zoo.load import load_sizes

    hush_loading()
    machine = _machine(shared, flops, memory)
    for name in models_of(command, inner):
        how: dict[str, Any] = {"dtype": shared.dtype, "attn_implementation": shared.attn_implementation}
        model = load_sizes(name, **how)
        found = stages_of(model, command, inner, tokens)
        # As the command itself would open it, in this process alone.
        alone = replace(shared, backend=None, num_processes=None)
        timed = measure and flops is None and not shared.hosted and weights_here(name)
        loaded = open_model(name, alone) if timed else None
        if loaded is not None:
            say(
                "Two batches of each stage are run to measure the time; --no-measure leaves that out.",
                shared.quiet,
            )
        show_plan(
            f"patchkit plan {command}",
            model,
            found,
            machine,
            budget=shared.batch_tokens,
            devices=shared.gpus_per_replica or 1,
            loaded=loaded,
            hosted=shared.hosted,
        )


def _parsed(ctx: typer.Context, command: Any, words: list[str]) -> dict[str, Any]:
    """The options of the planned command; `--out` may be left out, since nothing is written."""
    if "--out" not in words:
        words += ["--out", "unused"]
    with command.make_context(command.name, words, parent=ctx.find_root()) as inner:
        return dict(inner.params)


def _machine(shared: RunOptions, flops: float | None, memory: float | None) -> Machine:
    import torch

    from patchkit.runtime.plan_words import Machine

    here = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    held = None if here is None else float(here.total_memory)
    return Machine(
        processes=shared.num_processes or 1,
        memory=held if memory is None else 1e9 * memory,
        device="" if here is None else here.name,
        rate=flops,
    )


def weights_here(name: str) -> bool:
    """Whether a model's weights need not be fetched."""
    from pathlib import Path

    from huggingface_hub import try_to_load_from_cache

    from patchkit import zoo

    if zoo.embedded(name):
        return True
    files = ("model.safetensors", "model.safetensors.index.json")
    path = Path(name).expanduser()
    if path.is_dir():
        return any((path / file).is_file() for file in files)
    return any(isinstance(try_to_load_from_cache(name, file), str) for file in files)
