"""What was finished is kept by what it is: found whatever the batches, and never taken for something else."""

from __future__ import annotations

import gc
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patchkit.errors import InputError
from patchkit.runtime import Journal, journal, run_program
from tests.comparisons import pair
from tests.runtime.journals import BATCHES, ITEMS, Squares, Totals, equal, run, shards


@pytest.mark.parametrize("kind", [Squares, Totals])
def test_a_run_goes_on_after_the_batches_that_were_finished(tmp_path: Path, kind: type[Squares]) -> None:
    undisturbed = run(kind(), None)
    first = kind(last_run=2)
    with pytest.raises(KeyboardInterrupt):
        run(first, tmp_path)
    assert first.runs == BATCHES[:2]
    second = kind()
    assert equal(run(second, tmp_path), undisturbed)
    assert second.runs == BATCHES[2:]
    third = kind()
    assert equal(run(third, tmp_path), undisturbed) and third.runs == []


def test_numbers_keep_their_precision_and_order(tmp_path: Path) -> None:
    run(Totals(), tmp_path)
    again = run(Totals(), tmp_path)
    assert again["square"].tolist() == [item**2 / 3 for item in ITEMS]
    assert again["item"].tolist() == ITEMS
    assert again["half"].dtype == torch.bfloat16 and again["half"].shape == (5, 2)
    assert again["total"].tolist() == [sum(ITEMS), len(ITEMS)] and again["halves"] == sum(ITEMS) / 2


def test_other_batches_other_order_and_fewer_items_find_what_was_finished(tmp_path: Path) -> None:
    run(Squares(), tmp_path)
    others = {"batches": (ITEMS, 1), "order": (ITEMS[::-1], 9), "fewer": (ITEMS[1:4], 40)}
    for items, tokens in others.values():
        again = Squares()
        assert run(again, tmp_path, items, tokens)["item"].tolist() == items and again.runs == []
    more = Squares()
    assert run(more, tmp_path, [*ITEMS, 7])["item"].tolist() == [*ITEMS, 7] and more.runs == [[7]]


def test_a_sum_is_only_taken_with_all_its_items(tmp_path: Path) -> None:
    run(Totals(), tmp_path)
    # 4 was summed with 3, so both are run again where one of them is not asked for.
    fewer = Totals()
    assert run(fewer, tmp_path, [5, 9, 4, 8])["total"].tolist() == [26, 4] and fewer.runs == [[4]]
    # And now there are two shards with 4, of which only one can be taken.
    again = Totals()
    assert run(again, tmp_path)["total"].tolist() == [sum(ITEMS), 5] and again.runs in ([], [[3]])


def test_another_program_item_or_model_is_not_mistaken(tmp_path: Path) -> None:
    run(Squares(), tmp_path)
    cubes, totals = Squares(power=3), Totals()
    assert run(cubes, tmp_path)["square"].tolist() == [item**3 / 3 for item in ITEMS]
    assert cubes.runs == BATCHES
    run(totals, tmp_path)
    assert totals.runs == BATCHES
    other = Squares()
    run_program(other, pair("llama-gqa")[0], ITEMS, max_batch_tokens=9, journal=Journal(tmp_path))
    assert other.runs == BATCHES


def test_equal_items_are_as_many_as_they_are(tmp_path: Path) -> None:
    run(Totals(), tmp_path, [3, 3, 4])
    again = Totals()
    found = run(again, tmp_path, [3, 4, 3])
    assert again.runs == [] and found["total"].tolist() == [10, 3] and found["item"].tolist() == [3, 4, 3]
    more = Totals()
    found = run(more, tmp_path, [3, 4, 3, 3])
    assert found["total"].tolist() == [13, 4] and more.runs == [[3]]


# The journal itself.


def filled(directory: Path) -> Journal:
    """Two items alone, two with a sum, one with nothing but a sum."""
    kept = Journal(directory)
    kept.add(["a", "b"], {"x": torch.arange(6.0).reshape(2, 3).bfloat16(), "none": torch.zeros(2, 0, 3)})
    kept.add(["c", "d"], {"x": torch.tensor([7, 8]), "sum": torch.tensor(3.5)}, frozenset({"sum"}))
    kept.add(["e"], {"sum": torch.ones(2, 2)}, frozenset({"sum", "absent"}))
    return kept


@pytest.mark.parametrize("where", ["waiting", "written", "read"])
def test_what_is_found_is_what_was_added(tmp_path: Path, where: str) -> None:
    kept = filled(tmp_path)
    if where != "waiting":
        kept.flush()
    found = (Journal(tmp_path) if where == "read" else kept).find(["q", "e", "d", "b", "c"])
    assert sorted(found.items) == [1, 2, 3, 4]
    assert found.items[1] == {}
    assert {name: value.tolist() for name, value in found.items[2].items()} == {"x": 8}
    assert found.items[3]["x"].dtype == torch.bfloat16 and found.items[3]["x"].tolist() == [3, 4, 5]
    assert found.items[3]["none"].shape == (0, 3) and found.items[3]["none"].dtype == torch.float32
    assert found.items[4]["x"].tolist() == 7 and found.items[4]["x"].dtype == torch.int64
    assert [each["sum"].tolist() for each in found.sums] == [3.5, [[1, 1], [1, 1]]]
    without = Journal(tmp_path).find(["c", "a"]) if where == "read" else kept.find(["c", "a"])
    assert sorted(without.items) == [1] and without.sums == []


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=5, unique=True), max_size=6),
    st.lists(st.integers(0, 30), unique=True),
    st.lists(st.booleans(), min_size=6, max_size=6),
)
def test_whatever_batches_overlap_an_item_counts_once(tmp_path_factory, batches, asked, flushed) -> None:
    """Batches of several writers may hold the same items; each sum is of what is found with it."""
    directory = tmp_path_factory.mktemp("journal")
    kept = Journal(directory)
    for batch, flush in zip(batches, flushed, strict=False):
        numbers = torch.tensor(batch)
        kept.add([f"k{n}" for n in batch], {"n": numbers, "sum": numbers.sum()}, frozenset({"sum"}))
        if flush:
            kept.flush()
    kept.flush()
    found = Journal(directory).find([f"k{n}" for n in asked])
    numbers = {place: int(item["n"]) for place, item in found.items.items()}
    assert numbers == {place: asked[place] for place in numbers}
    assert sum(int(each["sum"]) for each in found.sums) == sum(numbers.values())
    # Nothing that could be taken is left: a batch within what was asked for overlaps with one that was taken.
    taken = set(numbers.values())
    assert all(taken & set(batch) for batch in batches if set(batch) <= set(asked))


DTYPES = [
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128),
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_keeps_its_bits(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    value = (torch.randn(4, 2, 3) * 100).to(dtype)
    if value.is_floating_point():
        value[0, 0] = torch.tensor([torch.nan, -0.0, torch.inf])
    kept = Journal(tmp_path)
    # Neither contiguous nor free of a gradient.
    given_ = value.transpose(1, 2)
    kept.add(list("abcd"), {"v": given_.requires_grad_() if value.is_floating_point() else given_})
    kept.flush()
    found = torch.stack([each["v"] for each in Journal(tmp_path).find(list("abcd")).items.values()])
    assert found.dtype == dtype and found.shape == (4, 3, 2)
    bits = value.transpose(1, 2).contiguous().detach()
    assert torch.equal(found.reshape(-1).view(torch.uint8), bits.reshape(-1).view(torch.uint8))


def test_what_is_added_is_a_copy(tmp_path: Path) -> None:
    """A caller that goes on adding up in the same tensor does not change what is kept."""
    kept, total, rows = Journal(tmp_path), torch.ones(3), torch.ones(1)
    kept.add(["a"], {"sum": total, "x": rows}, frozenset({"sum"}))
    total += 1
    rows += 1
    found = kept.find(["a"])
    assert found.sums[0]["sum"].tolist() == [1, 1, 1] and found.items[0]["x"] == 1


def test_batches_wait_for_each_other_but_not_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(journal.time, "monotonic", lambda: now[0])
    kept = Journal(tmp_path)
    written = []
    for number, seconds in enumerate([0.3, 0.3, 0.3, 0.3, 0.9, 1.0, 5.0]):
        kept.find([])
        now[0] += seconds
        kept.add([str(number)], {"x": torch.zeros(1)})
        written.append(len(shards(tmp_path)))
    assert written == [0, 0, 0, 1, 1, 2, 3]
    assert sorted(Journal(tmp_path).find([str(n) for n in range(7)]).items) == list(range(7))
    monkeypatch.setattr(journal, "MOST_WAITING", 100)
    kept.add(["large"], {"x": torch.zeros(1, 26)})
    assert len(shards(tmp_path)) == 4


def test_nothing_is_written_where_nothing_is_kept(tmp_path: Path) -> None:
    kept = Journal(tmp_path / "journal")
    assert kept.find(["a"]).items == {}
    kept.flush()
    assert not (tmp_path / "journal").exists()


def test_a_shard_is_parquet_with_checksums_that_anybody_can_read(tmp_path: Path) -> None:
    filled(tmp_path).flush()
    (path,) = shards(tmp_path)
    table = pq.ParquetFile(path, page_checksum_verification=True).read().to_pylist()
    assert [(row["key"], row["name"], row["dtype"], row["shape"]) for row in table] == [
        ("a", "x", "torch.bfloat16", [3]),
        ("b", "x", "torch.bfloat16", [3]),
        ("a", "none", "torch.float32", [0, 3]),
        ("b", "none", "torch.float32", [0, 3]),
        ("c", "x", "torch.int64", []),
        ("d", "x", "torch.int64", []),
        ("", "sum", "torch.float32", []),
        ("e", "", "torch.uint8", [0]),
        ("", "sum", "torch.float32", [2, 2]),
    ]
    assert table[4]["data"] == (7).to_bytes(8, "little")


def test_what_is_not_asked_for_is_not_kept_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Journal(tmp_path)
    for name in "ab":
        kept.add([f"{name}{n}" for n in range(4)], {"x": torch.randn(4, 100_003)})
        kept.flush()
    monkeypatch.setattr(journal, "MOST_REMEMBERED", 0)

    def alive() -> int:
        """Bytes of everything that holds rows of this width."""
        gc.collect()
        rows = [value for value in gc.get_objects() if type(value) is torch.Tensor and 100_003 in value.shape]
        storages = [value.untyped_storage() for value in rows]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    assert alive() == 0
    found = Journal(tmp_path).find(["a1"])
    assert alive() == found.items[0]["x"].nbytes == 4 * 100_003


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda kept: kept.find(["a", "b", "a"]), "a key occurs twice"),
        (lambda kept: kept.add(["a"], {"x": torch.zeros(2)}), "x: expected 1 rows"),
        (lambda kept: kept.add(["a"], {"x": torch.zeros(())}), "x: expected 1 rows"),
        (lambda kept: kept.add([], {}), "without items"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path: Path, call, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call(Journal(tmp_path))


def test_a_file_in_its_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "journal").write_text("x")
    with pytest.raises(InputError, match="expected the directory of a journal, found a file"):
        Journal(tmp_path / "journal").find(["a"])
