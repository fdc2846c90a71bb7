"""The language of handmade programs: heads that look somewhere and move symbols, MLPs made of ReLUs, and spaces between.

The residual stream is divided into **spaces**: one dimension a symbol, 1 where the symbol is present. Two exist always:
`token` (the word here) and `one` (1 everywhere). A program names the others and says which head or MLP reads which and
writes which. Everything else (weights in Llama and GPT-2, the true circuit) follows from that.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from patchkit.errors import InputError

KEYS: tuple[str, ...] = tuple("abcdefgh")
VALUES: tuple[str, ...] = tuple("01234567")
MARKS: tuple[str, ...] = ("=", ",", ".", "+", "yes", "no")
START = "<s>"
WORDS: tuple[str, ...] = ("<pad>", START, "<unk>", *KEYS, *VALUES, *MARKS)

#: Scores are this far apart where attention is to be exactly one-hot: exp(-163) is 0 in float32, and so is exp(-110).
ONE_HOT = 4096.0


@dataclass(frozen=True)
class At:
    """Some dimensions of a space, in order; a symbol may come more than once."""

    space: str
    symbols: tuple[str, ...]


@dataclass(frozen=True)
class Offset:
    """Look `back` tokens back, whatever stands there; exact for prompts of up to 18 tokens."""

    back: int


@dataclass(frozen=True)
class Match:
    """`score` for each pair (query symbol here, key symbol there) of the same place in both lists."""

    query: At
    key: At
    score: float


@dataclass(frozen=True)
class Everywhere:
    """Attend to all tokens alike."""


@dataclass(frozen=True)
class Move:
    """Carry symbols from the token looked at to here, `scale` of each."""

    reads: At
    writes: At
    scale: float = 1.0


@dataclass(frozen=True)
class Head:
    """One attention head.

    Attributes:
        looks: where it attends; several matches add up.
        twin: with grouped KV heads it shares those of the head before it, so that keys and values read must be the same.
    """

    layer: int
    head: int
    looks: tuple[Offset | Match | Everywhere, ...]
    moves: tuple[Move, ...]
    twin: bool = False

    @property
    def name(self) -> str:
        return f"a{self.layer}.h{self.head}"


#: A symbol of a space and a weight.
Weighted = tuple[str, str, float]


@dataclass(frozen=True)
class Neuron:
    """Writes relu(sum of weight * symbol + bias), times each weight of `writes`."""

    reads: tuple[Weighted, ...]
    bias: float
    writes: tuple[Weighted, ...]


@dataclass(frozen=True)
class Mlp:
    layer: int
    neurons: tuple[Neuron, ...]

    @property
    def name(self) -> str:
        return f"m{self.layer}"


@dataclass(frozen=True)
class Prompt:
    """A prompt's words, without the start, and the word that comes next."""

    words: tuple[str, ...]
    answer: str

    @property
    def text(self) -> str:
        return " ".join(self.words)


@dataclass(frozen=True)
class Program:
    """A description from which a model, its prompts and its true circuit follow.

    Attributes:
        task: what it does, with an example.
        shows: what is planted in it.
        spaces: name -> symbols, besides `token` and `one`.
        answers: which symbols the unembedding reads, from the space `result`.
        sample: a random prompt.
        silent: names of heads that change nothing when one of them is patched alone.
        planted: why a method may miss something, by names as `KnownCircuit.planted` has them.
    """

    name: str
    task: str
    shows: str
    layers: int
    spaces: Mapping[str, tuple[str, ...]]
    parts: tuple[Head | Mlp, ...]
    answers: tuple[str, ...]
    sample: Callable[[random.Random], Prompt]
    silent: tuple[str, ...] = ()
    planted: Mapping[str, str] = field(default_factory=dict)
    n_heads: int = 4

    @property
    def heads(self) -> tuple[Head, ...]:
        return tuple(part for part in self.parts if isinstance(part, Head))

    @property
    def mlps(self) -> tuple[Mlp, ...]:
        return tuple(part for part in self.parts if isinstance(part, Mlp))

    def check(self) -> None:
        """InputError that names the part: outside the model, in a place that is taken, an unknown space or symbol."""
        taken: set[str] = set()
        for part in self.parts:
            where = f"program {self.name}, {part.name}"
            if part.name in taken:
                raise InputError(f"{where}: two parts stand there")
            taken.add(part.name)
            inside = part.layer < self.layers and (isinstance(part, Mlp) or part.head < self.n_heads)
            if not inside:
                raise InputError(f"{where}: the program has {self.layers} layers of {self.n_heads} heads")
            for space, symbol in sorted(_touched(part)):
                if symbol not in self.symbols(space, where):
                    raise InputError(f"{where}: space {space} has no symbol {symbol!r}")
        for part in self.heads:
            if part.twin:
                self._check_twin(part)
        unknown = sorted(set(self.silent) - taken)
        if unknown:
            raise InputError(f"program {self.name}: silent {unknown[0]} is no part of it")

    def _check_twin(self, part: Head) -> None:
        """What a KV head holds is read by both heads of its group, so both must say the same of it."""
        elder = next(
            (other for other in self.heads if (other.layer, other.head) == (part.layer, part.head - 1)), None
        )
        if elder is None or _kept(elder) != _kept(part):
            raise InputError(
                f"program {self.name}, {part.name}: a twin needs the head before it, with the same keys and the same "
                "values read"
            )

    def symbols(self, space: str, where: str = "") -> tuple[str, ...]:
        """The symbols of a space."""
        known = {"token": WORDS, "one": ("1",), **self.spaces}
        if space not in known:
            raise InputError(
                f"{where or self.name}: no space is called {space!r}; there are {', '.join(known)}"
            )
        return known[space]


def _touched(part: Head | Mlp) -> set[tuple[str, str]]:
    """Every (space, symbol) that a part reads or writes."""
    if isinstance(part, Mlp):
        return {(s, w) for neuron in part.neurons for s, w, _ in (*neuron.reads, *neuron.writes)}
    listed = [at for look in part.looks if isinstance(look, Match) for at in (look.query, look.key)]
    listed += [at for move in part.moves for at in (move.reads, move.writes)]
    return {(at.space, symbol) for at in listed for symbol in at.symbols}


def _kept(part: Head) -> tuple[list[object], list[At]]:
    """What a head's keys and values read."""
    keys: list[object] = [look.key if isinstance(look, Match) else type(look) for look in part.looks]
    return keys, [move.reads for move in part.moves]
