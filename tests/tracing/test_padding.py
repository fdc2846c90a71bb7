"""Padding: a batch of prompts of any lengths holds, row by row, what each prompt holds alone, in every family.

Prompts run alone have no padding, so that nothing here can be wrong twice in the same way. What the models themselves
compute is held to plain torch in `test_family_matrix.py`.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from patchkit.data import Batch
from patchkit.model import Site
from patchkit.tracing import capture, capture_gradients
from tests.comparisons import agree, kinds_of, metric, pair
from tests.node_oracle import DENSE

#: Families without a norm in float32: nothing but rounding in float64 is left there.
PRECISE = ("gpt2", "neox-parallel", "neox-sequential")
LENGTHS = (1, 9, 4, 12, 6)
Prompt = tuple[int, ...]
#: The module, whose name is that of its function.
CAPTURE: Any = importlib.import_module("patchkit.tracing.capture")


@functools.cache
def prompts() -> tuple[Prompt, ...]:
    generator = torch.Generator().manual_seed(3)
    return tuple(tuple(torch.randint(3, 37, (n,), generator=generator).tolist()) for n in LENGTHS)


def read(family: str, batch: Batch) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """(activations and gradients at every site, logits, metric)."""
    model, _ = pair(family, torch.float64)
    sites = [Site(kind, layer) for kind in kinds_of(family) for layer in range(model.dims.n_layers)]
    run, back = capture(model, batch, sites), capture_gradients(model, batch, sites, metric)
    found = {f"{site}": value for site, value in run.values.items()}
    found |= {f"gradient at {site}": value for site, value in back.gradients.items()}
    return found, run.logits, back.metric


@functools.cache
def alone(family: str, number: int) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    return read(family, Batch.from_ids([prompts()[number]]))


def check(family: str, numbers: Sequence[int]) -> None:
    tolerance = 1e-10 if family in PRECISE else 2e-6
    model, _ = pair(family, torch.float64)
    chosen = [prompts()[number] for number in numbers]
    found, logits, score = read(family, Batch.from_ids(chosen, pad_id=model.pad_id))
    for row, number in enumerate(numbers):
        own, own_logits, own_score = alone(family, number)
        agree(logits[row], own_logits[0], f"logits of row {row}", tolerance)
        agree(score[row], own_score[0], f"metric of row {row}", tolerance)
        for what, values in own.items():
            real = found[what][row, -len(chosen[row]) :]
            # The query of a prompt of one token has no gradient but rounding.
            agree(real, values[0], f"{what}, row {row}", tolerance, floor=1e-3)


@pytest.mark.parametrize("family", DENSE)
@settings(deadline=None, max_examples=4, phases=(Phase.explicit, Phase.generate))
@given(numbers=st.lists(st.integers(0, len(LENGTHS) - 1), min_size=2, max_size=6))
def test_a_row_holds_what_its_prompt_holds_alone(family: str, numbers: list[int]) -> None:
    check(family, numbers)


# Mistakes that must be seen.


def _unshifted(self: Batch) -> Tensor:
    return torch.arange(self.width).expand(self.rows, -1)


@pytest.mark.parametrize("family", DENSE)
def test_positions_that_count_padding_are_seen(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With rotary embeddings only differences of positions count, so logits stay; what was rotated does not."""
    check(family, (3, 2))
    monkeypatch.setattr(Batch, "position_ids", property(_unshifted))
    with pytest.raises(AssertionError, match="relative difference"):
        check(family, (3, 2))


@pytest.mark.parametrize("family", DENSE)
def test_padding_that_is_attended_to_is_seen(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check(family, (3, 2))
    right = CAPTURE.forward_inputs

    def wrong(*arguments: Any, **keywords: Any) -> dict[str, Any]:
        inputs = right(*arguments, **keywords)
        return inputs | {"attention_mask": torch.ones_like(inputs["attention_mask"])}

    monkeypatch.setattr(CAPTURE, "forward_inputs", wrong)
    with pytest.raises(AssertionError, match="logits of row 1: relative difference"):
        check(family, (3, 2))
