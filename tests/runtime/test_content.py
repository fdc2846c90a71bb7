"""Content digests: equal content is equal everywhere, and nothing else is."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from collections import OrderedDict
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict

from patchkit.data import Pair, kl, logit_diff
from patchkit.model.edges import EdgeGraph
from patchkit.runtime import content_digest


class Colour(Enum):
    RED = 1
    BLUE = 2


class Size(IntEnum):
    SMALL = 1


class Point(NamedTuple):
    x: int
    y: int


class Spot(NamedTuple):
    x: int
    y: int


@dataclass(frozen=True)
class Box:
    width: int
    label: str = ""
    running_number: int = field(default=0, compare=False)


@dataclass(frozen=True)
class Crate:
    width: int
    label: str = ""


@dataclass(frozen=True, eq=False)
class Holder:
    box: Any


class Settings(BaseModel):
    model_config = ConfigDict(extra="allow")
    rate: float = 0.5


ONES = torch.ones(2, 3)
#: No two of these are the same thing.
DIFFERENT: list[Any] = [
    *(None, "", b"", (), frozenset(), {}, 0, 0.0, -0.0, False, "0", b"0"),
    *(1, 1.0, True, "1", b"1", (1,), (True,), (1.0,), {1}, {1: 1}, ((1,),), ([],), (None,), Size.SMALL),
    *(1 << 70, -1, math.nan, math.inf, -math.inf, 0.3, float(np.nextafter(0.3, 1))),
    *((1, 2), (2, 1), (12,), ("1", "2"), ("12",), ("1", "2", ""), (("1",), "2"), ("1", ("2",))),
    *(("ab", "c"), ("a", "bc"), (b"ab", b"c"), (b"a", b"bc"), ("a\0", "b"), ("a", "\0b")),
    *({"a": 1, "b": 2}, {"a": 2, "b": 1}, {"a": (1, "b", 2)}, (("a", 1), ("b", 2)), {"a", "b"}),
    *({"a": {"b": 1}}, {"a": {"b": {}}}, {("a", "b"): 1}, {"ab": 1}),
    *(Colour.RED, Colour.BLUE, "RED", Point(1, 2), Spot(1, 2), Point(2, 1)),
    *(Box(1), Box(2), Box(1, "a"), Crate(1), Holder(Box(1)), Holder(Crate(1)), Holder(None), Box, Crate),
    *(Settings(), Settings(rate=0.25), Settings(more=1), Settings(more=2)),  # pyright: ignore[reportCallIssue]
    *(torch.float32, "torch.float32", torch.bfloat16, logit_diff, kl, len, int),
    *(ONES, ONES.double(), ONES.bfloat16(), ONES.half(), ONES.int(), ONES.bool(), ONES.reshape(3, 2)),
    *(ONES.flatten(), ONES[None], ONES * 2, torch.ones(()), torch.ones(1), torch.empty(0), torch.empty(0, 3)),
    *(torch.empty(3, 0), torch.tensor(0.0), torch.tensor(-0.0), torch.tensor([1, 2]), torch.tensor([2, 1])),
    *(torch.ones(2, dtype=torch.complex64), torch.ones(2, dtype=torch.complex64) * 1j),
    *(np.ones((2, 3)), np.ones((2, 3), np.float32), np.ones(6), np.float32(1), np.array("a"), np.array("b")),
    *(np.arange(3, dtype="<i4"), np.arange(3, dtype=">i4")),
]


def test_no_two_different_things_are_the_same() -> None:
    digests = [content_digest(value) for value in DIFFERENT]
    for (one, first), (other, second) in itertools.combinations(zip(DIFFERENT, digests, strict=True), 2):
        assert first != second, (one, other)
    assert all(len(digest) == 32 and int(digest, 16) >= 0 for digest in digests)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ([1, 2], (1, 2)),
        ({"a": 1, "b": 2}, OrderedDict(b=2, a=1)),
        ({"x", "y", "z"}, frozenset({"z", "y", "x"})),
        (math.nan, -math.nan),
        (0.1, float("0.1000000000000000055511151231257827")),
        (ONES, torch.nn.Parameter(torch.ones(3, 2).T, requires_grad=False)),
        (ONES, torch.ones(2, 6)[:, ::2]),
        (torch.tensor([1 + 2j]), torch.tensor([1 - 2j]).conj()),
        (np.ones((2, 3)), np.ones((3, 2)).T),
        (Box(1, running_number=5), Box(1, running_number=6)),
        ("é", "\u00e9"),
    ],
)
def test_the_same_content_is_the_same(one: Any, other: Any) -> None:
    assert content_digest(one) == content_digest(other)
    assert content_digest(Holder(one)) == content_digest(Holder(other))


def test_values_are_told_apart_from_a_tuple_of_them() -> None:
    assert content_digest(1, 2) != content_digest((1, 2)) != content_digest(((1, 2),))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=3),
    max_leaves=6,
)


def told(value: Any) -> Any:
    """The value in a form in which Python's own == tells what the digest should."""
    if isinstance(value, list):
        return ("list", tuple(told(part) for part in value))
    if isinstance(value, dict):
        return ("dict", frozenset((key, told(part)) for key, part in value.items()))
    return (type(value).__name__, math.copysign(1, value) if isinstance(value, float) else 0, value)


@settings(deadline=None, max_examples=300)
@given(JSON, JSON)
def test_digests_are_equal_where_values_are(one: Any, other: Any) -> None:
    assert (content_digest(one) == content_digest(other)) == (told(one) == told(other))


def test_another_process_finds_the_same() -> None:
    """Whatever Python's own `hash` is there; some are written down, so that no version of anything changes them."""
    code = (
        "import torch; from patchkit.data import Pair, kl; from patchkit.runtime import content_digest as d;"
        "from patchkit.model.edges import EdgeGraph;"
        "print(d('a', 1, 2.5, None, True, b'c', {'x', 'y'}, {'k': (1, 'z')}),"
        "d(torch.arange(6, dtype=torch.bfloat16).reshape(2, 3), kl),"
        "d(Pair((1, 2), (1, 3), 4, 5, {'s': (0, 1)}, 'p'), EdgeGraph(2, 4, 2, False, 8)))"
    )
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env=os.environ | {"PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    here = (
        content_digest("a", 1, 2.5, None, True, b"c", {"x", "y"}, {"k": (1, "z")}),
        content_digest(torch.arange(6, dtype=torch.bfloat16).reshape(2, 3), kl),
        content_digest(Pair((1, 2), (1, 3), 4, 5, {"s": (0, 1)}, "p"), EdgeGraph(2, 4, 2, False, 8)),
    )
    assert found == list(here)
    assert found[:2] == ["d7f601dd6aef41ad5763098c3f8383f2", "6afd2753275eeb21d4586eecc4bebeab"]


def test_what_a_pair_says_beside_its_tokens_is_no_content() -> None:
    bare = Pair((1, 2), (1, 3), 4, 5, {}, "p")
    assert content_digest(bare) == content_digest(Pair((1, 2), (1, 3), 4, 5, {}, "p", {"note": object()}))
    assert content_digest(bare) != content_digest(Pair((1, 2), (1, 3), 4, 5, {}, "q"))
    assert content_digest(bare) != content_digest(Pair((1, 2), (1, 3), 4, 5, {"s": (0, 1)}, "p"))


def local() -> Any:
    def inner() -> None: ...

    return inner


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (object(), "builtins:object has no content"),
        (Holder((1, {"a": object()})), "Holder.box: builtins:object"),
        (Holder(Holder(iter([]))), "Holder.box: Holder.box: builtins:list_iterator"),
        (lambda: 1, "<lambda> is a function that only exists inside"),
        (local(), "local.<locals>.inner is a function"),
        (",".join, "join is bound to something"),
        (torch.ones(2, device="meta"), "on the meta device has no values"),
        (torch.ones(2, 2).to_sparse(), "torch.sparse_coo has no values"),
        (np.array([object()]), "array of Python objects"),
        (torch.nn.Linear(1, 1), "Linear has no content"),
    ],
)
def test_what_cannot_be_known_again_is_named(value: Any, words: str) -> None:
    with pytest.raises(TypeError) as caught:
        content_digest(value)
    assert words in str(caught.value)
