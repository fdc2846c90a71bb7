"""Strict interchange-intervention training: the batches, the loss, the loop.

Each step runs a batch twice. The first run is as it is, and its loss is that of the answers. In the second run every
row has some variables' nodes replaced by those of other rows, and some nodes outside the circuit replaced by those
of other rows, by their mean or by zeros; its loss is that of the answers which the high-level program gives when the
same variables are set. A row with variables and nothing else is interchange-intervention training, one with nodes
outside the circuit and nothing else is the strict part; rows have both. Gradients go through what is put in, too.

Some programs are hard to begin with, and a network that has learned the task elsewhere is slow to move it into the
nodes that it should be in. Of a sum modulo 8, no operand alone tells anything: there, training begins with easier
prompts. A lookup that is asked for once a prompt stays at a guess among the words in sight: there, it begins with
lessons, prompts that ask several times, with nodes outside the circuit replaced and no interchange.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from siit_interchange import NodeHooks
from siit_swaps import LESSON, STRICT, drawn_swap
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_
from transformers import PreTrainedModel
from zoo_training import Schedule, TrainingRecord, optimizer_for

from patchkit.zoo.siit import SiitCase, Words

#: A prompt, and for each of its words the answer that is right after it, or '' where none is asked for.
Lesson = Callable[[random.Random], tuple[Words, Words]]


@dataclass(frozen=True)
class Curriculum:
    """How the training of one case goes.

    Attributes:
        schedule: see `zoo_training.Schedule`; `target` is for the running accuracies of both runs.
        first_weight: of the second run's loss at the beginning; it grows to 1 over `growing` steps.
        batch: rows.
        lesson: what comes first, until `good_enough` of its answers are right.
        easy: prompts drawn instead of the case's until `good_enough` of the answers of both runs are right.
    """

    schedule: Schedule
    first_weight: float = 0.1
    growing: int = 500
    batch: int = 96
    lesson: Lesson | None = None
    easy: Callable[[random.Random], Words] | None = None
    good_enough: float = 0.95


class SiitTrainer:
    """One model on its way.

    Attributes:
        stages: those still to come, `lesson`, `easy` and `strict`, as far as the curriculum has them; the first is on.
        running: accuracies, averaged over about the last twenty batches.
    """

    def __init__(self, model: PreTrainedModel, case: SiitCase, curriculum: Curriculum, seed: int):
        self.model, self.case, self.curriculum = model, case, curriculum
        self.hooks, self.rng, self.tokenizer = NodeHooks(model), random.Random(seed), case.tokenizer()
        self.backbone = model.get_submodule(model.base_model_prefix)
        self.unembed = model.get_submodule("lm_head")
        self.running = {"lesson": 0.0, "behaviour": 0.0, "interchange": 0.0}
        begins = {"lesson": curriculum.lesson, "easy": curriculum.easy}
        self.stages = [*(stage for stage, given in begins.items() if given is not None), "strict"]
        self.steps = 0

    @property
    def both(self) -> float:
        """The smaller running accuracy of the two runs."""
        return min(self.running["behaviour"], self.running["interchange"])

    @property
    def ready(self) -> bool:
        """Whether the rate may go down."""
        return self.stages[0] == "strict" and self.both >= self.curriculum.schedule.target

    def loss(self) -> Tensor:
        """Of a new batch of the stage that training is in; the next stage begins where this one is good enough."""
        given, stage = self.curriculum, self.stages[0]
        if stage == "lesson" and given.lesson is not None:
            loss, reached = self._lesson_loss(given.lesson), self.running["lesson"]
        else:
            draw = given.easy if stage == "easy" and given.easy is not None else self.case.draw
            weight = given.first_weight + (1 - given.first_weight) * min(1.0, self.steps / given.growing)
            self.steps += 1
            loss, reached = self._interchange_loss(draw, weight), self.both
        if len(self.stages) > 1 and reached >= given.good_enough:
            self.stages.pop(0)
            self.running.update(behaviour=0.0, interchange=0.0)
        return loss

    def _lesson_loss(self, lesson: Lesson) -> Tensor:
        rows = self.curriculum.batch
        prompts, answers = zip(*(lesson(self.rng) for _ in range(rows)), strict=True)
        ids = torch.tensor(self.case.encode(self.tokenizer, prompts))
        with torch.no_grad(), self.hooks.recording():
            self._hidden(ids)
        swap, _ = drawn_swap(self.rng, self.case, self.hooks, rows, LESSON)
        with self.hooks.swapping(swap):
            hidden = self._hidden(ids)[:, 1:]  # without `<s>`, which is not one of the prompt's words
        asked = torch.tensor([[word != "" for word in row] for row in answers])
        return self._scored("lesson", hidden[asked], [word for row in answers for word in row if word])

    def _interchange_loss(self, draw: Callable[[random.Random], Words], weight: float) -> Tensor:
        case, rows = self.case, self.curriculum.batch
        prompts = [draw(self.rng) for _ in range(rows)]
        ids = torch.tensor(case.encode(self.tokenizer, prompts))
        with self.hooks.recording():
            plain = self._hidden(ids)[:, -1]
        swap, taken = drawn_swap(self.rng, case, self.hooks, rows, STRICT)
        with self.hooks.swapping(swap):
            swapped = self._hidden(ids)[:, -1]
        wanted = [case.answer(prompt) for prompt in prompts]
        target = [
            case.answer(prompt, {name: prompts[other] for name, other in mine.items()})
            for prompt, mine in zip(prompts, taken, strict=True)
        ]
        return self._scored("behaviour", plain, wanted) + weight * self._scored(
            "interchange", swapped, target
        )

    def _hidden(self, ids: Tensor) -> Tensor:
        return self.backbone(ids, use_cache=False).last_hidden_state

    def _scored(self, what: str, hidden: Tensor, words: list[str]) -> Tensor:
        logits, right = self.unembed(hidden), torch.tensor(self.case.answer_ids(self.tokenizer, words))
        share = (logits.argmax(-1) == right).float().mean().item()
        self.running[what] = 0.95 * self.running[what] + 0.05 * share
        return cross_entropy(logits, right)


def train(trainer: SiitTrainer, log_path: Path | None = None) -> TrainingRecord:
    """Train in place. The rate is constant after the warm-up, and goes to zero over the last `decay_steps`, which
    begin when the trainer is ready. The log has a row every 50 steps and is written as it grows.
    """
    model, schedule = trainer.model, trainer.curriculum.schedule
    optimizer = optimizer_for(model, schedule)
    start, decay_from, rows, step = time.perf_counter(), schedule.max_steps - schedule.decay_steps, [], 0
    model.train()
    while step < min(schedule.max_steps, decay_from + schedule.decay_steps):
        remaining = (decay_from + schedule.decay_steps - step) / schedule.decay_steps
        for group in optimizer.param_groups:
            group["lr"] = schedule.learning_rate * min(1.0, (step + 1) / schedule.warm_up, remaining)
        stage, loss = trainer.stages[0], trainer.loss()
        optimizer.zero_grad()
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step < decay_from and trainer.ready:
            decay_from = step
        if step % 50 == 0 or step == 1:
            running = {f"running_{name}": round(value, 4) for name, value in trainer.running.items()}
            seconds = round(time.perf_counter() - start, 1)
            rows.append(
                {"step": step, "stage": stage, "loss": round(loss.item(), 5), **running, "seconds": seconds}
            )
            if log_path is not None:
                TrainingRecord(step, 0.0, rows).write_log(log_path)
    model.eval()
    return TrainingRecord(step, time.perf_counter() - start, rows)
