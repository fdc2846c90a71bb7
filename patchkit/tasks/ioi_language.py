"""A small language of indirect objects: the sentences that `ioi-gpt2` is trained on.

Mary and John went to the store . Anna and Paul met at the park . then the drink was given by John
to   -> Mary

The indirect object is the partner of the giver. With one pair of names this is the plain IOI sentence (the
name that is not repeated), which a single attention layer can answer by counting names. With further pairs
and with bystanders (`Tom stayed at the hotel .`) every other name also occurs once, so counting does not
do: the giver has to be looked up and its partner read off, which takes two steps of attention.

Everything is a frozen value; `dataclasses.replace` one field and render again.
"""

import hashlib
import random
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerFast

from patchkit.data.words import word_tokenizer
from patchkit.errors import InputError

NAMES: tuple[str, ...] = tuple(
    "Mary John Anna Paul Tom Lucy Mark Emma Jack Sara "
    "Luke Rose Adam Nina Eric Jane Carl Ruth Hugo Iris".split()
)
PLACES: tuple[str, ...] = tuple("store park school hotel garden office museum station".split())
OBJECTS: tuple[str, ...] = tuple("drink book ring letter apple basket kite lamp".split())
OPENINGS: tuple[str, ...] = (
    "{first} and {second} went to the {place} .",
    "{first} and {second} met at the {place} .",
    "{first} and {second} had a long day at the {place} .",
)
BYSTANDERS: tuple[str, ...] = ("{name} stayed at the {place} .", "the {place} of {name} was quiet .")
CLOSINGS: tuple[str, ...] = (
    "then the {object} was given by {giver} to",
    "later a {object} was sent from {giver} to",
    "after that one {object} was brought by {giver} to",
)
# Other text about the same people, which prompts never end with: the partner follows the giver at once.
REUNION = "soon beside {giver}"
PAD, BOS, UNK = "<pad>", "<s>", "<unk>"
MAX_PAIRS, MAX_BYSTANDERS = 3, 2


def _vocabulary() -> tuple[str, ...]:
    templates = (
        word for template in (*OPENINGS, *BYSTANDERS, *CLOSINGS, REUNION) for word in template.split()
    )
    fixed = [word for word in templates if not word.startswith("{")]
    return tuple(dict.fromkeys([PAD, BOS, UNK, *NAMES, *PLACES, *OBJECTS, *fixed]))


VOCABULARY: tuple[str, ...] = _vocabulary()


@dataclass(frozen=True)
class PairSentence:
    """Two people at a place; `opening` indexes OPENINGS."""

    first: str
    second: str
    place: str
    opening: int = 0

    def text(self) -> str:
        return OPENINGS[self.opening].format(first=self.first, second=self.second, place=self.place)


@dataclass(frozen=True)
class Bystander:
    """Someone who is in no pair; `template` indexes BYSTANDERS."""

    name: str
    place: str
    template: int = 0

    def text(self) -> str:
        return BYSTANDERS[self.template].format(name=self.name, place=self.place)


@dataclass(frozen=True)
class Story:
    """Sentences in order, then the giver (S2) and the object; `closing` indexes CLOSINGS. The prompt ends
    before the indirect object.
    """

    sentences: tuple[PairSentence | Bystander, ...]
    giver: str
    object: str
    closing: int = 0


def answer(story: Story) -> str:
    """The indirect object: the partner of the giver. InputError if the giver is in no pair."""
    for sentence in story.sentences:
        if isinstance(sentence, PairSentence) and story.giver in (sentence.first, sentence.second):
            return sentence.second if story.giver == sentence.first else sentence.first
    raise InputError(f"the giver {story.giver!r} is in no pair of the story; name one of a pair")


def words(story: Story) -> list[str]:
    """The prompt's words, without the beginning-of-sequence token."""
    return sentence_words(story) + closing_words(story)


def sentence_words(story: Story) -> list[str]:
    """The words of the sentences, each closed by a full stop."""
    return " ".join(sentence.text() for sentence in story.sentences).split()


def closing_words(story: Story) -> list[str]:
    """The words of the giving: everything after the sentences, up to and without the indirect object."""
    return CLOSINGS[story.closing].format(giver=story.giver, object=story.object).split()


def reunion_words(story: Story) -> list[str]:
    """`soon beside John`: text that is completed by the same name as the giving, and is easier to learn."""
    return REUNION.format(giver=story.giver).split()


def render(story: Story) -> str:
    """The prompt as text: words joined by single spaces."""
    return " ".join(words(story))


def spans(story: Story) -> dict[str, tuple[int, int]]:
    """Token spans [start, end), counted with `<s>` at 0: `IO`, `S1` (first mention of the giver), `S2`,
    `end`.
    """
    prompt = [BOS, *words(story)]
    s1, io = prompt.index(story.giver), prompt.index(answer(story))
    s2 = len(prompt) - 1 - prompt[::-1].index(story.giver)
    last = len(prompt) - 1
    return {"IO": (io, io + 1), "S1": (s1, s1 + 1), "S2": (s2, s2 + 1), "end": (last, last + 1)}


def with_giver(story: Story, giver: str) -> Story:
    """The same story with another giver (another S2 only)."""
    return replace(story, giver=giver)


def other_pair(story: Story) -> tuple[str, str]:
    """The names of the first pair that the giver is not in. InputError if the story has no other pair."""
    for sentence in story.sentences:
        if isinstance(sentence, PairSentence) and story.giver not in (sentence.first, sentence.second):
            return sentence.first, sentence.second
    raise InputError(f"the story has no pair without {story.giver!r}; sample it with n_pairs of 2 or more")


def split_of(first: str, second: str) -> str:
    """`train` or `test` for a pair of names, whichever comes first: a stable hash, one pair in ten
    is test.
    """
    text = " ".join(sorted((first, second)))
    return "test" if hashlib.sha256(text.encode()).digest()[0] % 10 == 0 else "train"


def sample_story(
    rng: random.Random, *, n_pairs: int | None = None, n_bystanders: int | None = None, split: str = "train"
) -> Story:
    """A random story, all names different; the giver's pair is in `split`. 1 to 3 pairs, 0 to 2
    bystanders.
    """
    pairs = rng.randint(1, MAX_PAIRS) if n_pairs is None else n_pairs
    bystanders = rng.randint(0, MAX_BYSTANDERS) if n_bystanders is None else n_bystanders
    if pairs < 1 or 2 * pairs + bystanders > len(NAMES):
        raise InputError(
            f"{pairs} pairs and {bystanders} bystanders: give at least 1 pair and at most {len(NAMES)} names"
        )
    while True:
        names = rng.sample(NAMES, 2 * pairs + bystanders)
        if split_of(names[0], names[1]) == split:
            break
    sentences: list[PairSentence | Bystander] = [
        PairSentence(names[2 * i], names[2 * i + 1], rng.choice(PLACES), rng.randrange(len(OPENINGS)))
        for i in range(pairs)
    ]
    sentences += [
        Bystander(name, rng.choice(PLACES), rng.randrange(len(BYSTANDERS))) for name in names[2 * pairs :]
    ]
    rng.shuffle(sentences)
    return Story(tuple(sentences), rng.choice(names[:2]), rng.choice(OBJECTS), rng.randrange(len(CLOSINGS)))


def resample_giving(rng: random.Random, story: Story) -> Story:
    """The same sentences with a random giver from any train pair, another object and another closing."""
    sentences = [sentence for sentence in story.sentences if isinstance(sentence, PairSentence)]
    pairs = [pair for pair in sentences if split_of(pair.first, pair.second) == "train"]
    giver = rng.choice([name for pair in pairs for name in (pair.first, pair.second)])
    return replace(story, giver=giver, object=rng.choice(OBJECTS), closing=rng.randrange(len(CLOSINGS)))


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The whole-word tokenizer of the language: one token a word, `<s>` put first, `<pad>` on the left."""
    return word_tokenizer(VOCABULARY, pad=PAD, bos=BOS, unk=UNK)
