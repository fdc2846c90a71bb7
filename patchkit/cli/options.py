"""The options that commands share, so that each has one name, one help text and one default everywhere.

Used as annotations: `def mask(ctx: typer.Context, model: Model, seed: Seed = 0, ...)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from patchkit.errors import InputError

Choice = TypeVar("Choice", bound=str)
_MODEL, _DATA, _RUN, _HOSTED = "Model", "Data", "Run", "Hosted model (--backend ndif)"
#: Where Programs run: in this process, in the processes of an accelerate group, or on an NDIF server.
BACKENDS = ("local", "accelerate", "ndif")

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
Pairs = Annotated[
    Path | None,
    typer.Option("--pairs", help="Prompt pairs: JSON Lines, or EAP-IG's CSV.", rich_help_panel=_DATA),
]
PairsTask = Annotated[
    str | None,
    typer.Option(
        "--task", help="Generate the pairs instead: one of `patchkit tasks`.", rich_help_panel=_DATA
    ),
]
PairsN = Annotated[int, typer.Option("--n", min=1, help="Pairs, with --task.", rich_help_panel=_DATA)]
AnswerFirstToken = Annotated[
    bool,
    typer.Option(
        "--answer-first-token", help="Answers of several tokens: score the first.", rich_help_panel=_DATA
    ),
]
Metric = Annotated[
    str,
    typer.Option(
        "--metric",
        help="logit-diff, prob-diff, kl, target-logprob or module:function.",
        rich_help_panel=_DATA,
    ),
]
MaxBatchTokens = Annotated[
    str,
    typer.Option("--max-batch-tokens", help="Tokens a batch may hold, or auto.", rich_help_panel=_RUN),
]
Backend = Annotated[
    str | None,
    typer.Option(
        "--backend",
        help=f"{' or '.join(BACKENDS)}; default: accelerate in a process group, else local.",
        rich_help_panel=_RUN,
    ),
]
NumProcesses = Annotated[
    int | None,
    typer.Option(
        "--num-processes",
        help="With accelerate: start so many on this machine; default: the group this is started in.",
        rich_help_panel=_RUN,
    ),
]
GpusPerReplica = Annotated[
    int | None,
    typer.Option(
        "--gpus-per-replica",
        help="With accelerate: GPUs that each process spreads its model over; default: 1.",
        rich_help_panel=_RUN,
    ),
]
MaxFailures = Annotated[
    int | None,
    typer.Option(
        "--max-failures",
        help="Give up when more pairs than this cannot be run; default: only when all cannot.",
        rich_help_panel=_RUN,
    ),
]
Host = Annotated[
    str | None,
    typer.Option(
        "--host",
        help="URL of the NDIF server; default: NDIF_HOST, or nnsight's. The key: NDIF_API_KEY only.",
        rich_help_panel=_HOSTED,
    ),
]
RemoteConcurrency = Annotated[
    int | None,
    typer.Option(
        "--remote-concurrency", help="Jobs under way at a time; default: 2.", rich_help_panel=_HOSTED
    ),
]
JobSeconds = Annotated[
    float | None,
    typer.Option(
        "--job-seconds",
        help="Seconds that one job of a long loop, such as a mask's training, may take; default: 300.",
        rich_help_panel=_HOSTED,
    ),
]
JobTimeout = Annotated[
    float | None,
    typer.Option(
        "--job-timeout",
        help="Seconds after which a job that is not done ends the run; default: 3600.",
        rich_help_panel=_HOSTED,
    ),
]
Patience = Annotated[
    float | None,
    typer.Option(
        "--patience",
        help="Seconds for which a host that cannot be reached is asked again; default: 600.",
        rich_help_panel=_HOSTED,
    ),
]


def options_of(ctx: typer.Context) -> dict[str, Any]:
    """Every option of the running command with its value, defaults included: what the manifest records."""
    return dict(ctx.params)


def words_of(text: str, option: str) -> tuple[str, ...]:
    """The words of an option that takes several, separated by commas."""
    words = tuple(word.strip() for word in text.split(",") if word.strip())
    if not words:
        raise InputError(f"{option} is empty; expected names separated by commas")
    return words


def one_of(known: Sequence[Choice], value: str, option: str) -> Choice:
    """The member of `known` that an option names."""
    for choice in known:
        if choice == value:
            return choice
    raise InputError(f"{option} {value}: expected one of: {', '.join(known)}")


def numbers_of(text: str, option: str) -> tuple[int, ...]:
    """The numbers of an option that takes several and ranges of them: `0,2-4` is 0, 2, 3 and 4."""
    found: list[int] = []
    for word in words_of(text, option):
        first, dash, last = word.partition("-")
        last = last if dash else first
        if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last)):
            raise InputError(f"{option} {text}: '{word}' is no number or range; expected such as 0,2-4")
        found += range(int(first), int(last) + 1)
    return tuple(dict.fromkeys(found))


def sizes_of(text: str) -> tuple[int, ...]:
    """`--top-n`: numbers of edges by comma."""
    words = words_of(text, "--top-n")
    for word in words:
        if not word.isdecimal():
            raise InputError(f"--top-n {text}: '{word}' is no number of edges; expected such as 50,200,1000")
    return tuple(map(int, words))


def batch_tokens(value: str) -> int | None:
    """`--max-batch-tokens`: a number of at least 1, or None for `auto`."""
    if value == "auto":
        return None
    if not value.isdecimal() or int(value) < 1:
        raise InputError(f"--max-batch-tokens {value}: expected a whole number of at least 1, or auto.")
    return int(value)
