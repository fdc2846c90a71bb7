"""The options that commands share, so that each has one name, one help text and one default everywhere.

Used as annotations: `def mask(ctx: typer.Context, model: Model, seed: Seed = 0, ...)`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from patchkit.errors import InputError

_MODEL, _RUN = "Model", "Run"

Model = Annotated[
    str,
    typer.Option(
        "--model", help="An embedded name, a local directory or a hub name.", rich_help_panel=_MODEL
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype", help="float32, bfloat16, ...; default: the checkpoint's.", rich_help_panel=_MODEL
    ),
]
DeviceMap = Annotated[
    str | None,
    typer.Option(
        "--device-map",
        help="How accelerate spreads the model; default: auto where there is a GPU.",
        rich_help_panel=_MODEL,
    ),
]
AttnImplementation = Annotated[
    str | None,
    typer.Option("--attn-implementation", help="eager, sdpa, ...", rich_help_panel=_MODEL),
]
Out = Annotated[
    Path, typer.Option("--out", help="Directory for the results; new or empty.", rich_help_panel=_RUN)
]
Seed = Annotated[
    int, typer.Option("--seed", help="The same seed gives the same numbers.", rich_help_panel=_RUN)
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with the run that --out holds.", rich_help_panel=_RUN)
]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress, results only.", rich_help_panel=_RUN)]
MaxBatchTokens = Annotated[
    str,
    typer.Option("--max-batch-tokens", help="Tokens a batch may hold, or auto.", rich_help_panel=_RUN),
]


def options_of(ctx: typer.Context) -> dict[str, Any]:
    """Every option of the running command with its value, defaults included: what the manifest records."""
    return dict(ctx.params)


def batch_tokens(value: str) -> int | None:
    """`--max-batch-tokens`: a number of at least 1, or None for `auto`."""
    if value == "auto":
        return None
    if not value.isdecimal() or int(value) < 1:
        raise InputError(f"--max-batch-tokens {value}: expected a whole number of at least 1, or auto.")
    return int(value)
