"""Triples for the tests of masks: random ones for random models, and some for the handmade model."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Literal

from patchkit.data import Triple
from patchkit.methods._mask_prepare import Chunk
from patchkit.methods._mask_prepared import Prepared
from patchkit.zoo import handmade
from tests.families import VOCAB
from tests.methods.plain_mask import Example

Split = Literal["train", "test"]


def random_triples(
    n: int,
    seed: int = 0,
    *,
    lengths: tuple[int, ...] = (6, 3, 8, 5),
    names: tuple[str, ...] = ("value", "operation"),
    split: Split | None = None,
) -> list[Triple]:
    """`n` triples a desideratum of random tokens: the first one a dependence, the others invariances.

    Prompt and alternate differ in length; each has a span `middle` of one token, at another place in the two.
    """
    rng = random.Random(seed)
    triples = []
    for place, name in enumerate(names):
        for index in range(n):
            original, alternate = (
                tuple(rng.randrange(3, VOCAB) for _ in range(lengths[(index + shift) % len(lengths)]))
                for shift in (0, 1)
            )
            answer, other = rng.sample(range(3, VOCAB), 2)
            at = rng.randrange(1, len(original)), rng.randrange(1, len(alternate))
            triples.append(
                Triple(
                    desideratum=name,
                    original_ids=original,
                    alternate_ids=alternate,
                    target_id=answer if place else other,
                    split=split,
                    original_answer_id=answer,
                    alternate_answer_id=other,
                    spans={"middle": (at[0], at[0] + 1)},
                    alternate_spans={"middle": (at[1], at[1] + 1)},
                )
            )
    return triples


def chunks(prepared: Prepared) -> list[Chunk]:
    """The batches that masked runs are made on, opened once more."""
    return [
        session.opener.open(session.model, [session.items[number] for number in batch])
        for session in prepared.sessions
        for batch in session.batches
    ]


def as_example(triple: Triple, position: str = "last") -> Example:
    """The same for the plain loop. Its rival is the answer that the target is not."""
    invariant = triple.target_id == triple.original_answer_id
    rival = triple.alternate_answer_id if invariant else triple.original_answer_id
    assert rival is not None
    places = (
        (-1, -1) if position == "last" else (triple.spans[position][0], triple.alternate_spans[position][0])
    )
    return Example(triple.original_ids, triple.alternate_ids, triple.target_id, rival, invariant, *places)


def handmade_triples(n: int, seed: int, *, change: Literal["value", "query"] = "value") -> list[Triple]:
    """Value dependence on the handmade model: another digit for the queried letter, or another letter asked for.

    The answers are left for the model to fill in. The span `digit` is the queried letter's digit in the original.
    """
    rng = random.Random(seed)
    tokenizer = handmade.build_tokenizer()
    triples = []
    for prompt in handmade.sample_prompts(20 * n, seed=seed):
        index = prompt.keys.index(prompt.query)
        if change == "value":
            values = list(prompt.values)
            values[index] = rng.choice([value for value in range(8) if value != values[index]])
            other = replace(prompt, values=tuple(values))
        else:
            other = replace(prompt, query=rng.choice([key for key in prompt.keys if key != prompt.query]))
        if other.answer == prompt.answer:
            continue
        original, alternate = (tuple(tokenizer(p.text)["input_ids"]) for p in (prompt, other))
        # <s> a = 3 , b = 7 , ...: the digit of binding i is token 3 + 4 i.
        span = {"digit": (3 + 4 * index, 4 + 4 * index)}
        triples.append(Triple(change, original, alternate, handmade.TOKEN_IDS[other.answer], spans=span))
        if len(triples) == n:
            return triples
    raise AssertionError("too few prompts drawn")
