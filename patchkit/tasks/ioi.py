"""Indirect objects: `Because Mary and John had met near the market, John lent a map to` is continued by Mary.

Pairs for real tokenizers (the structure of Wang et al. 2022 in sentences of our own, with names that are single tokens)
and for the embedded `ioi-gpt2`, whose sentences come from its own language. Two people are named, the indirect object
first (ABBA) or second (BABA); then the subject is named again. The corrupt prompt differs in one of three ways:

- `s2-flip`: the second mention is of the other of the two, so that `wrong` becomes the right answer (MIB's
  `s2_io_flip_counterfactual`; `swap` means the same);
- `third`: it is of someone else, so that neither name is repeated (the corruption of the EAP-IG data);
- `abc`: all three mentions are other people's names (the reference distribution of the IOI paper).

Under one seed the clean prompts are the same whatever the corruption. Answer: the indirect object. Wrong: the subject.
Spans: `io`, `s1`, `s1+1` (the token after the subject's first mention), `s2`, `last`, and the `clause` of the two names.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from transformers import PreTrainedTokenizerBase

from patchkit.data.pairs import Pair
from patchkit.data.tokens import continuation_ids, encode, prompt_ids, word_span
from patchkit.errors import InputError
from patchkit.tasks import ioi_language as lang
from patchkit.tasks._ioi_sentences import NAMES as NAMES
from patchkit.tasks._ioi_sentences import OBJECTS as OBJECTS
from patchkit.tasks._ioi_sentences import PLACES as PLACES
from patchkit.tasks._ioi_sentences import TEMPLATES as TEMPLATES
from patchkit.tasks._ioi_sentences import Sentence as Sentence
from patchkit.tasks._ioi_sentences import single_token_names as single_token_names
from patchkit.tasks._ioi_sentences import words_of_one_length
from patchkit.tasks._ioi_stories import corrupted, draw_layouts, draw_story, layout_name, story_spans
from patchkit.tasks.building import Split, require_split, split_by_hash

CORRUPTIONS = ("s2-flip", "third", "abc")
_ALIASES = {"swap": "s2-flip"}

# One pair of names in four is for testing.
_ONE_IN = 4
# Draws in a row that repeat a prompt before giving up.
_PATIENCE = 1000


@dataclass(frozen=True)
class _Request:
    """What is drawn, and from which chance: prompts from one source, the strangers of a corruption from another."""

    rng: random.Random
    strangers: random.Random
    split: Split
    corruption: str
    templates: int | None


#: Draws a pair, ABBA or BABA.
_Draw = Callable[[bool], Pair]


def pairs(
    tokenizer: PreTrainedTokenizerBase | None,
    n: int,
    seed: int,
    split: str = "test",
    corruption: str = "s2-flip",
    templates: int | None = None,
) -> list[Pair]:
    """`n` different pairs; half ABBA, half BABA. The two people of a prompt are in one split only.

    The tokenizer of `ioi-gpt2` gets sentences of its language, any other one English. Prompts of one template and one
    order have one length and the same spans; `groups` gathers them.

    Args:
        templates: how many templates (in the embedded language: layouts of a story) the pairs are drawn from; None for
            all. With 1 all pairs have one length.

    Raises:
        InputError: the tokenizer has too few names that are single tokens, the corruption is not known, or n pairs
            cannot be made.
    """
    if tokenizer is None:
        raise InputError("the IOI task writes text and needs a tokenizer, found none; load one")
    side = require_split(split)
    corruption = _ALIASES.get(corruption, corruption)
    if corruption not in CORRUPTIONS:
        raise InputError(
            f"corruption {corruption!r} is not one of {', '.join(CORRUPTIONS)} (s2-flip is also called swap)"
        )
    if n < 1:
        raise InputError(f"the number of pairs must be at least 1, found {n}")
    embedded = set(tokenizer.get_vocab()) == set(lang.VOCABULARY)
    if templates is not None and not 1 <= templates <= len(TEMPLATES):
        raise InputError(f"templates must be 1 to {len(TEMPLATES)} or None for all, found {templates}")
    request = _Request(
        # The word is older than `s2-flip`; another would draw other prompts from the seeds that are in use.
        rng=random.Random(f"ioi {split} swap {seed}"),
        strangers=random.Random(f"ioi {split} others {seed}"),
        split=side,
        corruption=corruption,
        templates=templates,
    )
    draw = _story_pair(tokenizer, request) if embedded else _sentence_pair(tokenizer, request)
    found: dict[tuple[int, ...], Pair] = {}
    repeats = 0
    while len(found) < n:
        pair = draw(len(found) % 2 == 0)
        repeats += 1
        if pair.clean_ids not in found:
            found[pair.clean_ids] = replace(pair, id=f"ioi-{split}-{seed}-{len(found)}")
            repeats = 0
        if repeats == _PATIENCE:
            raise InputError(f"only {len(found)} of {n} different IOI pairs could be made; ask for fewer")
    return list(found.values())


def groups(pairs: Sequence[Pair]) -> dict[str, list[Pair]]:
    """Pairs by template and order, e.g. `3 ABBA`: of one length and with the same spans within a group.

    What a mean per template and position is taken over, and what positions `each` can be asked of.

    Raises:
        InputError: a pair is not of this task, or two of a group have another length or other spans.
    """
    found: dict[str, list[Pair]] = {}
    for pair in pairs:
        missing = [key for key in ("template", "order") if key not in pair.meta]
        if missing:
            raise InputError(
                f"pair {pair.id!r} has no {' and no '.join(missing)} in its metadata; groups are made of pairs of the "
                "IOI task (`patchkit pairs ioi`)"
            )
        group = found.setdefault(f"{pair.meta['template']} {pair.meta['order']}", [])
        if group and (len(pair.clean_ids), pair.spans) != (len(group[0].clean_ids), group[0].spans):
            raise InputError(
                f"pairs {group[0].id!r} and {pair.id!r} name one template and order, but their tokens do not align: "
                f"{len(group[0].clean_ids)} and {len(pair.clean_ids)} tokens, spans {group[0].spans} and {pair.spans}; "
                "make the pairs with one tokenizer"
            )
        group.append(pair)
    return found


def _sentence_pair(tokenizer: PreTrainedTokenizerBase, request: _Request) -> _Draw:
    rng, corruption = request.rng, request.corruption
    names = list(single_token_names(tokenizer))
    if len(names) < 6:
        raise InputError(
            f"the IOI task needs at least 6 names that are single tokens of the tokenizer, found {len(names)}: "
            f"{', '.join(names) or 'none'}; use another tokenizer"
        )
    couples = [
        couple
        for couple in combinations(names, 2)
        if split_by_hash(" ".join(sorted(couple)), _ONE_IN) == request.split
    ]
    if not couples:
        raise InputError(
            f"none of the couples of {', '.join(names)} is in the {request.split} split; use a tokenizer that knows more "
            "names, or the other split"
        )
    places = words_of_one_length(tokenizer, PLACES, "places")
    objects = words_of_one_length(tokenizer, OBJECTS, "objects")
    used = sorted(rng.sample(range(len(TEMPLATES)), request.templates or len(TEMPLATES)))

    def draw(abba: bool) -> Pair:
        io, subject = rng.sample(rng.choice(couples), 2)
        others = request.strangers.sample([name for name in names if name not in (io, subject)], 3)
        first, second = (io, subject) if abba else (subject, io)
        clean = Sentence(rng.choice(used), first, second, subject, rng.choice(places), rng.choice(objects))
        if corruption == "abc":
            corrupt = replace(clean, first=others[0], second=others[1], giver=others[2])
        else:
            corrupt = replace(clean, giver=io if corruption == "s2-flip" else others[0])
        text, at = clean.parts()
        other_text, _ = corrupt.parts()
        answer, wrong = continuation_ids(tokenizer, text, [f" {io}", f" {subject}"])
        ids, other_ids = prompt_ids(tokenizer, text), prompt_ids(tokenizer, other_text)
        if len(ids) != len(other_ids):
            raise InputError(
                f"the tokenizer gives {text!r} {len(ids)} tokens and {other_text!r} {len(other_ids)}, though every name "
                "is one token after `to`; use a tokenizer that does not merge names with the words before them"
            )
        spans = {name: word_span(tokenizer, text, *characters) for name, characters in at.items()}
        s1 = spans["b" if abba else "a"]
        return Pair(
            clean_ids=ids,
            corrupt_ids=other_ids,
            answer_id=answer,
            wrong_id=wrong,
            spans={
                "io": spans["a" if abba else "b"],
                "s1": s1,
                "s1+1": (s1[1], s1[1] + 1),
                "s2": spans["s"],
                "last": (len(ids) - 1, len(ids)),
                "clause": spans["clause"],
            },
            meta=_meta(text, other_text, io, subject, abba, clean.template),
        )

    return draw


def _story_pair(tokenizer: PreTrainedTokenizerBase, request: _Request) -> _Draw:
    vocabulary = tokenizer.get_vocab()
    lead = len(encode(tokenizer, lang.NAMES[0])) - 1
    layouts = draw_layouts(request.rng, request.split, request.templates or 0)

    def draw(abba: bool) -> Pair:
        story = draw_story(request.rng, request.split, layouts, abba)
        corrupt = corrupted(request.strangers, story, request.corruption)
        io = lang.answer(story)
        return Pair(
            clean_ids=tuple(encode(tokenizer, lang.render(story))),
            corrupt_ids=tuple(encode(tokenizer, lang.render(corrupt))),
            answer_id=vocabulary[io],
            wrong_id=vocabulary[story.giver],
            spans={
                name: (start + lead - 1, end + lead - 1) for name, (start, end) in story_spans(story).items()
            },
            meta=_meta(lang.render(story), lang.render(corrupt), io, story.giver, abba, layout_name(story)),
        )

    return draw


def _meta(
    clean: str, corrupt: str, io: str, subject: str, abba: bool, template: int | str
) -> dict[str, object]:
    return {
        "clean": clean,
        "corrupt": corrupt,
        "answer": io,
        "wrong": subject,
        "order": "ABBA" if abba else "BABA",
        "template": template,
    }
