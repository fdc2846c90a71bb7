"""The bound of `diagnostics` for an attribution: random subsets of the nodes that were not verified, patched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from patchkit.data import Pair
from patchkit.methods._node_options import NodeOptions, ask
from patchkit.methods._replacements import replacement
from patchkit.methods.activation_patching import set_effects
from patchkit.methods.diagnostics import BoundOptions, bound_effects
from patchkit.methods.verification import check_same_run, strata_of
from patchkit.model import PatchModel
from patchkit.results.scores import Scores
from patchkit.results.verification import Bound
from patchkit.runtime import Progress


def bound(
    model: PatchModel,
    pairs: Sequence[Pair],
    scores: Scores,
    options: NodeOptions,
    alpha: float = 0.05,
    *,
    draws: BoundOptions | None = None,
    reference: Sequence[Pair] | None = None,
    progress: Progress | None = None,
) -> Bound:
    """Bounds the effects of all nodes that `scores` estimates and its verification, if any, did not patch.

    Args:
        scores: what `attribute` returned for the same pairs and options.
        alpha: 1 - confidence.
        draws: how subsets are drawn; its alpha and seed are those of this call.
        reference: as it was given to `attribute`.

    Raises:
        InputError: alpha outside 0 to 1, or scores of other pairs or options.
    """
    asked = ask(model, pairs, options)
    check_same_run(scores, asked)
    chosen = replace(draws or BoundOptions(), alpha=alpha, seed=options.seed)
    verified = [node.number for node in scores.verification.nodes] if scores.verification else []
    order = scores.order()
    rest = order[~torch.isin(order, torch.tensor(verified, dtype=torch.long))].sort().values
    made = replacement(model, pairs, options, asked.grid.sites(asked.ids), reference)
    paid = 0.0

    def effects(sets: Sequence[Tensor], numbers: Sequence[int]) -> Tensor:
        nonlocal paid
        found = set_effects(model, asked, made, sets, numbers, progress)
        paid += found.cost
        return found.effects

    names = asked.grid.names(rest.tolist())
    found = bound_effects(effects, rest, strata_of(asked.grid, rest), names, len(pairs), chosen)
    return found.model_copy(update={"cost": paid})
