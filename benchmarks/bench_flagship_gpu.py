"""The flagship at its size: one mask step and one AtP* pair on a Llama of 13B's shape, in bfloat16, on one GPU.

Random weights; nothing is downloaded. Triples and pairs are of 20 random tokens, as long as the published prompts are.

- mask step: one step of Adam over heads and MLPs at the last token, on 90 triples of two desiderata as published; the
  difference of two runs of different length, so that preparing and testing are not in it;
- AtP* pair: queries, keys, values, heads and MLPs at the last token; the difference of 8 and 16 pairs;
- peak memory of both, beside the weights, and what the plan says of the mask.

    python benchmarks/bench_flagship_gpu.py [--shape 13b] [--device cuda:0] [--out FILE]

`--shape tiny --device cpu` tries the command itself.
"""

from __future__ import annotations

import argparse
import platform
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from _measure import write
from _random_llama import SHAPES, Meter, build, pairs_of

from patchkit import MaskOptions, NodeOptions, attribute, learn_mask
from patchkit.data import Triple
from patchkit.methods import Schedule
from patchkit.model import PatchModel
from patchkit.studies.published import PUBLISHED_DESIDERATA, plan_published, published_options

TOKENS, TRIPLES = 20, 45
STEPS = (10, 40)
PAIRS = (8, 16)


def triples_of(model: PatchModel) -> list[Triple]:
    """As many as published, for training and for testing, with random prompts and answers."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.dims.vocab_size
    made = []
    for name in PUBLISHED_DESIDERATA:
        for number in range(2 * TRIPLES):
            ids = torch.randint(1, vocabulary, (2, TOKENS), generator=generator).tolist()
            own, other = torch.randperm(vocabulary, generator=generator)[:2].tolist()
            target = other if name == PUBLISHED_DESIDERATA[0] else own
            made.append(
                Triple(
                    desideratum=name,
                    original_ids=tuple(ids[0]),
                    alternate_ids=tuple(ids[1]),
                    target_id=target,
                    original_answer_id=own,
                    alternate_answer_id=other,
                    split="train" if number < TRIPLES else "test",
                )
            )
    return made


def options_of(steps: int) -> MaskOptions:
    """The published options, one lambda, so many steps."""
    options = published_options(iterations=steps)
    schedule = Schedule(lambdas=options.schedule.lambdas[:1], steps=steps, lr=0.01, patience=0, warm=False)
    return replace(options, schedule=schedule, random_sets=1, carried_limit=0)


def measure(model: PatchModel, meter: Meter) -> dict[str, Any]:
    triples = triples_of(model)
    masks = {
        steps: meter(lambda steps=steps: learn_mask(model, triples, options_of(steps))) for steps in STEPS
    }
    nodes = NodeOptions(nodes=("q", "k", "v", "z", "mlp_out"), positions="last")
    found = {
        count: meter(lambda count=count: attribute(model, pairs_of(model, count, TOKENS), nodes, "atp-star"))
        for count in PAIRS
    }
    # The published loop steps on both desiderata in turn.
    step = (masks[STEPS[1]][0] - masks[STEPS[0]][0]) / (STEPS[1] - STEPS[0])
    pair = (found[PAIRS[1]][0] - found[PAIRS[0]][0]) / (PAIRS[1] - PAIRS[0])
    plan = dict(plan_published(model, published_options()).lines())
    return {
        "seconds": {"mask step, both desiderata": round(step, 4), "AtP* pair": round(pair, 4)},
        "GB beside the weights": {
            "mask": round(max(each[1] for each in masks.values()) / 1e9, 3),
            "AtP*, 16 pairs": round(found[PAIRS[1]][1] / 1e9, 3),
        },
        "plan of the mask": plan,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="13b")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "bench_flagship_gpu.json"
    )
    options = parser.parse_args()
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print("There is no GPU here: nothing was measured.")
        return
    meter = Meter(options.device)
    model = build(options.shape, options.device)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.hf.parameters())
    result = {
        "benchmark": "mask step and AtP* pair in bfloat16",
        "shape": options.shape,
        "device": torch.cuda.get_device_name(0) if meter.on_gpu else platform.processor(),
        "torch": torch.__version__,
        "weights, GB": round(weights / 1e9, 2),
        **measure(model, meter),
    }
    write(result, options.out)
    print(result)


if __name__ == "__main__":
    main()
