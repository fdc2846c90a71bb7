"""Variable binding in the language of the embedded models: what must move the answer, and what must not.

Every desideratum goes from a seed to a dataset of triples. `a = 3 , b = 7 , ; + 4 a` has the answer 7; the
alternate changes what the desideratum names, and its activations are patched in. The target is

- the alternate's answer: `value_dependence`, `value_not_position`, `value_not_name` (the value must arrive);
- the original's answer: the `..._invariance`s. Their alternates change the operation as well, because an
  alternate with the same answer could not show a failure;
- a third answer: `third_value`, `position_dependence`, `name_dependence` (the parts must come together).

No list of bindings is in both splits, neither as an original nor as an alternate. Options of all: `form`
(one, several, or None for all in turn), `operations`, `n_variables`, `n_distractors`.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Literal

from transformers import PreTrainedTokenizerBase

from patchkit.data.pairs import Pair
from patchkit.tasks import language as lang
from patchkit.tasks._binding import (
    WITH_CONSTANT,
    Change,
    Setting,
    desideratum,
)
from patchkit.tasks.language import Binding, Context, Query


@desideratum("dependence")
def value_dependence(rng: random.Random, setting: Setting, context: Context, query: Query) -> Change | None:
    """The alternate binds another value to the queried variable. Target: the alternate's answer."""
    other = _with_other_value(rng, setting, context, query.name)
    return other and Change(other, query, lang.answer(other, query))


@desideratum("invariance", operations=WITH_CONSTANT, min_operations=2)
def operation_invariance(
    rng: random.Random, setting: Setting, context: Context, query: Query
) -> Change | None:
    """The alternate asks for another operation with the same constant. Target: the original's answer."""
    return Change(context, setting.other_query(rng, query), lang.answer(context, query))


@desideratum("invariance", operations=WITH_CONSTANT, allowed=WITH_CONSTANT, min_operations=2)
def constant_invariance(
    rng: random.Random, setting: Setting, context: Context, query: Query
) -> Change | None:
    """The alternate asks for another operation with another constant. Target: the original's answer."""
    other = setting.other_query(rng, query, new_constant=True)
    return Change(context, other, lang.answer(context, query))


@desideratum("invariance", operations=WITH_CONSTANT, min_operations=2)
def name_invariance(rng: random.Random, setting: Setting, context: Context, query: Query) -> Change | None:
    """The alternate calls the queried variable by a name that the original does not have, wherever it is
    mentioned, and asks for another operation. Target: the original's answer.
    """
    fresh = [name for name in lang.NAMES if name not in context.names]
    other = setting.find(lambda: _renamed(context, {query.name: rng.choice(fresh)}))
    if other is None:
        return None
    name = other.names[context.names.index(query.name)]
    asked = replace(setting.other_query(rng, query), name=name)
    return Change(other, asked, lang.answer(context, query))


@desideratum("invariance", operations=WITH_CONSTANT, min_operations=2, min_distractors=1)
def distractor_invariance(
    rng: random.Random, setting: Setting, context: Context, query: Query
) -> Change | None:
    """Every clause of the alternate that binds nothing says something else, in the same places, and the
    alternate asks for another operation. Target: the original's answer.
    """
    changed = []
    for clause in context.distractors:
        others = [
            replace(clause, word=word, item=item)
            for word, items in lang.FILLERS.items()
            for item in items
            if (word, item) != (clause.word, clause.item)
        ]
        changed.append(rng.choice(others))
    other = replace(context, distractors=tuple(changed))
    return Change(other, setting.other_query(rng, query), lang.answer(context, query))


@desideratum("dependence")
def value_not_position(rng: random.Random, setting: Setting, context: Context, query: Query) -> Change | None:
    """The alternate lists the bindings in another order, the queried one elsewhere and with another value.
    Target: the alternate's answer; what the original binds at the alternate's position would give another.
    """
    index = context.names.index(query.name)
    order = list(range(len(context.bindings)))
    while order.index(index) == index:
        rng.shuffle(order)
    place = order.index(index)
    other = _with_other_value(rng, setting, lang.with_order(context, order), query.name)
    by_position = _apply(query, context.bindings[place].value)
    return other and Change(other, query, lang.answer(other, query), traps=(by_position,))


@desideratum("dependence")
def value_not_name(rng: random.Random, setting: Setting, context: Context, query: Query) -> Change | None:
    """In the alternate the queried variable has changed names with another one, wherever they are mentioned,
    and has another value. Target: the alternate's answer; the original's value of that name would give
    another.
    """
    partner = rng.choice([name for name in context.names if name != query.name])
    swapped = _renamed(context, {query.name: partner, partner: query.name})
    other = _with_other_value(rng, setting, swapped, partner)
    by_name = _apply(query, context.value(partner))
    if other is None:
        return None
    asked = replace(query, name=partner)
    return Change(other, asked, lang.answer(other, asked), traps=(by_name,))


@desideratum("third")
def position_dependence(
    rng: random.Random, setting: Setting, context: Context, query: Query
) -> Change | None:
    """The alternate has the same names in another order and other values, and asks about another position.
    Target: the original's value at that position, under the original's operation; it is not the value of the
    alternate's queried name, nor either answer.
    """
    found = _redealt(rng, setting, context, query, "position")
    if found is None:
        return None
    other, asked, by_position, by_name = found
    return Change(other, asked, by_position, traps=(by_name,))


@desideratum("third")
def name_dependence(rng: random.Random, setting: Setting, context: Context, query: Query) -> Change | None:
    """The alternate has the same names in another order and other values, and asks about another name.
    Target: the original's value of that name, under the original's operation; it is not the original's value
    at the alternate's queried position, nor either answer.
    """
    found = _redealt(rng, setting, context, query, "name")
    if found is None:
        return None
    other, asked, by_position, by_name = found
    return Change(other, asked, by_name, traps=(by_position,))


@desideratum("third", operations=WITH_CONSTANT, min_operations=2)
def third_value(rng: random.Random, setting: Setting, context: Context, query: Query) -> Change | None:
    """The alternate binds another value to the queried variable and asks for another operation with another
    constant. Target: the alternate's value under the original's operation and constant, which is neither
    prompt's answer.
    """
    other = _with_other_value(rng, setting, context, query.name)
    if other is None:
        return None
    return Change(other, setting.other_query(rng, query, new_constant=True), lang.answer(other, query))


def _with_other_value(rng: random.Random, setting: Setting, context: Context, name: str) -> Context | None:
    """The context with another value for `name`, in the setting's split."""
    values = [value for value in range(10) if value != context.value(name)]
    return setting.find(lambda: lang.with_value(context, name, rng.choice(values)))


def _renamed(context: Context, names: dict[str, str]) -> Context:
    """The context with variables renamed in bindings and in mentions, all at once."""
    bindings = tuple(
        replace(binding, name=names.get(binding.name, binding.name)) for binding in context.bindings
    )
    distractors = tuple(
        replace(clause, item=names.get(clause.item, clause.item)) for clause in context.distractors
    )
    return replace(context, bindings=bindings, distractors=distractors)


def _redealt(
    rng: random.Random, setting: Setting, context: Context, query: Query, pointer: Literal["position", "name"]
) -> tuple[Context, Query, str, str] | None:
    """The same names in another order with other values, and a query that differs in the pointer asked for;
    its name and its position disagree about the original. With them the answers that the original's values
    give by position and by name.
    """
    names = list(context.names)

    def make() -> Context:
        rng.shuffle(names)
        return replace(context, bindings=tuple(Binding(name, rng.randrange(10)) for name in names))

    other = setting.find(make)
    if other is None:
        return None
    queried = context.names.index(query.name)
    moved = [place for place, name in enumerate(other.names) if context.names[place] != name]
    if pointer == "position":
        places = [place for place in moved if place != queried]
    else:
        places = [place for place in moved if other.names[place] != query.name]
    if not places:
        return None
    place = rng.choice(places)
    name = other.names[place]
    by_position, by_name = context.bindings[place].value, context.value(name)
    return other, replace(query, name=name), _apply(query, by_position), _apply(query, by_name)


def _apply(query: Query, value: int) -> str:
    """The answer to the query's operation on a value."""
    return lang.answer(Context((Binding(query.name, value),)), query)


DESIDERATA = (
    value_dependence,
    operation_invariance,
    constant_invariance,
    name_invariance,
    distractor_invariance,
    value_not_position,
    value_not_name,
    position_dependence,
    name_dependence,
    third_value,
)


def pairs(
    tokenizer: PreTrainedTokenizerBase,
    n: int,
    seed: int,
    split: str = "test",
    form: str | None = None,
    operations: tuple[str, ...] = lang.OPERATIONS,
    n_variables: int | None = None,
    n_distractors: int | None = None,
) -> list[Pair]:
    """Aligned pairs: the corrupt prompt binds another value to the queried variable, and `wrong` is its
    answer. With `n_variables` and `n_distractors` given, all prompts of a form and operation have one length.

    Spans: `name` and `value` of the queried binding, `operation`, `query` (the last token).
    """
    dataset = value_dependence(
        tokenizer,
        n,
        seed,
        split,
        form=form,
        operations=operations,
        n_variables=n_variables,
        n_distractors=n_distractors,
    )
    names = ("form", "operation")
    return [
        Pair(
            clean_ids=tuple(row["original_ids"]),
            corrupt_ids=tuple(row["alternate_ids"]),
            answer_id=row["original_answer_id"],
            wrong_id=row["alternate_answer_id"],
            spans={name: (span[0], span[1]) for name, span in row["spans"].items()},
            id=f"variable-binding-{split}-{seed}-{index}",
            meta={
                "clean": row["original"],
                "corrupt": row["alternate"],
                **{name: row[name] for name in names},
            },
        )
        for index, row in enumerate(dict(row) for row in dataset)
    ]
