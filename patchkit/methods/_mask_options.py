"""Options of a desiderata mask."""

from __future__ import annotations

from dataclasses import dataclass, field

from patchkit.errors import InputError
from patchkit.methods._mask_objective import Objective, check_fraction
from patchkit.methods._mask_schedule import Schedule
from patchkit.runtime import MAX_BATCH_TOKENS


@dataclass(frozen=True)
class MaskOptions:
    """What is masked, how it is trained, and what it is compared with.

    Attributes:
        components: `head`, `mlp`, `layer`, `neuron`, or node kinds of the contract.
        position: `last`, or a one-token span that every triple names.
        train_on: desiderata to train on jointly; None: all. The others are scored only.
        objective: loss and sparsity.
        schedule: lambda path and steps.
        seeds: one mask each; the best on validation is the result, the others say how stable it is.
        slack: validation accuracy given up for a smaller set, along the path and in pruning.
        own_masks: also train a mask on each desideratum alone.
        random_sets: how many random sets of the chosen size to score.
        carried_limit: the table of what each component carries is made for at most this many components.
        validation_fraction: share of the training prompts that early stopping and selection look at.
        reuse: cache what no mask can change (exact; False runs whole prompts).
    """

    components: tuple[str, ...] = ("head", "mlp")
    position: str = "last"
    train_on: tuple[str, ...] | None = None
    objective: Objective = field(default_factory=Objective)
    schedule: Schedule = field(default_factory=Schedule)
    seeds: tuple[int, ...] = (0, 1, 2)
    slack: float = 0.005
    own_masks: bool = True
    random_sets: int = 20
    carried_limit: int = 64
    validation_fraction: float = 0.25
    reuse: bool = True
    max_batch_tokens: int = MAX_BATCH_TOKENS

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise InputError(f"seeds is {list(self.seeds)}; expected at least one training seed, each once")
        if self.random_sets < 1:
            raise InputError(
                f"random_sets is {self.random_sets}; nothing is claimed without a baseline: at least 1"
            )
        if not self.slack >= 0:
            raise InputError(f"slack is {self.slack}; expected an accuracy to give up, 0 or more")
        if self.objective.sparsity == "hard-concrete":
            for fraction in self.schedule.lambdas:
                check_fraction(fraction)
