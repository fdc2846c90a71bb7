"""Edge methods on large random models in bfloat16 on one GPU: seconds, and memory beside the weights.

Llama-13B's and Llama-3.1-8B's shapes with random weights; nothing is downloaded. F is one forward of the plain Hugging
Face model over the base prompts with logits at the last token, F+B that and a backward of activations. Memory is the
peak that the allocator saw, less the weights.

- eap, eap-ig-inputs (5 steps): all edges at once;
- circuit: the best 5,000 edges of eap, base and source run included;
- exact: a random sample of edges, in F per edge;
- the plan's estimate of what eap holds beside a forward and backward, against the measured rise over F+B.

    python benchmarks/bench_edges_gpu.py --shapes 13b,8b [--device cuda:0] [--out benchmarks/results/bench_edges_gpu.json]
"""

from __future__ import annotations

import argparse
import platform
from pathlib import Path
from typing import Any, cast

import torch
from _measure import write
from _random_llama import Meter, build, pairs_of

from patchkit.methods import EdgeOptions, attribute_edges, patch_edges, run_circuits
from patchkit.methods._edge_cost import attribution_cost
from patchkit.model import EdgeGraph, PatchModel
from patchkit.results.circuit import top_n
from patchkit.results.edge_scores import EdgeMethod

#: (pairs, tokens) of a measurement.
BATCHES = ((8, 16), (2, 256))
SAMPLE = 200


def measure(model: PatchModel, meter: Meter, count: int, tokens: int) -> dict[str, Any]:
    pairs, hf = pairs_of(model, count, tokens), cast(Any, model.hf)
    ids = torch.tensor([pair.clean_ids for pair in pairs], device=model.embed_device)
    options = EdgeOptions()

    def forward() -> None:
        with torch.no_grad():
            hf(input_ids=ids, use_cache=False, logits_to_keep=1)

    def with_backward() -> None:
        embedded = hf.get_input_embeddings()(ids).detach().requires_grad_(True)
        logits = hf(inputs_embeds=embedded, use_cache=False, logits_to_keep=1).logits[:, -1]
        torch.autograd.grad((logits[:, 1] - logits[:, 2]).float().sum(), embedded)

    one, room, _ = meter(forward, 5)
    both, room_both, _ = meter(with_backward, 3)
    eap, room_eap, scores = meter(lambda: attribute_edges(model, pairs, options, "eap"), 2)
    path, room_path, _ = meter(lambda: attribute_edges(model, pairs, options, "eap-ig-inputs", steps=5), 1)
    graph = EdgeGraph.of(model.dims)
    circuit = top_n(graph, scores.importance, min(5000, graph.n_edges // 2), absolute=True).pruned()
    run, room_run, _ = meter(lambda: run_circuits(model, pairs, [circuit], options), 1)
    flat = graph.real.flatten().nonzero()[:, 0]
    drawn = flat[torch.randperm(len(flat), generator=torch.Generator().manual_seed(0))[:SAMPLE]]
    mask = torch.zeros(graph.real.numel(), dtype=torch.bool)
    mask[drawn] = True
    mask = mask.reshape(graph.real.shape)
    exact, room_exact, patched = meter(lambda: patch_edges(model, pairs, options, edges=mask), 1)
    known = mask & scores.mean.isfinite()
    agree = torch.stack([scores.mean[known].double(), patched.mean[known].double()])
    plan = attribution_cost(model.dims, [tokens] * count, EdgeMethod(name="eap"), model.dims.group > 1)
    return {
        "pairs": count,
        "tokens": tokens,
        "edges": graph.n_edges,
        "circuit edges": circuit.n_edges,
        "seconds": {
            "F": round(one, 4),
            "F+B": round(both, 4),
            "eap": round(eap, 3),
            "eap a pair": round(eap / count, 4),
            "eap-ig-inputs": round(path, 3),
            "circuit": round(run, 3),
            "exact an edge": round(exact / len(drawn), 4),
        },
        "F": {
            "eap": round(eap / one, 2),
            "eap-ig-inputs": round(path / one, 2),
            "circuit": round(run / one, 2),
            "exact an edge": round(exact / len(drawn) / one, 3),
        },
        "GB beside the weights": {
            name: round(value / 1e9, 3)
            for name, value in {
                "F": room,
                "F+B": room_both,
                "eap": room_eap,
                "eap-ig-inputs": room_path,
                "circuit": room_run,
                "exact": room_exact,
                "eap planned": plan.bytes + (plan.passes or 0),
            }.items()
        },
        "sample: correlation of eap with exact": round(float(torch.corrcoef(agree)[0, 1]), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", default="13b,8b")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "bench_edges_gpu.json"
    )
    options = parser.parse_args()
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print("There is no GPU here: nothing was measured.")
        return
    meter = Meter(options.device)
    found: dict[str, Any] = {}
    name = torch.cuda.get_device_name(0) if meter.on_gpu else platform.processor()
    for shape in options.shapes.split(","):
        model = build(shape, options.device)
        weights = sum(parameter.numel() * parameter.element_size() for parameter in model.hf.parameters())
        found[shape] = {"weights, GB": round(weights / 1e9, 2), "batches": []}
        for count, tokens in BATCHES:
            found[shape]["batches"].append(measure(model, meter, count, tokens))
            result = {
                "benchmark": "edge methods in bfloat16 on one GPU",
                "device": name,
                "torch": torch.__version__,
                "found": found,
            }
            # After every measurement, so that a limit on time loses none.
            write(result, options.out)
            print(shape, found[shape]["batches"][-1], flush=True)
        del model
        if meter.on_gpu:
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
