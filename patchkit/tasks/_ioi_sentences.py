"""English sentences about an indirect object, for models of English: templates of our own, and where their parts stand.

Two people share a clause (`{a} and {b}`), which a comma or a full stop ends; then one of them (`{s}`) passes something
on, and the prompt stops before the name of the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from string import Formatter

from transformers import PreTrainedTokenizerBase

from patchkit.data.tokens import encode
from patchkit.errors import InputError

NAMES: tuple[str, ...] = tuple(
    "Mary John Tom James Dan Anna Paul Mark Sarah Emma Jack Kate Peter Laura David Alice Robert Susan Michael "
    "Lisa William Jane Richard Helen Thomas Amy Charles Julia George Rachel Simon Claire Andrew Lucy Steven "
    "Diana Kevin Maria Brian Ruth Adam Jessica Scott Karen Martin Linda Frank Grace Henry Rose".split()
)
PLACES: tuple[str, ...] = tuple("market library museum theater farm bridge castle bakery".split())
OBJECTS: tuple[str, ...] = tuple("map lamp ticket blanket camera guitar hat coin".split())
TEMPLATES: tuple[str, ...] = (
    "Early in the morning {a} and {b} opened the {place}, and {s} handed the {object} to",
    "Because {a} and {b} had met near the {place}, {s} lent a {object} to",
    "Last summer {a} and {b} looked after the {place}. One evening {s} brought a {object} to",
    "On their way past the {place} {a} and {b} sat down, and {s} showed the {object} to",
    "Soon {a} and {b} were tired of the {place}. Without a word {s} passed the {object} to",
    "Nobody saw {a} and {b} leave the {place}, but {s} had sold a {object} to",
    "All week {a} and {b} painted the {place}, so on Sunday {s} sent a {object} to",
    "Outside the {place} {a} and {b} found a {object}, which {s} then offered to",
)

Characters = tuple[int, int]


@dataclass(frozen=True)
class Sentence:
    """One sentence: a template, the two people in the order of their first mention, and who gives."""

    template: int
    first: str
    second: str
    giver: str
    place: str
    object: str

    def parts(self) -> tuple[str, dict[str, Characters]]:
        """The text, and the characters [start, end) of `a` and `b` (first mentions), `s` (the giver) and `clause`.

        The clause begins with the first name and ends with the comma or full stop behind the second.
        """
        fields = {
            "a": self.first,
            "b": self.second,
            "s": self.giver,
            "place": self.place,
            "object": self.object,
        }
        text = ""
        at: dict[str, Characters] = {}
        for literal, name, _, _ in Formatter().parse(TEMPLATES[self.template]):
            text += literal
            if name is not None:
                at[name] = (len(text), len(text) + len(fields[name]))
                text += fields[name]
        stops = [place for place in (text.find(mark, at["b"][1]) for mark in ",.") if place >= 0]
        return text, {name: at[name] for name in "abs"} | {"clause": (at["a"][0], min(stops) + 1)}


def single_token_names(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The names that are one token after a space, and that token."""
    return {name: ids[0] for name, ids in _after_space(tokenizer, NAMES).items() if len(ids) == 1}


def words_of_one_length(tokenizer: PreTrainedTokenizerBase, words: Sequence[str], what: str) -> list[str]:
    """The words that the tokenizer gives the commonest number of tokens, so that one template has one length.

    Raises:
        InputError: the tokenizer knows none of them.
    """
    lengths = {word: len(ids) for word, ids in _after_space(tokenizer, words).items()}
    if not lengths:
        raise InputError(
            f"the IOI task names {what} ({', '.join(words)}), and the tokenizer knows none of them; use another tokenizer"
        )
    counted = list(lengths.values())
    common = max(dict.fromkeys(counted), key=counted.count)
    return [word for word, length in lengths.items() if length == common]


def _after_space(tokenizer: PreTrainedTokenizerBase, words: Sequence[str]) -> dict[str, list[int]]:
    """The tokens of each word after a space, of those that are known and keep to themselves."""
    head = encode(tokenizer, "to")
    found = {}
    for word in words:
        ids = encode(tokenizer, f"to {word}")
        own = ids[len(head) :]
        if ids[: len(head)] == head and own and tokenizer.unk_token_id not in own:
            found[word] = own
    return found
