"""Prefixes that are run once: what is read behind them is what whole prompts have, and they are held as promised."""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from patchkit.data import Batch
from patchkit.model import PatchModel, Site
from patchkit.tracing import blended_logits, capture, capture_gradients, compute_prefix, prefixes
from patchkit.tracing.prefixes import Prefixes, share_prefixes, use_prefixes
from patchkit.tracing.restart import Swap, compute_base, run_swapped
from patchkit.tracing.suffix import SuffixBatch
from patchkit.zoo.load import load
from tests import oracles
from tests.comparisons import agree, kinds_of, metric, pair
from tests.families import FAMILIES, VOCAB, build

#: Beside `make test`, in a lane of its own.
pytestmark = pytest.mark.slow

Prompt = tuple[int, ...]
every_family = pytest.mark.parametrize("family", FAMILIES)
#: Longer than the sliding windows.
PREAMBLE = (7, 30, 11, 22, 5, 9, 17, 28, 33)
#: Behind it, of several lengths; the last begins like the first.
RESTS = ((5, 9, 30, 2), (11, 3), (6, 1, 35, 20, 14, 8), (5, 9, 30, 4))
#: Prompts of three prefixes.
OTHER = (4, 8, 19, 21, 6, 33, 12, 10)
MIXED = [
    *(PREAMBLE + RESTS[i] for i in (0, 2)),
    *(OTHER + RESTS[i] for i in (0, 1)),
    (3, 4, 8, 21, 6),
    (3, 4, 8, 19),
]


def any_prefix(**options: int) -> Prefixes:
    """Prefixes that are held however short they are and however little they save."""
    return Prefixes(**{"least": 1, "worth": -(10**6), **options})  # type: ignore[arg-type]


def precise(family: str) -> torch.dtype:
    # Experts have no products in float64.
    return torch.float32 if "experts" in family else torch.float64


def tolerance(family: str) -> float:
    return 1e-5 if "experts" in family else 1e-10


def cut(model: PatchModel, prompts: Sequence[Sequence[int]], held: Prefixes | None = None) -> Batch:
    with use_prefixes(any_prefix() if held is None else held):
        (batch,), _ = share_prefixes(model, [Batch.from_ids(prompts, model.pad_id)])
    return batch


@contextmanager
def counted(model: PatchModel) -> Iterator[list[int]]:
    """Tokens of every forward inside, padding too."""
    tokens: list[int] = []

    def note(module: Any, args: Any, kwargs: dict[str, Tensor]) -> None:
        tokens.append(kwargs["input_ids"].numel())

    handle = model.hf.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield tokens
    finally:
        handle.remove()


def check_run(family: str, prompts: Sequence[Prompt], batch: Batch) -> None:
    """Activations, gradients and logits of a cut batch, against whole prompts run one by one."""
    model, twin = pair(family, precise(family))
    sites = [Site(kind, layer) for kind in kinds_of(family) for layer in range(3)]
    run, back = capture(model, batch, sites), capture_gradients(model, batch, sites, metric)
    for row, ids in enumerate(prompts):
        values, logits = oracles.read(twin, ids)
        slopes, score = oracles.gradients(twin, ids, metric)
        agree(run.logits[row], logits, f"logits of row {row}", tolerance(family))
        agree(back.metric[row], score, f"metric of row {row}", tolerance(family))
        here = int(batch.lengths[row])
        for site in sites:
            found, slope = run.values[site][row], back.gradients[site][row]
            assert len(found) == batch.width
            place = (site.kind, site.layer)
            agree(found[-here:], values[place][-here:], f"{site}, row {row}", tolerance(family))
            slopes_here = slopes[place][-here:]
            agree(slope[-here:], slopes_here, f"gradient at {site}, row {row}", 10 * tolerance(family))


@every_family
def test_what_is_read_behind_a_prefix_is_what_whole_prompts_have_there(family: str) -> None:
    model, _ = pair(family, precise(family))
    prompts = [PREAMBLE + rest for rest in RESTS]
    batch = cut(model, prompts)
    assert isinstance(batch, SuffixBatch) and batch.start == 9 and batch.width == 6
    # Shorter rows run the end of the prefix again, where they would have run padding.
    assert batch.before.tolist() == [7, 5, 9, 7] and bool(batch.attention_mask.all())
    check_run(family, prompts, batch)


@pytest.mark.parametrize("family", ["llama-gqa", "gpt2", "gemma2-post-norms-softcap", "mistral-window"])
def test_several_prefixes_in_one_batch_and_padding_that_is_left(family: str) -> None:
    model, _ = pair(family, precise(family))
    batch = cut(model, MIXED)
    assert isinstance(batch, SuffixBatch) and batch.which.tolist() == [0, 0, 1, 1, 2, 2]
    # The last rows have more padding than the cut leaves room for.
    assert batch.before.tolist() == [7, 9, 6, 4, 0, 0] and not bool(batch.attention_mask.all())
    check_run(family, MIXED, batch)


@settings(max_examples=25, deadline=None)
@given(
    shared=st.integers(0, 12),
    rests=st.lists(st.integers(0, 7), min_size=1, max_size=4),
    family=st.sampled_from(["llama-gqa", "gpt2", "gemma3-two-thetas", "phi3-fused-gqa"]),
    seed=st.integers(0, 1000),
)
def test_any_lengths(shared: int, rests: list[int], family: str, seed: int) -> None:
    draw = random.Random(seed)

    def some(count: int) -> Prompt:
        return tuple(draw.randrange(3, VOCAB) for _ in range(count))

    prefix = some(shared)
    prompts = [prefix + some(count) for count in rests]
    prompts = [prompt or (5,) for prompt in prompts]
    model, twin = pair(family, torch.float64)
    batch = cut(model, prompts)
    assert int(batch.lengths.min()) >= 1
    logits = capture(model, batch, []).logits
    for row, ids in enumerate(prompts):
        agree(logits[row], oracles.read(twin, ids)[1], f"row {row}", 1e-10)


def test_prompts_that_are_the_same_in_full_keep_their_last_token() -> None:
    model, twin = pair("llama-gqa", torch.float64)
    batch = cut(model, [PREAMBLE, PREAMBLE])
    assert batch.width == 1
    agree(capture(model, batch, []).logits[1], oracles.read(twin, PREAMBLE)[1], "the last token", 1e-10)


@every_family
def test_restarts_and_masks_behind_a_prefix(family: str) -> None:
    model, twin = pair(family, precise(family))
    prompts = [PREAMBLE + rest for rest in RESTS]
    batch = cut(model, prompts)
    base = compute_base(model, batch, behind_attention=[1])
    generator = torch.Generator().manual_seed(3)
    for kind in ("resid_pre", "k", "z", "mlp_out"):
        site = Site(kind, 1)
        values = capture(model, batch, [site]).values[site]
        values = values + torch.randn(values.shape, generator=generator).to(values)
        column = batch.width - 2
        where = torch.zeros(2, batch.width, values.shape[2] if values.ndim == 4 else 1, dtype=torch.bool)
        where[:, column] = True
        for start in (0, column):
            rows = torch.tensor([2, 1])
            logits = run_swapped(model, base, rows, [Swap(site, where, values)], layer=1, start=start)
            for row, of in enumerate(rows.tolist()):

                def edit(activation: Tensor, of=of, values=values) -> Tensor:
                    activation[-2] = values[of, -2]
                    return activation

                expected = oracles.patched_logits(twin, prompts[of], {(kind, 1): edit})
                agree(logits[row], expected, f"{site} from {start}, row {row}", tolerance(family))
    columns = torch.full((len(prompts),), batch.width - 1)
    for start in (0, batch.width - 2):
        logits = blended_logits(model, compute_prefix(model, batch, start), [], columns)
        for row, ids in enumerate(prompts):
            agree(logits[row], oracles.read(twin, ids)[1], f"row {row}", tolerance(family))


# What is held.


def test_a_prefix_is_run_once_and_a_longer_or_shorter_one_takes_what_is_known() -> None:
    model, _ = pair("llama-gqa")
    held = any_prefix()
    first = [PREAMBLE + rest for rest in RESTS[:2]]
    with use_prefixes(held), counted(model) as tokens:
        _, ran = share_prefixes(model, [Batch.from_ids(first, model.pad_id)])
        assert (ran, tokens) == (9, [9]) and len(held) == 1
        # A token more in common is run again for every prompt rather than once anew.
        again, ran = share_prefixes(model, [Batch.from_ids([first[0], (*first[0], 4)], model.pad_id)])
        assert ran == 0 and again[0].width == 5 and tokens == [9]
        # A part of what is known is enough.
        shorter = [(*PREAMBLE[:6], 4), (*PREAMBLE[:6], 8, 8)]
        _, ran = share_prefixes(model, [Batch.from_ids(shorter, model.pad_id)])
        assert ran == 0 and tokens == [9]
        # Of one that is much longer, the rest is run behind what is known.
        longer = PREAMBLE + tuple(range(3, 23))
        batch, ran = share_prefixes(model, [Batch.from_ids([(*longer, 4), (*longer, 8, 9)], model.pad_id)])
        assert ran == 20 and tokens == [9, 20] and len(held) == 2
    _, twin = pair("llama-gqa")
    agree(capture(model, batch[0], []).logits[0], oracles.read(twin, (*longer, 4))[1], "longer", 1e-5)


def test_short_prefixes_and_those_that_save_little_are_not_run() -> None:
    model, _ = pair("llama-gqa")
    prompts = [PREAMBLE + rest for rest in RESTS]
    for held in (Prefixes(), Prefixes(least=9), Prefixes(least=10), None):
        with use_prefixes(held), counted(model) as tokens:
            (batch,), ran = share_prefixes(model, [Batch.from_ids(prompts, model.pad_id)])
        assert type(batch) is Batch and ran == 0 and tokens == []
    # 25 tokens are saved for 9.
    with use_prefixes(Prefixes(least=9, worth=19)):
        assert isinstance(share_prefixes(model, [Batch.from_ids(prompts, model.pad_id)])[0][0], SuffixBatch)


def test_the_least_recently_used_go() -> None:
    model, _ = pair("llama-gqa")
    held = any_prefix(most=2)
    for first in (3, 4, 3, 5):
        cut(model, [(first, *PREAMBLE, 6), (first, *PREAMBLE, 7)], held)
    held.open(model)
    known = [held.find(model, (first, *PREAMBLE))[1] for first in (3, 4, 5)]
    assert known == [10, 0, 10]
    one = held.bytes // 2
    assert one == 2 * 3 * 2 * 8 * 10 * 4
    small = any_prefix(max_bytes=one)
    for first in (3, 4):
        batch = cut(model, [(first, *PREAMBLE, 6), (first, *PREAMBLE, 7)], small)
        assert isinstance(batch, SuffixBatch) and len(small) == 1
    none = any_prefix(max_bytes=one - 1)
    assert isinstance(cut(model, [(*PREAMBLE, 3, 6), (*PREAMBLE, 3, 7)], none), SuffixBatch)
    assert len(none) == 0
    held.clear()
    assert len(held) == 0 == held.bytes


def test_other_weights_are_another_prefix() -> None:
    prompts = [PREAMBLE + rest for rest in RESTS]
    held = any_prefix()

    def check(model: PatchModel, what: str) -> None:
        whole = capture(model, Batch.from_ids(prompts, model.pad_id), []).logits
        agree(capture(model, cut(model, prompts, held), []).logits, whole, what, 1e-5)

    model, other = load(build("llama-gqa")), load(build("llama-gqa", seed=1))
    check(model, "the first")
    check(other, "another model")
    assert len(held) == 2
    with torch.no_grad():
        model.hf.model.layers[0].self_attn.k_proj.weight.mul_(1.5)
    check(model, "written in place")
    model.hf.model.layers[1].self_attn.v_proj.weight.data.neg_()
    check(model, "written behind torch's back")
    model.hf.double()
    check(model, "another dtype")
    assert len(held) == 2
    del model
    gc.collect()
    assert len(held) == 1


def test_angles_that_depend_on_the_length_are_not_shared() -> None:
    model = load(build("llama-gqa"))
    prompts = [PREAMBLE + rest for rest in RESTS]
    for kind, shared in (("longrope", False), ("dynamic", False), ("llama3", True)):
        model.config.rope_parameters = {**model.config.rope_parameters, "rope_type": kind}
        assert isinstance(cut(model, prompts), SuffixBatch) is shared


# Mistakes.


def refused(prompts: Sequence[Prompt], batch: Batch, match: str, family: str = "llama-gqa") -> None:
    with pytest.raises(AssertionError, match=match):
        check_run(family, prompts, batch)


def test_positions_that_start_anew_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    for family in ("llama-gqa", "gpt2"):
        model, _ = pair(family, torch.float64)
        batch = cut(model, MIXED)
        with monkeypatch.context() as planted:
            planted.setattr(SuffixBatch, "position_ids", Batch.position_ids)
            refused(MIXED, batch, "logits of row|relative difference", family)


def test_padding_that_is_seen_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = pair("llama-gqa", torch.float64)
    batch = cut(model, MIXED)
    right = SuffixBatch.whole_mask.fget  # type: ignore[attr-defined]
    monkeypatch.setattr(SuffixBatch, "whole_mask", property(lambda self: torch.ones_like(right(self))))
    refused(MIXED, batch, "logits of row")


def test_rows_of_another_prefix_are_caught() -> None:
    model, _ = pair("llama-gqa", torch.float64)
    batch = cut(model, MIXED)
    assert isinstance(batch, SuffixBatch)
    object.__setattr__(batch, "which", torch.zeros_like(batch.which))
    refused(MIXED, batch, "row 2")


def test_rows_that_are_not_moved_for_their_padding_are_caught() -> None:
    model, _ = pair("llama-gqa", torch.float64)
    prompts = [PREAMBLE + rest for rest in RESTS]
    batch = cut(model, prompts)
    assert isinstance(batch, SuffixBatch)
    object.__setattr__(batch, "before", torch.full_like(batch.before, batch.start))
    refused(prompts, batch, "row 0")


def test_weights_that_are_not_looked_at_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefixes, "_weights", lambda model: prefixes._Weights((), ()))
    with pytest.raises(AssertionError, match="written in place"):
        test_other_weights_are_another_prefix()
