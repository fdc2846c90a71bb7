"""Edge scores, exact edge patching, selection and circuits against what the EAP-IG repository found."""

from __future__ import annotations

import pytest
import torch

from tests.methods import peer_cases
from tests.methods.peer_cases import FAMILIES, SETS, peer_numbers
from tests.methods.peer_checks import (
    METHODS,
    check_circuits,
    check_estimates,
    check_exact,
    check_selection,
    kept,
)

CASES = [(family, name) for family in FAMILIES for name in SETS]
#: What takes as long as all else together, and so is not run on every set of prompts.
SLOW = "EAP-IG-activations"
SLOW_CASES = (
    ("gpt2", "one-length", "patching"),
    ("llama-mha-wide-head", "mixed", "patching"),
    ("llama-gqa", "mixed", "patching"),
    ("llama-gqa", "mixed", "zero"),
)


def test_the_fixture_is_whole() -> None:
    for family in FAMILIES:
        numbers = peer_numbers(family)
        assert not any(value.isinf().any() for value in numbers.values())
        for name in SETS:
            known = {key.split("/")[1] for key in numbers if key.startswith(f"{name}/")}
            assert known == {*METHODS, "exact", "circuit", "evaluate", "baseline"}


def test_other_weights_are_refused() -> None:
    model = peer_cases.build("gpt2")
    peer_cases.check_weights("gpt2", model)
    with torch.no_grad():
        next(model.parameters())[3, 5] += 0.01
    with pytest.raises(AssertionError, match="not those that the EAP-IG repository ran on"):
        peer_cases.check_weights("gpt2", model)


@pytest.mark.parametrize("method", [method for method in METHODS if method != SLOW])
@pytest.mark.parametrize(("family", "name"), CASES)
def test_estimates(family: str, name: str, method: str) -> None:
    for intervention in kept(name, method):
        check_estimates(family, name, method, intervention)


@pytest.mark.parametrize(("family", "name", "intervention"), SLOW_CASES)
def test_estimates_along_activations(family: str, name: str, intervention: str) -> None:
    check_estimates(family, name, SLOW, intervention)


@pytest.mark.parametrize(("family", "name"), CASES)
def test_exact_edges(family: str, name: str) -> None:
    for intervention in kept(name, "exact"):
        check_exact(family, name, intervention)


@pytest.mark.parametrize(("family", "name"), CASES)
def test_selection_and_pruning(family: str, name: str) -> None:
    check_selection(family, name)


@pytest.mark.parametrize(("family", "name"), CASES)
def test_circuits(family: str, name: str) -> None:
    for intervention in kept(name, "evaluate/random"):
        check_circuits(family, name, intervention)
