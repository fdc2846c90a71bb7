"""What a bound says, in words that do not claim more than it holds."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from patchkit.results.verification import Bound, VerifiedNode


def bound(**changed: Any) -> Bound:
    fields: dict[str, Any] = {
        "alpha": 0.05,
        "unverified": 1234,
        "bound": 0.25,
        "familywise": 0.41237,
        "strata": [],
        "largest": [],
        "cost": 10.0,
    }
    return Bound(**(fields | changed))


def test_the_bound_for_all_nodes_comes_first() -> None:
    everywhere, one, caveat = bound().sentences
    assert everywhere == (
        "No unverified node has |effect| above 0.4124 with confidence 95 %, for all 1,234 at once (Bonferroni)."
    )
    assert one == "For one unverified node fixed in advance the bound is 0.25 with confidence 95 %."
    assert "not its effect alone or on one pair" in caveat
    assert bound().sentence == f"{everywhere} {one} {caveat}"


def test_confidence_is_written_as_it_was_asked() -> None:
    assert "confidence 99.9 %" in bound(alpha=0.001).sentence
    assert "confidence 90 %" in bound(alpha=0.1).sentence


def test_nothing_left_is_said_so() -> None:
    assert bound(unverified=0).sentence == "Every node was verified: nothing is left to bound."


def test_groups_are_two() -> None:
    with pytest.raises(ValidationError, match="group"):
        VerifiedNode.model_validate(
            {"node": "m0", "number": 0, "estimate": 1.0, "signed": 1.0, "exact": 1.0, "exact_signed": 1.0,
             "group": "rest", "stratum": "mlp_out.0"}
        )  # fmt: skip
