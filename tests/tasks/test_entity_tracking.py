"""The boxes task against a reading of the prompts by regular expressions."""

import re

import pytest

from patchkit.errors import InputError
from patchkit.tasks import entity_tracking as boxes
from tests.toy_tokenizers import byte_pairs, words

GLUE = "The the is in Box contains"
TOKENIZER = byte_pairs([" ".join([GLUE, *boxes.OBJECTS, *boxes.LABELS])] * 3)
EVERY = pytest.mark.parametrize("desideratum", boxes.DESIDERATA, ids=lambda d: d.name)


def read(text):
    """([(object, label)] in order, position asked about) of a prompt; the position is that in the list."""
    whole = re.fullmatch(r"(The .*), Box ([A-Z]) contains the", text)
    assert whole, text
    clauses = whole[1].split(", ")
    found = re.findall(r"[Tt]he ([a-z]+) is in Box ([A-Z])", whole[1])
    assert len(found) == len(clauses)
    return found, [label for _, label in found].index(whole[2])


def target(name, original, alternate):
    listed, _ = read(original)
    others, place = read(alternate)
    if name == "object_value":
        return others[place][0]
    if name == "positional":
        return listed[place][0]
    return dict((label, item) for item, label in listed)[others[place][1]]


@EVERY
@pytest.mark.parametrize("split", ["train", "test"])
def test_targets_are_what_the_text_says(desideratum, split):
    rows = desideratum(TOKENIZER, 30, 2, split).to_list()
    assert len(rows) == 30
    for row in rows:
        listed, place = read(row["original"])
        others, other_place = read(row["alternate"])
        answers = listed[place][0], others[other_place][0]
        tokens = [row["original_answer_id"], row["alternate_answer_id"], row["target_id"]]
        named = [token.removeprefix("Ġ") for token in TOKENIZER.convert_ids_to_tokens(tokens)]
        assert named == [*answers, row["target"]] and row["target"] == target(
            desideratum.name, row["original"], row["alternate"]
        )
        assert len(listed) == 7 and not {item for item, _ in listed} & {item for item, _ in others}
        assert row["target"] != answers[0]
        labels, other_labels = ({label for _, label in side} for side in (listed, others))
        if desideratum.name == "box_label_value":
            assert labels == other_labels and row["target"] != listed[other_place][0]
        else:
            assert not labels & other_labels
        if desideratum.name == "positional":
            assert place != other_place


@EVERY
def test_splits_share_no_list_and_seeds_repeat(desideratum):
    def lists(split, seed=0):
        rows = desideratum(TOKENIZER, 20, seed, split).to_list()
        return {frozenset(read(row[side])[0]) for row in rows for side in ("original", "alternate")}

    assert lists("train").isdisjoint(lists("test"))
    assert lists("test") == lists("test") != lists("test", seed=1)


def test_every_position_is_asked_about_about_as_often():
    rows = boxes.positional(TOKENIZER, 140, 0, "train").to_list()
    for side in ("original", "alternate"):
        places = [read(row[side])[1] for row in rows]
        assert all(8 <= places.count(place) <= 36 for place in range(7))


def test_spans_point_at_the_words():
    for row in boxes.object_value(TOKENIZER, 20, 0, "train").to_list():
        for side, key in (("original", "spans"), ("alternate", "alternate_spans")):
            listed, place = read(row[side])
            tokens = [
                token.removeprefix("Ġ") for token in TOKENIZER.convert_ids_to_tokens(row[f"{side}_ids"])
            ]
            at = {name: tokens[start:end] for name, (start, end) in row[key].items()}
            item, label = listed[place]
            assert at == {"object": [item], "label": [label], "query_label": [label], "last": ["the"]}
            assert row[key]["label"][0] < row[key]["query_label"][0]
            assert row[key]["last"][1] == len(tokens)
            # The published read position: the label asked for is two before the last token.
            assert row[key]["query_label"][0] == len(tokens) - 3


@EVERY
def test_fewer_boxes(desideratum):
    for row in desideratum(TOKENIZER, 6, 0, "train", boxes=2).to_list():
        assert len(read(row["original"])[0]) == 2
        assert row["target"] == target(desideratum.name, row["original"], row["alternate"])


def test_requests_that_cannot_be_met():
    with pytest.raises(InputError, match="needs a tokenizer, found none"):
        boxes.positional(None, 4, 0, "train")
    with pytest.raises(InputError, match="boxes is 14; expected 2 to 13"):
        boxes.positional(TOKENIZER, 4, 0, "train", boxes=14)
    few = words([*GLUE.split(), *boxes.LABELS, *boxes.OBJECTS[:5]])
    with pytest.raises(
        InputError, match="7 boxes needs 14 nouns that are single tokens of the tokenizer, found 5"
    ):
        boxes.positional(few, 4, 0, "train")
    unlettered = words([*GLUE.split(), *boxes.OBJECTS, "A", "B"])
    with pytest.raises(InputError, match="needs 4 capital letters .* found 2"):
        boxes.positional(unlettered, 4, 0, "train", boxes=2)
    # Whole words with their commas attached: `F,` is not the token `F`, so no span can be found.
    with_commas = words(
        [*GLUE.split(), *boxes.OBJECTS, *boxes.LABELS, *(f"{label}," for label in boxes.LABELS)]
    )
    with pytest.raises(InputError, match="merges '[A-Z]' with its surroundings"):
        boxes.positional(with_commas, 4, 0, "train")


def test_pairs_are_aligned():
    for pair in boxes.pairs(TOKENIZER, 12, 0):
        assert len(pair.clean_ids) == len(pair.corrupt_ids) and set(pair.spans) == {"query_label", "last"}
        for side, token in (("clean", pair.answer_id), ("corrupt", pair.wrong_id)):
            listed, place = read(pair.meta[side])
            assert TOKENIZER.convert_ids_to_tokens(token) == f"Ġ{listed[place][0]}"
