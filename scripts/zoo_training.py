"""The training loop of the embedded models: AdamW, warm-up, a constant rate, then a linear decay to
the end.
"""

import csv
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


class Stream(Protocol):
    """Batches that get harder: see zoo_curricula."""

    stage: str
    running: float

    def next(self) -> tuple[Tensor, Tensor]: ...
    def feedback(self, accuracy: float) -> None: ...
    def ready(self, target: float) -> bool: ...


@dataclass(frozen=True)
class Schedule:
    """The rate is constant after the warm-up; once the stream is `ready(target)`, or `max_steps -
    decay_steps` have passed, it goes to zero over `decay_steps` and training ends.

    With `ends_at` training ends after that many steps, wherever it is: an earlier stage of the run without it.
    """

    max_steps: int
    decay_steps: int = 600
    target: float = 0.985
    learning_rate: float = 1.5e-3
    warm_up: int = 200
    weight_decay: float = 0.1
    ends_at: int | None = None


@dataclass(frozen=True)
class TrainingRecord:
    steps: int
    seconds: float
    rows: list[dict[str, float | int | str]]

    def write_log(self, path: Path) -> None:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(self.rows[0]))
            writer.writeheader()
            writer.writerows(self.rows)


def optimizer_for(model: nn.Module, schedule: Schedule) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices only."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": schedule.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=schedule.learning_rate, betas=(0.9, 0.98))


def train(
    model: PreTrainedModel, stream: Stream, schedule: Schedule, log_path: Path | None = None
) -> TrainingRecord:
    """Train in place. The log has a row every 50 steps and is written as it grows when `log_path`
    is given.
    """
    optimizer = optimizer_for(model, schedule)
    backbone, unembed = model.get_submodule(model.base_model_prefix), model.get_submodule("lm_head")
    start, decay_from, rows, step = time.perf_counter(), schedule.max_steps - schedule.decay_steps, [], 0
    model.train()
    most = schedule.max_steps if schedule.ends_at is None else min(schedule.max_steps, schedule.ends_at)
    while step < min(most, decay_from + schedule.decay_steps):
        remaining = (decay_from + schedule.decay_steps - step) / schedule.decay_steps
        for group in optimizer.param_groups:
            group["lr"] = schedule.learning_rate * min(1.0, (step + 1) / schedule.warm_up, remaining)
        ids, labels = stream.next()
        keep = labels >= 0
        logits = unembed(backbone(ids, use_cache=False).last_hidden_state[keep])
        loss = nn.functional.cross_entropy(logits, labels[keep])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        accuracy = (logits.argmax(-1) == labels[keep]).float().mean().item()
        stream.feedback(accuracy)
        step += 1
        if step < decay_from and stream.ready(schedule.target):
            decay_from = step
        if step % 50 == 0 or step == 1:
            rows.append(
                {
                    "step": step,
                    "stage": stream.stage,
                    "loss": round(loss.item(), 5),
                    "accuracy": round(accuracy, 4),
                    "running_accuracy": round(stream.running, 4),
                    "seconds": round(time.perf_counter() - start, 1),
                }
            )
            if log_path is not None:
                TrainingRecord(step, 0.0, rows).write_log(log_path)
    model.eval()
    return TrainingRecord(step, time.perf_counter() - start, rows)
