"""Sharing prefixes: the first tokens that prompts have in common are run once in a process.

Prompts of a study often begin with the same long text (worked examples, instructions) and differ in a short rest. In a
causal model nothing at those first tokens depends on the rest, so their keys and values serve every prompt and every
run that leaves their activations as they are. `share_prefixes` cuts batches behind what their prompts have in common
(`patchkit.tracing.suffix`); whatever is run on such a batch runs its last columns alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar, Token
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import nnsight
import torch
from torch import Tensor

from patchkit.data.batch import Batch
from patchkit.model import PatchModel
from patchkit.tracing._inputs import forward_inputs
from patchkit.tracing.suffix import KnownTokens, SuffixBatch, kept_cache

#: Numbers of each parameter that are looked at to tell whether weights were changed behind torch's back.
SAMPLES = 8
#: Kinds of rotary embedding whose angles depend on how long the prompt is.
_OF_LENGTH = ("dynamic", "longrope")

Tokens = tuple[int, ...]


class _Weights(NamedTuple):
    """What a model's weights were: where they lie, how often torch saw them written, and some of their numbers."""

    written: tuple[tuple[Any, ...], ...]
    numbers: tuple[float, ...]


@dataclass
class _OfModel:
    weights: _Weights
    #: By tokens; the number says when each was used last.
    held: dict[Tokens, tuple[KnownTokens, int]]


class Prefixes:
    """Prefixes that were run, of each model: the least recently used go when there are too many.

    They are freed with their model, and forgotten when its weights change.

    Args:
        least: tokens of a prefix that is worth a run of its own.
        worth: tokens that a new prefix must save in the batches that ask for it.
        most: how many are held.
        max_bytes: of all that are held.
        groups: different prefixes of one batch.
    """

    def __init__(
        self, *, least: int = 16, worth: int = 64, most: int = 16, max_bytes: int = 1 << 30, groups: int = 4
    ) -> None:
        self.least, self.worth, self.most = least, worth, most
        self.max_bytes, self.groups = max_bytes, groups
        self._models: WeakKeyDictionary[PatchModel, _OfModel] = WeakKeyDictionary()
        self._clock = 0

    def __len__(self) -> int:
        return sum(len(each.held) for each in self._models.values())

    @property
    def bytes(self) -> int:
        return sum(known.bytes for each in self._models.values() for known, _ in each.held.values())

    def clear(self) -> None:
        """Forgets everything."""
        self._models.clear()

    def open(self, model: PatchModel) -> None:
        """To be called before anything of a model is looked for: what other weights gave is forgotten."""
        weights = _weights(model)
        held = self._models.get(model)
        if held is None or held.weights != weights:
            self._models[model] = _OfModel(weights, {})

    def find(self, model: PatchModel, tokens: Tokens) -> tuple[KnownTokens | None, int]:
        """The known prefix that begins with the most of these tokens, and how many that is."""
        held = self._models[model].held
        best = max(held, key=lambda known: len(_common([known, tokens])), default=())
        matched = len(_common([best, tokens]))
        return (held[best][0], matched) if matched else (None, 0)

    def use(self, model: PatchModel, known: KnownTokens) -> None:
        """Notes that a prefix is in use, new or not; drops others if they are too many now."""
        self._clock += 1
        self._models[model].held[known.tokens] = (known, self._clock)
        while len(self) > self.most or self.bytes > self.max_bytes:
            every = [(when, of, key) for of in self._models.values() for key, (_, when) in of.held.items()]
            _, of, key = min(every, key=lambda each: each[0])
            del of.held[key]


class _Current:
    """What `use_prefixes` has set last. (A ContextVar alone does not travel to a hosted model; every job has its own.)"""

    def __init__(self) -> None:
        self._set: ContextVar[Prefixes | None] = ContextVar("prefixes", default=Prefixes())  # noqa: B039

    def __reduce__(self) -> tuple[type[_Current], tuple[()]]:
        return (_Current, ())

    def get(self) -> Prefixes | None:
        return self._set.get()

    def set(self, prefixes: Prefixes | None) -> Token[Prefixes | None]:
        return self._set.set(prefixes)

    def reset(self, token: Token[Prefixes | None]) -> None:
        self._set.reset(token)


_CURRENT = _Current()


@contextmanager
def use_prefixes(prefixes: Prefixes | None) -> Iterator[None]:
    """Holds prefixes elsewhere inside; with None every prompt is run whole."""
    token = _CURRENT.set(prefixes)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def forget_prefixes() -> None:
    """Frees what is held where prefixes are held now, because memory has run out."""
    prefixes = _CURRENT.get()
    if prefixes is not None:
        prefixes.clear()


def share_prefixes(
    model: PatchModel, batches: Sequence[Batch], *, alike: bool = False
) -> tuple[list[Batch], int]:
    """Cuts batches behind what their prompts have in common, where that is worth it; else gives them back as they are.

    All prompts may have one prefix, or a few groups of them one each. At least the last token of every prompt is left.

    Args:
        alike: cut only where a row's tokens are the same in all batches, whose prompts have the same lengths row by row;
            they are cut at the same column then.

    Returns:
        The batches, in order, and how many tokens were run for prefixes that were not known before.
    """
    prefixes, whole = _CURRENT.get(), list(batches)
    if prefixes is None or not _allowed(model):
        return whole, 0
    by_batch = [_prompts(batch) for batch in batches]
    if alike:
        by_batch = [[_common(rows) for rows in zip(*by_batch, strict=True)]] * len(batches)
    prompts = [row for rows in by_batch for row in rows]
    chosen = _groups(prompts, prefixes)
    if chosen is None:
        return whole, 0
    prefixes.open(model)
    lengths = torch.zeros(len(prompts), dtype=torch.long)
    which = torch.zeros(len(prompts), dtype=torch.long)
    found: list[tuple[KnownTokens | None, int, Tokens]] = []
    for number, (tokens, members) in enumerate(chosen):
        known, matched = prefixes.find(model, tokens)
        # A little less, known already, is better than all of it run anew.
        if known is None or matched < prefixes.least or matched < 0.75 * len(tokens):
            found.append((known, matched, tokens))
            lengths[members] = len(tokens)
        else:
            found.append((known, matched, known.tokens))
            lengths[members] = matched
        which[members] = number
    rows = [batch.rows for batch in batches]
    starts = [
        int((batch.offset.cpu() + length).min())
        for batch, length in zip(batches, lengths.split(rows), strict=True)
    ]
    saved = sum(
        int((start - batch.offset.cpu()).clamp(min=0).sum())
        for start, batch in zip(starts, batches, strict=True)
    )
    new = [each for each in found if each[0] is None or each[2] != each[0].tokens]
    to_run = sum(len(tokens) - matched for _, matched, tokens in new)
    if min(starts) < 1 or saved - to_run < prefixes.worth * len(new):
        return whole, 0
    made = []
    for known, matched, tokens in found:
        if known is None or tokens != known.tokens:
            known = _run(model, tokens, known, matched)
        prefixes.use(model, known)
        made.append(known)
    cut = [
        SuffixBatch.of(batch, start, made, of)
        for batch, start, of in zip(batches, starts, which.split(rows), strict=True)
    ]
    return list(cut), to_run


def _groups(prompts: Sequence[Tokens], prefixes: Prefixes) -> list[tuple[Tokens, list[int]]] | None:
    """(what they have in common, which prompts) of all prompts, or of a few groups; None where it is too little."""
    members: dict[Tokens, list[int]] = {(): list(range(len(prompts)))}
    if len(_common(prompts)) < prefixes.least:
        members = {}
        for number, prompt in enumerate(prompts):
            members.setdefault(prompt[: prefixes.least], []).append(number)
    if len(members) > prefixes.groups:
        return None
    found = []
    for numbers in members.values():
        mine = [prompts[number] for number in numbers]
        shared = _common(mine)
        if len(shared) < prefixes.least:
            return None
        found.append((shared, numbers))
    return found


def _run(model: PatchModel, tokens: Tokens, known: KnownTokens | None, matched: int) -> KnownTokens:
    """Keys and values of these tokens; the first of them may be known."""
    batch = Batch.from_ids([tokens], model.pad_id)
    if known is not None:
        batch = SuffixBatch.of(batch, matched, [known], torch.zeros(1, dtype=torch.long))
    inputs = forward_inputs(model, batch, use_cache=True)
    inputs["past_key_values"] = kept_cache(batch)
    with torch.no_grad():
        with model.lm.trace(**inputs):
            layers = model.lm.output.past_key_values.layers
            kept = nnsight.save([(layer.keys[0], layer.values[0]) for layer in layers])
    keys, values = zip(*kept, strict=True)
    return KnownTokens(tokens, keys, values)


def _prompts(batch: Batch) -> list[Tokens]:
    """Each prompt without its last token, which is always run."""
    rows, offsets = batch.input_ids.tolist(), batch.offset.tolist()
    return [tuple(row[offset:-1]) for row, offset in zip(rows, offsets, strict=True)]


def _common(prompts: Sequence[Tokens]) -> Tokens:
    """The first tokens that all of these have in common."""
    # What lies between the smallest and the largest begins as both do.
    first, last = min(prompts), max(prompts)
    for place, (one, other) in enumerate(zip(first, last, strict=False)):
        if one != other:
            return first[:place]
    return first


def _allowed(model: PatchModel) -> bool:
    """Whether a token's keys depend on nothing but the tokens before it, and weights can be seen not to change."""
    if not model.reachable:
        return False
    parameters = getattr(model.config, "rope_parameters", None) or {}
    # Of a model with several, by type of layer.
    several = [each for each in parameters.values() if isinstance(each, dict)] or [parameters]
    return not any(each.get("rope_type") in _OF_LENGTH for each in several)


def _weights(model: PatchModel) -> _Weights:
    model.require_weights()
    written, samples = [], {}
    tensors: list[Tensor] = [*model.hf.parameters(), *model.hf.buffers()]
    for tensor in tensors:
        version = 0 if tensor.is_inference() else tensor._version
        written.append((tensor.data_ptr(), version, tensor.dtype, tensor.device))
        if tensor.numel() and not tensor.is_meta:
            some = tensor.detach().flatten()[:: max(1, tensor.numel() // SAMPLES)]
            samples.setdefault(tensor.device, []).append(some.float())
    numbers = [number for parts in samples.values() for number in torch.cat(parts).tolist()]
    written.append((getattr(model.config, "_attn_implementation", None),))
    return _Weights(tuple(written), tuple(numbers))
