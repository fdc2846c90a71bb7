"""From one change of a binding prompt to a dataset of triples: the machinery behind `variable_binding`."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from patchkit.data.desiderata import Triple
from patchkit.data.tokens import encode
from patchkit.errors import InputError
from patchkit.tasks import language as lang
from patchkit.tasks.building import Desideratum, Excluded, Kind, Split, collect, uninformative
from patchkit.tasks.language import Context, Query

WITH_CONSTANT: tuple[str, ...] = tuple(operation for operation in lang.OPERATIONS if operation != "recall")

# Tries to find an alternate in the split before the original is drawn again; one list in ten is a test list.
_TRIES = 50


@dataclass(frozen=True)
class Setting:
    """What the prompts look like: forms and operations take turns, the rest is drawn at random.

    `n_variables` and `n_distractors` None mean any number that the language has, with at least
    `min_distractors`.
    """

    split: Split
    forms: tuple[str, ...] = tuple(lang.FORMS)
    operations: tuple[str, ...] = lang.OPERATIONS
    n_variables: int | None = None
    n_distractors: int | None = None
    min_distractors: int = 0

    def __post_init__(self) -> None:
        for name, values, known in (
            ("form", self.forms, tuple(lang.FORMS)),
            ("operation", self.operations, lang.OPERATIONS),
        ):
            wrong = [value for value in values if value not in known]
            if wrong or not values:
                raise InputError(f"{name} {wrong[0] if wrong else ''!r} is not one of {', '.join(known)}")
        variables, distractors = self.n_variables, self.n_distractors
        if variables is not None and not lang.MIN_VARIABLES <= variables <= lang.MAX_VARIABLES:
            raise InputError(
                f"n_variables is {variables}; expected {lang.MIN_VARIABLES} to {lang.MAX_VARIABLES}"
            )
        if distractors is not None and not self.min_distractors <= distractors <= lang.MAX_DISTRACTORS:
            raise InputError(
                f"n_distractors is {distractors}; expected {self.min_distractors} to {lang.MAX_DISTRACTORS}"
            )

    def prompt(self, rng: random.Random, index: int) -> tuple[Context, Query]:
        """The original of triple number `index`."""
        distractors = self.n_distractors
        if distractors is None:
            distractors = rng.randint(self.min_distractors, lang.MAX_DISTRACTORS)
        form = self.forms[index % len(self.forms)]
        context = lang.sample_context(
            rng, n_variables=self.n_variables, n_distractors=distractors, form=form, split=self.split
        )
        operation = self.operations[index // len(self.forms) % len(self.operations)]
        return context, lang.sample_query(rng, context, operation=operation)

    def other_query(self, rng: random.Random, query: Query, new_constant: bool = False) -> Query:
        """The same question with another operation, and with another constant if asked for."""
        operation = rng.choice([name for name in self.operations if name != query.operation])
        if operation == "recall":
            return replace(query, operation=operation, constant=None)
        if query.constant is not None and not new_constant:
            return replace(query, operation=operation)
        constants = [number for number in range(1, 10) if number != query.constant]
        return replace(query, operation=operation, constant=rng.choice(constants))

    def find(self, make: Callable[[], Context]) -> Context | None:
        """A context from `make` whose bindings are in this split, or None after some tries."""
        for _ in range(_TRIES):
            context = make()
            if lang.split_of(context.bindings) == self.split:
                return context
        return None


@dataclass(frozen=True)
class Change:
    """An alternate and the answer that is asked for; `traps` are answers that another mechanism would give,
    so a target that is one of them could not tell the two apart.
    """

    context: Context
    query: Query
    target: str
    traps: tuple[str, ...] = ()


Changer = Callable[[random.Random, Setting, Context, Query], Change | None]


def desideratum(
    kind: Kind,
    *,
    operations: tuple[str, ...] = lang.OPERATIONS,
    allowed: tuple[str, ...] = lang.OPERATIONS,
    min_operations: int = 1,
    min_distractors: int = 0,
) -> Callable[[Changer], Desideratum]:
    """Turns a change of a prompt into a desideratum of that name, described by the change's docstring.

    `operations` are asked about by default, `allowed` may be asked for.
    """

    def wrap(change: Changer) -> Desideratum:
        name = change.__name__

        def make(
            tokenizer: PreTrainedTokenizerBase | None,
            n: int,
            seed: int,
            split: Split,
            form: str | Sequence[str] | None = None,
            operations: Sequence[str] | None = operations,
            n_variables: int | None = None,
            n_distractors: int | None = None,
        ) -> Dataset:
            setting = Setting(
                split=split,
                forms=tuple(lang.FORMS)
                if form is None
                else (form,)
                if isinstance(form, str)
                else tuple(form),
                operations=default if operations is None else tuple(operations),
                n_variables=n_variables,
                n_distractors=n_distractors,
                min_distractors=min_distractors,
            )
            known = [operation for operation in setting.operations if operation in allowed]
            if len(known) < len(setting.operations) or len(set(known)) < min_operations:
                raise InputError(
                    f"{name} needs at least {min_operations} of the operations {', '.join(allowed)}; found "
                    f"{', '.join(setting.operations)}"
                )
            words = language_tokenizer(tokenizer)
            rng = random.Random(f"{name} {split} {seed}")
            return collect(name, n, lambda index: _draw(name, kind, words, setting, change, rng, index))

        default = operations
        return Desideratum(name, kind, " ".join((inspect.getdoc(change) or "").split()), make)

    return wrap


def _draw(
    name: str,
    kind: Kind,
    tokenizer: PreTrainedTokenizerBase,
    setting: Setting,
    change: Changer,
    rng: random.Random,
    index: int,
) -> Triple | Excluded:
    made = None
    while made is None:
        context, query = setting.prompt(rng, index)
        made = change(rng, setting, context, query)
    answer, other = lang.answer(context, query), lang.answer(made.context, made.query)
    reason = uninformative(kind, answer, other, made.target)
    if reason is not None:
        return reason
    if made.target in made.traps:
        return Excluded("another mechanism would give the target too")
    vocabulary, lead = tokenizer.get_vocab(), len(encode(tokenizer, query.name)) - 1
    return Triple(
        desideratum=name,
        original_ids=prompt_ids(tokenizer, context, query),
        alternate_ids=prompt_ids(tokenizer, made.context, made.query),
        target_id=vocabulary[made.target],
        split=setting.split,
        original_answer_id=vocabulary[answer],
        alternate_answer_id=vocabulary[other],
        spans=prompt_spans(context, query, lead),
        alternate_spans=prompt_spans(made.context, made.query, lead),
        meta={
            "original": lang.render(context, query),
            "alternate": lang.render(made.context, made.query),
            "target": made.target,
            "form": query.form,
            "operation": query.operation,
            "alternate_operation": made.query.operation,
        },
    )


def language_tokenizer(tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
    """The same tokenizer; InputError if it has not the language's words."""
    vocabulary = {} if tokenizer is None else tokenizer.get_vocab()
    missing = [word for word in lang.VOCABULARY if word not in vocabulary]
    if tokenizer is None or missing:
        found = "none" if tokenizer is None else f"one without the word {missing[0]!r}"
        raise InputError(
            "the variable-binding task is in the language of the embedded models and needs their tokenizer, "
            f"found {found}; take a model of that language, or the task arithmetic, which is for any"
        )
    return tokenizer


def prompt_ids(tokenizer: PreTrainedTokenizerBase, context: Context, query: Query) -> tuple[int, ...]:
    """Token ids of a prompt, with the tokenizer's special tokens in front."""
    return tuple(encode(tokenizer, lang.render(context, query)))


def prompt_spans(context: Context, query: Query, lead: int) -> dict[str, tuple[int, int]]:
    """The language's spans, for `lead` special tokens in front instead of one."""
    spans = lang.spans(context, query)
    return {name: (start + lead - 1, end + lead - 1) for name, (start, end) in spans.items()}
