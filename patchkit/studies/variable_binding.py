"""The flagship study: which components of a model fetch the value of a variable?

After "Discovering Variable Binding Circuitry with Desiderata" (arXiv 2307.03637): learn one mask over the last token's
heads and MLPs on desiderata that only the value's carriers satisfy together, test it on held-out bindings, in surface
forms it was not trained on and on further desiderata, and look at where the chosen heads attend.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from patchkit.data import Triple, group, write_desiderata
from patchkit.errors import InputError
from patchkit.methods import MaskOptions, learn_mask
from patchkit.methods.mask_scores import answers_with
from patchkit.model import PatchModel
from patchkit.results.manifest import CHECKPOINT
from patchkit.results.mask import MaskResult
from patchkit.results.study import FormScores, PromptExample, VariableBindingStudy
from patchkit.runtime import Progress
from patchkit.studies._attention import attention_examples, attention_summary
from patchkit.tasks import variable_binding as task
from patchkit.tasks.building import Desideratum, Split, gather
from patchkit.tasks.language import FORMS, VOCABULARY

#: The published two, and a third that keeps out an MLP in which value and constant are mixed already.
TRAINED = (task.value_dependence, task.operation_invariance, task.constant_invariance)
ASKED_ONLY = tuple(desideratum for desideratum in task.DESIDERATA if desideratum not in TRAINED)

QUESTION = (
    "A prompt binds values to variables and asks for an operation on one of them, for example "
    "`a = 3 , b = 7 , ; + 4 a`. Somewhere the model must fetch the value of `a`. Which attention heads and MLPs of the "
    "last token carry it? If exactly these are replaced by what they compute on a prompt where `a` has another value, "
    "the answer must follow that value (value dependence); if they are replaced by what they compute on a prompt with "
    "another operation, the answer must not move (operation invariance)."
)


@dataclass(frozen=True)
class StudyOptions:
    """How much data, and how the mask is trained.

    Attributes:
        train_form: the one surface form that the mask is trained on; it is tested on all.
        n_train: training triples a desideratum, those for validation among them.
        n_test: held-out triples a desideratum, over all forms in turn.
        seed: of the triples.
        mask: options of the mask.
    """

    train_form: str = "symbol"
    n_train: int = 120
    n_test: int = 200
    seed: int = 0
    # Selection needs enough validation triples to tell 98 % from 100 %.
    mask: MaskOptions = field(default_factory=lambda: MaskOptions(validation_fraction=0.4))


def make_triples(model: PatchModel, options: StudyOptions) -> tuple[list[Triple], dict[str, int]]:
    """The study's triples and what was left out in making them, by reason.

    Raises:
        InputError: the model's tokenizer does not speak the binding language.
    """
    tokenizer = model.tokenizer
    known = tokenizer.get_vocab() if tokenizer is not None else {}
    missing = [word for word in VOCABULARY if word not in known]
    if tokenizer is None or missing:
        raise InputError(
            f"{model.name}: its tokenizer lacks words of the binding language ({', '.join(missing[:5])}, ...). "
            "This study needs an embedded variable-binding model; for a model with a real tokenizer use "
            "scripts/reproduce_variable_binding.py or `patchkit mask --task arithmetic`"
        )

    def draw(
        desiderata: Sequence[Desideratum], n: int, split: Split, form: str | None
    ) -> list[tuple[str, object]]:
        return [(d.name, d(tokenizer, n, options.seed, split, form=form)) for d in desiderata]

    parts = [
        *draw(TRAINED, options.n_train, "train", options.train_form),
        *draw((*TRAINED, *ASKED_ONLY), options.n_test, "test", None),
    ]
    made = gather(parts)  # pyright: ignore[reportArgumentType]
    return made.triples(), made.excluded


def run_study(
    model: PatchModel,
    out: Path,
    options: StudyOptions | None = None,
    *,
    command: str = "patchkit demo",
    model_card: dict[str, str] | None = None,
    progress: Progress | None = None,
) -> tuple[MaskResult, VariableBindingStudy]:
    """Runs the study and writes mask, study and triples into `out`; the report is made from these files.

    A study that was interrupted goes on from the paths that were finished in `out/journal`.
    """
    options = options or StudyOptions()
    started = time.monotonic()
    triples, excluded = make_triples(model, options)
    write_desiderata(out / "desiderata.jsonl", triples)
    mask_options = replace(options.mask, train_on=tuple(d.name for d in TRAINED))
    descriptions = {d.name: d.description for d in task.DESIDERATA}
    result = learn_mask(
        model,
        triples,
        mask_options,
        descriptions=descriptions,
        checkpoint=out / CHECKPOINT,
        progress=progress,
    )
    result = result.model_copy(update={"excluded": excluded | result.excluded})
    tested = group([t for t in triples if t.split == "test"], "test")
    say = progress or (lambda stage, done, total: None)
    say("forms and attention", 0, 2)
    forms = _forms(model, result, tested, options)
    say("forms and attention", 1, 2)
    value_triples = tested[task.value_dependence.name]
    study = VariableBindingStudy(
        question=QUESTION,
        model=model.name,
        model_card=model_card or {},
        examples=_examples(model, result, {d.name: tested[d.name][:2] for d in TRAINED}),
        attention=attention_examples(model, result.chosen, value_triples[: len(FORMS)]),
        attention_summary=attention_summary(model, result.chosen, value_triples),
        forms=forms,
        command=command,
        seconds=time.monotonic() - started,
        notes=_notes(result, options),
    )
    say("forms and attention", 2, 2)
    result.save(out)
    study.save(out)
    return result, study


def _forms(
    model: PatchModel, result: MaskResult, tested: dict[str, list[Triple]], options: StudyOptions
) -> list[FormScores]:
    """The chosen set's held-out scores, form by form."""
    cells = {
        f"{name}|{form}": [t for t in members if t.meta["form"] == form]
        for name, members in tested.items()
        for form in FORMS
    }
    scores, _ = answers_with(
        model,
        {cell: members for cell, members in cells.items() if members},
        result.chosen,
        kinds=result.components,
    )
    return [
        FormScores(
            form=form,
            trained=form == options.train_form,
            scores={name: scores[f"{name}|{form}"] for name in tested if f"{name}|{form}" in scores},
        )
        for form in FORMS
    ]


def _examples(model: PatchModel, result: MaskResult, triples: dict[str, list[Triple]]) -> list[PromptExample]:
    """A few held-out triples in words, with what the model says when the chosen components are patched."""
    tokenizer = model.tokenizer
    assert tokenizer is not None

    def words(ids: Sequence[int]) -> list[str]:
        return tokenizer.convert_ids_to_tokens(list(ids))  # pyright: ignore[reportReturnType]

    flat = [triple for members in triples.values() for triple in members]
    _, answers = answers_with(model, triples, result.chosen, kinds=result.components)
    examples = []
    for triple, answer in zip(flat, answers, strict=True):
        assert triple.original_answer_id is not None and triple.alternate_answer_id is not None
        said = words([triple.original_answer_id, triple.alternate_answer_id, triple.target_id, answer])
        examples.append(
            PromptExample(
                desideratum=triple.desideratum,
                original=words(triple.original_ids),
                alternate=words(triple.alternate_ids),
                position=len(triple.original_ids) - 1,
                original_answer=said[0],
                alternate_answer=said[1],
                target=said[2],
                answer_with_patch=said[3],
            )
        )
    return examples


def _notes(result: MaskResult, options: StudyOptions) -> list[str]:
    """What a careful reader should know about these numbers, with the numbers."""
    alone = max((max(c.alone.values(), default=0.0) for c in result.carried), default=0.0)
    return [
        f"The mask was trained on the form `{options.train_form}` only; every other form is a test of generalisation.",
        "Train and test share no list of bindings; lambda, seed and pruning were chosen on training bindings (a part "
        "of them kept for validation), and the test part was used once.",
        f"Patched alone, no chosen component changes more than {alone:.0%} of the answers: the value is a joint product "
        "of several components, which is why patching one at a time misses them.",
        "The complement may reach value dependence, since it holds the MLPs in which the finished answer stands; it "
        "fails operation invariance. Only the minimum over desiderata tells value from answer.",
    ]
