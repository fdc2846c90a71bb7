"""`edges`: the effect of every edge on a metric, from gradients, exactly, or by cutting one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from patchkit.cli.edge_options import (
    Direction,
    EdgeAblation,
    Positions,
    Reference,
    begin_edges,
    edge_options,
)
from patchkit.cli.edge_outcome import end_edges
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
)
from patchkit.cli.outcome import finished, open_model
from patchkit.cli.progress import progress_bar
from patchkit.cli.run_options import RunOptions, runs
from patchkit.errors import InputError

if TYPE_CHECKING:
    from patchkit.data import Pair
    from patchkit.methods import EdgeOptions
    from patchkit.model import PatchModel
    from patchkit.results.edge_scores import EdgeScores

_METHOD, _ACDC = "Method", "ACDC"
METHODS = ("eap", "eap-ig-inputs", "eap-ig-activations", "clean-corrupted", "ifr", "exact", "acdc")
#: Options that only some methods have: what they are at rest, and whose they are.
_OWN: dict[str, tuple[Any, tuple[str, ...]]] = {
    "steps": (5, ("eap-ig-inputs", "eap-ig-activations")),
    "ig_rule": (None, ("eap-ig-inputs", "eap-ig-activations")),
    "qk_fix": (False, ("eap",)),
    "graddrop": (False, ("eap",)),
    "by_query": (False, ("exact",)),
    "keep_pairs": (False, tuple(method for method in METHODS if method != "acdc")),
    "tau": (None, ("acdc",)),
    "order": ("reverse", ("acdc",)),
    "absolute": (False, ("acdc",)),
    "max_forwards": (None, ("acdc",)),
}


@runs
def edges(
    ctx: typer.Context,
    shared: RunOptions,
    model: Model,
    out: Out,
    pairs: Pairs = None,
    task: PairsTask = None,
    n: PairsN = 100,
    answer_first_token: AnswerFirstToken = False,
    method: Annotated[
        str, typer.Option("--method", help=f"{', '.join(METHODS)}.", rich_help_panel=_METHOD)
    ] = "eap-ig-inputs",
    steps: Annotated[
        int, typer.Option("--steps", min=1, help="Of the integral of EAP-IG.", rich_help_panel=_METHOD)
    ] = 5,
    ig_rule: Annotated[
        str | None,
        typer.Option(
            "--ig-rule",
            help="repo or midpoint; default: repo for inputs, midpoint for activations.",
            rich_help_panel=_METHOD,
        ),
    ] = None,
    qk_fix: Annotated[
        bool, typer.Option("--qk-fix", help="Of eap: see saturated attention.", rich_help_panel=_METHOD)
    ] = False,
    graddrop: Annotated[
        bool, typer.Option("--graddrop", help="Of eap: see effects that cancel.", rich_help_panel=_METHOD)
    ] = False,
    by_query: Annotated[
        bool,
        typer.Option(
            "--by-query",
            help="Of exact: patch keys and values for every query head too, where heads share them.",
            rich_help_panel=_METHOD,
        ),
    ] = False,
    keep_pairs: Annotated[
        bool,
        typer.Option("--keep-pairs", help="Keep the scores of every pair (large).", rich_help_panel=_METHOD),
    ] = False,
    tau: Annotated[
        float | None,
        typer.Option("--tau", help="Cut an edge that does less damage than this.", rich_help_panel=_ACDC),
    ] = None,
    order: Annotated[
        str, typer.Option("--order", help="reverse or by-size.", rich_help_panel=_ACDC)
    ] = "reverse",
    absolute: Annotated[
        bool,
        typer.Option("--absolute", help="Keep edges whose cut helps by tau, too.", rich_help_panel=_ACDC),
    ] = False,
    max_forwards: Annotated[
        float | None,
        typer.Option(
            "--max-forwards",
            help="End after so many forwards over all prompts; the rest stays in the circuit.",
            rich_help_panel=_ACDC,
        ),
    ] = None,
    positions: Positions = "all",
    direction: Direction = "noise",
    metric: Metric = "logit-diff",
    ablation: EdgeAblation = "resample",
    reference: Reference = None,
) -> None:
    """The effect of every edge on a metric: EAP, EAP-IG, exact patching, ACDC, information-flow routes."""
    given = ctx.params
    one_of(METHODS, method, "--method")
    check_pairs(given)
    check_own_options(given)
    options = edge_options(given, shared)
    from patchkit.results.manifest import open_run_dir
    from patchkit.runtime import without_failures

    with open_run_dir(out, "edges", options_of(ctx), shared.resume) as run:
        if run.done:
            finished(run, shared.quiet)
            return
        loaded = open_model(model, shared)
        made, mean_over = given_pairs(loaded, given), given_reference(loaded, given)
        begin_edges(run, loaded, options)
        with progress_bar(shared.quiet) as progress:
            more = {"reference": mean_over, "checkpoint": run.checkpoint, "progress": progress}
            scores, left_out = without_failures(
                lambda kept: _score(given, loaded, kept, options, **more), made
            )
        scores.save(run.path)
        end_edges(run, scores, left_out, shared.quiet)


def check_own_options(given: dict[str, Any]) -> None:
    """Raises InputError for an option of another method, and for ACDC without a threshold."""
    method = given["method"]
    for name, (rest, owners) in _OWN.items():
        if given[name] != rest and method not in owners:
            shown = name.replace("_", "-")
            raise InputError(f"--{shown} is for --method {' or '.join(owners)}; found --method {method}")
    if method == "acdc" and given["tau"] is None:
        raise InputError("--method acdc needs --tau, the damage from which on an edge is kept; such as 0.05")


def _score(
    given: dict[str, Any], model: PatchModel, pairs: Sequence[Pair], options: EdgeOptions, **more: Any
) -> EdgeScores:
    from patchkit import methods

    match given["method"]:
        case "exact":
            return methods.patch_edges(
                model, pairs, options, by_query=given["by_query"], keep_pairs=given["keep_pairs"], **more
            )
        case "acdc":
            return methods.acdc(
                model,
                pairs,
                options,
                tau=given["tau"],
                order=one_of(methods.ACDC_ORDERS, given["order"], "--order"),
                absolute=given["absolute"],
                max_forwards=given["max_forwards"],
                **more,
            )
    return methods.attribute_edges(
        model,
        pairs,
        options,
        one_of(methods.EDGE_METHODS, given["method"], "--method"),
        steps=given["steps"],
        rule=given["ig_rule"],
        qk_fix=given["qk_fix"],
        grad_drop=given["graddrop"],
        keep_pairs=given["keep_pairs"],
        **more,
    )
