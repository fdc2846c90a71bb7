"""What `compare` and `generalise` share: options of finding circuits, and pairs in halves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from patchkit.cli.given import given_pairs

if TYPE_CHECKING:
    from patchkit.data import Pair
    from patchkit.model import PatchModel
    from patchkit.runtime import LeftOut

Result = TypeVar("Result")
_CIRCUIT = "Circuits"

TopN = Annotated[
    str, typer.Option("--top-n", help="Numbers of edges, by comma: 20,50.", rich_help_panel=_CIRCUIT)
]
FindMethod = Annotated[
    str,
    typer.Option(
        "--method", help="That scores edges, as of `patchkit edges`; not acdc.", rich_help_panel=_CIRCUIT
    ),
]
Absolute = Annotated[
    bool,
    typer.Option("--absolute/--signed", help="Rank edges by |score| or score.", rich_help_panel=_CIRCUIT),
]
RandomSets = Annotated[
    int,
    typer.Option(
        "--random", min=0, help="Random sets of equal size to compare with.", rich_help_panel=_CIRCUIT
    ),
]


def split_of(model: PatchModel, given: Mapping[str, Any]) -> tuple[list[Pair], list[Pair]]:
    """The pairs of `--pairs` or `--task` in halves; with a task `--n` in each."""
    from patchkit.data import halves

    return halves(given_pairs(model, {**given, "n": 2 * given["n"]}), given["seed"])


def without_failing(
    sets: Mapping[str, Sequence[Pair]], call: Callable[[dict[str, list[Pair]]], Result]
) -> tuple[Result, list[LeftOut]]:
    """Calls with several sets of pairs; where pairs could not be run, again without them."""
    from patchkit.runtime import without_failures

    def again(kept: Sequence[Pair]) -> Result:
        left = set(map(id, kept))
        return call({name: [pair for pair in pairs if id(pair) in left] for name, pairs in sets.items()})

    return without_failures(again, [pair for pairs in sets.values() for pair in pairs])
