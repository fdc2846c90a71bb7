"""Masks on a model that the stand-in host has, in a process of their own: what jaxtyping wraps does not travel.

Started as a script with a directory to work in; prints what came of every case as JSON.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from patchkit import tasks, zoo
from patchkit.data import Triple
from patchkit.errors import PatchkitError
from patchkit.methods import MaskOptions, Objective, Schedule, learn_mask
from patchkit.model import PatchModel
from patchkit.results.mask import MaskResult
from patchkit.runtime import Execution, load_hosted, use_execution
from patchkit.zoo.load import load
from tests.hosts import StandIn, stand_in

NAME = "varbind-llama-gqa"
#: Of every run: the triples in three parts are opened before anything is trained.
OPENED = 3


class Masks:
    """The same mask, learned here and, in every way there is, on the host."""

    def __init__(self, host: StandIn) -> None:
        self.host = host
        self.local = load(NAME)
        self.hosted = load_hosted(NAME, host.url)
        names = tasks.get("variable-binding").trained
        drawn = tasks.desiderata("variable-binding", self.local.tokenizer, 4, 2, 0, names=names)
        self.triples: list[Triple] = drawn.triples()
        self.expected: dict[str, MaskResult] = {}

    def options(self, **changes: Any) -> MaskOptions:
        usual: dict[str, Any] = {
            "objective": Objective("cross-entropy", "l0.5"),
            "schedule": Schedule(lambdas=(0.02, 0.08), steps=4, steps_after=2, lr=0.1),
            "seeds": (1,),
            "own_masks": False,
            "random_sets": 2,
        }
        return MaskOptions(**(usual | changes))

    def learn(
        self,
        options: MaskOptions | None = None,
        *,
        checkpoint: Path | None = None,
        progress: Callable[[str, int, int], None] | None = None,
        **execution: Any,
    ) -> dict[str, Any]:
        """What is found on the host: whether it is what is found here, the jobs that took, or what was said."""
        options = options or self.options()
        how = Execution(**execution)
        found: dict[str, Any] = {}
        with use_execution(how):
            try:
                learned = self.run(self.hosted, options, checkpoint, progress)
                found["same"] = self.same(learned, options)
                found["chosen"] = len(learned.chosen)
            except (PatchkitError, KeyboardInterrupt) as error:
                found["error"] = f"{type(error).__name__}: {error}"
        spoken = how.hosts[self.host.url]
        limit = spoken.job_seconds
        return found | {"jobs": spoken.traffic.jobs, "limit": None if limit == float("inf") else limit}

    def run(self, model: PatchModel, options: MaskOptions, *more: Any) -> MaskResult:
        checkpoint, progress = more or (None, None)
        return learn_mask(model, self.triples, options, checkpoint=checkpoint, progress=progress)

    def same(self, learned: MaskResult, options: MaskOptions) -> bool:
        """Bit for bit, but for what was paid: a host opens the triples for every job."""
        if repr(options) not in self.expected:
            self.expected[repr(options)] = self.run(self.local, options)
        expected = self.expected[repr(options)]
        assert any(bool((each < 0.9).any()) for each in expected.values.values()), "the mask did not move"
        apart = {"values", "forward_equivalents"}
        values = all(torch.equal(learned.values[kind], each) for kind, each in expected.values.items())
        return values and learned.model_dump(exclude=apart) == expected.model_dump(exclude=apart)


def interrupted(masks: Masks, checkpoint: Path) -> dict[str, Any]:
    """Ctrl-C in the middle of the first lambda, and then again to the end."""
    stages: list[tuple[str, int]] = []

    def stop(stage: str, done: int, total: int) -> None:
        stages.append((stage, done))
        if stage.startswith("training") and done == 3:
            raise KeyboardInterrupt

    first = masks.learn(checkpoint=checkpoint, progress=stop, job_seconds=0.0)
    stages.clear()
    left = sorted(path.name for path in checkpoint.iterdir())
    second = masks.learn(
        checkpoint=checkpoint, progress=lambda *told: stages.append(told[:2]), job_seconds=0.0
    )
    steps = [done for stage, done in stages if stage.startswith("training")]
    kept = sorted(path.name for path in checkpoint.iterdir() if path.is_file())
    return {"first": first, "left": left, "second": second, "steps": steps, "kept": kept}


def taken_up(masks: Masks, checkpoint: Path) -> dict[str, Any]:
    """A job that runs for too long here goes on there, and is found again."""
    masks.host.fault("stall", after=OPENED)
    first = masks.learn(checkpoint=checkpoint, job_timeout=1.0)
    masks.host.go_on()
    return {"first": first, "second": masks.learn(checkpoint=checkpoint)}


def cases(masks: Masks, room: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"whole": masks.learn()}
    gates = masks.options(
        objective=Objective("published", "hard-concrete"),
        schedule=Schedule(lambdas=(0.4, 0.3), steps=3, steps_after=2, lr=0.3, patience=0),
    )
    found["steps"] = masks.learn(gates, job_seconds=0.0)
    masks.host.fault("time-limit", after=OPENED)
    found["time limit"] = masks.learn()
    masks.host.fault("time-limit", 99, after=OPENED)
    found["too long"] = masks.learn(job_seconds=2.0)
    masks.host.fault("time-limit", -99)
    masks.host.fault("cancel", after=OPENED)
    found["cancelled"] = masks.learn()
    found["interrupted"] = interrupted(masks, room / "interrupted")
    found["taken up"] = taken_up(masks, room / "taken up")
    return found


def main() -> None:
    torch.set_num_threads(1)
    with stand_in(zoo.find(NAME) or "") as host:
        print(json.dumps(cases(Masks(host), Path(sys.argv[1]))))


if __name__ == "__main__":
    main()
