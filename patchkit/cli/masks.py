"""`mask`, `demo` and `study`: learning a desiderata mask, and the variable-binding study around it."""

from __future__ import annotations

import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from click.core import ParameterSource

from patchkit.cli.console import give, hush_loading, plain_table, results, say
from patchkit.cli.options import (
    AttnImplementation,
    DeviceMap,
    Dtype,
    MaxBatchTokens,
    Model,
    Out,
    Quiet,
    Resume,
    Seed,
    batch_tokens,
    options_of,
)
from patchkit.cli.progress import progress_bar
from patchkit.cli.runs import command_arguments
from patchkit.errors import InputError, RunError

if TYPE_CHECKING:
    from patchkit.methods import MaskOptions
    from patchkit.model import PatchModel
    from patchkit.results.manifest import RunDir
    from patchkit.results.mask import MaskResult

_MASK = "Mask"


def mask(
    ctx: typer.Context,
    model: Model,
    out: Out,
    desiderata: Annotated[
        Path | None, typer.Option("--desiderata", help="JSON Lines of triples.", rich_help_panel="Data")
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            "--task", help="Generate the triples instead: one of `patchkit tasks`.", rich_help_panel="Data"
        ),
    ] = None,
    n: Annotated[
        int, typer.Option("--n", min=4, help="Triples a desideratum, with --task.", rich_help_panel="Data")
    ] = 100,
    train_on: Annotated[
        str | None,
        typer.Option(
            "--train-on", help="Desiderata to train on, by comma; default: all.", rich_help_panel="Data"
        ),
    ] = None,
    answer_first_token: Annotated[
        bool,
        typer.Option(
            "--answer-first-token", help="Targets of several tokens: score the first.", rich_help_panel="Data"
        ),
    ] = False,
    components: Annotated[
        str,
        typer.Option(
            "--components", help="head, mlp, layer, neuron or node kinds, by comma.", rich_help_panel=_MASK
        ),
    ] = "head,mlp",
    position: Annotated[
        str,
        typer.Option("--position", help="last, or a one-token span of the triples.", rich_help_panel=_MASK),
    ] = "last",
    loss: Annotated[
        str, typer.Option("--loss", help="cross-entropy or published.", rich_help_panel=_MASK)
    ] = "cross-entropy",
    sparsity: Annotated[
        str, typer.Option("--sparsity", help="l0.5, l1 or hard-concrete.", rich_help_panel=_MASK)
    ] = "l0.5",
    lambdas: Annotated[
        str | None,
        typer.Option(
            "--lambdas",
            help="The path, by comma; for hard-concrete the fractions that may be patched.",
            rich_help_panel=_MASK,
        ),
    ] = None,
    steps: Annotated[
        int, typer.Option("--steps", min=1, help="At the first lambda.", rich_help_panel=_MASK)
    ] = 160,
    steps_after: Annotated[
        int, typer.Option("--steps-after", min=1, help="At each later lambda.", rich_help_panel=_MASK)
    ] = 60,
    lr: Annotated[float, typer.Option("--lr", help="Adam's learning rate.", rich_help_panel=_MASK)] = 0.02,
    mask_seeds: Annotated[
        int, typer.Option("--mask-seeds", min=1, help="Masks trained, for stability.", rich_help_panel=_MASK)
    ] = 3,
    random_sets: Annotated[
        int, typer.Option("--random-sets", min=1, help="Random sets to compare with.", rich_help_panel=_MASK)
    ] = 20,
    own_masks: Annotated[
        bool,
        typer.Option(
            "--own-masks/--no-own-masks", help="A mask on each desideratum alone.", rich_help_panel=_MASK
        ),
    ] = True,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    attn_implementation: AttnImplementation = None,
    max_batch_tokens: MaxBatchTokens = "auto",
    seed: Seed = 0,
    resume: Resume = False,
    quiet: Quiet = False,
) -> None:
    """Learn a sparse mask over components from desiderata, and test it against its baselines."""
    if (desiderata is None) == (task is None):
        raise InputError("give either --desiderata FILE or --task NAME, one of the two")
    from patchkit.methods import MaskOptions, Objective, Schedule, learn_mask
    from patchkit.results.manifest import PairCounts, open_run_dir
    from patchkit.runtime import MAX_BATCH_TOKENS

    options = MaskOptions(
        components=_words(components, "--components"),
        position=position,
        train_on=_words(train_on, "--train-on") if train_on is not None else None,
        objective=Objective(loss, sparsity),
        schedule=Schedule(lambdas=_lambdas(lambdas, sparsity), steps=steps, steps_after=steps_after, lr=lr),
        seeds=tuple(range(seed, seed + mask_seeds)),
        own_masks=own_masks,
        random_sets=random_sets,
        max_batch_tokens=batch_tokens(max_batch_tokens) or MAX_BATCH_TOKENS,
    )
    if task is not None and options.train_on is None:
        from patchkit.tasks import get

        options = replace(options, train_on=get(task).trained or None)
    with open_run_dir(out, "mask", options_of(ctx), resume) as run:
        if run.done:
            _finished(run, quiet)
            return
        loaded = _load(model, dtype, device_map, attn_implementation)
        triples, descriptions, excluded = _triples(
            loaded, desiderata, task, options.train_on, n, seed, answer_first_token
        )
        _record(run, loaded, options, seed)
        with progress_bar(quiet) as progress:
            result = learn_mask(
                loaded,
                triples,
                options,
                descriptions=descriptions,
                checkpoint=run.path / "checkpoint",
                progress=progress,
            )
        result = result.model_copy(update={"excluded": excluded | result.excluded})
        result.save(run.path)
        used = sum(d.n_train + d.n_test for d in result.desiderata)
        run.record(
            pairs=PairCounts(total=used + sum(result.excluded.values()), used=used),
            cost=result.forward_equivalents,
        )
        _end(run, result, quiet)


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
    from patchkit.results.manifest import PairCounts, open_run_dir
    from patchkit.studies import StudyOptions, run_study

    options = StudyOptions(seed=seed)
    options = replace(options, mask=replace(options.mask, seeds=(seed, seed + 1, seed + 2)))
    with open_run_dir(out, command, options_of(ctx), resume) as run:
        if run.done:
            _finished(run, quiet)
            return
        loaded = _load(model, None, None, None)
        _record(run, loaded, options.mask, seed)
        card = summary(zoo.card(model)) if model in zoo.names() else {}
        with progress_bar(quiet) as progress:
            result, _ = run_study(
                loaded, run.path, options, command=_command_line(ctx), model_card=card, progress=progress
            )
        used = sum(d.n_train + d.n_test for d in result.desiderata)
        run.record(
            pairs=PairCounts(total=used + sum(result.excluded.values()), used=used),
            cost=result.forward_equivalents,
        )
        _end(run, result, quiet)


def _command_line(ctx: typer.Context) -> str:
    """What to type to do this again: the options that are not defaults."""
    changed = {
        name: value
        for name, value in ctx.params.items()
        if ctx.get_parameter_source(name) is not ParameterSource.DEFAULT
    }
    return shlex.join(["patchkit", str(ctx.info_name), *command_arguments(ctx.command, changed)])


def _load(model: str, dtype: str | None, device_map: str | None, attn: str | None) -> PatchModel:
    from patchkit.zoo.load import load

    hush_loading()
    return load(model, dtype=dtype, device_map=device_map, attn_implementation=attn)


def _triples(
    model: PatchModel,
    file: Path | None,
    task: str | None,
    train_on: tuple[str, ...] | None,
    n: int,
    seed: int,
    first_token: bool,
) -> tuple[list[Any], dict[str, str], dict[str, int]]:
    """(triples, descriptions of desiderata, what was left out in making them)."""
    if file is not None:
        from patchkit.data import read_desiderata

        return read_desiderata(file, model.tokenizer, model.dims.vocab_size, first_token), {}, {}
    from patchkit import tasks

    assert task is not None
    found = tasks.get(task)
    known = [name for name in train_on or found.trained if name in found.desiderata]
    others = [name for name in found.desiderata if name not in known]
    parts = [tasks.desiderata(task, model.tokenizer, n, n, seed, names=train_on or found.trained)]
    if others:
        parts.append(tasks.desiderata(task, model.tokenizer, 0, n, seed, names=others))
    triples = [triple for part in parts for triple in part.triples()]
    excluded = {reason: count for part in parts for reason, count in part.excluded.items()}
    return triples, {d.name: d.description for d in found.desiderata.values()}, excluded


def _record(run: RunDir, model: PatchModel, options: MaskOptions, seed: int) -> None:
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


def _end(run: RunDir, result: MaskResult, quiet: bool) -> None:
    """The table, the report, and the failure that a mask which ran into NaN still is."""
    from patchkit.report import write_report

    shutil.rmtree(run.path / "checkpoint", ignore_errors=True)
    page = write_report(run.path)
    _show(result)
    say("The report:", quiet)
    give(str(page))
    if result.diverged:
        raise RunError(f"{result.stopped}. What is in {run.path} is of the last good mask.")


def _finished(run: RunDir, quiet: bool) -> None:
    say("This run was complete already. The report:", quiet)
    give(str(run.path / "report.html"))


def _show(result: MaskResult) -> None:
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


def _words(text: str, option: str) -> tuple[str, ...]:
    words = tuple(word.strip() for word in text.split(",") if word.strip())
    if not words:
        raise InputError(f"{option} is empty; expected names separated by commas")
    return words


def _lambdas(text: str | None, sparsity: str) -> tuple[float, ...]:
    from patchkit.methods import Schedule

    if text is None:
        return (0.5, 0.25, 0.12, 0.06) if sparsity == "hard-concrete" else Schedule().lambdas
    try:
        values = tuple(float(word) for word in _words(text, "--lambdas"))
    except ValueError:
        raise InputError(f"--lambdas {text}: expected numbers separated by commas") from None
    if any(not value >= 0 for value in values):
        raise InputError(f"--lambdas {text}: expected numbers of at least 0")
    return values
