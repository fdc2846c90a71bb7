"""IOI pairs, English and embedded, read back from their text."""

import re
from collections import Counter

import pytest

from patchkit.errors import InputError
from patchkit.tasks import ioi, ioi_language
from tests.toy_tokenizers import byte_pairs, words

ENGLISH = byte_pairs(
    [template.format(a=a, b=a, s=a, place=place, object=item) for template in ioi.TEMPLATES for a in ioi.NAMES
     for place, item in zip(ioi.PLACES, ioi.OBJECTS, strict=True)]
)  # fmt: skip
EMBEDDED = ioi_language.build_tokenizer()
CORRUPTIONS = pytest.mark.parametrize("corruption", ioi.CORRUPTIONS)


def people(text, names):
    return re.findall(rf"\b({'|'.join(names)})\b", text)


def partner(text):
    """The giver, who is the last one named, and the other name of the couple (`X and Y`) they belong to."""
    giver = re.findall(r"\b[A-Z]\w+", text)[-1]
    couples = re.findall(r"(\w+) and (\w+) ", text)
    return giver, next((b if giver == a else a for a, b in couples if giver in (a, b)), None)


def differing(pair):
    return [i for i, (a, b) in enumerate(zip(pair.clean_ids, pair.corrupt_ids, strict=True)) if a != b]


@CORRUPTIONS
def test_english_pairs(corruption):
    pairs = ioi.pairs(ENGLISH, 40, 0, corruption=corruption)
    assert len({pair.clean_ids for pair in pairs}) == 40
    assert Counter(pair.meta["order"] for pair in pairs) == {"ABBA": 20, "BABA": 20}
    assert len({pair.meta["template"] for pair in pairs}) > 5
    for pair in pairs:
        first, second, giver = people(pair.meta["clean"], ioi.NAMES)
        assert giver in (first, second) and first != second
        io = second if giver == first else first
        assert ENGLISH.convert_ids_to_tokens([pair.answer_id, pair.wrong_id]) == [f"Ġ{io}", f"Ġ{giver}"]
        assert pair.meta["order"] == ("ABBA" if io == first else "BABA")
        tokens = [token.removeprefix("Ġ") for token in ENGLISH.convert_ids_to_tokens(list(pair.clean_ids))]
        at = {name: tokens[start:end] for name, (start, end) in pair.spans.items()}
        assert at == {"io": [io], "s1": [giver], "s2": [giver], "last": ["to"]}
        assert pair.spans["s1"] < pair.spans["s2"] and pair.spans["last"][1] == len(tokens)

        corrupt = people(pair.meta["corrupt"], ioi.NAMES)
        places = sorted(pair.spans[name][0] for name in ("io", "s1", "s2"))
        if corruption == "swap":
            assert corrupt == [first, second, io] and differing(pair) == places[2:]
        elif corruption == "third":
            assert corrupt[:2] == [first, second] and corrupt[2] not in (first, second)
            assert differing(pair) == places[2:]
        else:
            assert len({first, second, *corrupt}) == 5 and differing(pair) == places


@CORRUPTIONS
def test_embedded_pairs(corruption):
    pairs = ioi.pairs(EMBEDDED, 40, 0, corruption=corruption)
    assert Counter(pair.meta["order"] for pair in pairs) == {"ABBA": 20, "BABA": 20}
    assert len({pair.meta["clean"].count(" and ") for pair in pairs}) > 1
    for pair in pairs:
        giver, io = partner(pair.meta["clean"])
        assert EMBEDDED.convert_ids_to_tokens([pair.answer_id, pair.wrong_id]) == [io, giver]
        tokens = EMBEDDED.convert_ids_to_tokens(list(pair.clean_ids))
        assert tokens == ["<s>", *pair.meta["clean"].split()]
        at = {name: tokens[start:end] for name, (start, end) in pair.spans.items()}
        assert at == {"io": [io], "s1": [giver], "s2": [giver], "last": ["to"]}
        assert (pair.spans["io"] < pair.spans["s1"]) == (pair.meta["order"] == "ABBA")

        other, other_io = partner(pair.meta["corrupt"])
        places = sorted(pair.spans[name][0] for name in ("io", "s1", "s2"))
        if corruption == "swap":
            assert (other, other_io) == (io, giver)
        else:
            assert other not in tokens and other_io is None
        assert differing(pair) == (places if corruption == "abc" else places[2:])


@pytest.mark.parametrize("tokenizer", [ENGLISH, EMBEDDED], ids=["english", "embedded"])
def test_splits_share_no_couple_and_seeds_repeat(tokenizer):
    def couples(split, seed=0):
        return {
            frozenset((p.meta["answer"], p.meta["wrong"]))
            for p in ioi.pairs(tokenizer, 30, seed, split=split)
        }

    assert couples("train").isdisjoint(couples("test"))
    assert ioi.pairs(tokenizer, 10, 0) == ioi.pairs(tokenizer, 10, 0) != ioi.pairs(tokenizer, 10, 1)


def test_only_names_that_are_single_tokens_are_used():
    known = ["Then,", "When", "After", "While", "to", *ioi.NAMES[:4]]
    with pytest.raises(InputError, match="at least 6 names .* found 4: Mary, John, Tom, James"):
        ioi.pairs(words(known), 4, 0)
    assert set(ioi.single_token_names(ENGLISH)) == set(ioi.NAMES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokenizer": None}, "needs a tokenizer, found none"),
        ({"corruption": "noise"}, "corruption 'noise' is not one of swap, third, abc"),
        ({"split": "dev"}, "split must be 'train' or 'test'"),
        ({"n": 0}, "must be at least 1, found 0"),
    ],
)
def test_bad_requests(options, message):
    call = {"tokenizer": EMBEDDED, "n": 4, "seed": 0, **options}
    with pytest.raises(InputError, match=message):
        ioi.pairs(**call)
