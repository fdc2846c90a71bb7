"""The binding language: answers and renderings known by hand, the split, and what training sees of it."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from patchkit.errors import InputError
from patchkit.tasks import ioi_language, language
from patchkit.tasks.language import Binding, Context, Distractor, Query

CONTEXT = Context(
    (Binding("a", 3), Binding("b", 7)), (Distractor("note", "c", 1), Distractor("skip", "5", 2))
)


@pytest.mark.parametrize(
    ("query", "form", "text", "answer"),
    [
        (Query("recall", "a"), "symbol", "a = 3 , note c , b = 7 , skip 5 , ; = a", "3"),
        (Query("plus", "b", 4), "symbol", "a = 3 , note c , b = 7 , skip 5 , ; + 4 b", "1"),
        (Query("minus", "a", 9), "order", "a holds 3 , note c , b holds 7 , skip 5 , ; take 9 from a", "4"),
        (
            Query("compare", "a", 3),
            "tell",
            "a has 3 , note c , b has 7 , skip 5 , ; tell me 3 beside a",
            "same",
        ),
        (
            Query("compare", "b", 3),
            "question",
            "a is 3 , note c , b is 7 , skip 5 , ; what is versus 3 b",
            "more",
        ),
        (Query("compare", "b", 8), "symbol", "a = 3 , note c , b = 7 , skip 5 , ; ? 8 b", "less"),
    ],
)
def test_renderings_and_answers_known_by_hand(query: Query, form: str, text: str, answer: str) -> None:
    context, query = language.with_form(CONTEXT, query, form)
    assert language.render(context, query) == text
    assert language.answer(context, query) == answer


def test_one_change_at_a_time() -> None:
    assert language.with_value(CONTEXT, "a", 9).value("a") == 9
    assert language.with_value(CONTEXT, "a", 9).value("b") == 7
    assert language.with_name(CONTEXT, "a", "t").bindings == (Binding("t", 3), Binding("b", 7))
    assert language.with_order(CONTEXT, [1, 0]).bindings == (Binding("b", 7), Binding("a", 3))
    assert language.with_order(CONTEXT, [1, 0]).distractors == CONTEXT.distractors


def test_every_word_is_one_token_and_spans_point_at_the_right_ones() -> None:
    tokenizer, rng = language.build_tokenizer(), random.Random(0)
    for form in language.FORMS:
        for operation in language.OPERATIONS:
            context = language.sample_context(rng, form=form)
            query = language.sample_query(rng, context, operation=operation)
            ids = tokenizer(language.render(context, query))["input_ids"]
            tokens = tokenizer.convert_ids_to_tokens(ids)
            assert tokens == ["<s>", *language.words(context, query)]
            spans = language.spans(context, query)
            found = {name: tokens[start:end] for name, (start, end) in spans.items()}
            assert found["value"] == [str(context.value(query.name))]
            assert found["name"] == found["query"] == [query.name] == tokens[-1:]
            assert tokens[-1 - len(found["operation"]) : -1] == found["operation"]
            assert tokens[spans["name"][1]] == language.CONNECTORS[form]


def test_the_split_is_stable_and_blind_to_order() -> None:
    """The list was written down once: another hash would let the shipped weights have seen held-out
    bindings.
    """
    rng = random.Random(0)
    contexts = [language.sample_context(rng) for _ in range(4000)]
    share = sum(language.split_of(c.bindings) == "test" for c in contexts) / len(contexts)
    assert 0.08 < share < 0.125
    for context in contexts[:200]:
        assert language.split_of(context.bindings) == language.split_of(reversed(context.bindings))
    held_out = [i for i in range(40) if language.split_of(contexts[i].bindings) == "test"]
    assert held_out == [16, 17, 19, 30, 31, 32, 34]


def test_train_and_test_bindings_are_disjoint() -> None:
    def drawn(split: language.Split, seed: int) -> set[tuple[Binding, ...]]:
        rng = random.Random(seed)
        contexts = (language.sample_context(rng, n_variables=2, split=split) for _ in range(3000))
        return {tuple(sorted(context.bindings, key=lambda b: b.name)) for context in contexts}

    train, test = drawn("train", 0), drawn("test", 1)
    assert len(test) > 1000 and not train & test


@pytest.mark.parametrize(
    ("context", "query", "message"),
    [
        (CONTEXT, Query("recall", "c"), "'c' is not bound in this context; bound are: a b"),
        (CONTEXT, Query("plus", "a"), "one of 1..9"),
        (CONTEXT, Query("plus", "a", 0), "one of 1..9"),
        (CONTEXT, Query("recall", "a", 2), "recall takes no constant"),
        (CONTEXT, Query("times", "a", 2), "'times' is not one of recall, plus"),
        (CONTEXT, Query("recall", "a", form="song"), "form 'song' is not one of symbol"),
        (replace(CONTEXT, bindings=(Binding("a", 10),)), Query("recall", "a"), "values 0..9"),
        (replace(CONTEXT, bindings=(Binding("a", 1), Binding("a", 2))), Query("recall", "a"), "bound twice"),
        (replace(CONTEXT, distractors=(Distractor("note", "5", 0),)), Query("recall", "a"), "note"),
        (replace(CONTEXT, distractors=(Distractor("skip", "5", 3),)), Query("recall", "a"), "before=3"),
    ],
)
def test_what_is_not_in_the_language_is_said(context: Context, query: Query, message: str) -> None:
    with pytest.raises(InputError, match=message):
        language.render(context, query)


def test_indirect_objects_known_by_hand() -> None:
    sentences = (
        ioi_language.Bystander("Tom", "hotel"),
        ioi_language.PairSentence("Mary", "John", "store"),
        ioi_language.PairSentence("Anna", "Paul", "park", 1),
    )
    story = ioi_language.Story(sentences, "John", "drink")
    text = (
        "Tom stayed at the hotel . Mary and John went to the store . Anna and Paul met at the park . "
        "then the drink was given by John to"
    )
    assert ioi_language.render(story) == text
    assert ioi_language.answer(story) == "Mary"
    assert ioi_language.answer(ioi_language.with_giver(story, "Anna")) == "Paul"
    tokens = ["<s>", *text.split()]
    found = {name: tokens[start] for name, (start, _end) in ioi_language.spans(story).items()}
    assert found == {"IO": "Mary", "S1": "John", "S2": "John", "end": "to"}
    assert ioi_language.spans(story)["S1"][0] < ioi_language.spans(story)["S2"][0]
    with pytest.raises(InputError, match="'Tom' is in no pair"):
        ioi_language.answer(ioi_language.with_giver(story, "Tom"))


def test_held_out_name_pairs() -> None:
    rng = random.Random(0)
    for split in ("train", "test"):
        for _ in range(200):
            story = ioi_language.sample_story(rng, split=split)
            partner = ioi_language.answer(story)
            assert ioi_language.split_of(story.giver, partner) == split
            assert ioi_language.split_of(partner, story.giver) == split
