"""Entity tracking with boxes (Prakash et al. 2024): `The cup is in Box F, the key is in Box A, Box F contains
the`.

The answer is the object in the queried box. Alternates have other objects throughout, so that an object
always tells which prompt it comes from; what is asked is which information the patched components carry:

- `object_value`: the object itself. Target: the alternate's object. - `positional`: where in the list the
queried box stands. Target: the original's object at the alternate's position; the alternate's labels are all
new, so that a label can lead nowhere. - `box_label_value`: the label of the queried box. Target: the
original's object in the box that the alternate asks about, which stands elsewhere in the original.

Positions are counted in the list of boxes, not in the question. For any tokenizer with enough nouns and
capital letters that are single tokens.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from patchkit.data.desiderata import Triple
from patchkit.data.pairs import Pair
from patchkit.data.tokens import encode, prompt_ids, word_span
from patchkit.errors import InputError
from patchkit.tasks.building import Desideratum, Kind, Split, collect, split_by_hash

OBJECTS: tuple[str, ...] = tuple(
    "apple bag ball bank bar bell bill boat bomb book boot bottle bowl box brain bread brick bridge brush "
    "bus cake "
    "camera candle cap car card cat chain chair clock coat coffee coin computer cream cross crown cup dish "
    "disk "
    "document dog door dress drink drug drum egg engine fan file fish flag flower fork game gift glass "
    "glove gold "
    "gun guitar hammer hat helmet horse ice iron key knife lamp leaf letter lock machine magazine magnet "
    "map mask "
    "meat medicine milk mirror money needle newspaper note nut oil orange paint paper pen pencil phone "
    "picture pie "
    "pin pipe plane plant plate pot radio ring rock rope rose salt scale sheet shell shirt shoe silver "
    "soap sock "
    "spoon stamp star stick stone string sugar sword table tape tea television ticket tie tool toy train "
    "tree truck "
    "watch water wheel wine wire".split()
)
LABELS: tuple[str, ...] = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
BOXES = 7

# One list of boxes in four is for testing.
_ONE_IN = 4


@dataclass(frozen=True)
class Boxes:
    """Objects and labels in the order of the list, and the position that is asked about."""

    objects: tuple[str, ...]
    labels: tuple[str, ...]
    queried: int

    @property
    def answer(self) -> str:
        return self.objects[self.queried]

    @property
    def label(self) -> str:
        return self.labels[self.queried]

    @property
    def split(self) -> Split:
        """By the set of (object, label), whatever their order."""
        return split_by_hash(
            " ".join(sorted(map(" ".join, zip(self.objects, self.labels, strict=True)))), _ONE_IN
        )

    def text(self) -> str:
        clauses = [
            f"the {item} is in Box {label}, " for item, label in zip(self.objects, self.labels, strict=True)
        ]
        text = "".join(clauses)
        return f"T{text[1:]}Box {self.label} contains the"

    def places(self) -> dict[str, tuple[int, int]]:
        """Characters of the named words: the queried box's object and label in the list, and the label asked
        for.
        """
        clauses = [
            f"the {item} is in Box {label}, " for item, label in zip(self.objects, self.labels, strict=True)
        ]
        start = sum(map(len, clauses[: self.queried]))
        label = start + len(clauses[self.queried]) - len(f"{self.label}, ")
        query = sum(map(len, clauses)) + len("Box ")
        return {
            "object": (start + len("the "), start + len(f"the {self.answer}")),
            "label": (label, label + len(self.label)),
            "query_label": (query, query + len(self.label)),
        }


@dataclass(frozen=True)
class Words:
    """The nouns and letters that are single tokens where the task puts them, for one tokenizer."""

    tokenizer: PreTrainedTokenizerBase
    objects: dict[str, int]
    labels: tuple[str, ...]
    boxes: int

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase | None, boxes: int) -> Words:
        """InputError where there are fewer than two prompts' worth: originals and alternates share no object."""
        if tokenizer is None:
            raise InputError(
                "the entity-tracking task writes text and needs a tokenizer, found none; load one"
            )
        if not 2 <= boxes <= len(LABELS) // 2:
            raise InputError(f"boxes is {boxes}; expected 2 to {len(LABELS) // 2}")
        nouns = {noun: ids[0] for noun in OBJECTS if len(ids := _after(tokenizer, "the", noun)) == 1}
        letters = tuple(letter for letter in LABELS if len(_after(tokenizer, "Box", letter)) == 1)
        for what, found in (("nouns", len(nouns)), ("capital letters", len(letters))):
            if found < 2 * boxes:
                raise InputError(
                    f"entity tracking with {boxes} boxes needs {2 * boxes} {what} that are single tokens of "
                    "the "
                    f"tokenizer, found {found}; ask for fewer boxes or use another tokenizer"
                )
        return cls(tokenizer, nouns, letters, boxes)

    def draw(
        self, rng: random.Random, split: Split, other: Boxes | None = None, relabel: bool = True
    ) -> Boxes:
        """A prompt of the split. With `other` it shares no object with that one, and has none of its labels
        or, without `relabel`, the same labels in another order.
        """
        taken = () if other is None else (*other.objects, *other.labels)
        objects = [noun for noun in self.objects if noun not in taken]
        labels = [letter for letter in self.labels if letter not in taken]
        if other is not None and not relabel:
            labels = list(other.labels)
        while True:
            chosen = tuple(rng.sample(objects, self.boxes)), tuple(rng.sample(labels, self.boxes))
            boxes = Boxes(*chosen, rng.randrange(self.boxes))
            if boxes.split == split:
                return boxes

    def spans(self, boxes: Boxes) -> dict[str, tuple[int, int]]:
        """Token spans of the named words, and `last`."""
        text, length = boxes.text(), len(prompt_ids(self.tokenizer, boxes.text()))
        spans = {name: word_span(self.tokenizer, text, *place) for name, place in boxes.places().items()}
        return {**spans, "last": (length - 1, length)}


def _after(tokenizer: PreTrainedTokenizerBase, before: str, word: str) -> list[int]:
    """The tokens of a word after another one and a space; [] where the tokenizer merges or does not know
    them.
    """
    head, whole = encode(tokenizer, before), encode(tokenizer, f"{before} {word}")
    tail = whole[len(head) :]
    return [] if whole[: len(head)] != head or tokenizer.unk_token_id in tail else tail


# What each desideratum's alternate is, and the object that is its target. No draw needs to be left out:
# objects are
# never shared, and positions and labels that would give the same object are not drawn.


def _object_value(rng: random.Random, words: Words, original: Boxes) -> tuple[Boxes, str]:
    boxes = words.draw(rng, original.split, original)
    return boxes, boxes.answer


def _positional(rng: random.Random, words: Words, original: Boxes) -> tuple[Boxes, str]:
    while True:
        boxes = words.draw(rng, original.split, original)
        if boxes.queried != original.queried:
            return boxes, original.objects[boxes.queried]


def _box_label_value(rng: random.Random, words: Words, original: Boxes) -> tuple[Boxes, str]:
    while True:
        boxes = words.draw(rng, original.split, original, relabel=False)
        place = original.labels.index(boxes.label)
        if place not in (original.queried, boxes.queried):
            return boxes, original.objects[place]


def _desideratum(
    name: str,
    kind: Kind,
    description: str,
    alter: Callable[[random.Random, Words, Boxes], tuple[Boxes, str]],
) -> Desideratum:
    def make(
        tokenizer: PreTrainedTokenizerBase | None, n: int, seed: int, split: Split, boxes: int = BOXES
    ) -> Dataset:
        words = Words.of(tokenizer, boxes)
        rng = random.Random(f"entity-tracking {name} {split} {seed}")

        def draw(index: int) -> Triple:
            original = words.draw(rng, split)
            alternate, target = alter(rng, words, original)
            return Triple(
                desideratum=name,
                original_ids=prompt_ids(words.tokenizer, original.text()),
                alternate_ids=prompt_ids(words.tokenizer, alternate.text()),
                target_id=words.objects[target],
                split=split,
                original_answer_id=words.objects[original.answer],
                alternate_answer_id=words.objects[alternate.answer],
                spans=words.spans(original),
                alternate_spans=words.spans(alternate),
                meta={"original": original.text(), "alternate": alternate.text(), "target": target},
            )

        return collect(name, n, draw)

    return Desideratum(name, kind, description, make)


object_value = _desideratum(
    "object_value",
    "dependence",
    "The alternate has other objects in other boxes. Target: the alternate's object.",
    _object_value,
)
positional = _desideratum(
    "positional",
    "third",
    "The alternate has other objects and labels and asks about another position in the list. Target: the "
    "original's object at that position.",
    _positional,
)
box_label_value = _desideratum(
    "box_label_value",
    "third",
    "The alternate has other objects in the same boxes, listed in another order, and asks about another box. "
    "Target: the original's object in that box, which is not at the alternate's position.",
    _box_label_value,
)
DESIDERATA = (object_value, positional, box_label_value)


def pairs(
    tokenizer: PreTrainedTokenizerBase | None, n: int, seed: int, split: str = "test", boxes: int = BOXES
) -> list[Pair]:
    """Pairs of `object_value`: the corrupt prompt has other objects and labels and asks about a random box of
    its own, as in the published path patching; `wrong` is its answer. The span `last` is the last token.
    """
    rows = object_value(tokenizer, n, seed, split, boxes=boxes).to_list()
    return [
        Pair(
            clean_ids=tuple(row["original_ids"]),
            corrupt_ids=tuple(row["alternate_ids"]),
            answer_id=row["original_answer_id"],
            wrong_id=row["alternate_answer_id"],
            spans={name: tuple(row["spans"][name]) for name in ("query_label", "last")},
            id=f"entity-tracking-{split}-{seed}-{index}",
            meta={"clean": row["original"], "corrupt": row["alternate"]},
        )
        for index, row in enumerate(rows)
    ]
