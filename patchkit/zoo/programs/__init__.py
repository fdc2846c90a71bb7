"""Programs written by hand, compiled to Llama and GPT-2 with exact weights, whose circuit is known.

names()                        `handmade-lookup-llama`, ...: every program in every shape
build(name)                    (module, tokenizer)
circuit(name)                  its true nodes and edges
pairs(name, n, seed)           prompt pairs
"""

from __future__ import annotations

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from patchkit.data import Pair
from patchkit.data.words import word_tokenizer
from patchkit.errors import InputError
from patchkit.zoo.known import KnownCircuit
from patchkit.zoo.programs import failures, simple
from patchkit.zoo.programs.compile import SHAPES as SHAPES
from patchkit.zoo.programs.compile import Shape, compile_program
from patchkit.zoo.programs.language import START, WORDS, Program
from patchkit.zoo.programs.prompts import program_pairs as program_pairs
from patchkit.zoo.programs.truth import known_circuit

PROGRAMS: dict[str, Program] = {
    program.name: program
    for program in (
        simple.COPY,
        simple.INDUCTION,
        simple.LOOKUP,
        simple.CHAIN,
        simple.COMPARE,
        simple.ADD,
        simple.TWO_LOOKUPS,
        simple.DEEP,
        simple.CROWDED,
        failures.SATURATED_LOOKUP,
        failures.SATURATED_MLP,
        failures.CANCELLING_GRADIENT,
        failures.CANCELLING_PAIR,
        failures.NEGATIVE,
        failures.MAJORITY,
        failures.BACKUP_HEAD,
    )
}
_PREFIX = "handmade-"


def names() -> list[str]:
    """Every program in every shape."""
    return [f"{_PREFIX}{program}-{shape}" for program in PROGRAMS for shape in SHAPES]


def find(name: str) -> tuple[Program, Shape]:
    """The program and the shape of a name; InputError that says what there is."""
    program, _, shape = name.removeprefix(_PREFIX).rpartition("-")
    for known in SHAPES:
        if shape == known and program in PROGRAMS and name.startswith(_PREFIX):
            return PROGRAMS[program], known
    raise InputError(
        f"no handmade model is called {name!r}; expected {_PREFIX}PROGRAM-SHAPE with PROGRAM one of "
        f"{', '.join(PROGRAMS)} and SHAPE one of {', '.join(SHAPES)}"
    )


def build(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """The model in float32, without gradients, and its tokenizer."""
    tokenizer = word_tokenizer(WORDS, pad="<pad>", bos=START, unk="<unk>")
    return compile_program(*find(name)), tokenizer


def circuit(name: str) -> KnownCircuit:
    """The true circuit, named as in this model."""
    return known_circuit(*find(name))


def pairs(name: str, n: int, seed: int) -> list[Pair]:
    """`n` prompt pairs; the same for every shape of a program."""
    return program_pairs(find(name)[0], n, seed)
