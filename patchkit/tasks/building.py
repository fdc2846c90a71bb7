"""How a task's triples are gathered: drawn from a seed, kept only if they can tell success from failure."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from patchkit.data.desiderata import Triple, from_dataset, to_dataset
from patchkit.errors import InputError

Split = Literal["train", "test"]
Kind = Literal["dependence", "invariance", "third"]

_SPLITS: dict[str, Split] = {"train": "train", "test": "test"}

# Draws in a row without a new triple before giving up; the tightest cell of the tasks needs a few dozen.
_PATIENCE = 2000


def require_split(split: str) -> Split:
    """The same split; InputError if it is neither `train` nor `test`."""
    if split not in _SPLITS:
        raise InputError(f"split must be 'train' or 'test', found {split!r}")
    return _SPLITS[split]


@dataclass(frozen=True)
class Excluded:
    """A draw that is left out, and why."""

    reason: str


@dataclass(frozen=True)
class Desideratum:
    """A named function from a seed to a dataset of triples; `description` says what changes and what is
    asked.

    Call it as `desideratum(tokenizer, n, seed, split, **options)`; the options are those of its task. What
    was left out is in the dataset: `excluded(dataset)`.
    """

    name: str
    kind: Kind
    description: str
    make: Callable[..., Dataset]

    def __call__(
        self, tokenizer: PreTrainedTokenizerBase | None, n: int, seed: int, split: str, **options: object
    ) -> Dataset:
        """`n` triples of one split; the same seed gives the same triples."""
        return self.make(tokenizer, n, seed, require_split(split), **options)


@dataclass(frozen=True)
class DesiderataSet:
    """Triples of several desiderata as one dataset, and how many draws were left out, by desideratum and
    reason.

    The dataset has the columns of a desiderata file in id form, and the text beside them.
    """

    dataset: Dataset
    excluded: dict[str, int]

    def triples(self) -> list[Triple]:
        """The dataset's rows as triples."""
        return from_dataset(self.dataset)


def uninformative(
    kind: Kind, original_answer: object, alternate_answer: object, target: object
) -> Excluded | None:
    """Why a triple could not tell success from failure, or None if it can.

    An invariance whose alternate has the same answer is passed by patching everything; a dependence whose
    target is the original's answer is passed by patching nothing; a target that is to be neither answer must
    be neither.
    """
    if kind == "invariance" and alternate_answer == original_answer:
        return Excluded("the alternate has the original's answer")
    if kind != "invariance" and target == original_answer:
        return Excluded("the target is the original's own answer")
    if kind == "third" and target == alternate_answer:
        return Excluded("the target is the alternate's own answer")
    return None


def collect(name: str, n: int, draw: Callable[[int], Triple | Excluded]) -> Dataset:
    """`n` different triples from `draw`, which gets the number of the triple it is for.

    The dataset's `info.description` is JSON that says how many draws were left out, by reason; `excluded`
    reads it. InputError where n is not positive or the draws run dry.
    """
    if n < 1:
        raise InputError(f"{name}: the number of triples must be at least 1, found {n}")
    triples: list[Triple] = []
    seen: set[tuple[tuple[int, ...], tuple[int, ...]]] = set()
    left_out: dict[str, int] = {}
    fruitless = 0
    while len(triples) < n:
        drawn = draw(len(triples))
        fruitless += 1
        if isinstance(drawn, Excluded):
            left_out[drawn.reason] = left_out.get(drawn.reason, 0) + 1
        elif (drawn.original_ids, drawn.alternate_ids) not in seen:
            seen.add((drawn.original_ids, drawn.alternate_ids))
            triples.append(drawn)
            fruitless = 0
        if fruitless == _PATIENCE:
            raise InputError(
                f"{name}: only {len(triples)} of {n} different triples could be made; ask for fewer"
            )
    dataset = to_dataset(triples)
    dataset.info.description = json.dumps({"desideratum": name, "n": n, "excluded": left_out})
    return dataset


def excluded(dataset: Dataset) -> dict[str, int]:
    """How many draws were left out of a desideratum's dataset, by reason; InputError for another dataset."""
    try:
        return dict(json.loads(dataset.info.description)["excluded"])
    except (json.JSONDecodeError, KeyError, TypeError):
        raise InputError(
            "this dataset does not say what was left out; it must come straight from a desideratum's function"
        ) from None


def gather(datasets: Sequence[tuple[str, Dataset]]) -> DesiderataSet:
    """One set of several desiderata's datasets, given as (name, dataset)."""
    triples = [triple for _, dataset in datasets for triple in from_dataset(dataset)]
    left_out: dict[str, int] = {}
    for name, dataset in datasets:
        for reason, count in excluded(dataset).items():
            key = f"{name}: {reason}"
            left_out[key] = left_out.get(key, 0) + count
    return DesiderataSet(to_dataset(triples), left_out)


def split_by_hash(text: str, one_in: int) -> Split:
    """A stable split of a binding by its text: one in `one_in` is test, the same on every machine."""
    digest = hashlib.sha256(text.encode()).digest()
    return "test" if int.from_bytes(digest[:4], "big") % one_in == 0 else "train"
