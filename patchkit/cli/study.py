"""`demo` and `study`: whole experiments by name, with a report."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from patchkit.cli.console import give, plain_table, results
from patchkit.cli.mask_outcome import begin_mask, end_mask
from patchkit.cli.options import Out, Quiet, Resume, Seed, options_of
from patchkit.cli.outcome import begin, end, finished, open_model
from patchkit.cli.progress import progress_bar
from patchkit.cli.runs import command_arguments
from patchkit.errors import InputError

if TYPE_CHECKING:
    from patchkit.results.recall import RecallStudy


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
    name: Annotated[str, typer.Argument(help="variable-binding or attribution-recall.")],
    out: Out,
    model: Annotated[
        str | None,
        typer.Option("--model", help="The model to study; default: the embedded ones it is made for."),
    ] = None,
    seed: Seed = 0,
    resume: Resume = False,
    quiet: Quiet = False,
) -> None:
    """A whole experiment by name."""
    match name:
        case "variable-binding":
            _study(ctx, "study", model or "varbind-llama", out, seed, resume, quiet)
        case "attribution-recall":
            _recall(ctx, model, out, seed, resume, quiet)
        case _:
            raise InputError(
                f"study '{name}' is not known; expected one of: variable-binding, attribution-recall"
            )


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


def _recall(ctx: typer.Context, model: str | None, out: Path, seed: int, resume: bool, quiet: bool) -> None:
    from patchkit.results.manifest import Failure, PairCounts, open_run_dir
    from patchkit.studies.attribution_recall import MODELS, RecallOptions, run_recall

    with open_run_dir(out, "study", options_of(ctx), resume) as run:
        if run.done:
            finished(run, quiet)
            return
        models = [open_model(name) for name in ([model] if model else MODELS)]
        begin(
            run, models, seed, sign="costs: forwards per pair until the nodes that matter most are verified"
        )
        with progress_bar(quiet) as progress:
            result = run_recall(
                models,
                run.path,
                RecallOptions(seed=seed),
                command=_command_line(ctx),
                progress=lambda _, done, total: progress("settings", done, total),
            )
        convention = result.settings[0].convention
        silent = [
            Failure(id=f"{name} of {setting.name}", reason="no node has an effect")
            for setting in result.settings
            for name in setting.silent
        ]
        used = sum(setting.pairs for setting in result.settings)
        end(
            run,
            quiet,
            lambda: _show_recall(result),
            metric=convention.metric,
            direction=convention.direction,
            ablation=convention.ablation,
            pairs=PairCounts(total=used + len(silent), used=used, failures=silent),
        )


def _show_recall(result: RecallStudy) -> None:
    table = plain_table("setting")
    for title in ("atp", "atp-star", "best of all"):
        table.add_column(title, justify="right")
    table.add_column("")
    for setting in result.settings:
        best = setting.ranking()[0]
        costs = (setting.aggregate("atp"), setting.aggregate("atp-star"), best.aggregate)
        table.add_row(setting.name, *(f"{cost:.2f}" for cost in costs), best.name)
    results().print(table)
    give("Forwards paid until the nodes that matter most are verified, over those of one who knows them.")
    for finding in result.findings:
        give(finding)


def _command_line(ctx: typer.Context) -> str:
    """What to type to do this again: the options that are not defaults."""
    sources = {name: ctx.get_parameter_source(name) for name in ctx.params}
    changed = {
        name: value
        for name, value in ctx.params.items()
        if (source := sources[name]) is not None and source.name != "DEFAULT"
    }
    return shlex.join(["patchkit", str(ctx.info_name), *command_arguments(ctx.command, changed)])
