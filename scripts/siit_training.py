"""Strict interchange-intervention training: the batches, the swaps and the loss.

Each step runs a batch twice. The first run is as it is, and its loss is that of the answers. In the second run every
row has some variables' nodes replaced by those of other rows, and some nodes outside the circuit replaced by those
of other rows, by their mean or by zeros; its loss is that of the answers which the high-level program gives when the
same variables are set. A row with variables and nothing else is interchange-intervention training, one with nodes
outside the circuit and nothing else is the strict part; rows have both.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from siit_interchange import NodeHooks, Swap
from torch import Tensor, nn
from transformers import PreTrainedModel
from zoo_training import Schedule, TrainingRecord, optimizer_for

from patchkit.zoo.siit import SiitCase, Words

T = TypeVar("T")

#: Shares of rows: no variable is set, one, or each with even odds; the nodes outside are left, one replaced, each
#: with even odds, or all of them.
VARIABLES = {"none": 0.2, "one": 0.4, "some": 0.4}
OUTSIDE = {"none": 0.15, "one": 0.15, "some": 0.2, "all": 0.5}
#: What is put in at the nodes outside: other rows', their mean, zeros.
BLANKS = {"donor": 0.7, "mean": 0.15, "zero": 0.15}


@dataclass(frozen=True)
class Curriculum:
    """How the training of one case goes.

    Attributes:
        schedule: see `zoo_training.Schedule`; `target` is for both running accuracies.
        strict_from: the step from which the second run counts fully; before, its weight grows from `first_weight`.
        batch: rows.
    """

    schedule: Schedule
    strict_from: int = 500
    first_weight: float = 0.1
    batch: int = 96


def drawn_swap(rng: random.Random, case: SiitCase, hooks: NodeHooks, rows: int) -> tuple[Swap, list[dict[str, int]]]:
    """A swap, and for each row the row that each of its variables is taken from."""
    aligned = hooks.numbers(case.nodes)
    outside = [number for number in range(len(hooks.names)) if number not in aligned]
    changed = torch.zeros(rows, len(hooks.names), dtype=torch.bool)
    donor = torch.zeros(rows, len(hooks.names), dtype=torch.long)
    blank, scale = changed.clone(), torch.zeros(rows, 1)
    taken: list[dict[str, int]] = []
    for row in range(rows):
        variables = _some(rng, VARIABLES, list(case.variables))
        taken.append({name: rng.randrange(rows) for name in variables})
        for number, name in zip(aligned, case.variables, strict=True):
            if name in taken[row]:
                changed[row, number], donor[row, number] = True, taken[row][name]
        others = _some(rng, OUTSIDE, outside)
        kind = rng.choices(list(BLANKS), list(BLANKS.values()))[0]
        # One other prompt for all of them, or one for each.
        together = rng.randrange(rows) if rng.random() < 0.5 else None
        for number in others:
            changed[row, number] = True
            donor[row, number] = rng.randrange(rows) if together is None else together
            blank[row, number] = kind != "donor"
        scale[row] = float(kind == "mean")
    return Swap(changed, donor, blank, scale), taken


def _some(rng: random.Random, shares: dict[str, float], of: list[T]) -> list[T]:
    how = rng.choices(list(shares), list(shares.values()))[0]
    if how == "none":
        return []
    if how == "one":
        return [rng.choice(of)]
    return [each for each in of if how == "all" or rng.random() < 0.5]


class SiitTrainer:
    """One model on its way; `step` does one batch."""

    def __init__(self, model: PreTrainedModel, case: SiitCase, curriculum: Curriculum, seed: int):
        self.model, self.case, self.curriculum = model, case, curriculum
        self.hooks, self.rng = NodeHooks(model), random.Random(seed)
        self.tokenizer = case.tokenizer()
        self.backbone = model.get_submodule(model.base_model_prefix)
        self.unembed = model.get_submodule("lm_head")
        self.running = {"behaviour": 0.0, "interchange": 0.0}

    def logits(self, ids: Tensor) -> Tensor:
        return self.unembed(self.backbone(ids, use_cache=False).last_hidden_state[:, -1])

    def answers(self, words: list[str]) -> Tensor:
        return torch.tensor(self.case.answer_ids(self.tokenizer, words))

    def losses(self) -> tuple[Tensor, Tensor]:
        """The loss of the plain run and that of the swapped run, on a new batch."""
        case, rows = self.case, self.curriculum.batch
        prompts: list[Words] = [case.draw(self.rng) for _ in range(rows)]
        ids = torch.tensor(case.encode(self.tokenizer, prompts))
        with self.hooks.recording():
            plain = self.logits(ids)
        swap, taken = drawn_swap(self.rng, case, self.hooks, rows)
        with self.hooks.swapping(swap):
            swapped = self.logits(ids)
        wanted = self.answers([case.answer(prompt) for prompt in prompts])
        set_to = [
            case.answer(prompt, {name: prompts[other] for name, other in mine.items()})
            for prompt, mine in zip(prompts, taken, strict=True)
        ]
        target = self.answers(set_to)
        for name, logits, right in (("behaviour", plain, wanted), ("interchange", swapped, target)):
            share = (logits.argmax(-1) == right).float().mean().item()
            self.running[name] = 0.95 * self.running[name] + 0.05 * share
        cross_entropy = nn.functional.cross_entropy
        return cross_entropy(plain, wanted), cross_entropy(swapped, target)

    def weight(self, step: int) -> float:
        """Of the swapped run's loss."""
        first = self.curriculum.first_weight
        return first + (1 - first) * min(1.0, step / max(1, self.curriculum.strict_from))


def train(trainer: SiitTrainer, log_path: Path | None = None) -> TrainingRecord:
    """Train in place; the rate goes to zero over the last `decay_steps`, which begin at the target or at the end."""
    model, schedule = trainer.model, trainer.curriculum.schedule
    optimizer = optimizer_for(model, schedule)
    start, decay_from, rows, step = time.perf_counter(), schedule.max_steps - schedule.decay_steps, [], 0
    model.train()
    while step < min(schedule.max_steps, decay_from + schedule.decay_steps):
        remaining = (decay_from + schedule.decay_steps - step) / schedule.decay_steps
        for group in optimizer.param_groups:
            group["lr"] = schedule.learning_rate * min(1.0, (step + 1) / schedule.warm_up, remaining)
        behaviour, interchange = trainer.losses()
        loss = behaviour + trainer.weight(step) * interchange
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step < decay_from and min(trainer.running.values()) >= schedule.target:
            decay_from = step
        if step % 50 == 0 or step == 1:
            rows.append(
                {
                    "step": step,
                    "loss": round(loss.item(), 5),
                    "behaviour_loss": round(behaviour.item(), 5),
                    "interchange_loss": round(interchange.item(), 5),
                    "running_accuracy": round(trainer.running["behaviour"], 4),
                    "running_interchange": round(trainer.running["interchange"], 4),
                    "seconds": round(time.perf_counter() - start, 1),
                }
            )
            if log_path is not None:
                TrainingRecord(step, 0.0, rows).write_log(log_path)
    model.eval()
    return TrainingRecord(step, time.perf_counter() - start, rows)
