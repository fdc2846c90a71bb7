"""Options that the commands about edges, paths and circuits share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from patchkit.cli.options import one_of
from patchkit.cli.outcome import begin
from patchkit.cli.run_options import RunOptions

if TYPE_CHECKING:
    from patchkit.methods import EdgeOptions
    from patchkit.model import PatchModel
    from patchkit.results.manifest import RunDir

_EDGES = "Edges"

Positions = Annotated[
    str,
    typer.Option(
        "--positions", help="all, last, each, or spans and indices, by comma.", rich_help_panel=_EDGES
    ),
]
Direction = Annotated[
    str,
    typer.Option(
        "--direction", help="noise: patch the clean prompt; denoise: the corrupt one.", rich_help_panel=_EDGES
    ),
]
EdgeAblation = Annotated[
    str,
    typer.Option(
        "--ablation",
        help="What a cut edge carries: resample, mean, mean-positional or zero.",
        rich_help_panel=_EDGES,
    ),
]
Reference = Annotated[
    Path | None,
    typer.Option(
        "--reference",
        help="Prompt pairs that the means are taken over; default: the pairs.",
        rich_help_panel=_EDGES,
    ),
]


def edge_options(given: dict[str, Any], shared: RunOptions) -> EdgeOptions:
    """The options of a command as the methods take them."""
    from patchkit.methods import DIRECTIONS, EDGE_ABLATIONS, EdgeOptions

    return EdgeOptions(
        positions=given.get("positions", "all"),
        direction=one_of(DIRECTIONS, given["direction"], "--direction"),
        metric=given["metric"],
        ablation=one_of(EDGE_ABLATIONS, given["ablation"], "--ablation"),
        seed=shared.seed,
        max_batch_tokens=shared.batch_tokens,
    )


def begin_edges(run: RunDir, model: PatchModel, options: EdgeOptions) -> None:
    """Notes the model and the convention of the numbers."""
    begin(
        run,
        [model],
        options.seed,
        metric=options.metric,
        direction=options.direction,
        ablation=options.ablation,
    )
