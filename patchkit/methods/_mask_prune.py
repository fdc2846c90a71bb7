"""Dropping components that a set does not need."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from patchkit.methods._mask_evaluate import evaluate_mask, evaluate_sets, joint_score
from patchkit.methods._mask_jobs import StepOverTime, advance_hosted
from patchkit.methods._mask_layout import Layout
from patchkit.methods._mask_prepared import Prepared, pool

#: Accuracies that differ by less are the same: 0.7 less a slack of 0.1 is 0.6, not a little more.
ROUNDING = 1e-9
#: Up to so many components are pruned one at a time.
ONE_BY_ONE = 48


def prune(
    layout: Layout, prepared: Prepared, chosen: Sequence[int], slack: float
) -> tuple[list[int], list[int]]:
    """Drops components that are not needed: (kept, dropped); see `Pruning`."""
    pruning = Pruning((layout, slack), chosen)
    try:
        while prepared.hosted and not pruning.over:
            pruning = advance_hosted(pruning, [], prepared, "pruning")
    except StepOverTime:
        # A round is too long for one job: its batches are jobs from here on, and halved as their time asks for.
        pass
    pruning.advance([], prepared, lambda: True)
    return pruning.kept, pruning.dropped


class Pruning:
    """Rounds of pruning.

    One component at a time, always the one whose absence costs least, as long as the joint score stays within a slack of
    the whole set's. While there are more than `ONE_BY_ONE`, as many of the cheapest go together as the score allows: one
    at a time would take as many evaluations as the square of their number.

    Args:
        recipe: the layout and the slack.
        kept: what is left of the set.
        floor: the joint score below which nothing more is dropped; None before the first round.

    Attributes:
        over: nothing more can be dropped.
    """

    def __init__(
        self,
        recipe: tuple[Layout, float],
        kept: Sequence[int],
        dropped: Sequence[int] = (),
        floor: float | None = None,
        over: bool = False,
    ) -> None:
        self.recipe, self.kept, self.dropped = recipe, list(kept), list(dropped)
        self.floor, self.over = floor, over or not self.kept

    @classmethod
    def restored(cls, recipe: tuple[Layout, float], state: dict[str, Any]) -> Pruning:
        """The same pruning from its state."""
        return cls(recipe, **state)

    def state(self) -> dict[str, Any]:
        """What `restored` makes the same pruning of."""
        return {"kept": self.kept, "dropped": self.dropped, "floor": self.floor, "over": self.over}

    def advance(self, training: Sequence[Prepared], validation: Prepared, go_on: Callable[[], bool]) -> None:
        """Drops components by their scores on all these triples until no more can be, or as long as it may."""
        prepared = pool([*training, validation])
        while not self.over:
            self._round(prepared)
            if not go_on():
                return

    def _round(self, prepared: Prepared) -> None:
        layout, slack = self.recipe
        kept = self.kept

        def joint(components: Sequence[int]) -> float:
            return joint_score(evaluate_mask(prepared, layout.keep_all_but(components)))

        floor = self.floor = joint(kept) - slack - ROUNDING if self.floor is None else self.floor
        rest = ([c for c in kept if c != component] for component in kept)
        scores = map(joint_score, evaluate_sets(layout, prepared, rest))
        without = dict(zip(kept, scores, strict=True))
        cheapest = sorted(
            (component for component in kept if without[component] >= floor),
            key=lambda component: (-without[component], component),
        )
        count = min(len(cheapest), 1) if len(kept) <= ONE_BY_ONE else len(cheapest)
        while count > 1 and joint([c for c in kept if c not in cheapest[:count]]) < floor:
            count //= 2
        self.dropped += cheapest[:count]
        self.kept = [c for c in kept if c not in cheapest[:count]]
        self.over = not count or not self.kept
