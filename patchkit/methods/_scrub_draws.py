"""Which inputs a scrubbed run is made of: keys, buckets of equal keys, and the draws, as a tree that can be looked at."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from statistics import median

from patchkit.data import Pair
from patchkit.errors import InputError
from patchkit.methods._scrub_hypothesis import OUTPUT, Hypothesis, Interpretation

#: Occurrences of nodes in one treeified graph: beyond so many, a hypothesis takes as many runs for every input.
MOST_OCCURRENCES = 1024


@dataclass(frozen=True)
class Draw:
    """One occurrence of an interpretation node, and the inputs that were drawn for it.

    Attributes:
        node: the interpretation node, or `output`.
        input: number of the input that it stands for: the reference for the output, else one with an equal key.
        unrelated: number of the input on which everything runs that the node's children do not claim; None for a node
            without children, whose value is taken from a plain run on `input`.
        children: an occurrence of each child, in order.
    """

    node: str
    input: int
    unrelated: int | None
    children: tuple[Draw, ...] = ()

    def inputs(self) -> Iterator[int]:
        """Numbers of all inputs that are run for it."""
        yield self.input if self.unrelated is None else self.unrelated
        for child in self.children:
            yield from child.inputs()

    def occurrences(self) -> Iterator[Draw]:
        """It and all below it."""
        yield self
        for child in self.children:
            yield from child.occurrences()


@dataclass(frozen=True)
class Buckets:
    """How the inputs of equal key lie, for one interpretation node.

    Attributes:
        count: different keys in the pool; `smallest`, `middle` (median) and `largest` are their sizes.
        singletons: buckets that hold one input.
        empty: keys that were asked for and that no input of the pool has.
        draws: how often an input was drawn.
        vacuous: draws that could give nothing but the prompt that was to be replaced, so that nothing was tested.
    """

    count: int
    smallest: int
    middle: float
    largest: int
    singletons: int
    empty: int
    draws: int
    vacuous: int


@dataclass(frozen=True, eq=False)
class Draws:
    """All draws of a run.

    Attributes:
        inputs: the pool, then the references where they are none of it; trees hold numbers of these.
        pool: how many of them are drawn from.
        references: the number of each reference among them.
        trees: `samples` trees for each reference, one reference after the other.
        buckets: by interpretation node.
    """

    inputs: tuple[Pair, ...]
    pool: int
    references: tuple[int, ...]
    trees: tuple[Draw, ...]
    buckets: dict[str, Buckets]


def draw(
    hypothesis: Hypothesis,
    pairs: Sequence[Pair],
    pool: Sequence[Pair] | None = None,
    *,
    samples: int = 1,
    seed: int = 0,
) -> Draws:
    """Draws the inputs of every occurrence of every node, for every reference (Chan et al. 2022).

    A child's input has the child's key in common with the input that its parent stands for. It is another prompt than
    that wherever the pool has another with that key; else it is the same, and the draw is vacuous. An unrelated input is
    any other prompt. Draws depend on the seed, the reference's number and the path of node names alone.

    Args:
        pairs: the references; their clean prompts are the inputs.
        pool: what is drawn from; default: the references themselves.

    Raises:
        InputError: fewer than two different prompts to draw from, a key that fails or cannot be hashed, or a treeified
            graph that is too large.
    """
    size = sum(1 for _ in islice(hypothesis.occurrences(), MOST_OCCURRENCES + 1))
    if size > MOST_OCCURRENCES:
        raise InputError(
            f"hypothesis '{hypothesis.name}': its nodes occur more than {MOST_OCCURRENCES:,} times in the treeified "
            "graph, once for every path from the output; merge nodes, or give fewer of them common children"
        )
    if not pairs:
        raise InputError("causal scrubbing: there are no prompt pairs; expected at least two")
    drawn_from = tuple(pairs if pool is None else pool)
    inputs = drawn_from if pool is None else (*drawn_from, *pairs)
    dice = _Dice(hypothesis, inputs, len(drawn_from))
    first = 0 if pool is None else len(drawn_from)
    references = tuple(range(first, first + len(pairs)))
    trees = tuple(
        dice.tree(OUTPUT, reference, f"{seed} {number} {sample}")
        for number, reference in enumerate(references)
        for sample in range(samples)
    )
    buckets = {node.name: dice.buckets(node.name) for node in hypothesis.nodes}
    return Draws(inputs, len(drawn_from), references, trees, buckets)


class _Dice:
    """Draws from one pool, and counts."""

    def __init__(self, hypothesis: Hypothesis, inputs: Sequence[Pair], pool: int) -> None:
        self.hypothesis, self.pool = hypothesis, pool
        prompts: dict[tuple[int, ...], int] = {}
        self.prompt = [prompts.setdefault(pair.clean_ids, len(prompts)) for pair in inputs]
        if len(set(self.prompt[:pool])) < 2:
            raise InputError(
                f"causal scrubbing: the {pool} inputs to draw from have fewer than two different clean prompts, so none "
                "could be replaced by another; give more pairs"
            )
        self.keys = {node.name: [_key(node, pair) for pair in inputs] for node in hypothesis.nodes}
        self.members: dict[str, dict[Hashable, list[int]]] = {}
        for name, keys in self.keys.items():
            mine = self.members.setdefault(name, {})
            for number, key in enumerate(keys[:pool]):
                mine.setdefault(key, []).append(number)
        # Whether a bucket has two prompts: then another one is found by trying.
        self.varied = {
            (name, key): len({self.prompt[number] for number in bucket}) > 1
            for name, mine in self.members.items()
            for key, bucket in mine.items()
        }
        self.draws: Counter[str] = Counter()
        self.vacuous: Counter[str] = Counter()
        self.missing: dict[str, set[Hashable]] = {}

    def tree(self, name: str, number: int, path: str) -> Draw:
        """An occurrence of a node that stands for input `number`."""
        children = self.hypothesis.children_of(name)
        if name != OUTPUT and not children:
            return Draw(name, number, None)
        below = []
        for child in children:
            way = f"{path}/{child}"
            below.append(self.tree(child, self._equal(child, number, random.Random(f"equal {way}")), way))
        unrelated = self._another(range(self.pool), number, random.Random(f"unrelated {path}"))
        return Draw(name, number, unrelated, tuple(below))

    def _equal(self, name: str, number: int, rng: random.Random) -> int:
        key = self.keys[name][number]
        bucket = self.members[name].get(key)
        self.draws[name] += 1
        if bucket is None:
            self.missing.setdefault(name, set()).add(key)
        elif self.varied[name, key] or self.prompt[bucket[0]] != self.prompt[number]:
            return self._another(bucket, number, rng)
        self.vacuous[name] += 1
        return number

    def _another(self, numbers: Sequence[int], number: int, rng: random.Random) -> int:
        while True:
            found = numbers[rng.randrange(len(numbers))]
            if self.prompt[found] != self.prompt[number]:
                return found

    def buckets(self, name: str) -> Buckets:
        sizes = [len(bucket) for bucket in self.members[name].values()]
        return Buckets(
            count=len(sizes),
            smallest=min(sizes),
            middle=float(median(sizes)),
            largest=max(sizes),
            singletons=sizes.count(1),
            empty=len(self.missing.get(name, ())),
            draws=self.draws[name],
            vacuous=self.vacuous[name],
        )


def _key(node: Interpretation, pair: Pair) -> Hashable:
    try:
        key, again = node.key(pair), node.key(pair)
    except Exception as error:
        # A user's function may raise anything.
        raise InputError(
            f"interpretation node '{node.name}': its key function failed on pair {pair.id!r} with "
            f"{type(error).__name__}: {error}"
        ) from error
    try:
        same = hash(key) == hash(again) and bool(key == again)
    except TypeError:
        raise InputError(
            f"interpretation node '{node.name}': the key of pair {pair.id!r} is a {type(key).__name__} that cannot be "
            "hashed; return a number, a string or a tuple of these"
        ) from None
    if not same:
        # Tensors and most objects are hashed by identity; NaN equals nothing.
        raise InputError(
            f"interpretation node '{node.name}': the key of pair {pair.id!r} was {key!r} and then {again!r}, which are "
            "not equal, so no input could share it; return numbers, strings or tuples of these, the same every time"
        )
    return key
