"""`demo` and `study`: whole experiments by name, with a report."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from patchkit.cli.console import give, plain_table, results
from patchkit.cli.mask_outcome import begin_mask, end_mask
from patchkit.cli.options import Out, one_of, options_of
from patchkit.cli.outcome import begin, counted, end, finished, open_model
from patchkit.cli.progress import progress_bar
from patchkit.cli.run_options import RunOptions, runs
from patchkit.cli.runs import command_arguments
from patchkit.errors import InputError

if TYPE_CHECKING:
    from patchkit.model import PatchModel
    from patchkit.results.circuit_study import CircuitStudy
    from patchkit.results.convention import Convention
    from patchkit.results.recall import RecallStudy
    from patchkit.results.scoreboard import Scoreboard
    from patchkit.results.scrubbing import Scrubbing
    from patchkit.runtime import Progress

    #: What prints a study's findings, and the manifest's last fields.
    Ending = tuple[Callable[[], None], dict[str, Any]]
    #: A study of one model: the model, where its files go, the seed, the command that does it again, the progress.
    Work = Callable[[PatchModel, Path, int, str, Progress], Ending]

STUDIES = ("variable-binding", "attribution-recall", "circuits", "ioi", "scrubbing", "ground-truth")
_NOT_OF_STUDIES = ("max_batch_tokens", "max_failures")


# A study's batches are what its parts make them; memory that runs out halves them.
@runs(without=_NOT_OF_STUDIES)
def demo(
    ctx: typer.Context,
    shared: RunOptions,
    out: Out = Path("patchkit-demo"),
    model: Annotated[
        str, typer.Option("--model", help="An embedded variable-binding model.")
    ] = "varbind-llama",
) -> None:
    """The variable-binding study on the embedded model, with a report."""
    _study(ctx, shared, "demo", model, out)


@runs(without=_NOT_OF_STUDIES)
def study(
    ctx: typer.Context,
    shared: RunOptions,
    name: Annotated[str, typer.Argument(help=f"{', '.join(STUDIES)}.")],
    out: Out,
    model: Annotated[
        str | None,
        typer.Option("--model", help="The model to study; default: the embedded ones it is made for."),
    ] = None,
) -> None:
    """A whole experiment by name."""
    one_of(STUDIES, name, "study")
    match name:
        case "variable-binding":
            _study(ctx, shared, "study", model or "varbind-llama", out)
        case "attribution-recall":
            _recall(ctx, shared, model, out)
        case "circuits":
            _of_one_model(_circuits, ctx, shared, model or "varbind-llama", out)
        case "ioi":
            _of_one_model(_ioi, ctx, shared, model or "ioi-gpt2", out)
        case "ground-truth":
            _ground_truth(ctx, shared, model, out)
        case "scrubbing":
            _of_one_model(_scrubbing, ctx, shared, model or "varbind-llama", out)


def _study(ctx: typer.Context, shared: RunOptions, command: str, model: str, out: Path) -> None:
    from patchkit.results.manifest import open_run_dir
    from patchkit.studies import StudyOptions, run_study

    seed = shared.seed
    options = StudyOptions(seed=seed)
    options = replace(options, mask=replace(options.mask, seeds=(seed, seed + 1, seed + 2)))
    with open_run_dir(out, command, options_of(ctx), shared.resume) as run:
        if run.done:
            finished(run, shared.quiet)
            return
        loaded = open_model(model, shared)
        begin_mask(run, loaded, options.mask, seed)
        card = _embedded_card(loaded)
        with progress_bar(shared.quiet) as progress:
            result, _ = run_study(
                loaded, run.path, options, command=command_line(ctx), model_card=card, progress=progress
            )
        end_mask(run, result, [], shared.quiet)


def _recall(ctx: typer.Context, shared: RunOptions, model: str | None, out: Path) -> None:
    from patchkit.results.manifest import Failure, PairCounts, open_run_dir
    from patchkit.studies.attribution_recall import MODELS, RecallOptions, run_recall

    with open_run_dir(out, "study", options_of(ctx), shared.resume) as run:
        if run.done:
            finished(run, shared.quiet)
            return
        models = [open_model(name, shared) for name in ([model] if model else MODELS)]
        sign = "costs: forwards per pair until the nodes that matter most are verified"
        begin(run, models, shared.seed, sign=sign)
        with progress_bar(shared.quiet) as progress:
            result = run_recall(
                models,
                run.path,
                RecallOptions(seed=shared.seed),
                command=command_line(ctx),
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
            shared.quiet,
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


def _ground_truth(ctx: typer.Context, shared: RunOptions, model: str | None, out: Path) -> None:
    from patchkit.results.manifest import open_run_dir
    from patchkit.studies.ground_truth import TruthOptions, case_names, run_ground_truth

    if shared.hosted:
        raise InputError(
            "the ground-truth study is of the many models that come with the package, and a host has none of them: "
            "expected --backend local or accelerate, found ndif"
        )
    with open_run_dir(out, "study", options_of(ctx), shared.resume) as run:
        if run.done:
            finished(run, shared.quiet)
            return
        models = [open_model(name, shared) for name in ([model] if model else case_names())]
        begin(run, models, shared.seed)
        with progress_bar(shared.quiet) as progress:
            result = run_ground_truth(
                models,
                run.path,
                TruthOptions(seed=shared.seed),
                command=_command_line(ctx),
                progress=progress,
            )
        counts = counted(sum(case.pairs + case.test_pairs for case in result.cases), [])
        meaning = _meaning(result.convention, 0) | {"pairs": counts}
        end(run, shared.quiet, lambda: _show_ground_truth(result), **meaning)


def _show_ground_truth(result: Scoreboard) -> None:
    table = plain_table("method")
    measures = ("node auroc", "edge auroc", "single node auroc", "single edge auroc", "faithfulness", "cmd")
    for title in ("forwards", *measures):
        table.add_column(title, justify="right")
    for method in result.methods:
        found = [result.mean_of(method, measure) for measure in ("cost", *measures)]
        cost, *others = ("" if each is None else f"{each.mean:,.3f}" for each in found)
        table.add_row(method, cost[:-2], *others)
    results().print(table)
    for question, answer in result.best.items():
        give(f"{question}: {answer}")
    for finding in result.findings:
        give(finding)


def _of_one_model(work: Work, ctx: typer.Context, shared: RunOptions, model: str, out: Path) -> None:
    """The frame of a study of one model: its directory, its manifest, its progress, its end."""
    from patchkit.results.manifest import open_run_dir

    with open_run_dir(out, "study", options_of(ctx), shared.resume) as run:
        if run.done:
            finished(run, shared.quiet)
            return
        loaded = open_model(model, shared)
        begin(run, [loaded], shared.seed)
        with progress_bar(shared.quiet) as progress:
            show, fields = work(loaded, run.path, shared.seed, command_line(ctx), progress)
        end(run, shared.quiet, show, **fields)


def _circuits(model: PatchModel, out: Path, seed: int, command: str, progress: Progress) -> Ending:
    from patchkit.studies.circuits import CircuitStudyOptions, run_circuit_study

    found = run_circuit_study(model, out, CircuitStudyOptions(seed=seed), command=command, progress=progress)
    return lambda: _show_circuits(found), _meaning(found.convention, found.pairs)


def _meaning(convention: Convention, pairs: int) -> dict[str, Any]:
    """Fields of the manifest: what the numbers mean, and how many pairs they are of."""
    return {
        "metric": convention.metric,
        "direction": convention.direction,
        "ablation": convention.ablation,
        "pairs": counted(pairs, []),
    }


def _show_circuits(found: CircuitStudy) -> None:
    table = plain_table("method")
    sizes = [run.requested for run in found.methods[0].runs]
    for title in ("forwards", "rank corr.", *(f"{size} edges" for size in sizes), "CMD"):
        table.add_column(title, justify="right")
    for row in found.methods:
        by_size = {run.requested: run for run in row.runs}
        shown = [by_size.get(size) for size in sizes]
        cells = [
            "" if run is None or run.faithfulness is None else f"{run.faithfulness:.3f}" for run in shown
        ]
        cmd = next((curve.cmd for curve in row.curves if curve.absolute), None)
        table.add_row(
            row.method,
            f"{row.cost:,.1f}",
            "" if row.rank_correlation is None else f"{row.rank_correlation:.2f}",
            *cells,
            "" if cmd is None else f"{cmd:.3f}",
        )
    results().print(table)
    for finding in found.findings:
        give(finding)


def _ioi(model: PatchModel, out: Path, seed: int, command: str, progress: Progress) -> Ending:
    from patchkit.studies.ioi import IoiOptions, run_ioi

    found = run_ioi(
        model,
        out,
        IoiOptions(seed=seed),
        command=command,
        model_card=_embedded_card(model),
        progress=progress,
    )
    return lambda: give("\n".join(found.findings)), _meaning(found.convention, found.pairs)


def _scrubbing(model: PatchModel, out: Path, seed: int, command: str, progress: Progress) -> Ending:
    from patchkit.studies.binding_hypotheses import BindingOptions, run_scrubbing

    found = run_scrubbing(model, out, BindingOptions(seed=seed), command=command, progress=progress)
    first = found.results[0]
    return lambda: _show_scrubbing(found), _meaning(first.convention, len(first.inputs))


def _show_scrubbing(found: Scrubbing) -> None:
    table = plain_table("hypothesis")
    for title in ("recovered", "95 % interval"):
        table.add_column(title, justify="right")
    for result in found.results:
        shown = "" if result.recovered is None else f"{result.recovered:.3f}"
        interval = result.recovered_interval
        table.add_row(
            result.hypothesis, shown, "" if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}"
        )
    results().print(table)
    for finding in found.findings:
        give(finding)


def _embedded_card(model: PatchModel) -> dict[str, str]:
    """What is known of an embedded model, for its report; nothing of any other."""
    from patchkit import zoo
    from patchkit.cli.cards import summary

    return summary(zoo.card(model.name)) if zoo.embedded(model.name) else {}


def command_line(ctx: typer.Context) -> str:
    """What to type to do this again: the options that are not defaults."""
    sources = {name: ctx.get_parameter_source(name) for name in ctx.params}
    changed = {
        name: value
        for name, value in ctx.params.items()
        if (source := sources[name]) is not None and source.name != "DEFAULT"
    }
    return shlex.join(["patchkit", str(ctx.info_name), *command_arguments(ctx.command, changed)])
