"""IOI pairs, English and embedded, read back from their text."""

import random
import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from patchkit.data import Pair, read_places
from patchkit.errors import InputError
from patchkit.tasks import _ioi_stories as stories
from patchkit.tasks import ioi, ioi_language
from tests.toy_tokenizers import byte_pairs, characters, words

SENTENCES = [
    ioi.Sentence(template, a, b, a, place, item).parts()[0]
    for template in range(len(ioi.TEMPLATES))
    for a, b in zip(ioi.NAMES, ioi.NAMES[1:] + ioi.NAMES[:1], strict=True)
    for place, item in zip(ioi.PLACES, ioi.OBJECTS, strict=True)
]
ENGLISH = byte_pairs(SENTENCES)
EMBEDDED = ioi_language.build_tokenizer()
# Words and their punctuation are one token here, `<s>` comes first.
WHOLE = words(
    dict.fromkeys(word for text in SENTENCES for word in (*text.split(), *re.findall(r"\w+", text)))
)
TOKENIZERS = {"bytes": ENGLISH, "whole words": WHOLE, "embedded": EMBEDDED}
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
        clause = at.pop("clause")
        after = at.pop("s1+1")
        assert at == {"io": [io], "s1": [giver], "s2": [giver], "last": ["to"]}
        assert pair.spans["s1"] < pair.spans["s2"] and pair.spans["last"][1] == len(tokens)
        assert clause[:3] == [first, "and", second] and clause[-1] in ",."
        assert not {",", "."} & set(clause[:-1]) and pair.spans["clause"][1] <= pair.spans["s2"][0]
        assert after == (["and"] if io == second else clause[3:4])

        corrupt = people(pair.meta["corrupt"], ioi.NAMES)
        places = sorted(pair.spans[name][0] for name in ("io", "s1", "s2"))
        if corruption == "s2-flip":
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
        clause = at.pop("clause")
        after = at.pop("s1+1")
        assert at == {"io": [io], "s1": [giver], "s2": [giver], "last": ["to"]}
        assert (pair.spans["io"] < pair.spans["s1"]) == (pair.meta["order"] == "ABBA")
        assert {clause[0], clause[2]} == {io, giver} and clause[-1] == "." and "." not in clause[:-1]
        assert after == (["and"] if pair.meta["order"] == "BABA" else clause[3:4])

        other, other_io = partner(pair.meta["corrupt"])
        places = sorted(pair.spans[name][0] for name in ("io", "s1", "s2"))
        if corruption == "s2-flip":
            assert (other, other_io) == (io, giver)
        else:
            assert other not in tokens and other_io is None
        assert differing(pair) == (places if corruption == "abc" else places[2:])


def test_a_seed_keeps_its_stories():
    """Figures of other studies were measured on these prompts."""
    first, second = ioi.pairs(EMBEDDED, 2, 0)
    assert first.meta["clean"].endswith("a long day at the office . then the apple was given by Carl to")
    assert first.meta["template"] == "bystander 1, giver 0, bystander 1, pair 2; closing 0"
    assert (first.meta["answer"], first.id, second.meta["order"]) == ("Lucy", "ioi-test-0-0", "BABA")


@settings(max_examples=30, deadline=None)
@given(
    kind=st.sampled_from(sorted(TOKENIZERS)),
    n=st.integers(1, 8),
    seed=st.integers(0, 99),
    split=st.sampled_from(["train", "test"]),
    corruption=st.sampled_from(ioi.CORRUPTIONS),
    templates=st.none() | st.integers(1, 3),
)
def test_whatever_is_asked_for_aligns(kind, n, seed, split, corruption, templates):
    tokenizer = TOKENIZERS[kind]
    pairs = ioi.pairs(tokenizer, n, seed, split, corruption, templates)
    assert len({pair.clean_ids for pair in pairs}) == len({pair.id for pair in pairs}) == n
    assert [pair.meta["order"] for pair in pairs] == [("ABBA", "BABA")[i % 2] for i in range(n)]
    gathered = ioi.groups(pairs)
    assert sorted(p.id for group in gathered.values() for p in group) == sorted(p.id for p in pairs)
    used = {pair.meta["template"] for pair in pairs}
    assert len(used) <= (templates or n)
    for group in gathered.values():
        assert len({len(pair.clean_ids) for pair in group}) == 1
        # What a position is, is the same in all: `each` is answered, and every span means one set of columns.
        covered = read_places("each", group).covered
        assert len(set(covered)) == 1
        assert len(set(read_places("io,s1,s1+1,s2,clause", group).covered)) == 1
    if templates == 1:
        read_places("each", pairs)
    for pair in pairs:
        spans = pair.spans
        assert spans["s1"][1] - spans["s1"][0] == spans["io"][1] - spans["io"][0] == 1
        assert pair.clean_ids[spans["s1"][0]] == pair.clean_ids[spans["s2"][0]] == pair.wrong_id
        assert pair.clean_ids[spans["io"][0]] == pair.answer_id != pair.wrong_id
        assert spans["s1+1"] == (spans["s1"][1], spans["s1"][1] + 1)
        assert pair.answer_id not in pair.clean_ids[spans["s2"][0] :]
    same = ioi.pairs(tokenizer, n, seed, split, "abc", templates)
    assert [pair.clean_ids for pair in same] == [pair.clean_ids for pair in pairs]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), n_pairs=st.integers(1, 3), bystanders=st.integers(0, 2))
def test_stories_of_one_layout_differ_in_words_only(seed, n_pairs, bystanders):
    rng = random.Random(seed)
    layout = ioi_language.sample_story(rng, n_pairs=n_pairs, n_bystanders=bystanders, split="train")
    other = stories.refilled(rng, layout, "test")
    assert stories.layout_name(other) == stories.layout_name(layout)
    names = [word for word in ioi_language.render(other).split() if word in ioi_language.NAMES]
    assert len(set(names)) == len(names) - 1 == 2 * n_pairs + bystanders
    assert ioi_language.split_of(other.giver, ioi_language.answer(other)) == "test"
    fixed = set(ioi_language.NAMES) | set(ioi_language.PLACES) | set(ioi_language.OBJECTS)
    shared = [[word if word not in fixed else "*" for word in ioi_language.words(s)] for s in (layout, other)]
    assert shared[0] == shared[1]


@pytest.mark.parametrize("tokenizer", [ENGLISH, EMBEDDED], ids=["english", "embedded"])
def test_splits_share_no_couple_and_seeds_repeat(tokenizer):
    def couples(split, seed=0):
        return {
            frozenset((p.meta["answer"], p.meta["wrong"]))
            for p in ioi.pairs(tokenizer, 30, seed, split=split)
        }

    assert couples("train").isdisjoint(couples("test"))
    assert ioi.pairs(tokenizer, 10, 0) == ioi.pairs(tokenizer, 10, 0) != ioi.pairs(tokenizer, 10, 1)


def test_the_older_word_for_the_flip_means_the_same():
    assert ioi.pairs(ENGLISH, 6, 3, corruption="swap") == ioi.pairs(ENGLISH, 6, 3, corruption="s2-flip")


def test_only_names_that_are_single_tokens_are_used():
    known = ["to", *ioi.NAMES[:4]]
    with pytest.raises(InputError, match="at least 6 names .* found 4: Mary, John, Tom, James"):
        ioi.pairs(words(known), 4, 0)
    with pytest.raises(InputError, match="at least 6 names .* found 0: none"):
        ioi.pairs(characters(), 4, 0)
    assert set(ioi.single_token_names(ENGLISH)) == set(ioi.NAMES)
    with pytest.raises(InputError, match="names places .market, library.* the tokenizer knows none of them"):
        ioi.pairs(words(["to", *ioi.NAMES]), 4, 0)
    with pytest.raises(InputError, match="none of the couples of Mary, John, .* is in the test split"):
        ioi.pairs(words(["to", "Mary", "John", "Anna", "Mark", "Jack", "Peter"]), 4, 0)


def test_words_of_one_length_are_used_where_some_are_longer():
    corpus = [text for text in SENTENCES if not re.search("library|theater|camera", text)]
    short = byte_pairs(corpus)
    pairs = ioi.pairs(short, 60, 0)
    ioi.groups(pairs)
    assert not any(re.search("library|theater|camera", pair.meta["clean"]) for pair in pairs)


def test_names_that_merge_with_the_word_before_them_are_refused():
    """`and Mary` is one token here, though `to Mary` is two: the corrupt prompt would be longer."""
    plain = ["<unk>", *dict.fromkeys("".join(SENTENCES)), "▁"]
    vocabulary = {token: -20.0 for token in plain}
    vocabulary |= {f"▁{word}": -2.0 for text in SENTENCES for word in re.findall(r"\w+", text)}
    vocabulary |= {"▁and▁Mary": -0.5, ",": -2.0, ".": -2.0}
    tokenizer = Tokenizer(models.Unigram(list(vocabulary.items()), unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    tokenizer.decoder = decoders.Metaspace()
    merging = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    with pytest.raises(InputError, match="does not merge names with the words before them"):
        ioi.pairs(merging, 200, 0, corruption="abc")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokenizer": None}, "needs a tokenizer, found none"),
        (
            {"corruption": "noise"},
            "corruption 'noise' is not one of s2-flip, third, abc .s2-flip is also called swap",
        ),
        ({"split": "dev"}, "split must be 'train' or 'test'"),
        ({"n": 0}, "must be at least 1, found 0"),
        ({"templates": 0}, "templates must be 1 to 8 or None for all, found 0"),
        ({"templates": 9}, "templates must be 1 to 8 or None for all, found 9"),
    ],
)
def test_bad_requests(options, message):
    call = {"tokenizer": EMBEDDED, "n": 4, "seed": 0, **options}
    with pytest.raises(InputError, match=message):
        ioi.pairs(**call)


def test_pairs_that_do_not_belong_together_are_not_grouped():
    assert ioi.groups([]) == {}
    with pytest.raises(InputError, match="pair 'x' has no template and no order in its metadata"):
        ioi.groups([Pair((1, 2), (1, 3), 4, 5, id="x")])
    one, other = (ioi.pairs(tokenizer, 1, 0, templates=1)[0] for tokenizer in (ENGLISH, WHOLE))
    with pytest.raises(InputError, match=r"name one template and order, but .* 1\d and 1\d tokens"):
        ioi.groups([one, other])
