"""Places: which tokens the words of `--positions` mean in each pair, and the columns they are in a padded batch."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from patchkit.data import Pair, covering, read_places
from patchkit.errors import InputError

LONG, SHORT = 7, 4


def a_pair(length: int, name: str, spans: Mapping[str, tuple[int, int]] | None = None) -> Pair:
    ids = tuple(range(3, 3 + length))
    return Pair(ids, ids[::-1], 1, 2, dict(spans or {}), name)


PAIRS = [a_pair(LONG, "long", {"verb": (2, 5), "gap": (1, 1)}), a_pair(SHORT, "short", {"verb": (0, 1)})]


def test_last_and_all_have_no_position_axis() -> None:
    last, every = read_places("last", PAIRS), read_places(" all ", PAIRS)
    assert (last.labels, last.placed) == (("last",), False)
    assert last.covered == (((6,),), ((3,),))
    assert (every.labels, every.placed) == (("all",), False)
    assert every.covered == (((0, 1, 2, 3, 4, 5, 6),), ((0, 1, 2, 3),))


def test_each_makes_a_place_of_every_token() -> None:
    each = read_places("each", [PAIRS[1], a_pair(SHORT, "other")])
    assert (each.labels, each.placed) == (("0", "1", "2", "3"), True)
    assert each.covered == (((0,), (1,), (2,), (3,)),) * 2


def test_spans_and_indices_mix_and_count_from_either_end() -> None:
    places = read_places("verb, -1,0", PAIRS)
    assert (places.labels, places.placed, places.text) == (("verb", "-1", "0"), True, "verb, -1,0")
    assert places.covered == (((2, 3, 4), (6,), (0,)), ((0,), (3,), (0,)))


def test_columns_are_counted_from_the_right_in_a_padded_batch() -> None:
    places = read_places("verb,-1,0", PAIRS)
    mask = covering(places.covered, [LONG, SHORT], LONG + 1)
    expected = torch.zeros(2, 3, LONG + 1, dtype=torch.bool)
    for row, place, columns in (
        *((0, 0, (3, 4, 5)), (0, 1, (7,)), (0, 2, (1,))),
        *((1, 0, (4,)), (1, 1, (7,)), (1, 2, (4,))),
    ):
        expected[row, place, list(columns)] = True
    assert torch.equal(mask, expected)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("each", "need pairs of one length.*pair 'long' has 7 tokens, pair 'short' 4; use last, all, spans"),
        ("0,4", r"position 4 is outside pair 'short', which has 4 tokens \(0 to 3\)"),
        ("-5", "position -5 is outside pair 'short'"),
        ("noun", "pair 'long' has no span 'noun'; its spans: verb, gap. Expected last, all, each"),
        ("gap", r"span 'gap' of pair 'long' is empty \(1 to 1\)"),
        ("all,verb", "'all' stands alone"),
        ("0,each", "'each' stands alone"),
        ("verb,verb", "a place comes twice"),
        ("", "positions are empty"),
        (" , ", "positions are empty"),
    ],
)
def test_what_is_refused(text: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        read_places(text, PAIRS)


def test_a_pair_without_spans_and_no_pairs() -> None:
    with pytest.raises(InputError, match="its spans: none"):
        read_places("verb", [a_pair(3, "bare")])
    with pytest.raises(InputError, match="there are no prompt pairs"):
        read_places("all", [])
