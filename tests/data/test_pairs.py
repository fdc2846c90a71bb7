"""Reading and writing prompt pairs: both forms, the CSV, and every complaint with its line."""

import json

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from patchkit.data import Pair, read_pairs, word_span, write_pairs
from patchkit.errors import InputError, RunError
from tests.toy_tokenizers import byte_pairs, characters, words

TOY = words("Mary John Paul went gave to the".split())
IDS = {"clean_ids": [1, 2, 3], "corrupt_ids": [1, 4, 3], "answer_id": 5, "wrong_id": 6}
TEXT = {"clean": "Mary gave to", "corrupt": "Paul gave to", "answer": "John", "wrong": "Mary"}


def lines(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def toy_ids(text):
    vocabulary = ["<pad>", "<s>", "<unk>", "Mary", "John", "Paul", "went", "gave", "to", "the"]
    return tuple(vocabulary.index(word) for word in text.split())


def test_the_id_form_needs_no_tokenizer_and_keeps_the_rest(tmp_path):
    row = {**IDS, "id": "first", "spans": {"name": [1, 2]}, "template": "ABBA", "clean": "in words"}
    pairs = read_pairs(lines(tmp_path / "p.jsonl", row, "", IDS), None, vocab_size=7)
    assert pairs == [
        Pair((1, 2, 3), (1, 4, 3), 5, 6, {"name": (1, 2)}, "first"),
        Pair((1, 2, 3), (1, 4, 3), 5, 6, {}, "1", {}),
    ]
    assert [pair.meta for pair in pairs] == [{"template": "ABBA", "clean": "in words"}, {}]


def test_the_text_form_gets_the_tokenizers_bos_and_the_continuing_answer(tmp_path):
    (pair,) = read_pairs(lines(tmp_path / "p.jsonl", {**TEXT, "note": 3}), TOY, vocab_size=10)
    assert pair.clean_ids == toy_ids("<s> Mary gave to") and pair.corrupt_ids == toy_ids("<s> Paul gave to")
    assert (pair.answer_id,) == toy_ids("John") and (pair.wrong_id,) == toy_ids("Mary")
    assert pair.meta == {"note": 3}


def test_the_csv_of_the_eap_ig_repository_with_its_extra_columns(tmp_path):
    path = tmp_path / "ioi.csv"
    path.write_text(
        ",clean,corrupted,corrupted_hard,correct_idx,incorrect_idx\n"
        '470,Mary gave to,Paul gave to,"John, gave",4,3\n'
    )
    (pair,) = read_pairs(path, TOY, vocab_size=10)
    assert (pair.answer_id, pair.wrong_id, pair.id) == (4, 3, "470")
    assert pair.meta == {"corrupted_hard": "John, gave"}


def test_a_dataset_is_as_good_as_a_file(tmp_path):
    rows = [{**IDS, "spans": {"a": [0, 1]}, "tag": "x"}, {**IDS, "spans": {"b": [1, 3]}, "tag": None}]
    first, second = read_pairs(Dataset.from_list(rows), None, vocab_size=7)
    assert first.spans == {"a": (0, 1)} and second.spans == {"b": (1, 3)}
    assert first.meta == {"tag": "x"} and second.meta == {}


TOKENS = st.lists(st.integers(0, 99), min_size=1, max_size=6)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(TOKENS, st.integers(0, 49), st.integers(50, 99), st.text(max_size=5)), min_size=1))
def test_what_is_written_is_what_is_read(tmp_path_factory, rows):
    pairs = [
        Pair(tuple(ids), tuple(reversed(ids)), good, bad, {"all": (0, len(ids))}, f"n{index}", {"note": note})
        for index, (ids, good, bad, note) in enumerate(rows)
    ]
    path = tmp_path_factory.mktemp("pairs") / "deep" / "p.jsonl"
    write_pairs(path, pairs)
    found = read_pairs(path, None, vocab_size=100)
    assert found == pairs and [pair.meta for pair in found] == [pair.meta for pair in pairs]
    assert [entry.name for entry in path.parent.iterdir()] == ["p.jsonl"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"corrupt_ids": [1, 2]}, "clean has 3 tokens and corrupt 2"),
        ({"answer_id": 7}, r"answer_id = 7 is outside the model's vocabulary \(0 to 6\)"),
        ({"clean_ids": [1, -1, 3]}, r"clean_ids\[1\] = -1 is outside"),
        ({"clean_ids": [1, 2.5, 3]}, r"clean_ids\[1\] must be a whole number, found a fraction 2.5"),
        ({"clean_ids": [True, 2, 3]}, r"clean_ids\[0\] must be a whole number"),
        ({"clean_ids": []}, "clean_ids must be a list of token ids with at least one"),
        ({"clean_ids": "1 2 3"}, "clean_ids must be a list of token ids"),
        ({"answer_id": [5]}, "answer_id must be one whole number, found a list"),
        ({"answer_id": None}, "answer_id must be one whole number, found nothing"),
        ({"wrong_id": 5}, r"answer and wrong are the same token \(5\)"),
        ({"spans": {"name": [1, 4]}}, r"spans.name must be .* <= 3"),
        ({"spans": {"name": [2, 2]}}, "spans.name must be"),
        ({"spans": [[0, 1]]}, "spans must be"),
        ({"span": {"name": [0, 1]}}, "unknown column 'span': it looks like 'spans'"),
        ({"Clean": "x"}, "unknown column 'Clean': it looks like 'clean'"),
        ({"id": "0"}, "the id '0' is also that of .* line 1"),
    ],
)
def test_a_bad_record_is_named_by_file_and_line(tmp_path, change, message):
    path = lines(tmp_path / "p.jsonl", IDS, {**IDS, **change})
    with pytest.raises(InputError, match=rf"p.jsonl line 2: {message}"):
        read_pairs(path, None, vocab_size=7)


@pytest.mark.parametrize("name", ["clean_ids", "corrupt_ids", "answer_id", "wrong_id"])
def test_a_missing_column_is_named_with_what_was_found(tmp_path, name):
    row = {key: value for key, value in IDS.items() if key != name}
    with pytest.raises(InputError, match=f"line 1: column '{name}' is missing; expected clean_ids.*; found"):
        read_pairs(lines(tmp_path / "p.jsonl", row), None, vocab_size=7)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"clean_ids": [1, 2', "line 2: malformed JSON at column 20"),
        ("[1, 2]", "line 2: expected a JSON object, found a list"),
        ('{"answer_id": 1, "answer_id": 2}', "line 2: the key 'answer_id' appears twice"),
    ],
)
def test_malformed_lines(tmp_path, line, message):
    with pytest.raises(InputError, match=message):
        read_pairs(lines(tmp_path / "p.jsonl", IDS, line), None, vocab_size=7)


def test_files_that_are_not_files_of_pairs(tmp_path):
    with pytest.raises(InputError, match="absent.jsonl: no such file"):
        read_pairs(tmp_path / "absent.jsonl", None, 7)
    with pytest.raises(InputError, match="found a directory"):
        read_pairs(tmp_path, None, 7)
    with pytest.raises(
        InputError, match="empty.jsonl: expected a file of prompt pairs .* found an empty file"
    ):
        read_pairs(lines(tmp_path / "empty.jsonl", "", "  "), None, 7)
    with pytest.raises(InputError, match="has no rows"):
        read_pairs(Dataset.from_list([IDS]).select([]), None, 7)
    (tmp_path / "latin.jsonl").write_bytes(b'{"clean": "\xe9"}\n')
    with pytest.raises(InputError, match="expected UTF-8 text, found byte 11"):
        read_pairs(tmp_path / "latin.jsonl", None, 7)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("clean,corrupted,label\nMary,Paul,3\n", "line 2: column 'correct_idx' is missing.*found clean, c"),
        ("clean,corrupted,correct_idx,incorrect_idx\nMary,Paul,4\n", "line 2: expected 4 fields .*found 3"),
        ("clean,corrupted,correct_idx,incorrect_idx\nMary,Paul,John,3\n", "line 2: correct_idx must be"),
        ("clean,clean,corrupted,correct_idx,incorrect_idx\n", "line 1: column 'clean' appears twice"),
        ("clean,corrupted,correct_idx,incorrect_idx\n", "found nothing but a header"),
        ('clean,corrupted,correct_idx,incorrect_idx\n"Mary" x,Paul,4,3\n', "line 2: malformed CSV"),
    ],
)  # fmt: skip
def test_bad_csv(tmp_path, content, message):
    (tmp_path / "p.csv").write_text(content)
    with pytest.raises(InputError, match=message):
        read_pairs(tmp_path / "p.csv", TOY, 10)


def test_text_without_a_tokenizer_says_what_to_do(tmp_path):
    with pytest.raises(
        InputError, match="line 1: clean is text, but the model has no tokenizer; give clean_ids"
    ):
        read_pairs(lines(tmp_path / "p.jsonl", TEXT), None, 10)


def test_words_the_tokenizer_does_not_know(tmp_path):
    with pytest.raises(InputError, match="line 1: clean: 'Zoe' is unknown to the tokenizer"):
        read_pairs(lines(tmp_path / "p.jsonl", {**TEXT, "clean": "Zoe gave to"}), TOY, 10)
    with pytest.raises(InputError, match="answer, wrong: the answer ' Zoe' is unknown to the tokenizer"):
        read_pairs(lines(tmp_path / "p.jsonl", {**TEXT, "wrong": "Zoe"}), TOY, 10)


def test_a_vocabulary_smaller_than_the_tokenizers(tmp_path):
    with pytest.raises(
        InputError, match=r"the tokenizer gives id 8, outside the model's vocabulary \(0 to 7\)"
    ):
        read_pairs(lines(tmp_path / "p.jsonl", TEXT), TOY, 8)


BPE = byte_pairs(["Then Mary gave it to John to Mary", "x = 12 34 Mary", "x =12"])


def bpe_token(token):
    return BPE.convert_tokens_to_ids(token)


@pytest.mark.parametrize(
    ("prompt", "answer", "wrong", "tokens"),
    [
        ("Then Mary gave it to", "John", "Mary", ("ĠJohn", "ĠMary")),
        ("Then Mary gave it to", " John", " Mary", ("ĠJohn", "ĠMary")),
        ("x =", "12", "34", ("Ġ12", "Ġ34")),
        ("x (", "M", "J", ("M", "J")),
        ("x=", "1", "3", ("1", "3")),
    ],
)
def test_an_answer_is_the_token_that_really_continues_the_prompt(tmp_path, prompt, answer, wrong, tokens):
    row = {"clean": prompt, "corrupt": prompt, "answer": answer, "wrong": wrong}
    (pair,) = read_pairs(lines(tmp_path / "p.jsonl", row), BPE, 5000)
    assert (pair.answer_id, pair.wrong_id) == tuple(bpe_token(token) for token in tokens)


def test_an_answer_that_merges_with_the_prompts_end_is_explained(tmp_path):
    row = {"clean": "x = ", "corrupt": "x = ", "answer": "12", "wrong": "34"}
    with pytest.raises(
        InputError, match=r"answer '12' does not continue .*'Ġ=' 'Ġ' becomes .*'Ġ=' 'Ġ12'.*move the space"
    ):
        read_pairs(lines(tmp_path / "p.jsonl", row), BPE, 5000)


def test_answers_of_several_tokens(tmp_path):
    row = {"clean": "x=", "corrupt": "x=", "answer": "47", "wrong": "81"}
    path = lines(tmp_path / "p.jsonl", row)
    letters = characters()
    with pytest.raises(
        InputError, match=r"answer '47' is 2 tokens \('4', '7'\), expected one; .*--answer-first-token"
    ):
        read_pairs(path, letters, 100)
    (pair,) = read_pairs(path, letters, 100, answer_first_token=True)
    assert letters.convert_ids_to_tokens([pair.answer_id, pair.wrong_id]) == ["4", "8"]
    spaced = lines(tmp_path / "q.jsonl", {**row, "clean": "x is", "corrupt": "y is"})
    (pair,) = read_pairs(spaced, letters, 100, answer_first_token=True)
    assert letters.convert_ids_to_tokens(pair.answer_id) == "4", "a space alone says nothing about the answer"
    same = lines(tmp_path / "r.jsonl", {**row, "wrong": "48"})
    with pytest.raises(InputError, match="same token"):
        read_pairs(same, letters, 100, answer_first_token=True)


def test_a_tokenizer_that_ends_every_text_is_refused(tmp_path):
    tokenizer = byte_pairs(["Mary gave to John"], eos=True)
    with pytest.raises(InputError, match=r"clean: the tokenizer puts '<\|endoftext\|>' at the end"):
        read_pairs(lines(tmp_path / "p.jsonl", TEXT), tokenizer, 5000)


def test_nothing_is_half_written(tmp_path, monkeypatch):
    good = Pair((1,), (2,), 3, 4, id="a")
    path = tmp_path / "p.jsonl"
    write_pairs(path, [good])
    before = path.read_bytes()
    with pytest.raises(InputError, match="item 1 cannot be written as JSON"):
        write_pairs(path, [good, Pair((1,), (2,), 3, 4, id="b", meta={"x": object()})])
    with pytest.raises(InputError, match="metadata key 'spans' is the name of a column"):
        write_pairs(path, [Pair((1,), (2,), 3, 4, id="b", meta={"spans": 1})])
    with pytest.raises(InputError, match="no prompt pairs to write"):
        write_pairs(path, [])

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(RunError, match="p.jsonl: could not be written: no space left"):
        write_pairs(path, [good, good])
    assert path.read_bytes() == before and [entry.name for entry in tmp_path.iterdir()] == ["p.jsonl"]


def test_a_prompt_without_tokens(tmp_path):
    with pytest.raises(InputError, match="line 1: clean: '  ' has no tokens"):
        read_pairs(lines(tmp_path / "p.jsonl", {**TEXT, "clean": "  "}), TOY, 10)


def test_a_word_that_the_tokenizer_merges_has_no_span_of_its_own():
    assert word_span(BPE, "Then Mary gave it", 5, 9) == (1, 2)
    assert word_span(BPE, "Then Mary gave it", 0, 4) == (0, 1)
    with pytest.raises(InputError, match="merges 'ar' with its surroundings"):
        word_span(BPE, "Then Mary gave it", 6, 8)
