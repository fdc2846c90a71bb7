"""`patch` and `attribute`: the effect of every node on a metric, exactly or from gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from patchkit.cli.given import check_pairs, given_pairs, given_reference
from patchkit.cli.node_outcome import begin_nodes, end_nodes
from patchkit.cli.options import (
    AnswerFirstToken,
    AttnImplementation,
    DeviceMap,
    Dtype,
    MaxBatchTokens,
    Metric,
    Model,
    Out,
    Pairs,
    PairsN,
    PairsTask,
    Quiet,
    Resume,
    Seed,
    batch_tokens,
    numbers_of,
    one_of,
    options_of,
    words_of,
)
from patchkit.cli.outcome import finished, open_model
from patchkit.cli.progress import progress_bar
from patchkit.errors import InputError

if TYPE_CHECKING:
    from patchkit.data import Pair
    from patchkit.methods import NodeOptions
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


def patch(
    ctx: typer.Context,
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
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    attn_implementation: AttnImplementation = None,
    max_batch_tokens: MaxBatchTokens = "auto",
    seed: Seed = 0,
    resume: Resume = False,
    quiet: Quiet = False,
) -> None:
    """The exact effect of every node on a metric: patch one at a time, run the rest of the model."""

    def exact(
        loaded: PatchModel, made: list[Pair], options: NodeOptions, progress: Progress, **more: Any
    ) -> Scores:
        from patchkit.methods import patch_nodes

        return patch_nodes(loaded, made, options, progress=progress, **more)

    _run(ctx, "patch", exact)


def attribute(
    ctx: typer.Context,
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
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    attn_implementation: AttnImplementation = None,
    max_batch_tokens: MaxBatchTokens = "auto",
    seed: Seed = 0,
    resume: Resume = False,
    quiet: Quiet = False,
) -> None:
    """Estimate the effect of every node from gradients, and prove it: AtP, AtP* and their parts."""
    from patchkit import methods

    chosen = one_of(methods.METHODS, method, "--method")
    if verify is not None and verify < 1:
        raise InputError(f"--verify {verify}: expected the number of top nodes to patch exactly, at least 1")
    if sample is not None and (verify is None or sample < 0):
        raise InputError(
            f"--sample {sample}: expected a number of at least 0 beside --verify K, which it belongs to"
        )
    if bound is not None and not 0 < bound < 1:
        raise InputError(f"--bound {bound:g}: expected a risk between 0 and 1, such as 0.05")

    def estimate(
        loaded: PatchModel, made: list[Pair], options: NodeOptions, progress: Progress, **more: Any
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

    _run(ctx, "attribute", estimate)


def _run(ctx: typer.Context, command: str, work: Callable[..., Scores]) -> None:
    """What both commands do: read the options and the pairs, `work`, save the scores and show them."""
    given = ctx.params
    check_pairs(given)
    from patchkit.results.manifest import open_run_dir

    options = _options(given)
    with open_run_dir(given["out"], command, options_of(ctx), given["resume"]) as run:
        if run.done:
            finished(run, given["quiet"])
            return
        loaded = open_model(given["model"], given["dtype"], given["device_map"], given["attn_implementation"])
        made, reference = given_pairs(loaded, given), given_reference(loaded, given)
        begin_nodes(run, loaded, options)
        with progress_bar(given["quiet"]) as progress:
            scores = work(loaded, made, options, progress, reference=reference, checkpoint=run.checkpoint)
        scores.save(run.path)
        end_nodes(run, scores, given["quiet"])


def _options(given: dict[str, Any]) -> NodeOptions:
    from patchkit.methods import ABLATIONS, DIRECTIONS, NodeOptions
    from patchkit.runtime import MAX_BATCH_TOKENS

    return NodeOptions(
        nodes=words_of(given["nodes"], "--nodes"),
        positions=given["positions"],
        direction=one_of(DIRECTIONS, given["direction"], "--direction"),
        metric=given["metric"],
        ablation=one_of(ABLATIONS, given["ablation"], "--ablation"),
        noise_scale=given["noise_scale"],
        group=given["group"],
        layers=None if given["layers"] is None else numbers_of(given["layers"], "--layers"),
        seed=given["seed"],
        max_batch_tokens=batch_tokens(given["max_batch_tokens"]) or MAX_BATCH_TOKENS,
    )


def _renamed(progress: Progress, stage: str) -> Progress:
    """The same progress under a stage of its own."""
    return lambda _, done, total: progress(stage, done, total)
