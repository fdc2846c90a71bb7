"""CPU time and memory of the edge methods, in forwards, against plain torch and against the EAP-IG repository.

On a random GPT-2 and a random grouped-query Llama (12 layers, width 384), 8 pairs of 16 tokens, one thread. F is one
forward of the plain Hugging Face model over the 8 prompts, measured before and after each item.

- eap, eap-ig-inputs: every edge scored, 5 steps;
- circuit: its metric for each pair, every edge outside it cut; one circuit a call, and per circuit of ten in one call;
- exact: single edges cut, in F per edge, on a random sample of all edges.

Beside each is a plain version with hooks and autograd, whose numbers must be the same before anything is timed. Memory
is the peak of a fresh process above that of a forward and backward. Where the repository can be had
(`scripts/run_eap_ig.py` says how) it runs beside, each item in a fresh process, and its numbers must be the same too:

    python benchmarks/bench_edges.py [--repetitions 5] [--edges 300] [--return-memory]
        [--out benchmarks/results/bench_edges.json] [--peer-python peers/bin/python --peer-repo EAP-IG]
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _measure import keep_memory, load_average, machine, ratio, seconds, show, spread, write
from _memory import forward_and_backward, peak_rise, tiny
from _plain_edges import PlainEdges
from bench_nodes import (
    ANSWER,
    HEADS,
    KV_HEADS,
    LAYERS,
    PAIRS,
    TOKENS,
    VOCABULARY,
    WIDTH,
    WRONG,
    build,
    random_pairs,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from patchkit import load
from patchkit.data import Pair
from patchkit.methods import EdgeOptions, attribute_edges, patch_edges, run_circuits
from patchkit.methods.activation_patching import CPU_FORWARD
from patchkit.model import EdgeGraph, PatchModel
from patchkit.results.circuit import Circuit, top_n

STEPS = 5
#: Edges asked for, of the largest |score|; what is left after pruning is in the results.
SIZES = {"circuit of 200": 200, "circuit of 5000": 5000}
ALL = "circuit of all"
#: Of this share of the edges each, in one call.
TOGETHER = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
METHODS = ("eap", "eap-ig-inputs")
#: What the project promises, at most.
BARS = {
    "eap": 6.5,
    "eap-ig-inputs": 17.0,
    "circuit of 200": 4.0,
    "circuit of 5000": 4.0,
    ALL: 4.0,
    "exact, per edge": 0.5,
}
MEMORY_BAR = 0.25
#: Items whose memory is measured, each in a fresh process; the others are timed behind the first in the repository's.
FRESH = (("eap",), ("eap-ig-inputs",), ("circuit of 5000", "circuit of 200"))


class Case:
    """One family: the model as patchkit opens it, and a copy of it for the plain side."""

    def __init__(self, family: str, edges: int) -> None:
        module, self.pairs = build(family), random_pairs()
        self.plain = PlainEdges(copy.deepcopy(module), **prompts_of(self.pairs))
        self.model: PatchModel = load(module)
        self.graph = EdgeGraph.of(self.model.dims)
        importance = -self.plain.eap()
        self.circuits = {
            name: top_n(self.graph, importance, size, absolute=True).pruned() for name, size in SIZES.items()
        }
        self.circuits[ALL] = Circuit.full(self.graph)
        self.largest_metric = float(self.plain.evaluate(self.circuits[ALL].edges).abs().max())
        self.together = [
            top_n(self.graph, importance, round(share * self.graph.n_edges), absolute=True)
            for share in TOGETHER
        ]
        # In two halves, so that there are two repetitions in the time of one.
        real = self.graph.real.nonzero()
        sample = real[torch.randperm(len(real), generator=torch.Generator().manual_seed(0))[:edges]]
        self.halves = sample.chunk(2)

    def exact(self, half: int) -> None:
        """Cuts each of half the sampled edges."""
        where = self.halves[half].unbind(1)
        mask = torch.zeros_like(self.graph.real)
        mask[where] = True
        options = EdgeOptions(max_batch_tokens=CPU_FORWARD)
        self.effects = patch_edges(self.model, self.pairs, options, edges=mask).mean[where]

    def exact_plain(self, half: int) -> None:
        self.expected = self.plain.exact([(u, v) for u, v in self.halves[half].tolist()], CPU_FORWARD)

    def items(self) -> dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]]:
        """(ours, plain), to be timed and to be the same."""
        own = partial(one, self.model, self.pairs)
        plain: dict[str, Callable[[], Tensor]] = {
            "eap": self.plain.eap,
            "eap-ig-inputs": partial(self.plain.eap_ig_inputs, STEPS),
        }
        for name, circuit in self.circuits.items():
            plain[name] = partial(self.plain.evaluate, circuit.edges)
        return {name: (partial(own, name, self.circuits.get(name)), run) for name, run in plain.items()}

    def in_forwards(self, run: Callable[[], object]) -> float:
        """CPU time of a run over that of F, taken before and after it."""
        around = seconds(self.plain.forward, 3)
        taken = seconds(run)
        return taken / ((around + seconds(self.plain.forward, 3)) / 2)

    def check(self) -> None:
        """Raises unless both sides agree on all but the single edges."""
        for name, (own, plain) in self.items().items():
            same(name, own(), plain())


def prompts_of(pairs: Sequence[Pair]) -> dict[str, Tensor]:
    return {
        "base": torch.tensor([pair.clean_ids for pair in pairs]),
        "source": torch.tensor([pair.corrupt_ids for pair in pairs]),
        "answer": torch.full((len(pairs),), ANSWER),
        "wrong": torch.full((len(pairs),), WRONG),
    }


def one(model: PatchModel, pairs: Sequence[Pair], item: str, circuit: Circuit | None) -> Tensor:
    """Scores, native, 0 where there is no edge; or a circuit's metric of each pair."""
    if circuit is None:
        return attribute_edges(model, pairs, EdgeOptions(), item, steps=STEPS).mean.nan_to_num()  # pyright: ignore[reportArgumentType]
    return run_circuits(model, pairs, [circuit], EdgeOptions()).metric[:, 0]


def same(what: str, found: Tensor, expected: Tensor, of: str = "plain torch", floor: float = 0.0) -> None:
    """Exits unless two results are the same to 2e-5 of the largest number in them, or of `floor`."""
    gap = float((found - expected).abs().max()) / max(float(expected.abs().max()), floor)
    if not gap < 2e-5:
        raise SystemExit(f"{what}: patchkit and {of} differ by {gap:.2g} of the largest number")


def measure(case: Case, repetitions: int) -> dict[str, Any]:
    """The times of one family, on both sides."""
    case.check()
    items = case.items()
    # The long item is repeated less often.
    often = {name: max(2, repetitions // 2) if name == "eap-ig-inputs" else repetitions for name in items}
    taken: dict[str, list[float]] = {}
    for name, (own, plain) in items.items():
        for _ in range(often[name]):
            taken.setdefault(name, []).append(case.in_forwards(own))
            taken.setdefault(f"{name}, plain", []).append(case.in_forwards(plain))
    together = partial(run_circuits, case.model, case.pairs, case.together, EdgeOptions())
    taken["ten circuits, per circuit"] = [case.in_forwards(together) / len(TOGETHER) for _ in range(2)]
    for half, edges in enumerate(case.halves):
        for name, run in (("exact, per edge", case.exact), ("exact, per edge, plain", case.exact_plain)):
            taken.setdefault(name, []).append(case.in_forwards(partial(run, half)) / len(edges))
        # Checked here and not before, since it takes as long as a repetition. An effect is a difference of two metrics.
        same("exact", case.effects, case.expected, floor=case.largest_metric)
    return {
        "milliseconds of F": round(
            1000 * statistics.median(seconds(case.plain.forward) for _ in range(9)), 1
        ),
        "edges": {"all": case.graph.n_edges}
        | {name: circuit.n_edges for name, circuit in case.circuits.items()}
        | {"exact, sample": sum(map(len, case.halves))},
        "F": {name: spread(values) for name, values in taken.items()},
        "to plain torch": {
            name: ratio(values, taken[f"{name}, plain"])
            for name, values in taken.items()
            if f"{name}, plain" in taken
        },
        "load_average": load_average(),
    }


# Other processes: memory, and the repository.


def deliver(case: Case, folder: Path) -> None:
    """Writes what another process needs to do the same."""
    case.plain.model.save_pretrained(folder)
    save_file(prompts_of(case.pairs), folder / "prompts.safetensors")
    save_file({name: circuit.edges for name, circuit in case.circuits.items()}, folder / "native.safetensors")
    wide = {name: circuit.by_query_head().edges for name, circuit in case.circuits.items()}
    save_file(wide, folder / "by-query-head.safetensors")


def measure_memory(folder: Path, item: str) -> None:
    """Run in a process of its own: prints the MiB that an item needs beyond a forward and backward."""
    torch.set_num_threads(1)
    pairs = random_pairs()
    small = load(AutoModelForCausalLM.from_config(tiny(AutoConfig.from_pretrained(folder))).eval())
    circuits = load_file(folder / "native.safetensors")
    one(small, pairs, item, Circuit.full(EdgeGraph.of(small.dims)) if item in circuits else None)
    model = load(AutoModelForCausalLM.from_pretrained(folder).eval())
    circuit = Circuit(EdgeGraph.of(model.dims), circuits[item]) if item in circuits else None
    ids = prompts_of(pairs)["base"]
    rise = peak_rise(lambda: forward_and_backward(model.hf, ids), partial(one, model, pairs, item, circuit))
    print(json.dumps(rise))


def own_memory(folder: Path) -> dict[str, float]:
    """MiB by item."""
    return {
        items[0]: _answer([sys.executable, __file__, "--memory", items[0], "--data", str(folder)])
        for items in FRESH
    }


def measure_repository(case: Case, folder: Path, python: str, repo: Path) -> dict[str, Any]:
    """F, and MiB for the first of the items in a process; raises unless its numbers are ours."""
    script, found = str(Path(__file__).with_name("_peer_edges.py")), {}
    given = ["--repo", str(repo), "--data", str(folder), "--steps", str(STEPS)]
    for items in FRESH:
        found |= _answer([python, script, *given, "--items", *items])
        for item, theirs in load_file(folder / f"peer-{items[0]}.safetensors").items():
            if item in METHODS:
                scores = attribute_edges(case.model, case.pairs, EdgeOptions(), item, steps=STEPS)  # pyright: ignore[reportArgumentType]
                ours = (scores.mean if scores.by_query is None else scores.by_query[0]).nan_to_num()
            else:
                ours = one(case.model, case.pairs, item, case.circuits[item])
            same(item, ours, theirs, "the repository")
    return found


def _answer(command: Sequence[str]) -> Any:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compared(own: dict[str, Any], memory: dict[str, float], repository: dict[str, Any]) -> dict[str, Any]:
    """The repository's F over ours, and our peak over its."""
    return {
        "F, repository / patchkit": {
            item: round(values["F"] / own["F"][item]["median"], 1) for item, values in repository.items()
        },
        "peak rise, patchkit / repository": {
            item: round(rise / repository[item]["peak rise, MiB"], 3) for item, rise in memory.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--edges", type=int, default=300, help="in the sample of single edges")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "bench_edges.json")
    parser.add_argument(
        "--return-memory", action="store_true", help="leave the allocator as it is; see keep_memory"
    )
    parser.add_argument("--peer-python", help="of an environment with transformer-lens 3.9.0")
    parser.add_argument("--peer-repo", type=Path, help="a clone of hannamw/EAP-IG")
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory:
        measure_memory(options.data, options.memory)
        return
    if (options.peer_python is None) != (options.peer_repo is None):
        parser.error("--peer-python and --peer-repo go together")
    kept = not options.return_memory and keep_memory()
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for family in ("gpt2", "llama"):
        case = Case(family, options.edges)
        found[family] = measure(case, options.repetitions)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            deliver(case, folder)
            memory = found[family]["peak rise, MiB"] = own_memory(folder)
            if options.peer_python:
                repository = measure_repository(case, folder, options.peer_python, options.peer_repo)
                found[family] |= {"repository": repository} | compared(found[family], memory, repository)
    result = {
        "benchmark": "edges and circuits, CPU time in forwards and peak memory",
        "model": {
            "families": {"gpt2": {"kv_heads": HEADS}, "llama": {"kv_heads": KV_HEADS, "d_mlp": 1024}},
            "layers": LAYERS,
            "d_model": WIDTH,
            "heads": HEADS,
            "vocabulary": VOCABULARY,
        },
        "pairs": PAIRS,
        "tokens": TOKENS,
        "steps": STEPS,
        "repetitions": options.repetitions,
        "memory_kept": kept,
        "found": found,
        "bars": {name: f"<= {bar:g} F" for name, bar in BARS.items()}
        | {"peak rise, patchkit / repository": f"<= {MEMORY_BAR:g}"},
        "machine": machine(),
    }
    write(result, options.out)
    report(found, result["bars"])


def report(found: dict[str, Any], bars: dict[str, str]) -> None:
    for family, measured in found.items():
        for name, values in measured["F"].items():
            show(f"{family}: {name}", values, bars.get(name, ""))
        for name in ("peak rise, MiB", "F, repository / patchkit", "peak rise, patchkit / repository"):
            if name in measured:
                print(f"{family}: {name}", measured[name], bars.get(name, ""))


if __name__ == "__main__":
    main()
