"""Desiderata: reading, writing, splitting; and the checks a run makes before it starts."""

import json

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from patchkit.data import (
    Triple,
    drop_uninformative,
    from_dataset,
    group,
    read_desiderata,
    require_disjoint,
    require_equal_lengths,
    span_positions,
    split_if_needed,
    to_dataset,
    write_desiderata,
)
from patchkit.errors import InputError
from tests.toy_tokenizers import words

TOY = words("a b = 1 2 3 ; +".split())
IDS = {"desideratum": "value", "original_ids": [1, 2, 3], "alternate_ids": [1, 4], "target_id": 5}
TEXT = {"desideratum": "value", "original": "a = 1 ; a", "alternate": "a = 2 ; a", "target": "2"}


def lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_both_forms(tmp_path):
    row = {
        **IDS,
        "split": "test",
        "original_answer_id": 6,
        "alternate_answer_id": 5,
        "spans": {"v": [0, 1]},
        "form": "s",
    }
    (by_ids,) = read_desiderata(lines(tmp_path / "a.jsonl", row), None, vocab_size=7)
    assert by_ids == Triple("value", (1, 2, 3), (1, 4), 5, "test", 6, 5, {"v": (0, 1)})
    assert by_ids.meta == {"form": "s"}
    row = {**TEXT, "original_answer": "1", "alternate_answer": "2", "form": "s"}
    (by_text,) = read_desiderata(lines(tmp_path / "b.jsonl", row), TOY, vocab_size=20)
    a, b, eq, one, two, _, end, _ = range(3, 11)
    assert by_text == Triple("value", (1, a, eq, one, end, a), (1, a, eq, two, end, a), two, None, one, two)
    assert by_text.meta == {"form": "s"}
    assert by_text.where.endswith("b.jsonl line 1") and by_text.kind == "dependence"


def test_kind_follows_from_the_answers():
    def kind(target, original):
        return Triple("d", (1,), (2,), target, original_answer_id=original).kind

    assert kind(3, 3) == "invariance" and kind(3, 4) == "dependence" and kind(3, None) == "dependence"


TRIPLES = st.lists(
    st.fixed_dictionaries(
        {
            "desideratum": st.sampled_from(["value", "operation"]),
            "original_ids": st.lists(st.integers(0, 9), min_size=3, max_size=5).map(tuple),
            "alternate_ids": st.lists(st.integers(0, 9), min_size=3, max_size=5).map(tuple),
            "target_id": st.integers(0, 9),
            "split": st.sampled_from(["train", "test"]),
            "original_answer_id": st.none() | st.integers(0, 9),
            "alternate_answer_id": st.none() | st.integers(0, 9),
            "spans": st.sampled_from([{}, {"v": (0, 1)}, {"w": (1, 3)}]),
            "alternate_spans": st.sampled_from([{}, {"v": (2, 3)}]),
            "meta": st.dictionaries(st.sampled_from(["form", "note"]), st.text(max_size=3)),
        }
    ),
    min_size=1,
    max_size=5,
)


@settings(deadline=None, max_examples=40)
@given(TRIPLES)
def test_what_is_written_or_made_a_dataset_is_what_is_read(tmp_path_factory, rows):
    triples = [Triple(**row) for row in rows]
    path = tmp_path_factory.mktemp("triples") / "t.jsonl"
    write_desiderata(path, triples)
    for found in (read_desiderata(path, None, vocab_size=10), from_dataset(to_dataset(triples))):
        assert found == triples and [triple.meta for triple in found] == [triple.meta for triple in triples]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target_id": 7}, "target_id = 7 is outside"),
        ({"alternate_ids": [9]}, r"alternate_ids\[0\] = 9 is outside"),
        ({"split": "dev"}, 'split must be "train" or "test", found \'dev\''),
        ({"desideratum": ""}, "desideratum must be text"),
        ({"alternate_spans": {"v": [0, 3]}}, "alternate_spans.v must be .* <= 2"),
        ({"orignal_ids": [1]}, "unknown column 'orignal_ids': it looks like 'original_ids'"),
        ({"original_answer_id": "six"}, "original_answer_id must be one whole number"),
    ],
)
def test_a_bad_record_is_named_by_file_and_line(tmp_path, change, message):
    path = lines(tmp_path / "t.jsonl", {**IDS, "split": "train"}, {**IDS, "split": "train", **change})
    with pytest.raises(InputError, match=f"t.jsonl line 2: {message}"):
        read_desiderata(path, None, vocab_size=7)


def test_more_that_cannot_be_read(tmp_path):
    path = lines(tmp_path / "t.jsonl", {**IDS, "split": "train"}, IDS)
    with pytest.raises(InputError, match="line 2: has no `split`, but other lines have"):
        read_desiderata(path, None, 7)
    with pytest.raises(
        InputError, match="line 1: original is text, but the model has no tokenizer; give original_ids"
    ):
        read_desiderata(lines(tmp_path / "u.jsonl", TEXT), None, 20)
    with pytest.raises(InputError, match="line 1: target: the answer ' 1 2' is 2 tokens"):
        read_desiderata(lines(tmp_path / "v.jsonl", {**TEXT, "target": "1 2"}), TOY, 20)
    with pytest.raises(InputError, match="the tokenizer gives id 9, outside"):
        read_desiderata(lines(tmp_path / "w.jsonl", TEXT), TOY, 9)
    rows = Dataset.from_list([{**IDS, "target_id": "5"}, {**IDS, "target_id": "x"}])
    with pytest.raises(InputError, match="dataset row 1: target_id must be one whole number"):
        read_desiderata(rows, None, 7)


def triple(name, original, split=None, where="", **more):
    return Triple(name, tuple(original), (8, 9), 5, split, where=where, **more)


def test_groups_keep_order_and_refuse_what_is_missing():
    triples = [
        triple("b", [1], "train"),
        triple("a", [2], "test"),
        triple("a", [3], "train"),
        triple("b", [4], "test"),
    ]
    assert {name: [t.original_ids for t in members] for name, members in group(triples, "train").items()} == {
        "b": [(1,)],
        "a": [(3,)],
    }
    with pytest.raises(InputError, match="desideratum 'a' has no train triples"):
        group(triples[:2], "train")
    with pytest.raises(InputError, match=r"f line 3 \(a\) has no split"):
        group([triple("a", [1], where="f line 3")], "train")


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("pqr"), st.integers(0, 40)), min_size=1, max_size=60),
    st.integers(0, 3),
)
def test_splitting_never_shares_a_prompt_and_gives_every_desideratum_both(rows, seed):
    triples = [triple(name, [prompt]) for name, prompt in rows]
    prompts = {name: {prompt for other, prompt in rows if other == name} for name, _ in rows}
    try:
        divided = split_if_needed(triples, seed, test_fraction=0.3)
    except InputError as error:
        assert "too few to hold some out" in str(error)
        # Only possible where a desideratum has one prompt, or all of its prompts are shared with others.
        assert any(
            len(own) == 1
            or own <= set().union(*(prompts[other] for other in prompts if other != name), set())
            for name, own in prompts.items()
        )
        return
    assert [t.original_ids for t in divided] == [t.original_ids for t in triples]
    require_disjoint(divided)
    for name in prompts:
        assert {t.split for t in divided if t.desideratum == name} == {"train", "test"}
    assert divided == split_if_needed(triples, seed, test_fraction=0.3)


def test_splits_that_a_file_gives_are_kept_and_the_share_is_about_right():
    given_ = [triple("a", [1], "test"), triple("a", [1], "train")]
    assert split_if_needed(given_, 0) == given_
    with pytest.raises(InputError, match="same original prompt"):
        require_disjoint(given_)
    divided = split_if_needed([triple("a", [i]) for i in range(100)], 1, test_fraction=0.3)
    assert sum(t.split == "test" for t in divided) == 30
    other = split_if_needed([triple("a", [i]) for i in range(100)], 2, test_fraction=0.3)
    assert [t.split for t in divided] != [t.split for t in other]
    with pytest.raises(InputError, match="between 0 and 1"):
        split_if_needed([triple("a", [1])], 0, test_fraction=1.0)


def test_lengths_and_spans_name_the_triple():
    equal = triple("a", [1, 2])
    require_equal_lengths([equal])
    with pytest.raises(InputError, match=r"f line 7 \(a\): original has 3 tokens and alternate 2"):
        require_equal_lengths([equal, triple("a", [1, 2, 3], where="f line 7")])

    spanned = triple(
        "a", [1, 2, 3], where="f line 1", spans={"v": (2, 3), "w": (0, 2)}, alternate_spans={"v": (0, 1)}
    )
    assert span_positions([spanned, spanned], "v") == ([2, 2], [0, 0])
    assert span_positions([spanned, equal], "last") == ([2, 1], [1, 1])
    assert spanned.span("w") == ((0, 2), (0, 2))
    with pytest.raises(InputError, match=r"f line 1 \(a\): span 'w' is \[0, 2\]; expected one token"):
        span_positions([spanned], "w")
    with pytest.raises(InputError, match=r"f line 1 \(a\) has no span 'x'; it has: v, w"):
        span_positions([spanned], "x")
    beyond = triple("a", [1, 2, 3], where="f line 2", spans={"v": (2, 3)})
    with pytest.raises(InputError, match="f line 2 .*in the alternate of 2 tokens"):
        span_positions([beyond], "v")


def test_uninformative_triples_are_left_out_and_counted():
    good = triple("op", [1], original_answer_id=5, alternate_answer_id=6)
    idle = triple("op", [2], original_answer_id=5, alternate_answer_id=5)
    unknown = triple("op", [3])
    kept, excluded = drop_uninformative([good, idle, unknown, idle])
    assert kept == [good, unknown]
    assert excluded == {"op: the alternate has the original's answer": 2}
