"""Plans of `compare` and `generalise`, from their own options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from patchkit.cli.across_options import split_of
from patchkit.cli.compare import compare_options, groups_of, refuse_hosted, triples_of
from patchkit.cli.generalise import check_sets, generalise_options, sets_of
from patchkit.errors import InputError

if TYPE_CHECKING:
    from patchkit.cli.run_options import RunOptions
    from patchkit.data import Pair
    from patchkit.model import PatchModel
    from patchkit.runtime.plan import Stage

#: Sets that stand for those of a plan without data, of as many prompts each.
_MADE_UP = 3


def compare_plan(
    model: PatchModel, given: Mapping[str, Any], shared: RunOptions, tokens: int
) -> tuple[list[Stage], list[Pair], bool]:
    """(stages on one of the two models, their pairs, whether these are made up)."""
    from patchkit.methods.edge_plans import synthetic_pairs
    from patchkit.studies.across_plans import compare_stages

    refuse_hosted(shared)
    options = compare_options(given, shared)
    made_up = given["pairs"] is None and given["task"] is None
    if given["pairs"] is not None and given["task"] is not None:
        raise InputError(
            "give either --pairs FILE or --task NAME, one of the two, or neither for a plan by --n and --tokens"
        )
    if made_up:
        made = synthetic_pairs(2 * given["n"], tokens, model.dims.vocab_size)
        finding, held_out = made[::2], made[1::2]
    else:
        finding, held_out = split_of(model, given)
    stages = compare_stages(
        model,
        finding,
        held_out,
        options,
        triples=triples_of(model, given),
        groups=groups_of(given["group"]),
    )
    return stages, held_out, made_up


def generalise_plan(
    model: PatchModel, given: Mapping[str, Any], shared: RunOptions, tokens: int
) -> tuple[list[Stage], list[Pair], bool]:
    """(stages, held-out pairs, whether these are made up)."""
    from patchkit.data import halves
    from patchkit.methods.edge_plans import synthetic_pairs
    from patchkit.studies.across_plans import generalise_stages

    options = generalise_options(given, shared)
    made_up = not given["pairs"] and given["task"] is None
    if made_up:
        made = synthetic_pairs(2 * given["n"], tokens, model.dims.vocab_size)
        split = {str(number): (made[::2], made[1::2]) for number in range(_MADE_UP)}
    else:
        check_sets(given)
        split = {name: halves(pairs, given["seed"]) for name, pairs in sets_of(model, given).items()}
    stages = generalise_stages(model, split, options)
    return stages, [pair for _, held_out in split.values() for pair in held_out], made_up
