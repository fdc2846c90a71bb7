"""The word-level language of bindings and queries that the embedded variable-binding models are trained on.

A prompt is a list of bindings, with filler clauses that bind nothing, and one query:

    a = 3 , note b , b = 7 , skip 5 , ; + 4 a        (symbol)        answer: 7
    a is 3 , note b , b is 7 , skip 5 , ; what is plus 4 a  (question)      answer: 7

The queried variable is always the last token and the answer follows at once, so nothing about the answer
can be computed before the last position: the value has to be fetched there, and the operation applied after
it. All forms share one layout (three tokens and a comma for a binding; operation, constant, variable for a
query).

Everything is a frozen value: to ask what one change does, `dataclasses.replace` one field of a `Binding`,
`Context` or `Query` (or use the `with_*` helpers) and render again.
"""

import hashlib
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from transformers import PreTrainedTokenizerFast

from patchkit.data.words import word_tokenizer
from patchkit.errors import InputError

Split = Literal["train", "test"]

NAMES: tuple[str, ...] = tuple("abcdefghijklmnopqrst")
DIGITS: tuple[str, ...] = tuple("0123456789")
COMPARISONS: tuple[str, ...] = ("less", "same", "more")
OPERATIONS: tuple[str, ...] = ("recall", "plus", "minus", "compare")
MIN_VARIABLES, MAX_VARIABLES, MAX_DISTRACTORS = 2, 6, 3

# The words of a query that come before the queried variable; {c} is the constant.
FORMS: dict[str, dict[str, str]] = {
    "symbol": {"recall": "=", "plus": "+ {c}", "minus": "- {c}", "compare": "? {c}"},
    "question": {
        "recall": "what is",
        "plus": "what is plus {c}",
        "minus": "what is minus {c}",
        "compare": "what is versus {c}",
    },
    "order": {
        "recall": "fetch",
        "plus": "add {c} to",
        "minus": "take {c} from",
        "compare": "hold {c} against",
    },
    "tell": {
        "recall": "tell me",
        "plus": "tell me {c} above",
        "minus": "tell me {c} below",
        "compare": "tell me {c} beside",
    },
}
CONNECTORS: dict[str, str] = {"symbol": "=", "question": "is", "order": "holds", "tell": "has"}
FILLERS: dict[str, tuple[str, ...]] = {"note": NAMES, "skip": DIGITS}

PAD, BOS, UNK = "<pad>", "<s>", "<unk>"


def _vocabulary() -> tuple[str, ...]:
    query_words = (word for form in FORMS.values() for phrase in form.values() for word in phrase.split())
    language = [*NAMES, *DIGITS, *COMPARISONS, ",", ";", *CONNECTORS.values(), *FILLERS, *query_words]
    words = [PAD, BOS, UNK, *language]
    return tuple(dict.fromkeys(word for word in words if word != "{c}"))


VOCABULARY: tuple[str, ...] = _vocabulary()


@dataclass(frozen=True)
class Binding:
    """One variable and its value, `name` in NAMES and `value` in 0..9."""

    name: str
    value: int


@dataclass(frozen=True)
class Distractor:
    """A clause that mentions a variable (`note b`) or a digit (`skip 7`) and binds nothing.

    `before` is the number of bindings that come before it, 0 to the number of bindings.
    """

    word: str
    item: str
    before: int


@dataclass(frozen=True)
class Context:
    """The bindings in order, the distractors, and the form (which word binds: `=`, `is`, ...)."""

    bindings: tuple[Binding, ...]
    distractors: tuple[Distractor, ...] = ()
    form: str = "symbol"

    def value(self, name: str) -> int:
        """The value of a variable; InputError if the context does not bind it."""
        for binding in self.bindings:
            if binding.name == name:
                return binding.value
        bound = " ".join(self.names)
        raise InputError(f"variable {name!r} is not bound in this context; bound are: {bound}")

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(binding.name for binding in self.bindings)


@dataclass(frozen=True)
class Query:
    """What is asked: an operation on one variable. `constant` is 1..9, and None for `recall`."""

    operation: str
    name: str
    constant: int | None = None
    form: str = "symbol"


def validate(context: Context, query: Query) -> None:
    """Raise InputError, naming the field, if the prompt is not in the language."""
    if len(set(context.names)) != len(context.names):
        raise InputError(f"a variable is bound twice: {' '.join(context.names)}; bind every variable once")
    for binding in context.bindings:
        if binding.name not in NAMES or not 0 <= binding.value <= 9:
            raise InputError(f"{binding} is not in the language; names are a..t and values 0..9")
    for distractor in context.distractors:
        fits = distractor.item in FILLERS.get(distractor.word, ())
        if not fits or not 0 <= distractor.before <= len(context.bindings):
            raise InputError(f"{distractor} is not in the language; it takes `note` + name or `skip` + digit")
    for form in (context.form, query.form):
        if form not in FORMS:
            raise InputError(f"form {form!r} is not one of {', '.join(FORMS)}")
    if query.operation not in OPERATIONS:
        raise InputError(f"operation {query.operation!r} is not one of {', '.join(OPERATIONS)}")
    constants = (None,) if query.operation == "recall" else tuple(range(1, 10))
    if query.constant not in constants:
        raise InputError(f"{query}: recall takes no constant, the other operations one of 1..9")
    context.value(query.name)


def answer(context: Context, query: Query) -> str:
    """The single token that follows the prompt: a digit (plus and minus are modulo 10) or less, same, more.

    `compare` says what the variable's value is beside the constant: `less` when value < constant.
    """
    value = context.value(query.name)
    if query.operation == "recall":
        return str(value)
    if query.constant is None:
        raise InputError(f"{query.operation} needs a constant, 1..9")
    if query.operation == "plus":
        return str((value + query.constant) % 10)
    if query.operation == "minus":
        return str((value - query.constant) % 10)
    if query.operation == "compare":
        return COMPARISONS[(value > query.constant) - (value < query.constant) + 1]
    raise InputError(f"operation {query.operation!r} is not one of {', '.join(OPERATIONS)}")


def context_words(context: Context) -> list[str]:
    """The words of the bindings and distractors, every clause closed by a comma, then `;`."""
    words: list[str] = []
    for index in range(len(context.bindings) + 1):
        for distractor in context.distractors:
            if distractor.before == index:
                words += [distractor.word, distractor.item, ","]
        if index < len(context.bindings):
            binding = context.bindings[index]
            words += [binding.name, CONNECTORS[context.form], str(binding.value), ","]
    return [*words, ";"]


def query_words(query: Query) -> list[str]:
    """The words of a query; the last one is the queried variable."""
    return [*FORMS[query.form][query.operation].format(c=query.constant).split(), query.name]


def words(context: Context, query: Query) -> list[str]:
    """The whole prompt without the beginning-of-sequence token. The last word is the queried variable."""
    validate(context, query)
    return context_words(context) + query_words(query)


def render(context: Context, query: Query) -> str:
    """The prompt as text: words joined by single spaces."""
    return " ".join(words(context, query))


def spans(context: Context, query: Query) -> dict[str, tuple[int, int]]:
    """Token spans [start, end) counted with the beginning-of-sequence token at 0.

    `value`: the queried variable's value; `name`: its name in its binding; `operation`: the query's words
    before the variable; `query`: the last token.
    """
    prompt = words(context, query)
    head = len(context_words(context))
    mentions = {d.before: 0 for d in context.distractors}
    for distractor in context.distractors:
        mentions[distractor.before] += 3
    index = context.names.index(query.name)
    start = 1 + 4 * index + sum(length for before, length in mentions.items() if before <= index)
    last = len(prompt)
    return {
        "name": (start, start + 1),
        "value": (start + 2, start + 3),
        "operation": (head + 1, last),
        "query": (last, last + 1),
    }


def with_value(context: Context, name: str, value: int) -> Context:
    """The same context with one variable's value changed."""
    context.value(name)
    changed = tuple(replace(b, value=value) if b.name == name else b for b in context.bindings)
    return replace(context, bindings=changed)


def with_name(context: Context, old: str, new: str) -> Context:
    """The same context with one binding's variable renamed (mentions in distractors stay)."""
    context.value(old)
    changed = tuple(replace(b, name=new) if b.name == old else b for b in context.bindings)
    return replace(context, bindings=changed)


def with_order(context: Context, order: Sequence[int]) -> Context:
    """The same bindings in another order: position i holds the old binding `order[i]`; distractors stay."""
    if sorted(order) != list(range(len(context.bindings))):
        raise InputError(f"order {list(order)} is not a permutation of {len(context.bindings)} bindings")
    return replace(context, bindings=tuple(context.bindings[i] for i in order))


def with_form(context: Context, query: Query, form: str) -> tuple[Context, Query]:
    """The same content in another surface form."""
    return replace(context, form=form), replace(query, form=form)


def split_of(bindings: Iterable[Binding]) -> Split:
    """Which split a set of bindings belongs to: a stable hash of all (name, value) pairs, one in ten is test.

    The pairs are sorted first, so that reordering the bindings never moves a context to the other split.
    """
    text = " ".join(sorted(f"{binding.name}{binding.value}" for binding in bindings))
    return "test" if hashlib.sha256(text.encode()).digest()[0] % 10 == 0 else "train"


def sample_context(
    rng: random.Random,
    *,
    n_variables: int | None = None,
    n_distractors: int | None = None,
    form: str = "symbol",
    split: Split | None = None,
) -> Context:
    """A random context; by default 2 to 6 variables and 0 to 3 distractors, of either split."""
    count = rng.randint(MIN_VARIABLES, MAX_VARIABLES) if n_variables is None else n_variables
    if not 1 <= count <= len(NAMES):
        raise InputError(f"n_variables is {count}; the language has {len(NAMES)} names")
    while True:
        bindings = tuple(Binding(name, rng.randrange(10)) for name in rng.sample(NAMES, count))
        if split is None or split_of(bindings) == split:
            break
    fillers = rng.randint(0, MAX_DISTRACTORS) if n_distractors is None else n_distractors
    distractors = tuple(sample_distractor(rng, count) for _ in range(fillers))
    return Context(bindings, distractors, form)


def sample_distractor(rng: random.Random, n_bindings: int) -> Distractor:
    """A random filler clause at a random place among `n_bindings` bindings."""
    word = rng.choice(tuple(FILLERS))
    return Distractor(word, rng.choice(FILLERS[word]), rng.randint(0, n_bindings))


def sample_query(
    rng: random.Random, context: Context, *, operation: str | None = None, form: str | None = None
) -> Query:
    """A random query about one of the context's variables; `form` defaults to the context's."""
    chosen = rng.choice(OPERATIONS) if operation is None else operation
    constant = None if chosen == "recall" else rng.randint(1, 9)
    return Query(chosen, rng.choice(context.names), constant, context.form if form is None else form)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The whole-word tokenizer of the language: one token a word, `<s>` put first, `<pad>` on the left."""
    return word_tokenizer(VOCABULARY, pad=PAD, bos=BOS, unk=UNK)
