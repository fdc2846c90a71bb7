"""Planted mistakes in exact edges and path patching: the comparisons with plain hooks must refuse each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from patchkit.methods import _edge_base, _edge_rows, _edge_sweep, _pair_batch, _path_carry, _path_program
from patchkit.methods._edge_base import EdgeBase
from patchkit.methods._edge_rows import EdgeRows
from patchkit.methods._pair_batch import PairBatch
from patchkit.methods._path_carry import Receivers
from patchkit.model import PatchModel, Site
from patchkit.tracing import restart
from patchkit.tracing.restart import Swap, run_swapped
from tests.comparisons import pair
from tests.edge_oracle import check_edges, check_paths
from tests.node_oracle import LONG, MIDDLE, SHORT

#: Beside `make test`, in a lane of its own.
pytestmark = pytest.mark.slow

GQA, GEMMA, GPT2, PARALLEL, OLMO = (
    "llama-gqa",
    "gemma2-post-norms-softcap",
    "gpt2",
    "neox-parallel",
    "olmo2",
)
PAIRS = [LONG, SHORT]
#: A few edges with every kind of sender and receiver.
EDGES = (
    "input->a0.h1<v>",
    "a0.h2->a1.h0<k>",
    "m0->a1.h3<q>",
    "a1.h1->m2",
    "input->m1",
    "m1->logits",
    "a2.h0->logits",
)
SENDERS = ("input", "a0.h1", "m0", "a1.h2")
SEVERAL = ("a1.h0<q>", "m1", "a2.h1<v>", "logits")


def refused(check: Callable[..., Any], *args: Any, match: str = "effect of", **options: Any) -> None:
    with pytest.raises(AssertionError, match=match):
        check(*args, **options)


@pytest.fixture(scope="module", autouse=True)
def opened() -> None:
    """Models are opened before anything is broken: validation on load would refuse it before the checks here see it."""
    for family in (GQA, GEMMA, GPT2, PARALLEL, OLMO):
        pair(family, torch.float64)


def test_without_a_mistake_the_checks_pass() -> None:
    check_edges(GQA, PAIRS, EDGES, by_query=True)
    check_edges(GQA, PAIRS, EDGES, positions="s,-1")
    check_edges(GQA, [MIDDLE], EDGES)
    check_edges(GEMMA, [LONG], EDGES)
    check_edges(GPT2, [LONG], EDGES, ablation="zero")
    check_edges(OLMO, [LONG], EDGES)
    for family in (GQA, GEMMA, PARALLEL):
        for mlps in ("recomputed", "frozen"):
            check_paths(family, [LONG], SENDERS, SEVERAL, mlps)


# What is put in, and where.


def test_source_and_base_swapped(monkeypatch: pytest.MonkeyPatch) -> None:
    right = PairBatch.of.__func__  # type: ignore[attr-defined]

    def wrong(cls: type, model: PatchModel, pairs: Any, covered: Any, direction: str) -> PairBatch:
        return right(cls, model, pairs, covered, "denoise" if direction == "noise" else "noise")

    monkeypatch.setattr(PairBatch, "of", classmethod(wrong))
    refused(check_edges, GQA, [LONG], EDGES)
    refused(check_paths, GQA, [LONG], SENDERS, ("logits",))


def test_places_counted_from_the_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    right = _pair_batch.covering

    def wrong(covered: Any, lengths: Sequence[int], width: int) -> Tensor:
        return right(covered, [width] * len(lengths), width)

    monkeypatch.setattr(_pair_batch, "covering", wrong)
    check_edges(GQA, [LONG], EDGES, positions="s,-1")
    refused(check_edges, GQA, PAIRS, EDGES, positions="s,-1", match="effect of .* in pair short")


def test_prompts_that_differ_one_token_later_than_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    right = PairBatch.first_difference
    monkeypatch.setattr(PairBatch, "first_difference", lambda batch: right(batch) + 1)
    refused(check_edges, GQA, [MIDDLE], EDGES)


def test_a_norm_behind_the_heads_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PatchModel, "attention_post_norm", lambda *_: None)
    for family in (GEMMA, OLMO):
        refused(check_edges, family, [LONG], EDGES, match="effect of a")
    refused(check_paths, GEMMA, [LONG], SENDERS, ("logits",), match="effect of a")
    check_edges(GQA, [LONG], EDGES)


def test_heads_of_one_layer_taken_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    right = _edge_base.contributions
    monkeypatch.setattr(_edge_base, "contributions", lambda *args: right(*args).roll(1, dims=-2))
    refused(check_edges, GQA, [LONG], EDGES, match="effect of a")
    check_edges(GQA, [LONG], [name for name in EDGES if not name.startswith("a")])


def test_the_embedding_of_positions_taken_for_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """It cancels in differences between two prompts, not where the input is cut to nothing."""
    monkeypatch.setattr(_edge_base, "_embedded", lambda model, batch, base: base.streams[0])
    refused(check_edges, GPT2, [LONG], EDGES, ablation="zero", match="effect of input")


# What receivers read.


@pytest.mark.parametrize("letters", ["kqv", "qvk", "vkq"])
def test_one_input_of_a_head_patched_for_another(letters: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A letter's values are another one's, where they have one shape, or go into another projection."""
    kinds = {letter: f"{other}_proj" for letter, other in zip("qkv", letters, strict=True)}
    monkeypatch.setattr(_edge_sweep, "PROJECTIONS", kinds)
    monkeypatch.setattr(_path_carry, "PROJECTIONS", kinds)
    refused(check_edges, GPT2, [LONG], EDGES)
    refused(check_paths, GPT2, [LONG], SENDERS, ("a1.h0<k>", "a1.h1<q>", "a1.h2<v>"))


def test_the_norm_taken_before_adding(monkeypatch: pytest.MonkeyPatch) -> None:
    """The base run's norm with what is added behind it."""

    right = _edge_sweep.read_by_mlp
    added: list[Tensor] = []

    def changed(rows: Any, stream: Tensor, chosen: EdgeRows, start: int) -> Tensor:
        added.append(rows.run.changes(chosen.pair, chosen.place, chosen.sender, start))
        return stream[chosen.pair, start:]

    monkeypatch.setattr(_edge_sweep._Rows, "_changed", changed)
    monkeypatch.setattr(_edge_sweep, "read_by_mlp", lambda *args: right(*args) + added[-1])
    refused(check_edges, GQA, [LONG], EDGES, match="effect of .*->m")


def test_no_norm_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_edge_sweep, "read_by_mlp", lambda model, layer, stream: stream)
    refused(check_edges, GQA, [LONG], EDGES, match="effect of .*->m")
    # Where the MLP reads the stream itself it is no mistake.
    check_edges(OLMO, [LONG], EDGES)


def test_the_mlp_reading_the_stream_that_the_attention_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EdgeBase, "read_by_mlp", lambda run, layer: run.base.streams[layer])
    check_edges(PARALLEL, [LONG], EDGES)
    refused(check_edges, GQA, [LONG], EDGES, match="effect of .*->m")
    refused(check_paths, GQA, [LONG], SENDERS, ("m1",))


def read_by(monkeypatch: pytest.MonkeyPatch, wrong: Callable[[Any, EdgeRows], Tensor]) -> None:
    monkeypatch.setattr(_edge_sweep._Rows, "_read_by", wrong)


def test_all_heads_patched_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    read_by(monkeypatch, lambda rows, chosen: torch.ones(len(chosen), 4, dtype=torch.bool))
    refused(check_edges, GQA, [LONG], EDGES, match="effect of .*<.>")


def test_heads_of_other_groups_for_those_that_share_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every second head, as if KV heads were dealt out in turn."""

    def wrong(rows: Any, chosen: EdgeRows) -> Tensor:
        heads, count = torch.arange(4), rows.program.graph.n_kv_heads
        own = torch.where((chosen.letter == 0)[:, None], heads, heads % count)
        return own == chosen.head[:, None]

    read_by(monkeypatch, wrong)
    refused(check_edges, GQA, [LONG], EDGES, match="effect of .*<[kv]>")
    # Without groups it is right.
    check_edges(GPT2, [LONG], EDGES)


def test_one_head_of_a_group_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    right = _edge_sweep._Rows._read_by

    def wrong(rows: Any, chosen: EdgeRows) -> Tensor:
        found = right(rows, chosen)
        return found & (found.int().cumsum(1) == 1)

    read_by(monkeypatch, wrong)
    refused(check_edges, GQA, [LONG], EDGES, match="effect of .*<[kv]>")


def test_the_whole_group_for_one_query_head(monkeypatch: pytest.MonkeyPatch) -> None:
    right = _edge_sweep._Rows._read_by

    def wrong(rows: Any, chosen: EdgeRows) -> Tensor:
        found = right(rows, chosen)
        if rows.program.graph.n_kv_heads == 2:
            return found
        shared = found.unflatten(1, (2, 2)).any(2).repeat_interleave(2, dim=1)
        return torch.where((chosen.letter == 0)[:, None], found, shared)

    read_by(monkeypatch, wrong)
    check_edges(GQA, [LONG], EDGES)
    refused(check_edges, GQA, [LONG], EDGES, by_query=True, match="by query head")


def test_heads_read_together_under_a_norm_over_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    right = _edge_sweep.PatchEdges.run
    monkeypatch.setattr(
        _edge_sweep.PatchEdges,
        "run",
        lambda program, *args: right(replace(program, joint=False), *args),
    )
    refused(check_edges, OLMO, [LONG], EDGES, match="effect of .*<[qk]>")
    check_edges(GQA, [LONG], EDGES)


def test_a_key_read_at_its_own_position_only(monkeypatch: pytest.MonkeyPatch) -> None:
    right = _edge_sweep.columns_from
    monkeypatch.setattr(
        _edge_sweep,
        "columns_from",
        lambda columns, start, after: right(columns, start, torch.zeros_like(after)),
    )
    refused(check_edges, GQA, [LONG], EDGES, positions="s", match="effect of .*<[kv]>")


def test_every_row_takes_the_first_values(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Swap.apply

    def wrong(swap: Swap, activation: Tensor, pairs: Tensor, first: int | None = None) -> Tensor:
        takes = None if swap.takes is None else torch.zeros_like(swap.takes)
        return right(replace(swap, takes=takes), activation, pairs, first)

    monkeypatch.setattr(Swap, "apply", wrong)
    refused(check_edges, GQA, PAIRS, EDGES)
    refused(check_paths, GQA, PAIRS, SENDERS, SEVERAL)


# Where runs restart.


@pytest.mark.parametrize(("layers", "columns"), [(1, 0), (0, 1)])
def test_restarts_too_late(layers: int, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(right: Callable[..., Any]) -> Callable[..., Any]:
        def late(model: Any, base: Any, *args: Any, layer: int, start: int) -> Any:
            at, begin = min(layer + layers, 2), min(start + columns, base.batch.width - 1)
            return right(model, base, *args, layer=at, start=begin)

        return late

    monkeypatch.setattr(restart, "_check", lambda *_: None)
    monkeypatch.setattr(_edge_sweep, "run_swapped", wrong(_edge_sweep.run_swapped))
    monkeypatch.setattr(_path_program, "run_swapped", wrong(_path_program.run_swapped))
    refused(check_edges, GQA, [LONG], EDGES, positions="s")
    refused(check_paths, GQA, [LONG], SENDERS, ("a1.h0<k>", "m1"), positions="s")


def test_attention_read_one_column_too_late(monkeypatch: pytest.MonkeyPatch) -> None:
    right = _edge_sweep.together

    def wrong(starts: Tensor, width: int, most: int) -> Iterator[tuple[slice, int]]:
        for rows, start in right(starts, width, most):
            yield rows, min(start + 1, width - 1)

    monkeypatch.setattr(restart, "_check", lambda *_: None)
    monkeypatch.setattr(_edge_sweep, "together", wrong)
    refused(check_edges, GQA, [LONG], EDGES, positions="s")


def test_keys_of_the_last_layer_read_by_none_but_the_last_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_edge_rows, "MLP", 1)
    refused(check_edges, GQA, [LONG], ("m0->a2.h0<k>", "a1.h1->a2.h1<v>", "m0->logits"), positions="0,s")


# Paths.


def test_other_heads_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sender is patched as a node is, and everything after it recomputed."""

    def wrong(rows: Any, lowest: int, pair: Tensor, sender: Tensor, start: int) -> tuple[Tensor, float]:
        run, heads = rows.run, rows.program.graph.heads(0)
        where = torch.zeros(len(pair), rows.width, 4, dtype=torch.bool)
        where[torch.arange(len(pair)), :, sender - heads.start] = True
        swap = Swap(Site("z", 0), where, run.other.heads[0])
        return run_swapped(rows.model, run.base, pair, [swap], layer=0, start=0), 0.0

    monkeypatch.setattr(_path_program._Rows, "_run", wrong)
    refused(check_paths, GQA, [LONG], ("a0.h1", "a0.h3"), ("logits",))


def test_mlps_held_that_are_recomputed_and_the_other_way(monkeypatch: pytest.MonkeyPatch) -> None:
    right = _path_program.carry

    def wrong(*args: Any, recompute: bool, **options: Any) -> Any:
        return right(*args, recompute=not recompute, **options)

    monkeypatch.setattr(_path_program, "carry", wrong)
    for mlps in ("recomputed", "frozen"):
        refused(check_paths, GQA, [LONG], SENDERS, ("logits",), mlps)


def test_the_order_of_attention_and_mlp(monkeypatch: pytest.MonkeyPatch) -> None:
    right = _path_program.carry

    def wrong(run: EdgeBase, *args: Any, **options: Any) -> Any:
        turned = replace(run, graph=replace(run.graph, parallel=not run.graph.parallel))
        return right(turned, *args, **options)

    monkeypatch.setattr(_path_program, "carry", wrong)
    monkeypatch.setattr(
        EdgeBase,
        "read_by_mlp",
        lambda run, layer: run.base.own.get(Site("resid_mid", layer), run.base.streams[layer]),
    )
    for family in (GQA, PARALLEL):
        refused(check_paths, family, [LONG], SENDERS, ("logits",), match="effect of a")


def test_receivers_above_others_given_only_what_the_sender_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere they would read what the lower receivers have moved."""
    monkeypatch.setattr(Receivers, "several_stages", property(lambda receivers: False))
    refused(check_paths, GQA, [LONG], SENDERS, ("a1.h0<v>", "a2.h1<k>"), positions="s")


def test_heads_of_the_third_pass_unseen_by_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    right = _path_program.carry

    def wrong(*args: Any, heads: Any = None, **options: Any) -> Any:
        return right(*args, **options)

    monkeypatch.setattr(_path_program, "carry", wrong)
    refused(check_paths, GQA, [LONG], SENDERS, SEVERAL)


def test_mlps_that_are_receivers_not_held_for_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    right = _path_program.carry

    def wrong(*args: Any, held: Any = None, **options: Any) -> Any:
        return right(*args, **options)

    monkeypatch.setattr(_path_program, "carry", wrong)
    refused(check_paths, GQA, [LONG], SENDERS, ("a1.h0<v>", "m2", "logits"))


def test_the_sender_unseen_by_the_logits_among_others(monkeypatch: pytest.MonkeyPatch) -> None:
    for mlps in ("recomputed", "frozen"):
        right = _path_program._Rows._with_logits

        def wrong(rows: Any, lowest: int, pair: Tensor, sender: Tensor, start: int, carried: Any) -> Any:
            swaps = carried.swaps
            return run_swapped(rows.model, rows.run.base, pair, swaps, layer=lowest, start=start), 0.0

        monkeypatch.setattr(_path_program._Rows, "_with_logits", wrong)
        refused(check_paths, GQA, [LONG], SENDERS, SEVERAL, mlps)
        monkeypatch.setattr(_path_program._Rows, "_with_logits", right)
