"""What learning a mask will run, as stages of a plan: the same triples, opened by the same `Preparation`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from patchkit.data import Triple, span_positions, split_if_needed
from patchkit.errors import InputError
from patchkit.methods._mask_layout import Layout
from patchkit.methods._mask_prepare import Masked, Preparation
from patchkit.methods._mask_steps import Gradient
from patchkit.methods._mask_triples import OwnAnswers
from patchkit.methods.desiderata_mask import MaskOptions
from patchkit.model import PatchModel
from patchkit.runtime.plan import Stage, Steps

#: Sets of components that pruning scores, for a mask of the published size: about half the square of its number.
PRUNED = 60


def mask_stages(model: PatchModel, triples: Sequence[Triple], options: MaskOptions) -> list[Stage]:
    """Of `learn_mask`, if no lambda is done early and no triple is left out.

    Raises:
        InputError: a position that a triple does not have, or nothing to train on.
    """
    layout = Layout.build(options.components, model.dims)
    triples = split_if_needed(triples, 0)
    names = options.train_on or tuple(dict.fromkeys(triple.desideratum for triple in triples))
    training = [each for each in triples if each.split == "train" and each.desideratum in names]
    if not training:
        raise InputError(
            f"there are no training triples of {', '.join(names)}; expected some with split 'train'"
        )
    held = round(len(training) * options.validation_fraction)
    tested = [each for each in triples if each.split == "test"]
    counts = _Counts(options, len(training) - held, held, len(tested), len(set(names)))
    used = [*training, *tested]
    items = [
        Masked(*place, number)
        for number, place in enumerate(zip(used, *span_positions(used, options.position), strict=True))
    ]
    opener = Preparation(layout, options.reuse)
    run = opener.rerun(items) if options.reuse else max(map(opener.tokens, items))
    weights = torch.full((len(items),), 1 / len(items))
    example = Gradient(options.objective.loss, torch.ones(layout.size), weights), 2.0 * run
    steps = Steps(
        counts.runs,
        run * counts.row_runs / len(items),
        back=4 * layout.size + 16,
        example=example,
        jobs=counts.jobs,
    )
    stages: list[Stage] = []
    unknown = [
        each for each in triples if each.original_answer_id is None or each.alternate_answer_id is None
    ]
    if unknown:
        prompts = list(
            dict.fromkeys(ids for each in unknown for ids in (each.original_ids, each.alternate_ids))
        )
        stages.append(Stage("answers", OwnAnswers(), prompts, back=8))
    return [*stages, Stage("mask", opener, items, back=24, steps=steps)]


class _Counts:
    """Runs of triples under a mask; a backward counts as one more.

    Attributes:
        runs: how often some of the triples are run together: steps and looks at validation or test triples.
        row_runs: one for each triple in each of them.
        jobs: on a host, where each part of the triples is one batch and every loop fits into one job.
    """

    def __init__(self, options: MaskOptions, train: int, held: int, tested: int, desiderata: int) -> None:
        schedule, lambdas = options.schedule, len(options.schedule.lambdas)
        paths = len(options.seeds)
        # A mask on each desideratum alone goes over its own triples: together they are one more path.
        alone = 1 if options.own_masks and desiderata > 1 else 0
        stepped = schedule.total_steps * (paths + alone)
        looks = 2 * stepped // schedule.check_every if schedule.patience else 0
        looks += lambdas * (paths + alone) * 2 + 2
        pruned = PRUNED * (paths + alone)
        # The chosen set, none, all, the complement, the soft mask; random sets; every lambda's set, every seed's.
        scored = 5 + options.random_sets + lambdas + paths * (3 + options.random_sets)
        scored += 2 * min(options.carried_limit, PRUNED // 6)
        # Published: one desideratum after the other, each step over the triples of one.
        turns = desiderata if options.objective.alternates_steps else 1
        self.runs = stepped * turns + looks + pruned + scored
        # The parts beyond the first are opened by themselves, and so are those of a mask on one desideratum.
        opened = turns + 1 + alone * desiderata * (1 if options.objective.alternates_steps else 2)
        # A path, its pruning, the validation of what is left.
        loops = 3 * (paths + alone * desiderata)
        # Training scores of the chosen set; on the test triples all sets together, and the soft mask.
        self.jobs = float(opened + loops + turns + 2)
        self.row_runs = 2 * stepped * train + looks * held + pruned * (train + held) + scored * tested


def synthetic_triples(names: Sequence[str], count: int, tokens: int, vocabulary: int) -> list[Triple]:
    """Triples that stand for prompts of one length where there are none yet: of each desideratum so many to train on, and
    as many to test with."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for name in names:
        for number in range(2 * count):
            original, alternate = torch.randint(vocabulary, (2, tokens), generator=generator).tolist()
            found.append(
                Triple(
                    name,
                    tuple(original),
                    tuple(alternate),
                    0,
                    split="train" if number < count else "test",
                    original_answer_id=min(1, vocabulary - 1),
                    alternate_answer_id=min(2, vocabulary - 1),
                )
            )
    return found
