"""The EAP-IG repository on the shapes of `bench_edges.py`, in a process and an environment of its own.

Started by `bench_edges.py --peer-python ... --peer-repo ...`; prints one line of JSON and writes what was found. Memory
is measured in the first run of the first item, on the allocator's defaults; times are those of one run after it, on the
allocator's settings that patchkit is timed on. What makes the repository's graph is not counted.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from _measure import keep_memory, seconds
from _memory import forward_and_backward, peak_rise, tiny
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
from run_eap_ig import batch_of, hooked, import_repo, logit_diff, total  # noqa: E402

METHODS = {"eap": "EAP", "eap-ig-inputs": "EAP-IG-inputs"}


class Side:
    """One model as the repository sees it, and what it is asked to do."""

    def __init__(self, repo: SimpleNamespace, twin: Any, prompts: dict[str, Tensor], steps: int) -> None:
        self.repo, self.twin, self.ids, self.steps = repo, twin.requires_grad_(False), prompts["base"], steps
        columns = (prompts[name].tolist() for name in ("base", "source", "answer", "wrong"))
        self.loader = batch_of(list(zip(*columns, strict=True)))
        self.model = hooked(twin, context=4 * self.ids.shape[1])
        self.graph = repo.Graph.from_model(self.model)

    def forward(self) -> None:
        """F: one forward of the Hugging Face model, in this process."""
        with torch.no_grad():
            self.twin(input_ids=self.ids, use_cache=False)

    def scores(self, item: str) -> Tensor:
        self.repo.attribute(
            self.model, self.graph, self.loader, total, METHODS[item], ig_steps=self.steps, quiet=True
        )
        return self.graph.scores

    def metric(self, circuit: Tensor) -> Tensor:
        self.graph.in_graph[:] = circuit
        return self.repo.evaluate_graph(self.model, self.graph, self.loader, logit_diff, quiet=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repo", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="what bench_edges.py wrote of a model")
    parser.add_argument("--items", nargs="+", required=True, help="memory is measured in the first")
    parser.add_argument("--steps", type=int, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    prompts, circuits = (
        load_file(options.data / f"{name}.safetensors") for name in ("prompts", "by-query-head")
    )
    repo = import_repo(options.repo)
    small = Side(
        repo, AutoModelForCausalLM.from_config(tiny(AutoConfig.from_pretrained(options.data))), prompts, 1
    )
    small.scores(options.items[0]) if options.items[0] in METHODS else small.metric(
        small.graph.real_edge_mask
    )
    side = Side(repo, AutoModelForCausalLM.from_pretrained(options.data).eval(), prompts, options.steps)
    found: dict[str, Tensor] = {}

    def run(item: str) -> None:
        found[item] = side.scores(item) if item in METHODS else side.metric(circuits[item])

    first = options.items[0]
    rise = peak_rise(lambda: forward_and_backward(side.twin, side.ids), lambda: run(first))
    keep_memory()
    result: dict[str, dict[str, float]] = {}
    for item in options.items:
        side.forward()
        around = seconds(side.forward, 3)
        taken = seconds(lambda item=item: run(item))
        around = (around + seconds(side.forward, 3)) / 2
        result[item] = {"F": round(taken / around, 2)}
    result[first]["peak rise, MiB"] = rise
    save_file(
        {item: value.clone() for item, value in found.items()},
        options.data / f"peer-{first}.safetensors",
    )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
