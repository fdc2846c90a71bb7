"""Indirect objects: `When Mary and John went to the store, John gave a drink to` is continued by Mary.

Pairs for real tokenizers (the ABBA and BABA sentences of Wang et al. 2022, with names that are single tokens)
and for the embedded `ioi-gpt2`, whose sentences come from its own language. The corrupt prompt differs in one
of three ways:

- `swap`: the giver is the other of the two, so that `wrong` becomes the right answer;
- `third`: the giver is someone else, so that neither name is repeated (the corruption of the EAP-IG data);
- `abc`: all three mentions are other people's names (the reference distribution of the IOI paper).

Answer: the indirect object. Wrong: the subject. Spans: `io`, `s1`, `s2`, `last`.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from patchkit.data.pairs import Pair
from patchkit.data.tokens import continuation_ids, encode, prompt_ids, word_span
from patchkit.errors import InputError
from patchkit.tasks import ioi_language as lang
from patchkit.tasks.building import Split, require_split, split_by_hash
from patchkit.tasks.ioi_language import Bystander, PairSentence, Story

CORRUPTIONS = ("swap", "third", "abc")

NAMES: tuple[str, ...] = tuple(
    "Mary John Tom James Dan Anna Paul Mark Sarah Emma Jack Kate Peter Laura David Alice Robert Susan "
    "Michael Lisa "
    "William Jane Richard Helen Thomas Amy Charles Julia George Rachel Simon Claire Andrew Lucy Steven "
    "Diana Kevin "
    "Maria Brian Ruth Adam Jessica Scott Karen Martin Linda Frank Grace Henry Rose".split()
)
PLACES: tuple[str, ...] = (
    "store",
    "garden",
    "restaurant",
    "school",
    "hospital",
    "office",
    "house",
    "station",
)
OBJECTS: tuple[str, ...] = ("ring", "kiss", "bone", "basketball", "computer", "necklace", "drink", "snack")
TEMPLATES: tuple[str, ...] = (
    "Then, {a} and {b} went to the {place}. {s} gave a {object} to",
    "Then, {a} and {b} had a lot of fun at the {place}. {s} gave a {object} to",
    "Then, {a} and {b} were working at the {place}. {s} decided to give a {object} to",
    "Then, {a} and {b} were thinking about going to the {place}. {s} wanted to give a {object} to",
    "When {a} and {b} got a {object} at the {place}, {s} decided to give it to",
    "When {a} and {b} went to the {place}, {s} gave a {object} to",
    "After {a} and {b} went to the {place}, {s} gave a {object} to",
    "While {a} and {b} were working at the {place}, {s} gave a {object} to",
)

# One pair of names in four is for testing.
_ONE_IN = 4
# Draws in a row that repeat a prompt before giving up.
_PATIENCE = 1000


@dataclass(frozen=True)
class Sentence:
    """One sentence: the two people in the order of their first mention, and who gives."""

    template: int
    first: str
    second: str
    giver: str
    place: str
    object: str

    def text(self) -> str:
        fields = {
            "a": self.first,
            "b": self.second,
            "s": self.giver,
            "place": self.place,
            "object": self.object,
        }
        return TEMPLATES[self.template].format(**fields)

    def places(self) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
        """Characters of the first mention, the second mention, and the giver."""
        text = self.text()
        first = text.index(self.first)
        second = text.index(f" and {self.second}") + len(" and ")
        giver = text.index(f" {self.giver} ", second + len(self.second)) + 1
        return (
            (first, first + len(self.first)),
            (second, second + len(self.second)),
            (giver, giver + len(self.giver)),
        )


def pairs(
    tokenizer: PreTrainedTokenizerBase | None,
    n: int,
    seed: int,
    split: str = "test",
    corruption: str = "swap",
) -> list[Pair]:
    """`n` different pairs; half ABBA, half BABA. The two people of a prompt are in one split only.

    The tokenizer of `ioi-gpt2` gets sentences of its language, any other one English. InputError where the
    tokenizer has too few names that are single tokens, or where n pairs cannot be made.
    """
    if tokenizer is None:
        raise InputError("the IOI task writes text and needs a tokenizer, found none; load one")
    side = require_split(split)
    if corruption not in CORRUPTIONS:
        raise InputError(f"corruption {corruption!r} is not one of {', '.join(CORRUPTIONS)}")
    if n < 1:
        raise InputError(f"the number of pairs must be at least 1, found {n}")
    embedded = set(tokenizer.get_vocab()) == set(lang.VOCABULARY)
    draw = _story_pair(tokenizer) if embedded else _sentence_pair(tokenizer)
    rng = random.Random(f"ioi {split} {corruption} {seed}")
    found: dict[tuple[int, ...], Pair] = {}
    repeats = 0
    while len(found) < n:
        pair = draw(rng, len(found), side, corruption)
        repeats += 1
        if pair.clean_ids not in found:
            found[pair.clean_ids] = replace(pair, id=f"ioi-{split}-{seed}-{len(found)}")
            repeats = 0
        if repeats == _PATIENCE:
            raise InputError(f"only {len(found)} of {n} different IOI pairs could be made; ask for fewer")
    return list(found.values())


Draw = Callable[[random.Random, int, Split, str], Pair]


def single_token_names(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The names that are one token after a space, and that token."""
    head = encode(tokenizer, "to")
    found = {}
    for name in NAMES:
        ids = encode(tokenizer, f"to {name}")
        if ids[: len(head)] == head and len(ids) == len(head) + 1 and ids[-1] != tokenizer.unk_token_id:
            found[name] = ids[-1]
    return found


def _sentence_pair(tokenizer: PreTrainedTokenizerBase) -> Draw:
    names = single_token_names(tokenizer)
    if len(names) < 6:
        raise InputError(
            "the IOI task needs at least 6 names that are single tokens of the tokenizer, found "
            f"{len(names)}: "
            f"{', '.join(names) or 'none'}; use another tokenizer"
        )

    def draw(rng: random.Random, index: int, split: Split, corruption: str) -> Pair:
        while True:
            io, subject, *others = rng.sample(list(names), 5)
            if split_by_hash(" ".join(sorted((io, subject))), _ONE_IN) == split:
                break
        abba = index % 2 == 0
        first, second = (io, subject) if abba else (subject, io)
        template, place, item = rng.randrange(len(TEMPLATES)), rng.choice(PLACES), rng.choice(OBJECTS)
        clean = Sentence(template, first, second, subject, place, item)
        if corruption == "swap":
            corrupt = replace(clean, giver=io)
        elif corruption == "third":
            corrupt = replace(clean, giver=others[0])
        else:
            corrupt = replace(clean, first=others[0], second=others[1], giver=others[2])
        spans = [word_span(tokenizer, clean.text(), *place) for place in clean.places()]
        answer, wrong = continuation_ids(tokenizer, clean.text(), [f" {io}", f" {subject}"])
        ids = prompt_ids(tokenizer, clean.text())
        return Pair(
            clean_ids=ids,
            corrupt_ids=prompt_ids(tokenizer, corrupt.text()),
            answer_id=answer,
            wrong_id=wrong,
            spans={
                "io": spans[0 if abba else 1],
                "s1": spans[1 if abba else 0],
                "s2": spans[2],
                "last": (len(ids) - 1, len(ids)),
            },
            meta={
                "clean": clean.text(),
                "corrupt": corrupt.text(),
                "answer": io,
                "wrong": subject,
                "order": "ABBA" if abba else "BABA",
                "template": template,
            },
        )

    return draw


def _story_pair(tokenizer: PreTrainedTokenizerBase) -> Draw:
    vocabulary = tokenizer.get_vocab()
    lead = len(encode(tokenizer, lang.NAMES[0])) - 1

    def draw(rng: random.Random, index: int, split: Split, corruption: str) -> Pair:
        story = lang.sample_story(rng, split=split)
        partner = lang.answer(story)
        # The two people take turns at being mentioned first.
        pair = next(
            s for s in story.sentences if isinstance(s, PairSentence) and s.first in (story.giver, partner)
        )
        if (pair.first == partner) != (index % 2 == 0):
            story = lang.with_giver(story, partner)
            partner = lang.answer(story)
        corrupt = _corrupt_story(rng, story, partner, corruption)
        named = {"io": "IO", "s1": "S1", "s2": "S2", "last": "end"}
        spans = {ours: lang.spans(story)[theirs] for ours, theirs in named.items()}
        return Pair(
            clean_ids=tuple(encode(tokenizer, lang.render(story))),
            corrupt_ids=tuple(encode(tokenizer, lang.render(corrupt))),
            answer_id=vocabulary[partner],
            wrong_id=vocabulary[story.giver],
            spans={name: (start + lead - 1, end + lead - 1) for name, (start, end) in spans.items()},
            meta={
                "clean": lang.render(story),
                "corrupt": lang.render(corrupt),
                "answer": partner,
                "wrong": story.giver,
                "order": "ABBA" if index % 2 == 0 else "BABA",
            },
        )

    return draw


def _corrupt_story(rng: random.Random, story: Story, partner: str, corruption: str) -> Story:
    if corruption == "swap":
        return lang.with_giver(story, partner)
    present = set(lang.render(story).split())
    others = rng.sample([name for name in lang.NAMES if name not in present], 3)
    if corruption == "third":
        return lang.with_giver(story, others[0])
    renamed = {partner: others[0], story.giver: others[1]}
    sentences = tuple(_renamed(sentence, renamed) for sentence in story.sentences)
    return replace(story, sentences=sentences, giver=others[2])


def _renamed(sentence: PairSentence | Bystander, names: dict[str, str]) -> PairSentence | Bystander:
    if isinstance(sentence, Bystander):
        return sentence
    return replace(
        sentence,
        first=names.get(sentence.first, sentence.first),
        second=names.get(sentence.second, sentence.second),
    )
