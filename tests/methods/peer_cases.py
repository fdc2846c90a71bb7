"""Models and prompts on which the EAP-IG repository ran beside, and the file of what it found.

`scripts/run_eap_ig.py` runs it in an environment of its own (transformer-lens, without patchkit), so nothing here imports
more than torch, numpy and transformers. Weights are drawn by numpy's frozen `RandomState`, tensor by tensor in order of
their names: neither torch's generator nor the initialisation of transformers can change them.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from tests import families

FAMILIES = ("gpt2", "llama-mha-wide-head", "llama-gqa")
FIXTURES = Path(__file__).resolve().parent.parent / "fixtures" / "eap_ig"
CONVENTIONS = FIXTURES / "conventions.json"
#: Steps of both integrals.
STEPS = 5


class Prompts(NamedTuple):
    clean: tuple[int, ...]
    corrupt: tuple[int, ...]
    answer: int
    wrong: int


#: Pairs of one length, and of three. Some differ from the first token on, some in the middle, one at the last token too.
SETS = {
    "one-length": (
        Prompts((5, 9, 30, 2, 17, 8), (5, 9, 12, 2, 33, 8), 3, 7),
        Prompts((14, 21, 33, 9, 26, 5), (31, 21, 33, 9, 26, 5), 28, 10),
        Prompts((11, 3, 7, 4, 21, 18), (6, 1, 35, 20, 14, 29), 16, 29),
    ),
    "mixed": (
        Prompts((4, 6, 8, 10), (4, 22, 18, 10), 5, 7),
        Prompts((3, 5, 7, 9, 11, 13, 2), (9, 5, 3, 30, 11, 17, 8), 4, 6),
        Prompts((34, 1, 19, 12, 25), (27, 1, 32, 12, 25), 13, 36),
    ),
}


def build(family: str) -> PreTrainedModel:
    """The model of a family that the fixture is of: the sizes of `tests.families`, other weights."""
    model: Any = families.FAMILIES[family]()
    draw = np.random.RandomState(FAMILIES.index(family))
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            numbers = torch.from_numpy(draw.standard_normal(tuple(parameter.shape))).float()
            if parameter.ndim > 1:
                parameter.copy_(numbers * (0.4 if "embed" in name or "wte" in name else 0.2))
            else:
                parameter.copy_(0.1 * numbers + (0.0 if name.endswith("bias") else 1.0))
    return model.eval()


def fingerprint(model: PreTrainedModel) -> dict[str, list[float]]:
    """Of each weight: its sum, and its sum with every other number's sign turned."""
    found = {}
    for name, parameter in sorted(model.named_parameters()):
        numbers = parameter.detach().double().flatten()
        found[name] = [
            round(float(numbers.sum()), 4),
            round(float(numbers[::2].sum() - numbers[1::2].sum()), 4),
        ]
    return found


@cache
def conventions() -> dict[str, Any]:
    """How the fixture was made and what its numbers mean."""
    return json.loads(CONVENTIONS.read_text(encoding="utf-8"))


@cache
def peer_numbers(family: str) -> dict[str, Tensor]:
    """What the repository found, named `set/method/intervention`; see `conventions`."""
    return load_file(FIXTURES / f"{family}.safetensors")


def check_weights(family: str, model: PreTrainedModel) -> None:
    """Raises AssertionError unless a model has the weights that the repository's numbers are of."""
    kept, found = conventions()["weights"][family], fingerprint(model)
    changed = [
        name
        for name in sorted(kept.keys() | found.keys())
        if name not in kept
        or name not in found
        or max(abs(a - b) for a, b in zip(kept[name], found[name], strict=True)) > 1e-3
    ]
    assert not changed, (
        f"{family}: the weights built here are not those that the EAP-IG repository ran on ({', '.join(changed[:3])}"
        f"{' and others' if len(changed) > 3 else ''} differ), so its numbers cannot be compared with; see "
        f"tests/methods/peer_cases.py for how they are built, and run scripts/run_eap_ig.py again if that has changed"
    )
