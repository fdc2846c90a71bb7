"""`compare`: two models of one architecture, such as two training stages, on the same prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from patchkit.cli.across_options import Absolute, FindMethod, RandomSets, TopN, split_of, without_failing
from patchkit.cli.compare_outcome import end_comparison
from patchkit.cli.given import check_pairs
from patchkit.cli.options import (
    AnswerFirstToken,
    Metric,
    Out,
    Pairs,
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
    from patchkit.data import Triple
    from patchkit.model import PatchModel
    from patchkit.studies.comparison import CompareOptions

_DATA, _ACROSS = "Data", "Activations across"


@runs
def compare(
    ctx: typer.Context,
    shared: RunOptions,
    first: Annotated[
        str, typer.Argument(help="A model: an embedded name, a directory or a hub name.", metavar="MODEL_A")
    ],
    second: Annotated[
        str, typer.Argument(help="Another of the same architecture and vocabulary.", metavar="MODEL_B")
    ],
    out: Out,
    pairs: Pairs = None,
    task: PairsTask = None,
    n: Annotated[
        int,
        typer.Option(
            "--n",
            min=1,
            help="Pairs to find circuits on, and as many held out, with --task.",
            rich_help_panel=_DATA,
        ),
    ] = 32,
    desiderata: Annotated[
        Path | None,
        typer.Option(
            "--desiderata", help="Triples for groups; default: those of --task.", rich_help_panel=_DATA
        ),
    ] = None,
    triples: Annotated[
        int,
        typer.Option("--triples", min=0, help="Triples a desideratum, with --task.", rich_help_panel=_DATA),
    ] = 60,
    answer_first_token: AnswerFirstToken = False,
    top_n: TopN = "20,50",
    method: FindMethod = "eap-ig-inputs",
    absolute: Absolute = True,
    nodes: Annotated[
        str,
        typer.Option(
            "--nodes", help="Node kinds and names to put across, by comma.", rich_help_panel=_ACROSS
        ),
    ] = "z,mlp_out",
    positions: Annotated[
        str, typer.Option("--positions", help="all, last, or a named span.", rich_help_panel=_ACROSS)
    ] = "all",
    group: Annotated[
        list[str] | None,
        typer.Option(
            "--group",
            help="NAME=a1.h0,m2 (may be given several times); default: the circuits' heads by layer.",
            rich_help_panel=_ACROSS,
        ),
    ] = None,
    random: RandomSets = 10,
    metric: Metric = "logit-diff",
) -> None:
    """Two models of one architecture: behaviour, circuits and their overlap, activations of one put into the other."""
    given = ctx.params
    check_pairs(given)
    refuse_hosted(shared)
    options, groups = compare_options(given, shared), groups_of(group)
    from patchkit.results.manifest import open_run_dir
    from patchkit.studies.comparison import compare_models

    with open_run_dir(out, "compare", options_of(ctx), shared.resume) as run:
        if run.done:
            finished(run, shared.quiet)
            return
        models = [open_model(name, shared) for name in (first, second)]
        begin(
            run,
            models,
            shared.seed,
            metric=metric,
            direction="noise",
            ablation="resample",
            sign="effect = metric(model with the other's activation put in) - metric(model), on clean prompts",
        )
        finding, held_out = split_of(models[0], given)
        asked = triples_of(models[0], given)
        with progress_bar(shared.quiet) as progress:
            found, left_out = without_failing(
                {"find": finding, "test": held_out},
                lambda kept: compare_models(
                    models[0],
                    models[1],
                    kept["find"],
                    kept["test"],
                    options,
                    desiderata=asked,
                    groups=groups,
                    task=task or "",
                    command=command_line(ctx),
                    checkpoint=run.checkpoint,
                    progress=progress,
                ),
            )
        found.save(run.path)
        end_comparison(run, found, left_out, shared.quiet)


def refuse_hosted(shared: RunOptions) -> None:
    """Raises InputError where the models would stay on a host."""
    if shared.hosted:
        raise InputError(
            "compare puts activations of one model into another, which hosts that hold one model each cannot do; run it "
            "with --backend local or accelerate on a machine that holds both models"
        )


def compare_options(given: Mapping[str, Any], shared: RunOptions) -> CompareOptions:
    """The options of the command as the study takes them."""
    from patchkit.methods import EdgeOptions
    from patchkit.studies._finding import SCORINGS
    from patchkit.studies.comparison import CompareOptions

    return CompareOptions(
        sizes=sizes_of(given["top_n"]),
        method=one_of(SCORINGS, given["method"], "--method"),
        absolute=given["absolute"],
        nodes=words_of(given["nodes"], "--nodes"),
        positions=given["positions"],
        edges=EdgeOptions(metric=given["metric"], seed=shared.seed, max_batch_tokens=shared.batch_tokens),
        random=given["random"],
        seed=shared.seed,
    )


def groups_of(given: Sequence[str] | None) -> dict[str, tuple[str, ...]] | None:
    """`--group NAME=nodes`, each; None where there is none."""
    found: dict[str, tuple[str, ...]] = {}
    for text in given or ():
        name, equals, nodes = text.partition("=")
        if not equals or not name.strip():
            raise InputError(f"--group {text}: expected NAME=nodes, such as fetchers=a1.h0,a1.h2")
        if name.strip() in found:
            raise InputError(f"--group {text}: there is a group '{name.strip()}' already; name each once")
        found[name.strip()] = words_of(nodes, f"--group {name.strip()}")
    return found or None


def triples_of(model: PatchModel, given: Mapping[str, Any]) -> dict[str, list[Triple]] | None:
    """Held-out triples by desideratum: of a file, or of the task, where it has any; None for none."""
    from patchkit import tasks
    from patchkit.data import group, read_desiderata, split_if_needed

    if given["desiderata"] is not None:
        read = read_desiderata(
            given["desiderata"], model.tokenizer, model.dims.vocab_size, given["answer_first_token"]
        )
        return group(split_if_needed(read, given["seed"]), "test")
    if given["task"] is None or not given["triples"] or not tasks.get(given["task"]).desiderata:
        return None
    made = tasks.desiderata(
        given["task"],
        model.tokenizer,
        0,
        given["triples"],
        given["seed"],
        names=tasks.get(given["task"]).trained,
    )
    return group(made.triples(), "test")
