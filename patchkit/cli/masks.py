"""`mask`: learning a desiderata mask from triples or from a task."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from patchkit.cli.mask_outcome import begin_mask, end_mask
from patchkit.cli.options import (
    AnswerFirstToken,
    Model,
    Out,
    options_of,
    words_of,
)
from patchkit.cli.outcome import finished, open_model
from patchkit.cli.progress import progress_bar
from patchkit.cli.run_options import RunOptions, runs
from patchkit.errors import InputError

if TYPE_CHECKING:
    from patchkit.methods import MaskOptions
    from patchkit.model import PatchModel

_MASK = "Mask"


@runs
def mask(
    ctx: typer.Context,
    shared: RunOptions,
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
    answer_first_token: AnswerFirstToken = False,
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
) -> None:
    """Learn a sparse mask over components from desiderata, and test it against its baselines."""
    if (desiderata is None) == (task is None):
        raise InputError("give either --desiderata FILE or --task NAME, one of the two")
    from patchkit.methods import learn_mask
    from patchkit.results.manifest import open_run_dir
    from patchkit.runtime import without_failures

    options = mask_options(ctx.params, shared)
    with open_run_dir(out, "mask", options_of(ctx), shared.resume) as run:
        if run.done:
            finished(run, shared.quiet)
            return
        loaded = open_model(model, shared)
        triples, descriptions, excluded = mask_triples(
            loaded, desiderata, task, options.train_on, n, shared.seed, answer_first_token
        )
        begin_mask(run, loaded, options, shared.seed)
        with progress_bar(shared.quiet) as progress:
            more: dict[str, Any] = {
                "descriptions": descriptions,
                "checkpoint": run.checkpoint,
                "progress": progress,
            }
            result, left_out = without_failures(
                lambda kept: learn_mask(loaded, kept, options, **more), triples
            )
        result = result.model_copy(update={"excluded": excluded | result.excluded})
        result.save(run.path)
        end_mask(run, result, left_out, shared.quiet)


def mask_options(given: dict[str, Any], shared: RunOptions) -> MaskOptions:
    """The options of the command as the method takes them."""
    from patchkit.methods import MaskOptions, Objective, Schedule

    options = MaskOptions(
        components=words_of(given["components"], "--components"),
        position=given["position"],
        train_on=None if given["train_on"] is None else words_of(given["train_on"], "--train-on"),
        objective=Objective(given["loss"], given["sparsity"]),
        schedule=Schedule(
            lambdas=_lambdas(given["lambdas"], given["sparsity"]),
            steps=given["steps"],
            steps_after=given["steps_after"],
            lr=given["lr"],
        ),
        seeds=tuple(range(shared.seed, shared.seed + given["mask_seeds"])),
        own_masks=given["own_masks"],
        random_sets=given["random_sets"],
        max_batch_tokens=shared.batch_tokens,
    )
    if given["task"] is not None and options.train_on is None:
        from patchkit.tasks import get

        options = replace(options, train_on=get(given["task"]).trained or None)
    return options


def mask_triples(
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


def _lambdas(text: str | None, sparsity: str) -> tuple[float, ...]:
    from patchkit.methods import Schedule

    if text is None:
        return (0.5, 0.25, 0.12, 0.06) if sparsity == "hard-concrete" else Schedule().lambdas
    try:
        values = tuple(float(word) for word in words_of(text, "--lambdas"))
    except ValueError:
        raise InputError(f"--lambdas {text}: expected numbers separated by commas") from None
    if any(not value >= 0 for value in values):
        raise InputError(f"--lambdas {text}: expected numbers of at least 0")
    return values
