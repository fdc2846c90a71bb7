"""Models trained with a forced circuit: what each of them computes, by which of its nodes, along which edges.

Strict interchange-intervention training (SIIT; Gupta et al. 2024, InterpBench, arXiv 2407.14494) starts from a small
causal program with named variables and an alignment that gives each variable to one node of an ordinary network. The
network is trained to answer; to answer as the program does when a variable's value, and the node's activation, are
those of another prompt; and not to change its answer when any node that carries no variable is replaced. So the
circuit is known, and nothing in the weights was written by hand: `scripts/train_siit.py` makes each model from its
standard random initialisation, and `patchkit.studies.siit_checks` measures how well the circuit holds.

A node is a whole node: a head is its z at all positions, an MLP its output at all positions. Every head and MLP that
carries no variable is outside the circuit. Edges go from node to node, and from `input` (the embeddings) to the nodes
that read prompt words themselves; they are not divided by query, key and value.

    case = CASES["siit-choice-gpt2"]
    prompt, other = case.prompts(2, seed=0)
    case.answer(prompt)                        the answer
    case.answer(prompt, {"same": other})       the answer with `same` as it is in the other prompt
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from patchkit.data.pairs import Pair
from patchkit.data.words import word_tokenizer
from patchkit.errors import InputError
from patchkit.zoo import _siit_programs as programs
from patchkit.zoo._siit_programs import Values, Words

SPECIAL: Words = ("<pad>", "<s>", "<unk>")


@dataclass(frozen=True)
class Variable:
    """One variable of a high-level program.

    Attributes:
        name: what it is called.
        node: the node of the network that carries it, as the program is aligned.
        value: the prompt's words and the values of the variables before it, to its own.
    """

    name: str
    node: str
    value: Callable[[Words, Values], programs.Value]


@dataclass(frozen=True)
class SiitCase:
    """A high-level program aligned with the nodes of a trained model.

    Attributes:
        name: the embedded model's name.
        task: what the model does, in a sentence, with an example.
        vocabulary: the words of its prompts and answers.
        draw: one random prompt. All prompts of a case have one length.
        program: the variables, each after those it depends on; the last one's value is the answer.
        edges: which node reads which, in the model's node names, with `input` and `logits`.
    """

    name: str
    task: str
    vocabulary: Words
    draw: Callable[[random.Random], Words]
    program: tuple[Variable, ...]
    edges: tuple[str, ...]

    @property
    def variables(self) -> dict[str, str]:
        """The node that carries each variable."""
        return {variable.name: variable.node for variable in self.program}

    @property
    def nodes(self) -> tuple[str, ...]:
        """The heads and MLPs of the circuit."""
        return tuple(variable.node for variable in self.program)

    def prompts(self, n: int, seed: int) -> list[Words]:
        """`n` random prompts, as words."""
        rng = random.Random(f"{self.name} {seed}")
        return [self.draw(rng) for _ in range(n)]

    def values(self, prompt: Words, given: Values | None = None) -> dict[str, programs.Value]:
        """Every variable's value on a prompt, in the program's order.

        Args:
            given: values that are set; what depends on them follows.

        Raises:
            InputError: a variable that the program does not have.
        """
        given = {} if given is None else given
        self._known(given)
        found: dict[str, programs.Value] = {}
        for variable in self.program:
            name = variable.name
            found[name] = given[name] if name in given else variable.value(prompt, found)
        return found

    def answer(self, prompt: Words, others: Mapping[str, Words] | None = None) -> str:
        """The word that is right after a prompt, with some variables as they are on other prompts.

        Args:
            others: variable -> the prompt that its value is taken from.

        Raises:
            InputError: a variable that the program does not have.
        """
        others = {} if others is None else others
        self._known(others)
        given = {name: self.values(other)[name] for name, other in others.items()}
        return str(self.values(prompt, given)[self.program[-1].name])

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """One token a word, `<s>` put first."""
        pad, bos, unk = SPECIAL
        return word_tokenizer((*SPECIAL, *self.vocabulary), pad=pad, bos=bos, unk=unk)

    def pairs(self, tokenizer: PreTrainedTokenizerBase, n: int, seed: int) -> list[Pair]:
        """`n` pairs of random prompts whose answers differ.

        The two prompts are drawn independently, so that every variable differs in most pairs, and not always the same
        ones together. `meta` holds both prompts' text.
        """
        rng = random.Random(f"pairs {self.name} {seed}")
        pairs: list[Pair] = []
        while len(pairs) < n:
            clean, corrupt = self.draw(rng), self.draw(rng)
            answers = self.answer(clean), self.answer(corrupt)
            if answers[0] == answers[1]:
                continue
            clean_ids, corrupt_ids = self.encode(tokenizer, [clean, corrupt])
            answer_id, wrong_id = self.answer_ids(tokenizer, answers)
            texts = {"clean": " ".join(clean), "corrupt": " ".join(corrupt)}
            pairs.append(Pair(clean_ids, corrupt_ids, answer_id, wrong_id, id=str(len(pairs)), meta=texts))
        return pairs

    def encode(self, tokenizer: PreTrainedTokenizerBase, prompts: Iterable[Words]) -> list[tuple[int, ...]]:
        """Token ids of prompts, as the tokenizer makes them of the text.

        Raises:
            InputError: a word that the tokenizer does not know.
        """
        begin = SPECIAL[1]
        return [tuple(self._ids(tokenizer, (begin, *prompt))) for prompt in prompts]

    def answer_ids(self, tokenizer: PreTrainedTokenizerBase, answers: Iterable[str]) -> list[int]:
        """The token of each answer.

        Raises:
            InputError: a word that the tokenizer does not know.
        """
        return self._ids(tokenizer, answers)

    def _ids(self, tokenizer: PreTrainedTokenizerBase, words: Iterable[str]) -> list[int]:
        listed = list(words)
        ids = tokenizer.convert_tokens_to_ids(listed)
        assert isinstance(ids, list)
        for word, number in zip(listed, ids, strict=True):
            if number is None or number == tokenizer.unk_token_id:
                raise InputError(
                    f"{self.name}: the tokenizer has no token '{word}'; expected the tokenizer that comes with the "
                    f"model (patchkit.load('{self.name}').tokenizer)"
                )
        return ids

    def _known(self, names: Iterable[str]) -> None:
        for name in names:
            if name not in self.variables:
                raise InputError(
                    f"{self.name} has no variable '{name}'; its program has {', '.join(self.variables)}"
                )


def find(name: str) -> SiitCase:
    """The case of an embedded model. InputError for a model that was not trained with a forced circuit."""
    if name not in CASES:
        raise InputError(f"no case is called '{name}'; there are: {', '.join(CASES)}")
    return CASES[name]


_ADD = SiitCase(
    name="siit-add-llama",
    task="the sum of two digits modulo 8, a third one ignored: `3 plus 6 skip 2 is` -> `1`",
    vocabulary=programs.SUM_WORDS,
    draw=programs.draw_sum,
    program=(
        Variable("first", "a0.h1", lambda words, _: words[0]),
        Variable("second", "a0.h2", lambda words, _: words[2]),
        Variable("total", "m1", lambda _, made: programs.plus(made["first"], made["second"])),
    ),
    edges=("input->a0.h1", "input->a0.h2", "a0.h1->m1", "a0.h2->m1", "m1->logits"),
)

_CHAIN = SiitCase(
    name="siit-chain-gpt2",
    task="a sum and a difference modulo 8, in two steps: `3 plus 6 minus 5 is` -> `4`",
    vocabulary=programs.CHAIN_WORDS,
    draw=programs.draw_chain,
    program=(
        Variable("first", "a0.h3", lambda words, _: words[0]),
        Variable("second", "a1.h0", lambda words, _: words[2]),
        Variable("partial", "m1", lambda _, made: programs.plus(made["first"], made["second"])),
        Variable("third", "a2.h1", lambda words, _: words[4]),
        Variable("total", "m2", lambda _, made: programs.minus(made["partial"], made["third"])),
    ),
    edges=(
        "input->a0.h3",
        "input->a1.h0",
        "a0.h3->m1",
        "a1.h0->m1",
        "input->a2.h1",
        "m1->m2",
        "a2.h1->m2",
        "m2->logits",
    ),
)

_BIND = SiitCase(
    name="siit-bind-gqa",
    task="the digit bound to the last letter, plus one modulo 8: `b 3 a 7 d 0 c 7 ; a` -> `0`",
    vocabulary=programs.BINDING_WORDS,
    draw=programs.draw_binding,
    program=(
        Variable("owners", "a0.h1", lambda words, _: programs.owners(words)),
        Variable("found", "a1.h2", lambda words, made: programs.bound(words, made["owners"])),
        Variable("successor", "m2", lambda _, made: programs.plus(made["found"], "1")),
    ),
    edges=(
        "input->a0.h1",
        "a0.h1->a1.h2",
        "input->a1.h2",
        "a1.h2->m2",
        "m2->logits",
    ),
)

_CHOICE = SiitCase(
    name="siit-choice-gpt2",
    task="the first of two nouns if two colours are the same, else the second: `red blue ? cat dog :` -> `dog`",
    vocabulary=programs.CHOICE_WORDS,
    draw=programs.draw_choice,
    program=(
        Variable("left", "a0.h0", lambda words, _: words[0]),
        Variable("right", "a0.h3", lambda words, _: words[1]),
        Variable("same", "m0", lambda _, made: made["left"] == made["right"]),
        Variable("chosen", "a1.h2", lambda words, made: words[3] if made["same"] else words[4]),
    ),
    edges=(
        "input->a0.h0",
        "input->a0.h3",
        "a0.h0->m0",
        "a0.h3->m0",
        "m0->a1.h2",
        "input->a1.h2",
        "a1.h2->logits",
    ),
)

#: The cases by the name of their model.
CASES: dict[str, SiitCase] = {case.name: case for case in (_ADD, _CHAIN, _BIND, _CHOICE)}
