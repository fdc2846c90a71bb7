"""`generalise`: circuits found on some sets of prompts, run on the others."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from patchkit.cli.across_options import Absolute, FindMethod, RandomSets, TopN, without_failing
from patchkit.cli.compare_outcome import end_generalisation
from patchkit.cli.given import read_given
from patchkit.cli.options import (
    AnswerFirstToken,
    Metric,
    Model,
    Out,
    PairsTask,
    one_of,
    options_of,
    sizes_of,
    words_of,
)
from patchkit.cli.outcome import begin, finished, open_model
from patchkit.cli.progress import progress_bar
from patchkit.cli.run_options import RunOptions, runs
from patchkit.cli.study import command_line
from patchkit.errors import InputError

if TYPE_CHECKING:
    from patchkit.data import Pair
    from patchkit.model import PatchModel
    from patchkit.studies.generalisation import GeneraliseOptions

_DATA = "Data"


@runs
def generalise(
    ctx: typer.Context,
    shared: RunOptions,
    model: Model,
    out: Out,
    pairs: Annotated[
        list[str] | None,
        typer.Option(
            "--pairs", help="NAME=FILE, a set of prompt pairs; give several.", rich_help_panel=_DATA
        ),
    ] = None,
    task: PairsTask = None,
    templates: Annotated[
        str | None,
        typer.Option(
            "--templates",
            help="Templates of the task by comma, as symbol,order or plus,minus or symbol+plus; default: its wordings.",
            rich_help_panel=_DATA,
        ),
    ] = None,
    n: Annotated[
        int,
        typer.Option(
            "--n",
            min=1,
            help="Pairs of a template to find a circuit on, and as many held out.",
            rich_help_panel=_DATA,
        ),
    ] = 32,
    answer_first_token: AnswerFirstToken = False,
    top_n: TopN = "50",
    method: FindMethod = "eap-ig-inputs",
    absolute: Absolute = True,
    random: RandomSets = 5,
    metric: Metric = "logit-diff",
) -> None:
    """A circuit from each set of prompts, run on the held-out half of every set: a matrix of faithfulness."""
    given = ctx.params
    check_sets(given)
    options = generalise_options(given, shared)
    from patchkit.results.manifest import open_run_dir
    from patchkit.studies.generalisation import generalise as run_all

    with open_run_dir(out, "generalise", options_of(ctx), shared.resume) as run:
        if run.done:
            finished(run, shared.quiet)
            return
        loaded = open_model(model, shared)
        sets = sets_of(loaded, given)
        begin(run, [loaded], shared.seed, metric=metric, direction="noise", ablation="resample")
        with progress_bar(shared.quiet) as progress:
            found, left_out = without_failing(
                sets,
                lambda kept: run_all(
                    loaded,
                    kept,
                    options,
                    task=task or "",
                    command=command_line(ctx),
                    checkpoint=run.checkpoint,
                    progress=progress,
                ),
            )
        found.save(run.path)
        end_generalisation(run, found, left_out, shared.quiet)


def check_sets(given: Mapping[str, Any]) -> None:
    """Raises InputError unless the sets come from one place."""
    if (not given["pairs"]) == (given["task"] is None):
        raise InputError("give either --pairs NAME=FILE several times or --task NAME, one of the two")
    if given["templates"] is not None and given["task"] is None:
        raise InputError("--templates are those of a --task; sets of files are named by --pairs NAME=FILE")


def generalise_options(given: Mapping[str, Any], shared: RunOptions) -> GeneraliseOptions:
    """The options of the command as the study takes them."""
    from patchkit.methods import EdgeOptions
    from patchkit.studies._finding import SCORINGS
    from patchkit.studies.generalisation import GeneraliseOptions

    return GeneraliseOptions(
        sizes=sizes_of(given["top_n"]),
        method=one_of(SCORINGS, given["method"], "--method"),
        absolute=given["absolute"],
        edges=EdgeOptions(metric=given["metric"], seed=shared.seed, max_batch_tokens=shared.batch_tokens),
        random=given["random"],
        seed=shared.seed,
    )


def sets_of(model: PatchModel, given: Mapping[str, Any]) -> dict[str, list[Pair]]:
    """The sets of pairs that `--pairs` or `--task` ask for, by name."""
    if given["task"] is not None:
        from patchkit.tasks.templates import default_templates, template_pairs

        names = (
            default_templates(given["task"], model.tokenizer)
            if given["templates"] is None
            else words_of(given["templates"], "--templates")
        )
        return template_pairs(given["task"], model.tokenizer, names, 2 * given["n"], given["seed"])
    found: dict[str, list[Pair]] = {}
    for text in given["pairs"]:
        name, equals, file = text.partition("=")
        if not equals or not name.strip() or not file.strip():
            raise InputError(f"--pairs {text}: expected NAME=FILE, such as abba=abba.jsonl")
        if name.strip() in found:
            raise InputError(f"--pairs {text}: there is a set '{name.strip()}' already; name each once")
        found[name.strip()] = read_given(model, Path(file.strip()).expanduser(), given)
    return found
