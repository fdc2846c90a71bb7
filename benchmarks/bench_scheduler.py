"""What the scheduler costs beside a hand-written loop, and what a second process brings.

256 variable-binding pairs of uneven length on an embedded model; every process has one thread.

- overhead: CPU time of `run_program`, over that of a loop that calls the same Program on the same batches and puts the
  rows back in order; without a journal, and with one that is written anew every time. AtP, whose batches are short.
- throughput: wall-clock time in one process, over that in two (gloo, on this machine). Exact patching of the heads
  and MLPs of the lower two layers. Only a machine with two idle cores can show it.

All ways must give the same numbers, which is checked before anything is timed. Repetitions are interleaved and each gives
one ratio. Reported: medians, and the quartiles beside them.

    python benchmarks/bench_scheduler.py [--repetitions 5] [--out benchmarks/results/bench_scheduler.json]
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

# Before torch counts the cores; the processes that are started inherit it.
os.environ["OMP_NUM_THREADS"] = "1"

import torch
from _measure import keep_memory, load_average, machine, ratio, seconds, show, spread, write
from torch import Tensor

from patchkit import tasks
from patchkit.data import Pair
from patchkit.methods._node_options import NodeOptions, ask
from patchkit.methods._replacements import replacement
from patchkit.methods.activation_patching import patch_nodes
from patchkit.methods.attribution import Attribution, PairItem
from patchkit.model import PatchModel
from patchkit.runtime import Execution, Journal, length_buckets, run_program, started_processes, use_execution
from patchkit.zoo.load import load

MODEL, PAIRS = "varbind-llama-gqa", 256
#: Padded tokens of a batch: some thirty batches, none of which takes long.
BATCH_TOKENS = 256
#: What the project promises: scheduled / loop at most, one process / two processes at least.
AT_MOST, AT_LEAST = 1.05, 1.7
ROUNDING = 1e-5


class Scheduled:
    """One Program on the same items in three ways."""

    def __init__(self, model: PatchModel, pairs: Sequence[Pair]) -> None:
        options = NodeOptions()
        asked = ask(model, pairs, options)
        sites = tuple(asked.grid.sites(asked.ids))
        made = replacement(model, pairs, options, sites, None)
        self.model = model
        self.program = Attribution(asked.grid, sites, options.metric, options.direction, made, False, False)
        self.items = [
            PairItem(pair, covered) for pair, covered in zip(pairs, asked.places.covered, strict=True)
        ]
        self.batches = length_buckets([self.program.tokens(item) for item in self.items], BATCH_TOKENS)

    def loop(self) -> dict[str, Tensor]:
        """By hand: the batches in turn, and their rows in the order of the items."""
        parts = [
            self.program.run(self.model, [self.items[i] for i in batch]) for batch in reversed(self.batches)
        ]
        back = torch.argsort(torch.tensor([i for batch in reversed(self.batches) for i in batch]))
        return {name: torch.cat([part[name] for part in parts])[back] for name in parts[0]}

    def scheduled(self) -> dict[str, Tensor]:
        return run_program(self.program, self.model, self.items, max_batch_tokens=BATCH_TOKENS)

    def journalled(self) -> dict[str, Tensor]:
        with tempfile.TemporaryDirectory() as directory:
            return run_program(
                self.program,
                self.model,
                self.items,
                max_batch_tokens=BATCH_TOKENS,
                journal=Journal(directory),
            )


def check(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        gap, largest = (float(each.nan_to_num().abs().max()) for each in (found[name] - value, value))
        assert gap <= ROUNDING * largest, f"{name}: off by {gap:.1e}, the largest is {largest:.1e}"


def overhead(model: PatchModel, pairs: Sequence[Pair], repetitions: int) -> dict[str, object]:
    ways = Scheduled(model, pairs)
    runs: dict[str, Callable[[], object]] = {
        "loop": ways.loop,
        "scheduled": ways.scheduled,
        "journalled": ways.journalled,
    }
    expected = ways.loop()
    check(ways.scheduled(), expected)
    check(ways.journalled(), expected)
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for repetition in range(repetitions):
        # In turns, so that none has always the same one before it.
        names = list(runs)[repetition % 3 :] + list(runs)[: repetition % 3]
        for name in names:
            taken[name].append(seconds(runs[name]))
    return {
        "batches": len(ways.batches),
        "loop_seconds": round(statistics.median(taken["loop"]), 3),
        "scheduled/loop": ratio(taken["scheduled"], taken["loop"]),
        "journalled/loop": ratio(taken["journalled"], taken["loop"]),
        "bar": AT_MOST,
    }


def throughput(model: PatchModel, pairs: Sequence[Pair], repetitions: int) -> dict[str, object]:
    options = NodeOptions(layers=(0, 1), max_batch_tokens=1024)

    def run() -> tuple[Tensor, float]:
        begun = time.perf_counter()
        effects = patch_nodes(model, pairs, options).effects
        return effects, time.perf_counter() - begun

    one: list[float] = []
    two: list[float] = []
    with started_processes(2) as group:
        # Both have the model open, and run what is slow the first time.
        first, _ = run()
        with use_execution(Execution()):
            second, _ = run()
        check({"effects": first}, {"effects": second})
        before = load_average()
        for _ in range(repetitions):
            with use_execution(Execution()):
                one.append(run()[1])
            two.append(run()[1])
        assert not group.find_dead()
    return {
        "one_process_seconds": spread(one),
        "two_processes_seconds": spread(two),
        "load_average_before": before,
        "one/two": ratio(one, two),
        "bar": AT_LEAST,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/bench_scheduler.json")
    arguments = parser.parse_args()
    kept = keep_memory()
    torch.set_num_threads(1)
    model = load(MODEL)
    pairs = tasks.pairs("variable-binding", model.tokenizer, PAIRS, 0)
    lengths = [len(pair.clean_ids) for pair in pairs]
    result: dict[str, object] = {
        "model": MODEL,
        "pairs": {"count": len(pairs), "shortest": min(lengths), "longest": max(lengths)},
        "memory_kept": kept,
        "overhead": (beside := overhead(model, pairs, arguments.repetitions)),
        "throughput": (shared := throughput(model, pairs, max(2, arguments.repetitions))),
        "machine": machine(),
    }
    for name in ("scheduled/loop", "journalled/loop"):
        show(name, beside[name], f"at most {AT_MOST}")  # type: ignore[arg-type]
    show("one process / two processes", shared["one/two"], f"at least {AT_LEAST}")  # type: ignore[arg-type]
    write(result, arguments.out)


if __name__ == "__main__":
    main()
