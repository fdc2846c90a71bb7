"""`patch` and `attribute`: the effect of every node on a metric, exactly or from gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from patchkit.cli.given import check_pairs, given_pairs, given_reference
from patchkit.cli.node_outcome import begin_nodes, end_nodes
from patchkit.cli.options import (
    AnswerFirstToken,
    Metric,
    Model,
    Out,
    Pairs,
    PairsN,
    PairsTask,
    numbers_of,
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
    from patchkit.methods import Method, NodeOptions
    from patchkit.model import PatchModel
    from patchkit.results.scores import Scores
    from patchkit.runtime import Progress

_NODES, _PROOF = "Nodes", "Proof"

Nodes = Annotated[
    str,
    typer.Option(
        "--nodes",
        help="Node kinds (q, k, v, z, neuron, ...) and names (a1.h3), by comma.",
        rich_help_panel=_NODES,
    ),
]
Positions = Annotated[
    str,
    typer.Option(
        "--positions", help="all, each, last, or spans and indices, by comma.", rich_help_panel=_NODES
    ),
]
Layers = Annotated[
    str | None,
    typer.Option("--layers", help="Only these layers, as 0,2-4; default: all.", rich_help_panel=_NODES),
]
Group = Annotated[
    int, typer.Option("--group", help="Neighbouring neurons that make one node.", rich_help_panel=_NODES)
]
Direction = Annotated[
    str,
    typer.Option(
        "--direction", help="noise: patch the clean prompt; denoise: the corrupt one.", rich_help_panel=_NODES
    ),
]
Ablation = Annotated[
    str,
    typer.Option("--ablation", help="What is put in: resample, mean, zero or noise.", rich_help_panel=_NODES),
]
Reference = Annotated[
    Path | None,
    typer.Option("--reference", help="Prompt pairs that `mean` is taken over.", rich_help_panel=_NODES),
]
NoiseScale = Annotated[
    float,
    typer.Option(
        "--noise-scale",
        help="Of `noise`, in standard deviations of the activation.",
        rich_help_panel=_NODES,
    ),
]


@runs
def patch(
    ctx: typer.Context,
    shared: RunOptions,
    model: Model,
    out: Out,
    pairs: Pairs = None,
    task: PairsTask = None,
    n: PairsN = 100,
    answer_first_token: AnswerFirstToken = False,
    nodes: Nodes = "z,mlp_out",
    positions: Positions = "all",
    layers: Layers = None,
    group: Group = 1,
    direction: Direction = "noise",
    metric: Metric = "logit-diff",
    ablation: Ablation = "resample",
    reference: Reference = None,
    noise_scale: NoiseScale = 1.0,
) -> None:
    """The exact effect of every node on a metric: patch one at a time, run the rest of the model."""

    def exact(loaded: PatchModel, made: Sequence[Pair], options: NodeOptions, **more: Any) -> Scores:
        from patchkit.methods import patch_nodes

        return patch_nodes(loaded, made, options, **more)

    _run(ctx, shared, "patch", exact)


@runs
def attribute(
    ctx: typer.Context,
    shared: RunOptions,
    model: Model,
    out: Out,
    pairs: Pairs = None,
    task: PairsTask = None,
    n: PairsN = 100,
    answer_first_token: AnswerFirstToken = False,
    nodes: Nodes = "z,mlp_out",
    positions: Positions = "all",
    layers: Layers = None,
    group: Group = 1,
    direction: Direction = "noise",
    metric: Metric = "logit-diff",
    ablation: Ablation = "resample",
    reference: Reference = None,
    noise_scale: NoiseScale = 1.0,
    method: Annotated[
        str,
        typer.Option("--method", help="atp, atp-qk, atp-graddrop or atp-star.", rich_help_panel=_NODES),
    ] = "atp-star",
    verify: Annotated[
        int | None,
        typer.Option("--verify", help="Patch so many of the top nodes exactly.", rich_help_panel=_PROOF),
    ] = None,
    sample: Annotated[
        int | None,
        typer.Option(
            "--sample", help="And so many of the others, at random; default: as many.", rich_help_panel=_PROOF
        ),
    ] = None,
    bound: Annotated[
        float | None,
        typer.Option(
            "--bound",
            help="Bound the effects of unverified nodes, at this risk of being wrong (0.05).",
            rich_help_panel=_PROOF,
        ),
    ] = None,
    bound_draws: Annotated[
        int,
        typer.Option(
            "--bound-draws",
            min=2,
            help="Random subsets that each unverified node is in, at least: more make the bound tighter.",
            rich_help_panel=_PROOF,
        ),
    ] = 20,
) -> None:
    """Estimate the effect of every node from gradients, and prove it: AtP, AtP* and their parts."""
    from patchkit import methods

    chosen = proof_options(ctx.params)

    def estimate(
        loaded: PatchModel, made: Sequence[Pair], options: NodeOptions, progress: Progress, **more: Any
    ) -> Scores:
        scores = methods.attribute(loaded, made, options, chosen, progress=progress, **more)
        mean_over = more["reference"]
        if verify is not None:
            checked = methods.verify(
                loaded,
                made,
                scores,
                options,
                verify,
                sample,
                reference=mean_over,
                progress=_renamed(progress, "verification"),
            )
            scores = replace(scores, verification=checked)
        if bound is not None:
            found = methods.bound(
                loaded,
                made,
                scores,
                options,
                bound,
                draws=methods.BoundOptions(min_count=bound_draws),
                reference=mean_over,
                progress=_renamed(progress, "bound"),
            )
            scores = replace(scores, bound=found)
        return scores

    _run(ctx, shared, "attribute", estimate)


def proof_options(given: dict[str, Any]) -> Method:
    """The method of `attribute`; InputError for one that does not exist, and for proofs that make no sense."""
    from patchkit import methods

    chosen = one_of(methods.METHODS, given["method"], "--method")
    verify, sample, bound = given["verify"], given["sample"], given["bound"]
    if verify is not None and verify < 1:
        raise InputError(f"--verify {verify}: expected the number of top nodes to patch exactly, at least 1")
    if sample is not None and (verify is None or sample < 0):
        raise InputError(
            f"--sample {sample}: expected a number of at least 0 beside --verify K, which it belongs to"
        )
    if bound is not None and not 0 < bound < 1:
        raise InputError(f"--bound {bound:g}: expected a risk between 0 and 1, such as 0.05")
    return chosen


def _run(ctx: typer.Context, shared: RunOptions, command: str, work: Callable[..., Scores]) -> None:
    """What both commands do: read the options and the pairs, `work`, save the scores and show them."""
    given = ctx.params
    check_pairs(given)
    from patchkit.results.manifest import open_run_dir
    from patchkit.runtime import without_failures

    options = node_options(given, shared)
    with open_run_dir(given["out"], command, options_of(ctx), shared.resume) as run:
        if run.done:
            finished(run, shared.quiet)
            return
        loaded = open_model(given["model"], shared)
        made, reference = given_pairs(loaded, given), given_reference(loaded, given)
        begin_nodes(run, loaded, options)
        with progress_bar(shared.quiet) as progress:
            more = {"progress": progress, "reference": reference, "checkpoint": run.checkpoint}
            scores, left_out = without_failures(lambda kept: work(loaded, kept, options, **more), made)
        scores.save(run.path)
        end_nodes(run, scores, left_out, shared.quiet)


def node_options(given: dict[str, Any], shared: RunOptions) -> NodeOptions:
    """The options of either command as the methods take them."""
    from patchkit.methods import ABLATIONS, DIRECTIONS, NodeOptions

    return NodeOptions(
        nodes=words_of(given["nodes"], "--nodes"),
        positions=given["positions"],
        direction=one_of(DIRECTIONS, given["direction"], "--direction"),
        metric=given["metric"],
        ablation=one_of(ABLATIONS, given["ablation"], "--ablation"),
        noise_scale=given["noise_scale"],
        group=given["group"],
        layers=None if given["layers"] is None else numbers_of(given["layers"], "--layers"),
        seed=shared.seed,
        max_batch_tokens=shared.batch_tokens,
    )


def _renamed(progress: Progress, stage: str) -> Progress:
    """The same progress under a stage of its own."""
    return lambda _, done, total: progress(stage, done, total)
