"""Prompts of the embedded language of indirect objects: layouts that many stories share, and how a story is corrupted."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from patchkit.tasks import ioi_language as lang
from patchkit.tasks.building import Split
from patchkit.tasks.ioi_language import Bystander, PairSentence, Story


def draw_layouts(rng: random.Random, split: Split, n: int) -> list[Story]:
    """`n` stories of different layouts."""
    found: dict[str, Story] = {}
    while len(found) < n:
        story = lang.sample_story(rng, split=split)
        found.setdefault(layout_name(story), story)
    return list(found.values())


def draw_story(rng: random.Random, split: Split, layouts: Sequence[Story], abba: bool) -> Story:
    """A random story whose indirect object is named first (`abba`) or second; with `layouts`, in one of them."""
    story = refilled(rng, rng.choice(layouts), split) if layouts else lang.sample_story(rng, split=split)
    partner = lang.answer(story)
    pair = _pair_of(story, story.giver)
    return story if (pair.first == partner) == abba else lang.with_giver(story, partner)


def refilled(rng: random.Random, layout: Story, split: Split) -> Story:
    """Another story of the same layout: the same sentences in the same order about other people, places and things."""
    own = layout.sentences.index(_pair_of(layout, layout.giver))
    counts = [2 if isinstance(sentence, PairSentence) else 1 for sentence in layout.sentences]
    start = sum(counts[:own])
    while True:
        names = rng.sample(lang.NAMES, sum(counts))
        if lang.split_of(names[start], names[start + 1]) == split:
            break
    people = iter(names)
    sentences: list[PairSentence | Bystander] = []
    for sentence in layout.sentences:
        place = rng.choice(lang.PLACES)
        if isinstance(sentence, PairSentence):
            sentences.append(replace(sentence, first=next(people), second=next(people), place=place))
        else:
            sentences.append(replace(sentence, name=next(people), place=place))
    giver = rng.choice(names[start : start + 2])
    return Story(tuple(sentences), giver, rng.choice(lang.OBJECTS), layout.closing)


def layout_name(story: Story) -> str:
    """What stories of one layout share, e.g. `bystander 1, giver 0, pair 2; closing 1`."""
    own = _pair_of(story, story.giver)
    kinds = [
        f"bystander {sentence.template}"
        if isinstance(sentence, Bystander)
        else f"{'giver' if sentence is own else 'pair'} {sentence.opening}"
        for sentence in story.sentences
    ]
    return f"{', '.join(kinds)}; closing {story.closing}"


def story_spans(story: Story) -> dict[str, tuple[int, int]]:
    """Token spans, with `<s>` at 0: `io`, `s1`, `s1+1`, `s2`, `last`, and the `clause` of the giver and the partner."""
    found = lang.spans(story)
    prompt = [lang.BOS, *lang.words(story)]
    start = min(found["IO"][0], found["S1"][0])
    after = found["S1"][1]
    return {
        "io": found["IO"],
        "s1": found["S1"],
        "s1+1": (after, after + 1),
        "s2": found["S2"],
        "last": found["end"],
        "clause": (start, prompt.index(".", start) + 1),
    }


def corrupted(rng: random.Random, story: Story, corruption: str) -> Story:
    """The story with another giver (`s2-flip`, `third`), or with other people at all three mentions (`abc`)."""
    partner = lang.answer(story)
    if corruption == "s2-flip":
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


def _pair_of(story: Story, giver: str) -> PairSentence:
    return next(s for s in story.sentences if isinstance(s, PairSentence) and giver in (s.first, s.second))
