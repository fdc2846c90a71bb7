"""Desiderata: what must become of the original's answer when the right components are patched from the
alternate.

A desideratum is a set of triples (original, alternate, target). The target is the original's answer
(invariance: the components must not carry what changed), the alternate's answer or a third one (dependence:
they must carry it).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from patchkit.data._fields import check_columns, spans, text, token_id, token_ids
from patchkit.data._records import Record, Source, read_records, write_json_lines
from patchkit.data.tokens import continuation_ids, prompt_ids
from patchkit.errors import InputError

Split = Literal["train", "test"]

_IDS = ("desideratum", "original_ids", "alternate_ids", "target_id")
_TEXT = ("desideratum", "original", "alternate", "target")
_ANSWER_IDS = ("original_answer_id", "alternate_answer_id")
_ANSWER_TEXT = ("original_answer", "alternate_answer")
_SPANS = ("spans", "alternate_spans")
_COLUMNS = (*_IDS, *_ANSWER_IDS, *_SPANS, "split")


@dataclass(frozen=True)
class Triple:
    """One triple in token ids, without padding.

    `split` is None where the file did not say. `spans` are named [start, end) in the original's tokens; the
    alternate has the same unless `alternate_spans` names them otherwise. `where` is the file and line, for
    messages.
    """

    desideratum: str
    original_ids: tuple[int, ...]
    alternate_ids: tuple[int, ...]
    target_id: int
    split: Split | None = None
    original_answer_id: int | None = None
    alternate_answer_id: int | None = None
    spans: dict[str, tuple[int, int]] = field(default_factory=dict)
    # Kept for the user: no number depends on it.
    meta: dict[str, Any] = field(default_factory=dict, compare=False)
    alternate_spans: dict[str, tuple[int, int]] = field(default_factory=dict)
    where: str = field(default="", compare=False)

    @property
    def kind(self) -> Literal["dependence", "invariance"]:
        """`invariance` if the target is the original's own answer, else `dependence` (also if that is not
        known).
        """
        return "invariance" if self.target_id == self.original_answer_id else "dependence"

    def span(self, name: str) -> tuple[tuple[int, int], tuple[int, int]]:
        """The named span in the original and in the alternate; InputError names the triple if it has none."""
        if name not in self.spans:
            known = ", ".join(self.spans) or "none"
            raise InputError(f"{self._called()} has no span {name!r}; it has: {known}; add it to its `spans`")
        original, alternate = self.spans[name], self.alternate_spans.get(name, self.spans[name])
        if alternate[1] > len(self.alternate_ids) or alternate[1] - alternate[0] != original[1] - original[0]:
            raise InputError(
                f"{self._called()}: span {name!r} is {list(original)} in the original and {list(alternate)} "
                "in the "
                f"alternate of {len(self.alternate_ids)} tokens; expected the same number of tokens in both"
            )
        return original, alternate

    def _called(self) -> str:
        return f"{self.where or 'a triple'} ({self.desideratum})"


def read_desiderata(
    source: Source,
    tokenizer: PreTrainedTokenizerBase | None,
    vocab_size: int | None,
    answer_first_token: bool = False,
) -> list[Triple]:
    """Triples from a JSON Lines file or a `datasets.Dataset`.

    Id form: `desideratum`, `original_ids`, `alternate_ids`, `target_id`, and if known `original_answer_id`,
    `alternate_answer_id`. Text form: `desideratum`, `original`, `alternate`, `target`, and if known
    `original_answer`, `alternate_answer`; it needs the tokenizer. Optional in both: `split` ("train" or
    "test"; all lines or none), `spans`, `alternate_spans`; other keys are metadata, and so is text beside
    ids. With vocab_size None the ids' upper end is not checked. The two prompts may differ in length: see
    `require_equal_lengths`. Raises InputError that names the line.
    """
    records = read_records(source, "desiderata")
    triples = [_read(record, tokenizer, vocab_size, answer_first_token) for record in records]
    given = [triple.split is not None for triple in triples]
    if any(given) and not all(given):
        raise records[given.index(False)].error(
            "has no `split`, but other lines have; give it to all lines or to none"
        )
    return triples


def _read(
    record: Record, tokenizer: PreTrainedTokenizerBase | None, vocab_size: int | None, first_token: bool
) -> Triple:
    values = record.values
    answers: dict[str, int] = {}
    if any(name in values for name in _IDS[1:]):
        check_columns(record, _IDS, (*_COLUMNS, *_TEXT, *_ANSWER_TEXT))
        original, alternate = (
            token_ids(record, name, vocab_size) for name in ("original_ids", "alternate_ids")
        )
        target = token_id(record, "target_id", vocab_size)
        given = [name for name in _ANSWER_IDS if values.get(name) is not None]
        answers = {name: token_id(record, name, vocab_size) for name in given}
        used: tuple[str, ...] = ()
    else:
        check_columns(record, _TEXT, (*_TEXT, *_ANSWER_TEXT, *_SPANS, "split"))
        original, alternate = (_prompt(record, name, tokenizer) for name in ("original", "alternate"))
        assert tokenizer is not None
        given = [name for name in _ANSWER_TEXT if values.get(name) is not None]
        named = [text(record, name) for name in ("target", *given)]
        with record.naming(", ".join(("target", *given))):
            target, *others = continuation_ids(tokenizer, text(record, "original"), named, first_token)
        answers = {f"{name}_id": token for name, token in zip(given, others, strict=True)}
        used = (*_TEXT, *_ANSWER_TEXT)
        highest = max(*original, *alternate, target, *others)
        if vocab_size is not None and highest >= vocab_size:
            raise record.error(
                f"the tokenizer gives id {highest}, outside the model's vocabulary (0 to {vocab_size - 1}); "
                "use the model's own tokenizer"
            )
    split = values.get("split")
    if split not in ("train", "test", None):
        raise record.error(f'split must be "train" or "test", found {split!r}')
    return Triple(
        desideratum=text(record, "desideratum"),
        original_ids=original,
        alternate_ids=alternate,
        target_id=target,
        split=split,
        original_answer_id=answers.get("original_answer_id"),
        alternate_answer_id=answers.get("alternate_answer_id"),
        spans=spans(record, "spans", len(original)),
        alternate_spans=spans(record, "alternate_spans", len(alternate)),
        meta={key: value for key, value in values.items() if key not in (*_COLUMNS, *used)},
        where=record.where,
    )


def _prompt(record: Record, column: str, tokenizer: PreTrainedTokenizerBase | None) -> tuple[int, ...]:
    prompt = text(record, column)
    if tokenizer is None:
        raise record.error(
            f"{column} is text, but the model has no tokenizer; give {', '.join(_IDS[1:])} instead, or load "
            "a tokenizer"
        )
    with record.naming(column):
        return prompt_ids(tokenizer, prompt)


def _row(triple: Triple) -> dict[str, Any]:
    row: dict[str, Any] = {
        "desideratum": triple.desideratum,
        "original_ids": list(triple.original_ids),
        "alternate_ids": list(triple.alternate_ids),
        "target_id": triple.target_id,
    }
    for name in ("split", *_ANSWER_IDS):
        if getattr(triple, name) is not None:
            row[name] = getattr(triple, name)
    for name in _SPANS:
        if getattr(triple, name):
            row[name] = {key: list(span) for key, span in getattr(triple, name).items()}
    hidden = [key for key in triple.meta if key in _COLUMNS]
    if hidden:
        raise InputError(
            f"{triple.desideratum}: metadata key {hidden[0]!r} is the name of a column; rename it"
        )
    return {**row, **triple.meta}


def write_desiderata(path: Path | str, triples: Iterable[Triple]) -> None:
    """Writes triples as JSON Lines in id form, whole or not at all; `read_desiderata` gives the same back."""
    rows = [_row(triple) for triple in triples]
    if not rows:
        raise InputError(f"{path}: no triples to write; expected at least one")
    write_json_lines(Path(path), rows)


def to_dataset(triples: Sequence[Triple]) -> Dataset:
    """The same rows as a `datasets.Dataset` (id form); a key that only some triples have is null in the
    others.
    """
    if not triples:
        raise InputError("no triples to make a dataset of; expected at least one")
    rows = [_row(triple) for triple in triples]
    columns = dict.fromkeys(key for row in rows for key in row)
    return Dataset.from_dict({name: [row.get(name) for row in rows] for name in columns})


def from_dataset(dataset: Dataset) -> list[Triple]:
    """Triples from a dataset in id form; ids are not held against a vocabulary here."""
    return read_desiderata(dataset, tokenizer=None, vocab_size=None)
