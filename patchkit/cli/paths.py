"""`paths`: effects of senders along paths to receivers, once or stage by stage from the logits backwards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from patchkit.cli.edge_options import Direction, EdgeAblation, Positions, Reference, begin_edges, edge_options
from patchkit.cli.edge_outcome import end_paths
from patchkit.cli.given import check_pairs, given_pairs, given_reference
from patchkit.cli.options import (
    AnswerFirstToken,
    Metric,
    Model,
    Out,
    Pairs,
    PairsN,
    PairsTask,
    one_of,
    options_of,
    words_of,
)
from patchkit.cli.outcome import finished, open_model
from patchkit.cli.progress import progress_bar
from patchkit.cli.run_options import RunOptions, runs
from patchkit.errors import InputError

if TYPE_CHECKING:
    from patchkit.data import Pair
    from patchkit.methods import StagePlan
    from patchkit.results.paths import PathResult

_PATHS, _STAGES = "Paths", "Stages"
_FIELDS = ("name", "k", "threshold", "letters", "sign", "only")


@runs
def paths(
    ctx: typer.Context,
    shared: RunOptions,
    model: Model,
    out: Out,
    pairs: Pairs = None,
    task: PairsTask = None,
    n: PairsN = 100,
    answer_first_token: AnswerFirstToken = False,
    senders: Annotated[
        str | None,
        typer.Option(
            "--senders",
            help="input, heads (a1.h3), MLPs (m2), or heads, mlps, all; default: all.",
            rich_help_panel=_PATHS,
        ),
    ] = None,
    receivers: Annotated[
        str | None,
        typer.Option(
            "--receivers",
            help="logits, MLPs (m2), inputs of heads (a2.h3<q>), by comma; default: logits.",
            rich_help_panel=_PATHS,
        ),
    ] = None,
    mlps: Annotated[
        str,
        typer.Option(
            "--mlps", help="On the way: recomputed, or frozen as heads are.", rich_help_panel=_PATHS
        ),
    ] = "recomputed",
    iterative: Annotated[
        bool,
        typer.Option(
            "--iterative", help="From the logits backwards, stage by stage.", rich_help_panel=_STAGES
        ),
    ] = False,
    stage: Annotated[
        list[str] | None,
        typer.Option(
            "--stage",
            help="One a stage: name=movers,k=3,threshold=0.02,letters=q,sign=hurt,only=heads.",
            rich_help_panel=_STAGES,
        ),
    ] = None,
    k: Annotated[
        int,
        typer.Option("--k", min=1, help="Without --stage: senders to keep a stage.", rich_help_panel=_STAGES),
    ] = 3,
    threshold: Annotated[
        float,
        typer.Option(
            "--threshold", help="Without --stage: least share that is kept.", rich_help_panel=_STAGES
        ),
    ] = 0.02,
    stages: Annotated[
        int, typer.Option("--stages", min=1, help="Without --stage: how many.", rich_help_panel=_STAGES)
    ] = 3,
    positions: Positions = "all",
    direction: Direction = "noise",
    metric: Metric = "logit-diff",
    ablation: EdgeAblation = "resample",
    reference: Reference = None,
) -> None:
    """Path patching: what senders do along their paths to receivers, and circuits traced back from the logits."""
    given = ctx.params
    check_pairs(given)
    how = one_of(("recomputed", "frozen"), mlps, "--mlps")
    options = edge_options(given, shared)
    plans = stage_plans(given)
    from patchkit import methods
    from patchkit.results.manifest import open_run_dir
    from patchkit.runtime import without_failures

    with open_run_dir(out, "paths", options_of(ctx), shared.resume) as run:
        if run.done:
            finished(run, shared.quiet)
            return
        loaded = open_model(model, shared)
        made = given_pairs(loaded, given)
        mean_over = given_reference(loaded, given)
        begin_edges(run, loaded, options)
        with progress_bar(shared.quiet) as progress:
            more: dict[str, Any] = {
                "mlps": how,
                "reference": mean_over,
                "checkpoint": run.checkpoint,
                "progress": progress,
            }

            def patched(kept: Sequence[Pair]) -> PathResult:
                if iterative:
                    return methods.trace_paths_back(loaded, kept, options, stages=plans, **more)
                ends = words_of(senders or "all", "--senders"), words_of(receivers or "logits", "--receivers")
                return methods.patch_paths(loaded, kept, *ends, options, **more)

            found, left_out = without_failures(patched, made)
        found.save(run.path)
        end_paths(run, found, left_out, shared.quiet)


def stage_plans(given: dict[str, Any]) -> list[StagePlan]:
    """The stages of `--iterative`, none without it; InputError for options that do not go together."""
    if given["iterative"] and (given["senders"] is not None or given["receivers"] is not None):
        raise InputError(
            "--iterative asks about every sender and starts at the logits; leave --senders and --receivers out"
        )
    if given["stage"] and not given["iterative"]:
        raise InputError("--stage belongs to --iterative; give both")
    if not given["iterative"]:
        return []
    from patchkit.methods import StagePlan

    if not given["stage"]:
        return [
            StagePlan(name=f"stage {number + 1}", k=given["k"], threshold=given["threshold"], letters="qkv")
            for number in range(given["stages"])
        ]
    return [StagePlan(**_fields(text)) for text in given["stage"]]


def _fields(text: str) -> dict[str, Any]:
    """The fields of one `--stage`."""
    found: dict[str, Any] = {}
    for word in words_of(text, "--stage"):
        name, sign, value = word.partition("=")
        name = name.strip()
        if not sign or name not in _FIELDS or name in found:
            raise InputError(
                f"--stage {text}: '{word}' is not one of {', '.join(_FIELDS)} with its value, each once; expected such "
                "as name=movers,k=3,letters=q"
            )
        try:
            found[name] = {"k": int, "threshold": float}.get(name, str)(value.strip())
        except ValueError:
            raise InputError(f"--stage {text}: {name} is '{value}', expected a number") from None
    if "name" not in found:
        raise InputError(f"--stage {text}: expected a name=..., found none")
    return found
