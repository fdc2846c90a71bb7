"""`demo` and `study`: whole experiments by name, with a report."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from patchkit.cli.mask_outcome import begin_mask, end_mask
from patchkit.cli.options import Out, Quiet, Resume, Seed, options_of
from patchkit.cli.outcome import finished, open_model
from patchkit.cli.progress import progress_bar
from patchkit.cli.runs import command_arguments
from patchkit.errors import InputError


def demo(
    ctx: typer.Context,
    out: Out = Path("patchkit-demo"),
    model: Annotated[
        str, typer.Option("--model", help="An embedded variable-binding model.")
    ] = "varbind-llama",
    seed: Seed = 0,
    resume: Resume = False,
    quiet: Quiet = False,
) -> None:
    """The variable-binding study on the embedded model, with a report."""
    _study(ctx, "demo", model, out, seed, resume, quiet)


def study(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(help="variable-binding")],
    out: Out,
    model: Annotated[str, typer.Option("--model", help="The model to study.")] = "varbind-llama",
    seed: Seed = 0,
    resume: Resume = False,
    quiet: Quiet = False,
) -> None:
    """A whole experiment by name."""
    if name != "variable-binding":
        raise InputError(f"study '{name}' is not known; expected: variable-binding")
    _study(ctx, "study", model, out, seed, resume, quiet)


def _study(
    ctx: typer.Context, command: str, model: str, out: Path, seed: int, resume: bool, quiet: bool
) -> None:
    from patchkit import zoo
    from patchkit.cli.cards import summary
    from patchkit.results.manifest import open_run_dir
    from patchkit.studies import StudyOptions, run_study

    options = StudyOptions(seed=seed)
    options = replace(options, mask=replace(options.mask, seeds=(seed, seed + 1, seed + 2)))
    with open_run_dir(out, command, options_of(ctx), resume) as run:
        if run.done:
            finished(run, quiet)
            return
        loaded = open_model(model)
        begin_mask(run, loaded, options.mask, seed)
        card = summary(zoo.card(model)) if model in zoo.names() else {}
        with progress_bar(quiet) as progress:
            result, _ = run_study(
                loaded, run.path, options, command=_command_line(ctx), model_card=card, progress=progress
            )
        end_mask(run, result, quiet)


def _command_line(ctx: typer.Context) -> str:
    """What to type to do this again: the options that are not defaults."""
    sources = {name: ctx.get_parameter_source(name) for name in ctx.params}
    changed = {
        name: value
        for name, value in ctx.params.items()
        if (source := sources[name]) is not None and source.name != "DEFAULT"
    }
    return shlex.join(["patchkit", str(ctx.info_name), *command_arguments(ctx.command, changed)])
