"""The published arithmetic, its answers worked out from the text by the test itself."""

import re
from collections import Counter

import pytest
from tokenizers import Regex, normalizers

from patchkit.errors import InputError
from patchkit.tasks import arithmetic, excluded
from tests.toy_tokenizers import byte_pairs, characters, llama_like

# Numbers up to 199 are one token each, with the space before them, as where a tokenizer merges digits.
MERGING = byte_pairs(f"x = {number} y - + {number}\n" for number in range(200))
BOTH = pytest.mark.parametrize("desideratum", arithmetic.DESIDERATA, ids=lambda d: d.name)


def read(text):
    """(x, y, operation, answer) of a prompt."""
    match = re.fullmatch(r"x = (\d\d)\ny = (\d\d)\nx ([+-]) y = ?", text)
    assert match, text
    x, y = int(match[1]), int(match[2])
    return x, y, match[3], x + y if match[3] == "+" else x - y


@BOTH
@pytest.mark.parametrize("tokenizer", [llama_like(), characters()], ids=["llama", "characters"])
def test_forty_five_triples_scored_by_the_first_digit(desideratum, tokenizer):
    rows = desideratum(tokenizer, 50, 0, "train").to_list()
    assert len(rows) == 45
    digits = Counter()
    for row in rows:
        x, y, operation, answer = read(row["original"])
        other_x, other_y, other_operation, other = read(row["alternate"])
        first = tokenizer.convert_ids_to_tokens([row["original_answer_id"], row["alternate_answer_id"]])
        assert first == [str(answer)[0], str(other)[0]] and first[0] != first[1]
        assert answer > 0 and other > 0
        if desideratum.name == "value_dependence":
            assert (other_y, other_operation) == (y, operation) and other_x != x
            assert row["target_id"] == row["alternate_answer_id"]
        else:
            assert (other_x, other_y) == (x, y) and other_operation != operation
            assert row["target_id"] == row["original_answer_id"]
        digits[tokenizer.convert_ids_to_tokens(row["target_id"])] += 1
        # The answer really follows: tokenised together, the prompt's tokens come first, then the scored one.
        whole = tokenizer(row["original"] + str(answer))["input_ids"]
        assert whole[: len(row["original_ids"])] == row["original_ids"]
        assert whole[len(row["original_ids"])] == row["original_answer_id"]
    assert digits == {str(digit): 5 for digit in range(1, 10)}


@BOTH
def test_equal_first_digits_are_left_out_and_counted(desideratum):
    dataset = desideratum(llama_like(), 225, 1, "train")
    counted = excluded(dataset)
    assert list(counted) == ["the two answers begin with the same token"]
    assert counted["the two answers begin with the same token"] > 10


@BOTH
def test_splits_share_no_numbers_and_seeds_repeat(desideratum):
    def numbers(split, seed=0):
        rows = desideratum(llama_like(), 90, seed, split).to_list()
        return {read(row[side])[:2] for row in rows for side in ("original", "alternate")}

    assert numbers("train").isdisjoint(numbers("test"))
    assert numbers("train") == numbers("train") != numbers("train", seed=1)


def test_merged_numbers_are_scored_whole_once_the_space_goes_with_them():
    with pytest.raises(InputError, match=r"with the answer 1 \(... 'Ġ=' 'Ġ1'\); use trailing_space=F"):
        arithmetic.value_dependence(MERGING, 9, 0, "train")
    for row in arithmetic.value_dependence(MERGING, 18, 0, "train", trailing_space=False).to_list():
        answer = read(row["original"])[3]
        assert row["original"].endswith("y =")
        assert MERGING.convert_ids_to_tokens(row["original_answer_id"]) == f"Ġ{answer}"


def test_answers_that_a_first_token_cannot_tell_apart():
    with pytest.raises(InputError, match="begins with a token that is only a space"):
        arithmetic.value_dependence(characters(), 9, 0, "train", trailing_space=False)
    blurred = characters()
    blurred.backend_tokenizer.normalizer = normalizers.Replace(Regex(r"\d"), "*")
    with pytest.raises(
        InputError, match=r"answers that begin with 1, 2, 3, .* all begin with the token '\*'"
    ):
        arithmetic.value_dependence(blurred, 9, 0, "train")


def test_requests_that_cannot_be_met():
    with pytest.raises(InputError, match="n is 8; expected at least 9"):
        arithmetic.value_dependence(llama_like(), 8, 0, "train")
    with pytest.raises(InputError, match="needs a tokenizer, found none"):
        arithmetic.operation_invariance(None, 9, 0, "train")
    with pytest.raises(InputError, match="only .* of 90000 different triples could be made"):
        arithmetic.operation_invariance(llama_like(), 90000, 0, "test")


def test_pairs_are_aligned():
    tokenizer = llama_like()
    pairs = arithmetic.pairs(tokenizer, 20, 3)
    assert len(pairs) == len({pair.id for pair in pairs}) == 20
    for pair in pairs:
        assert len(pair.clean_ids) == len(pair.corrupt_ids)
        answers = [str(read(pair.meta[side])[3])[0] for side in ("clean", "corrupt")]
        assert tokenizer.convert_ids_to_tokens([pair.answer_id, pair.wrong_id]) == answers
