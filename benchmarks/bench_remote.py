"""What a host costs: bytes and jobs, and the time that it adds, with the server on the same machine.

    python benchmarks/bench_remote.py --host http://127.0.0.1:PORT [--model varbind-llama-gqa] [--repetitions 5]
                                      [--out benchmarks/results/bench_remote.json]

`python tests/remote/server/control.py up patchkit/zoo/models/varbind-llama-gqa` starts an NDIF server on loopback and
prints its address. Wall-clock time: the client waits while the server works. On one machine both share its cores, and the
model is tiny, so that the ratio is a job's fixed cost and not what a large model would show.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _measure import machine, ratio, show, spread, write

from patchkit import tasks
from patchkit.methods import MaskOptions, NodeOptions, Objective, Schedule, learn_mask
from patchkit.methods.activation_patching import patch_nodes
from patchkit.methods.attribution import attribute
from patchkit.methods.edge_attribution import attribute_edges
from patchkit.model import PatchModel
from patchkit.runtime import Execution, load_hosted, use_execution
from patchkit.runtime.probe import run_alone
from patchkit.zoo.load import load

PAIRS = 24
#: Of the mask: training triples of a desideratum, and steps at each of two lambdas.
TRIPLES, STEPS = 16, 40


def nothing(model: PatchModel) -> dict[str, Any]:
    """Job: an empty one."""
    return {"ok": True}


def workloads(local: PatchModel) -> dict[str, Callable[[PatchModel], Any]]:
    """By name; all but the mask over the same pairs."""
    pairs = tasks.pairs("variable-binding", local.tokenizer, PAIRS, 0)
    nodes = NodeOptions(nodes=("z", "mlp_out"))
    names = tasks.get("variable-binding").trained
    triples = tasks.desiderata(
        "variable-binding", local.tokenizer, TRIPLES, TRIPLES, 0, names=names
    ).triples()
    schedule = Schedule(lambdas=(0.02, 0.04), steps=STEPS, steps_after=STEPS, patience=0)
    mask = MaskOptions(objective=Objective(), schedule=schedule, seeds=(0,), own_masks=False, random_sets=5)
    return {
        "exact patching": lambda model: patch_nodes(model, pairs, nodes),
        "AtP*": lambda model: attribute(model, pairs, nodes, "atp-star"),
        "EAP-IG": lambda model: attribute_edges(model, pairs, method="eap-ig-inputs"),
        f"mask, {2 * STEPS} steps": lambda model: learn_mask(model, triples, mask),
    }


def timed(run: Callable[[], Any]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--host", required=True)
    parser.add_argument("--model", default="varbind-llama-gqa")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    local, hosted = load(given.model), load_hosted(given.model, given.host)
    rows: dict[str, dict[str, Any]] = {}
    trips = [timed(lambda: run_alone(hosted, nothing)) for _ in range(given.repetitions)]
    for name, run in workloads(local).items():
        run(local)
        here, there = [], []
        for _ in range(given.repetitions):
            execution = Execution()
            here.append(timed(lambda run=run: run(local)))
            with use_execution(execution):
                there.append(timed(lambda run=run: run(hosted)))
        traffic = execution.hosts[hosted.hosted.url].traffic  # pyright: ignore
        rows[name] = {
            "jobs": traffic.jobs,
            "requests": traffic.requests,
            "bytes_out": traffic.sent,
            "bytes_back": traffic.received,
            "bytes_a_pair": round((traffic.sent + traffic.received) / PAIRS),
            "seconds_here": spread(here),
            "seconds_there": spread(there),
            "there_over_here": ratio(there, here),
        }
    result = {
        "benchmark": "bench_remote",
        "machine": machine(),
        "model": given.model,
        "pairs": PAIRS,
        "empty_job_seconds": spread(trips),
        "workloads": rows,
    }
    show("seconds of an empty job", spread(trips))
    for name, row in rows.items():
        show(f"{name}: there / here", row["there_over_here"])
        print(
            f"    {row['jobs']} jobs, {row['requests']} requests, {row['bytes_out']:,} bytes out, "
            f"{row['bytes_back']:,} back"
        )
    if given.out is not None:
        write(result, given.out)


if __name__ == "__main__":
    main()
