"""Sets of a task's pairs that differ in one thing: how the prompt is worded, or what it asks for.

What a circuit is found on and what it is tried on, when the question is how far it generalises. A name may join two with
`+`, as `symbol+plus`: pairs that are both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from patchkit.data.pairs import Pair
from patchkit.errors import InputError
from patchkit.tasks import TASKS, get, pairs
from patchkit.tasks import language as binding
from patchkit.tasks._ioi_sentences import TEMPLATES
from patchkit.tasks.ioi_language import VOCABULARY as IOI_WORDS

#: Pairs are drawn until so many times the number that is wanted gave too few.
_MOST = 64


@dataclass(frozen=True)
class Template:
    """One way that a task's pairs can be.

    Attributes:
        options: of the task's function of pairs.
        keep: which of its pairs are meant, where no option says it.
    """

    options: dict[str, object] = field(default_factory=dict)
    keep: Callable[[Pair], bool] | None = None


def templates(task: str, tokenizer: PreTrainedTokenizerBase | None) -> dict[str, Template]:
    """The templates of a task for a model's tokenizer, by name.

    Raises:
        InputError: no such task, or one whose prompts are all of one template.
    """
    get(task)
    made: dict[str, Template] = {}
    if task == "variable-binding":
        made = {form: Template({"form": form}) for form in binding.FORMS}
        made |= {name: Template({"operations": (name,)}) for name in binding.OPERATIONS}
    if task == "ioi":
        made = {order: Template(keep=_is("order", order)) for order in ("ABBA", "BABA")}
        embedded = tokenizer is not None and set(tokenizer.get_vocab()) == set(IOI_WORDS)
        if embedded:
            made |= {f"{count}-pairs": Template(keep=_story_of(count)) for count in (1, 2, 3)}
        else:
            made |= {
                f"template-{number}": Template(keep=_is("template", number))
                for number in range(len(TEMPLATES))
            }
    if not made:
        known = ", ".join(name for name in TASKS if name in ("variable-binding", "ioi"))
        raise InputError(
            f"task '{task}' has prompts of one template only; {known} have several, or give several sets of pairs"
        )
    return made


def default_templates(task: str, tokenizer: PreTrainedTokenizerBase | None) -> tuple[str, ...]:
    """Those that are meant when none is named: the wordings of a task, or its orders."""
    known = tuple(templates(task, tokenizer))
    return tuple(binding.FORMS) if task == "variable-binding" else known


def template_pairs(
    task: str,
    tokenizer: PreTrainedTokenizerBase | None,
    names: Sequence[str],
    n: int,
    seed: int,
) -> dict[str, list[Pair]]:
    """`n` pairs of each template, by name; the same seed gives the same pairs.

    Raises:
        InputError: a template that the task does not have or that comes twice, or too few of its pairs among many.
    """
    known = templates(task, tokenizer)
    if len(set(names)) < len(names):
        raise InputError(f"templates {', '.join(names)}: one comes twice; name each once")
    return {name: _draw(task, tokenizer, name, known, n, seed) for name in names}


def _draw(
    task: str,
    tokenizer: PreTrainedTokenizerBase | None,
    name: str,
    known: dict[str, Template],
    n: int,
    seed: int,
) -> list[Pair]:
    parts = name.split("+")
    for each in parts:
        if each not in known:
            raise InputError(f"task '{task}' has no template '{each}'; it has {', '.join(known)}")
    options: dict[str, object] = {}
    for each in parts:
        if options.keys() & known[each].options.keys():
            raise InputError(f"template '{name}': {' and '.join(parts)} exclude each other")
        options |= known[each].options
    wanted = [keep for each in parts if (keep := known[each].keep) is not None]
    times = 1
    while True:
        drawn = pairs(task, tokenizer, n * times, seed, **options)
        found = [pair for pair in drawn if all(keep(pair) for keep in wanted)]
        if len(found) >= n:
            return found[:n]
        times *= 2
        if times > _MOST:
            raise InputError(
                f"template '{name}' of task '{task}': only {len(found)} of {n} pairs among {len(drawn)} drawn; ask for "
                "fewer"
            )


def _is(key: str, value: object) -> Callable[[Pair], bool]:
    return lambda pair: pair.meta[key] == value


def _story_of(count: int) -> Callable[[Pair], bool]:
    """Stories of so many pairs of people: the giver's own and others."""
    return lambda pair: str(pair.meta["template"]).count("pair ") + 1 == count
