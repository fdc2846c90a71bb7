"""Tasks that make their own prompts: pairs for patching and attribution, desiderata for masks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from transformers import PreTrainedTokenizerBase

from patchkit.data.pairs import Pair
from patchkit.errors import InputError
from patchkit.tasks import arithmetic, entity_tracking, ioi, variable_binding
from patchkit.tasks.building import DesiderataSet as DesiderataSet
from patchkit.tasks.building import Desideratum as Desideratum
from patchkit.tasks.building import excluded as excluded
from patchkit.tasks.building import gather
from patchkit.tasks.known import program_task
from patchkit.zoo.programs import PROGRAMS


@dataclass(frozen=True)
class Task:
    """A task by its command-line name. `desiderata` is empty for a task that has pairs only; a mask is
    trained on those in `trained` unless others are asked for.
    """

    name: str
    description: str
    pairs: Callable[..., list[Pair]]
    desiderata: dict[str, Desideratum]
    trained: tuple[str, ...] = ()


def _named(desiderata: Sequence[Desideratum]) -> dict[str, Desideratum]:
    return {desideratum.name: desideratum for desideratum in desiderata}


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            "variable-binding",
            "Bindings, then a question about one variable, in the language of the embedded varbind models.",
            variable_binding.pairs,
            _named(variable_binding.DESIDERATA),
            ("value_dependence", "operation_invariance", "constant_invariance"),
        ),
        Task(
            "arithmetic",
            "Sums and differences of two variables, as published for LLaMA-13B; for any model with digit "
            "tokens.",
            arithmetic.pairs,
            _named(arithmetic.DESIDERATA),
            ("value_dependence", "operation_invariance"),
        ),
        Task(
            "entity-tracking",
            "Which object is in which box, as published for LLaMA-7B; for any model with nouns as single "
            "tokens.",
            entity_tracking.pairs,
            _named(entity_tracking.DESIDERATA),
            ("object_value",),
        ),
        Task(
            "ioi",
            "Who is given what: the indirect object, for the embedded ioi-gpt2 and for any model of English.",
            ioi.pairs,
            {},
        ),
        *(
            Task(
                f"handmade-{program.name}",
                f"For the models handmade-{program.name}-llama, -gqa and -gpt2: {program.task}.",
                partial(program_task, program.name),
                {},
            )
            for program in PROGRAMS.values()
        ),
    )
}


def get(name: str) -> Task:
    """The task of a name; InputError that lists them."""
    if name not in TASKS:
        raise InputError(f"unknown task {name!r}; expected one of {', '.join(TASKS)}")
    return TASKS[name]


def pairs(
    task: str, tokenizer: PreTrainedTokenizerBase | None, n: int, seed: int, **options: object
) -> list[Pair]:
    """`n` aligned prompt pairs of a task; the same seed gives the same pairs. Options are those of the task's
    function, `split` ("test" by default) among them.
    """
    return get(task).pairs(tokenizer, n, seed, **options)


def desiderata(
    task: str,
    tokenizer: PreTrainedTokenizerBase | None,
    n_train: int,
    n_test: int,
    seed: int,
    names: Sequence[str] | None = None,
    **options: object,
) -> DesiderataSet:
    """Triples of a task's desiderata (all, or those named) for both splits, with the number left out by
    reason.

    `n_train` and `n_test` count triples per desideratum; 0 leaves that split out. Options are those of the
    task.
    """
    known = get(task).desiderata
    if not known:
        with_some = [name for name, other in TASKS.items() if other.desiderata]
        raise InputError(f"task {task!r} has prompt pairs but no desiderata; {', '.join(with_some)} have")
    for name in names or ():
        if name not in known:
            raise InputError(f"task {task!r} has no desideratum {name!r}; it has {', '.join(known)}")
    parts = [
        (name, known[name](tokenizer, n, seed, split, **options))
        for name in (tuple(known) if names is None else dict.fromkeys(names))
        for split, n in (("train", n_train), ("test", n_test))
        if n
    ]
    if not parts:
        raise InputError("no triples asked for; give at least one desideratum and n_train or n_test above 0")
    return gather(parts)
