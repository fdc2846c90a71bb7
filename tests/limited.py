"""Run as a process of its own: a method, or a command, in so much memory and no more.

    python -m tests.limited LIMIT MEGABYTES attribute|patch OUT    a method over many pairs in one batch
    python -m tests.limited LIMIT MEGABYTES patchkit ...           a command line

The limit (`RLIMIT_AS` or `RLIMIT_DATA`) is set when everything is loaded and has run once: it is what batches may take.
"""

from __future__ import annotations

import functools
import json
import resource
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from patchkit import tasks
from patchkit.data import Pair
from patchkit.methods import NodeOptions, attribute, patch_nodes
from patchkit.model import PatchModel
from patchkit.results.scores import Scores
from patchkit.runtime import Execution, use_execution, without_failures
from patchkit.runtime._process_memory import status
from patchkit.zoo.load import load

MODEL, TASK = "varbind-llama", "variable-binding"
#: More tokens than any batch here has.
ONE_BATCH = 1 << 20
MONSTER = "monster"


@functools.cache
def opened() -> PatchModel:
    """Eager attention: its scores grow with the square of a prompt."""
    return load(MODEL, attn_implementation="eager")


def pairs(count: int, monster: int = 0) -> list[Pair]:
    """Pairs of the task, the last but one of them as long as `monster` says."""
    made = [
        Pair(each.clean_ids, each.corrupt_ids, each.answer_id, each.wrong_id, id=f"p{number}")
        for number, each in enumerate(tasks.pairs(TASK, opened().tokenizer, count, 0))
    ]
    if monster:
        usual = made[0]
        times = -(-monster // len(usual.clean_ids))
        long = (usual.clean_ids * times)[:monster], (usual.corrupt_ids * times)[:monster]
        made.insert(-1, Pair(*long, usual.answer_id, usual.wrong_id, id=MONSTER))
    return made


def run(method: str, chosen: Sequence[Pair], max_batch_tokens: int = ONE_BATCH) -> Scores:
    options = NodeOptions(nodes=("z", "mlp_out"), max_batch_tokens=max_batch_tokens)
    if method == "attribute":
        return attribute(opened(), chosen, options, "atp")
    return patch_nodes(opened(), chosen, replace(options, nodes=("attn_out", "mlp_out")))


class Batches:
    """Notes the batches that were tried."""

    def __init__(self) -> None:
        self.tried: list[tuple[int, int]] = []
        self.failures = 0

    def batch(self, rows: int, width: int) -> None:
        self.tried.append((rows, width))

    def failed(self, count: int) -> None:
        self.failures = count

    def message(self, text: str) -> None:
        raise AssertionError(text)


def limit(name: str, megabytes: int) -> None:
    """From now on this process may take so much more."""
    used = status({"RLIMIT_AS": "VmSize", "RLIMIT_DATA": "VmData"}[name])
    assert used is not None
    resource.setrlimit(getattr(resource, name), (used + (megabytes << 20), resource.RLIM_INFINITY))


def main(name: str, megabytes: str, what: str, *rest: str) -> None:
    torch.set_num_threads(1)
    # What is imported or laid out at the first run is no part of a batch.
    for method in ("attribute", "patch"):
        run(method, pairs(2))
    if what == "patchkit":
        import patchkit.cli.nodes  # noqa: F401
        from patchkit.cli import main as command

        sys.argv = ["patchkit", *rest]
        limit(name, int(megabytes))
        command()
    count, monster, out = int(rest[0]), int(rest[1]), Path(rest[2])
    chosen = pairs(count, monster)
    batches = Batches()
    limit(name, int(megabytes))
    with use_execution(Execution(fit_memory=False, watcher=batches)):
        scores, left_out = without_failures(lambda kept: run(what, kept), chosen)
    said = {
        "tried": batches.tried,
        "left_out": [[each.id, each.reason] for each in left_out],
        "ids": list(scores.pair_ids),
    }
    save_file(
        {"effects": scores.effects.contiguous(), "base": scores.base_metric}, out, {"said": json.dumps(said)}
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
