"""Batches against plain lists: padding and positions are recomputed row by row."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patchkit.data import Batch, positions
from patchkit.errors import InputError

ROWS = st.lists(st.lists(st.integers(1, 50), min_size=1, max_size=9), min_size=1, max_size=6)


@settings(deadline=None)
@given(ROWS, st.integers(0, 60))
def test_padding_keeps_every_token_and_puts_the_last_in_the_last_column(rows, pad):
    batch = Batch.from_ids(rows, pad_id=pad)
    width = max(map(len, rows))
    assert (batch.rows, batch.width) == (len(rows), width)
    assert batch.input_ids.tolist() == [[pad] * (width - len(row)) + row for row in rows]
    assert batch.attention_mask.tolist() == [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    assert batch.lengths.tolist() == [len(row) for row in rows]
    assert batch.offset.tolist() == [width - len(row) for row in rows]
    expected = [[0] * (width - len(row)) + list(range(len(row))) for row in rows]
    assert batch.position_ids.tolist() == expected


@settings(deadline=None)
@given(ROWS, st.data())
def test_positions_reach_the_token_that_a_list_index_reaches(rows, data):
    batch = Batch.from_ids(rows, pad_id=0)
    index = [data.draw(st.integers(-len(row), len(row) - 1)) for row in rows]
    columns = positions(batch, index)
    reached = batch.input_ids[torch.arange(len(rows)), columns].tolist()
    assert reached == [row[i] for row, i in zip(rows, index, strict=True)]
    assert positions(batch, -1).tolist() == [batch.width - 1] * len(rows)


def test_one_number_serves_all_rows():
    batch = Batch.from_ids([[1, 2, 3], [4, 5]])
    assert positions(batch, 1).tolist() == [1, 2]
    assert positions(batch, -2).tolist() == [1, 1]


@pytest.mark.parametrize("index", [2, -3, [0, 2], [0, -3]])
def test_a_position_outside_a_row_names_the_row(index):
    with pytest.raises(InputError, match="outside row 1, which has 2 tokens"):
        positions(Batch.from_ids([[1, 2, 3], [4, 5]]), index)


def test_as_many_positions_as_rows():
    with pytest.raises(InputError, match="one for each of 2 rows; found 3"):
        positions(Batch.from_ids([[1, 2, 3], [4, 5]]), [0, 0, 0])


def test_splitting_off_the_last_token_loses_nothing():
    batch = Batch.from_ids([[1, 2, 3], [4, 5]], pad_id=9)
    prefix, last = batch.split_last()
    assert last.tolist() == [[3], [5]]
    assert prefix.input_ids.tolist() == [[1, 2], [9, 4]]
    assert prefix.lengths.tolist() == [2, 1]
    with pytest.raises(InputError, match="row 1 of the batch has one token"):
        Batch.from_ids([[1, 2], [3]]).split_last()


def test_moving_a_batch_moves_both_tensors():
    moved = Batch.from_ids([[1, 2]]).to("meta")
    assert moved.input_ids.is_meta and moved.attention_mask.is_meta


def test_empty_rows_and_right_padding_are_refused():
    with pytest.raises(InputError, match="at least one row"):
        Batch.from_ids([])
    with pytest.raises(InputError, match="row 1 of the batch has no tokens"):
        Batch.from_ids([[1], []])
    ids = torch.tensor([[1, 2, 0]])
    with pytest.raises(InputError, match="pad on the left"):
        Batch(ids, torch.tensor([[1, 1, 0]]))
    with pytest.raises(InputError, match="pad on the left"):
        Batch(ids, torch.tensor([[2, 2, 2]]))
