"""Hypotheses about the embedded variable-binding model, scrubbed: one true, others plausible and false.

A learned mask says which heads of the last token carry something that moves the answer with the value (`patchkit demo`).
What they carry is another question: the value itself, or a pointer to it, such as the queried name or its place in the
list? Prompts are drawn in which value, name and place vary independently, and everything is resampled that a hypothesis
says does not matter (Chan et al. 2022).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from patchkit.data import Pair
from patchkit.errors import InputError
from patchkit.methods.causal_scrubbing import Hypothesis, Interpretation, ScrubOptions, scrub
from patchkit.model import EdgeGraph, PatchModel
from patchkit.results.manifest import CHECKPOINT
from patchkit.results.scrubbing import Scrubbing, ScrubResult
from patchkit.runtime import Progress
from patchkit.tasks import variable_binding as task

#: The heads of the last token that the demo's mask keeps.
VALUE_HEADS: dict[str, tuple[str, ...]] = {"varbind-llama": ("a1.h0", "a1.h3", "a1.h4", "a1.h5", "a1.h6")}

QUESTION = (
    "A prompt binds values to variables and asks for an operation on one of them, for example `a = 3 , b = 7 , ; + 4 a`. "
    "Some heads of the last token carry what the answer is made of. Do they carry the value of the queried variable, or "
    "only its name or its place in the list, with the value looked up later?"
)
#: Hypotheses by name, in the order of the report, and whether they are about what the heads carry.
TRUE, FALSE = ("value", "lookup"), ("name", "place", "lookup without names")
NAMES = ("value", "name", "place", "lookup", "lookup without names", "everything", "nothing")


@dataclass(frozen=True)
class BindingOptions:
    """How much is scrubbed.

    Attributes:
        n: reference prompts, from which all inputs are drawn too.
        seed: of the prompts and of the draws.
        samples: scrubbed runs of each prompt.
        form, operations, n_variables: of the prompts; operations with a constant, so that all have one length.
        heads: the heads that the hypotheses are about; default: those known of the model.
        hypotheses: which of `NAMES`.
    """

    n: int = 400
    seed: int = 0
    samples: int = 1
    form: str = "symbol"
    operations: tuple[str, ...] = ("plus", "minus")
    n_variables: int = 4
    heads: tuple[str, ...] | None = None
    hypotheses: tuple[str, ...] = NAMES

    def __post_init__(self) -> None:
        unknown = [name for name in self.hypotheses if name not in NAMES]
        if unknown or not self.hypotheses:
            raise InputError(
                f"hypothesis '{unknown[0] if unknown else ''}' is not known; expected one of: {', '.join(NAMES)}"
            )


def binding_inputs(model: PatchModel, options: BindingOptions) -> list[Pair]:
    """Prompts in which the queried variable's value, name and place vary independently, all of one length.

    Spans beside those of the task: `clause`, the queried value and the comma that closes its clause.

    Raises:
        InputError: the model's tokenizer does not speak the binding language.
    """
    if model.tokenizer is None:
        raise InputError(
            f"{model.name} has no tokenizer; this study needs an embedded variable-binding model"
        )
    drawn = task.pairs(
        model.tokenizer,
        options.n,
        options.seed,
        form=options.form,
        operations=options.operations,
        n_variables=options.n_variables,
        n_distractors=0,
    )
    return [replace(pair, spans=pair.spans | {"clause": _clause(pair)}) for pair in drawn]


def _clause(pair: Pair) -> tuple[int, int]:
    value, _ = pair.spans["value"]
    return value, value + 2


# What nodes are said to compute. Each docstring is what the report says of a key.


def queried_value(pair: Pair) -> Hashable:
    """the value of the queried variable"""
    return pair.clean_ids[pair.spans["value"][0]]


def queried_name(pair: Pair) -> Hashable:
    """the name of the queried variable"""
    return pair.clean_ids[-1]


def queried_place(pair: Pair) -> Hashable:
    """the place of the queried variable in the list"""
    return pair.spans["name"][0]


def queried_binding(pair: Pair) -> Hashable:
    """the name and the value of the queried variable"""
    return queried_name(pair), queried_value(pair)


def operation_and_constant(pair: Pair) -> Hashable:
    """the operation and its constant"""
    start, end = pair.spans["operation"]
    return pair.clean_ids[start:end]


def the_answer(pair: Pair) -> Hashable:
    """the answer"""
    return pair.answer_id


def whole_prompt(pair: Pair) -> Hashable:
    """the whole prompt"""
    return pair.clean_ids


def hypotheses(graph: EdgeGraph, heads: Sequence[str]) -> dict[str, Hypothesis]:
    """All hypotheses about some heads of the last token, by name.

    They have one skeleton, of the last token's nodes: the logits read the `answer` from all nodes above the heads; those
    read what the heads carry, and the `question` (operation and constant) from all nodes below or beside the heads. In
    the lookups the heads themselves are computed from the name that is `asked` for at the last token and from the
    queried `clause` in the list.

    Raises:
        InputError: a head that the model does not have.
    """
    below, beside, above = _around(graph, heads)
    question = Interpretation("question", operation_and_constant, _last([*below, *beside]))

    def carry(name: str, key: Callable[[Pair], Hashable], claim: str) -> Hypothesis:
        answer = Interpretation("answer", the_answer, _last(above), children=("carried", "question"))
        carried = Interpretation("carried", key, _last(heads))
        return Hypothesis(name, (answer, carried, question), ("answer",), claim)

    def lookup(name: str, key: Callable[[Pair], Hashable], claim: str) -> Hypothesis:
        answer = Interpretation("answer", the_answer, _last(above), children=("found", "question"))
        found = Interpretation("found", queried_value, _last(heads), children=("asked", "clause"))
        asked = Interpretation("asked", queried_name, _last(below))
        clause = Interpretation("clause", key, tuple(below), positions="clause")
        return Hypothesis(name, (answer, found, question, asked, clause), ("answer",), claim)

    everything = Interpretation("prompt", whole_prompt, graph.senders)
    spoken = ", ".join(heads)
    made = (
        carry("value", queried_value, f"{spoken} at the last token carry the value of the queried variable."),
        carry("name", queried_name, f"{spoken} at the last token carry the name of the queried variable."),
        carry("place", queried_place, f"{spoken} at the last token carry its place in the list."),
        lookup(
            "lookup",
            queried_binding,
            f"{spoken} at the last token find the value in the clause that has the asked name. (The drawn clause comes "
            "to stand in an unrelated list, which may bind the same name once more.)",
        ),
        lookup(
            "lookup without names",
            queried_value,
            f"{spoken} at the last token find the value in a clause that says nothing of its name.",
        ),
        Hypothesis(
            "everything",
            (everything,),
            ("prompt",),
            "All depends on the whole prompt: always true, and says nothing.",
        ),
        Hypothesis("nothing", claim="Nothing matters: every activation is an unrelated prompt's."),
    )
    return {hypothesis.name: hypothesis for hypothesis in made}


def _last(names: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"{name}@last" for name in names)


def _around(graph: EdgeGraph, heads: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """Senders that the lowest of the heads reads, senders that neither it reads nor they it, and senders that read it."""
    numbers = [graph.find_sender(head) for head in heads]
    if not numbers:
        raise InputError("the hypotheses about the binding model need at least one head, found none")
    # How many senders, from the first, each sender reads.
    reads = [int(graph.upstream[owned].max()) if bool(owned.any()) else 0 for owned in graph.owner]
    lowest = min(numbers)
    below, beside, above = [], [], []
    for sender, name in enumerate(graph.senders):
        if sender in numbers:
            continue
        (above if reads[sender] > lowest else below if sender < reads[lowest] else beside).append(name)
    if not above:
        raise InputError(f"no model node reads {', '.join(heads)}; expected heads below the last layer")
    return below, beside, above


def run_scrubbing(
    model: PatchModel,
    out: Path | None = None,
    options: BindingOptions | None = None,
    *,
    command: str = "patchkit study scrubbing",
    progress: Progress | None = None,
) -> Scrubbing:
    """Scrubs the hypotheses on the same prompts, and writes `scrubbing.json` into `out`; the report is made from it.

    A study that was interrupted goes on from the batches that were finished in `out/journal`.

    Raises:
        InputError: a model of another language, or one of which no heads are known and none are given.
    """
    options = options or BindingOptions()
    heads = options.heads or VALUE_HEADS.get(model.name)
    if heads is None:
        raise InputError(
            f"{model.name}: it is not known which heads of this model carry the value; find them (patchkit study "
            f"variable-binding) and give them as heads. They are known of: {', '.join(VALUE_HEADS)}"
        )
    started = time.monotonic()
    known = hypotheses(EdgeGraph.of(model.dims), heads)
    inputs = binding_inputs(model, options)
    say = progress or (lambda stage, done, total: None)
    results: list[ScrubResult] = []
    for number, name in enumerate(options.hypotheses):
        say(name, number, len(options.hypotheses))
        results.append(
            scrub(
                model,
                inputs,
                known[name],
                ScrubOptions(samples=options.samples, seed=options.seed),
                checkpoint=None if out is None else out / CHECKPOINT,
            )
        )
    say("done", len(results), len(results))
    found = Scrubbing(
        question=QUESTION,
        results=results,
        findings=findings(results),
        command=command,
        seconds=time.monotonic() - started,
    )
    if out is not None:
        found.save(out)
    return found


def findings(results: Sequence[ScrubResult]) -> list[str]:
    """In words: what each hypothesis recovers, and whether the intervals of true and false ones lie apart."""
    said = [f"{_words(result)}: {result.claim}" for result in results]
    true = [result for result in results if result.hypothesis in TRUE and result.recovered_interval]
    false = [result for result in results if result.hypothesis in FALSE and result.recovered_interval]
    if true and false:
        low = min(true, key=lambda result: _interval(result)[0])
        high = max(false, key=lambda result: _interval(result)[1])
        apart = _interval(low)[0] > _interval(high)[1]
        said.append(
            f"The 95 % intervals of the true hypotheses and of the false ones {'lie apart' if apart else 'OVERLAP'}: the "
            f"least is {_words(low)}, the largest false one {_words(high)}."
        )
    return said


def _interval(result: ScrubResult) -> tuple[float, float]:
    assert result.recovered_interval is not None
    return result.recovered_interval


def _words(result: ScrubResult) -> str:
    if result.recovered is None:
        return f"'{result.hypothesis}' recovers an undefined share"
    low, high = _interval(result)
    return f"'{result.hypothesis}' recovers {result.recovered:.2f} [{low:.2f}, {high:.2f}]"
