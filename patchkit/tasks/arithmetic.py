"""Two-operand arithmetic for any tokenizer, as published for LLaMA-13B: `x = 41\\ny = 27\\nx + y = `.

The two desiderata of the DCM paper (arXiv 2307.03637), which its code calls ValueSwitch and TaskSwitch:

- `value_dependence`: the alternate binds another number to x. Target: the alternate's answer.
- `operation_invariance`: the alternate has the other operation. Target: the original's answer.

What is scored is the first token of the answer as it continues the prompt; with one token per digit that is
the first digit, as published. Numbers are 10 to 99, answers below 1 do not occur, and the target's first
digit is balanced over 1 to 9. Unlike the published code, train and test share no (x, y), and triples whose
two answers begin with the same token are left out and counted, since they could not tell success from
failure.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from patchkit.data.desiderata import Triple
from patchkit.data.pairs import Pair
from patchkit.data.tokens import continuation_ids, encode, prompt_ids
from patchkit.errors import InputError
from patchkit.tasks.building import Desideratum, Excluded, Kind, Split, collect, split_by_hash, uninformative

NUMBERS = range(10, 100)
OPERATIONS = ("+", "-")
DIGITS = 9

# One (x, y) in four is for testing.
_ONE_IN = 4


@cache
def _split_of(x: int, y: int) -> Split:
    return split_by_hash(f"{x} {y}", _ONE_IN)


@dataclass(frozen=True)
class Sum:
    """One prompt: x and y, and the operation, `+` or `-`."""

    x: int
    y: int
    operation: str

    @property
    def answer(self) -> int:
        return self.x + self.y if self.operation == "+" else self.x - self.y

    @property
    def first_digit(self) -> int:
        return int(str(self.answer)[0])

    @property
    def split(self) -> Split:
        return _split_of(self.x, self.y)

    def text(self) -> str:
        """The published prompt; it ends in a space."""
        return f"x = {self.x}\ny = {self.y}\nx {self.operation} y = "


def sums(split: Split) -> dict[int, list[Sum]]:
    """Every prompt of a split whose answer is at least 1, by the answer's first digit."""
    found: dict[int, list[Sum]] = {digit: [] for digit in range(1, DIGITS + 1)}
    for x in NUMBERS:
        for y in NUMBERS:
            for operation in OPERATIONS:
                prompt = Sum(x, y, operation)
                if prompt.answer > 0 and prompt.split == split:
                    found[prompt.first_digit].append(prompt)
    return found


class Scorer:
    """Token ids for one tokenizer; `trailing_space` False moves the prompt's last space into the answer.

    InputError where the tokenizer merges answers with the prompt, or where the first tokens of answers do not
    tell their first digits apart.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, trailing_space: bool = True) -> None:
        if tokenizer is None:
            raise InputError("the arithmetic task writes text and needs a tokenizer, found none; load one")
        self.tokenizer, self.trailing_space = tokenizer, trailing_space
        self._tokens = {number: self._first_token(number) for number in range(1, 2 * max(NUMBERS) + 1)}
        by_token: dict[int, set[str]] = {}
        for number, token in self._tokens.items():
            by_token.setdefault(token, set()).add(str(number)[0])
        for token, digits in by_token.items():
            if len(digits) > 1:
                raise InputError(
                    "the first token of an answer does not tell it apart: with this tokenizer answers that "
                    "begin with "
                    f"{', '.join(sorted(digits))} all begin with the token "
                    f"{tokenizer.convert_ids_to_tokens(token)!r}; use a tokenizer with a token for every "
                    "digit"
                )

    def prompt(self, prompt: Sum) -> str:
        return prompt.text() if self.trailing_space else prompt.text().rstrip(" ")

    def ids(self, prompt: Sum) -> tuple[int, ...]:
        return prompt_ids(self.tokenizer, self.prompt(prompt))

    def token(self, answer: int) -> int:
        """The first token of an answer."""
        return self._tokens[answer]

    def _first_token(self, number: int) -> int:
        prompt = self.prompt(Sum(11, 11, "+"))
        before = encode(self.tokenizer, prompt)
        answer = str(number) if self.trailing_space else f" {number}"
        after = encode(self.tokenizer, prompt + answer)
        if self.trailing_space and after[: len(before)] != before:
            tokens = self.tokenizer.convert_ids_to_tokens(after[-2:])
            raise InputError(
                f"this tokenizer merges the space at the prompt's end with the answer {number} (... "
                f"{' '.join(map(repr, tokens))}); use trailing_space=False, which leaves that space to the "
                "answer"
            )
        return continuation_ids(self.tokenizer, prompt, [answer], first_token=True)[0]


def _desideratum(name: str, kind: Kind, description: str, by_value: bool) -> Desideratum:
    def make(
        tokenizer: PreTrainedTokenizerBase | None,
        n: int,
        seed: int,
        split: Split,
        trailing_space: bool = True,
    ) -> Dataset:
        if n < DIGITS:
            raise InputError(
                f"{name}: n is {n}; expected at least {DIGITS}, one triple for every first digit"
            )
        scorer, pool = Scorer(tokenizer, trailing_space), sums(split)
        rng = random.Random(f"arithmetic {name} {split} {seed}")

        def draw(index: int) -> Triple | Excluded:
            # The prompt whose answer is the target has the first digit whose turn it is.
            other = None
            while other is None:
                aimed = rng.choice(pool[index % DIGITS + 1])
                other = _other_value(rng, aimed) if by_value else _other_operation(aimed)
            original, alternate = (other, aimed) if by_value else (aimed, other)
            return _triple(name, kind, scorer, original, alternate, aimed)

        # As published: a number of samples is divided over the nine digits, and the rest is dropped (50 gives
        # 45).
        return collect(name, n // DIGITS * DIGITS, draw)

    return Desideratum(name, kind, description, make)


def _other_value(rng: random.Random, prompt: Sum) -> Sum | None:
    others = [Sum(x, prompt.y, prompt.operation) for x in NUMBERS if x != prompt.x]
    fitting = [other for other in others if other.answer > 0 and other.split == prompt.split]
    return rng.choice(fitting) if fitting else None


def _other_operation(prompt: Sum) -> Sum | None:
    other = Sum(prompt.x, prompt.y, OPERATIONS[1 - OPERATIONS.index(prompt.operation)])
    return other if other.answer > 0 else None


def _triple(
    name: str, kind: Kind, scorer: Scorer, original: Sum, alternate: Sum, aimed: Sum
) -> Triple | Excluded:
    answer, other, target = (scorer.token(prompt.answer) for prompt in (original, alternate, aimed))
    reason = uninformative(kind, answer, other, target)
    if reason is not None:
        return Excluded("the two answers begin with the same token")
    return Triple(
        desideratum=name,
        original_ids=scorer.ids(original),
        alternate_ids=scorer.ids(alternate),
        target_id=target,
        split=original.split,
        original_answer_id=answer,
        alternate_answer_id=other,
        meta={
            "original": scorer.prompt(original),
            "alternate": scorer.prompt(alternate),
            "target": str(aimed.answer),
            "original_answer": str(original.answer),
            "alternate_answer": str(alternate.answer),
            "operation": original.operation,
        },
    )


value_dependence = _desideratum(
    "value_dependence",
    "dependence",
    "The alternate binds another number to x (published as ValueSwitch). Target: the alternate's answer.",
    by_value=True,
)
operation_invariance = _desideratum(
    "operation_invariance",
    "invariance",
    "The alternate has the other operation (published as TaskSwitch). Target: the original's answer.",
    by_value=False,
)
DESIDERATA = (value_dependence, operation_invariance)


def pairs(
    tokenizer: PreTrainedTokenizerBase | None,
    n: int,
    seed: int,
    split: str = "test",
    trailing_space: bool = True,
) -> list[Pair]:
    """Pairs of `value_dependence`: the corrupt prompt has another x, and `wrong` is its answer's first token.

    Prompts of a pair have one length where two-digit numbers all have as many tokens; InputError where not.
    """
    rounded = -(-n // DIGITS) * DIGITS
    rows = value_dependence(tokenizer, rounded, seed, split, trailing_space=trailing_space).to_list()[:n]
    found = []
    for index, row in enumerate(rows):
        if len(row["original_ids"]) != len(row["alternate_ids"]):
            raise InputError(
                f"this tokenizer gives {row['original']!r} and {row['alternate']!r} different lengths; "
                "use one with a fixed number of tokens for two-digit numbers"
            )
        found.append(
            Pair(
                clean_ids=tuple(row["original_ids"]),
                corrupt_ids=tuple(row["alternate_ids"]),
                answer_id=row["original_answer_id"],
                wrong_id=row["alternate_answer_id"],
                id=f"arithmetic-{split}-{seed}-{index}",
                meta={"clean": row["original"], "corrupt": row["alternate"], "operation": row["operation"]},
            )
        )
    return found
