"""What prompts have in common is run once: numbers are those of whole runs, and the preamble is not run again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from patchkit.data import Pair
from patchkit.methods import _pair_batch
from patchkit.methods._edge_options import EdgeOptions
from patchkit.methods._mask_triples import OwnAnswers
from patchkit.methods._node_options import NodeOptions
from patchkit.methods._pair_batch import PairBatch
from patchkit.methods._replacements import Replacement
from patchkit.methods.activation_patching import patch_nodes
from patchkit.methods.attribution import attribute
from patchkit.methods.circuits import run_circuits
from patchkit.methods.edge_attribution import attribute_edges
from patchkit.methods.edge_patching import patch_edges
from patchkit.model import EdgeGraph, PatchModel
from patchkit.results.circuit import Circuit
from patchkit.runtime import run_program
from patchkit.tracing.prefixes import Prefixes, use_prefixes
from tests import circuit_oracle, edge_gradient_oracle, edge_oracle
from tests.attribution_oracle import check_estimates
from tests.comparisons import agree, pair
from tests.families import FAMILIES
from tests.node_oracle import DENSE, LONG, MIDDLE, SHORT, check_sets, check_sweep

#: In the lane of what takes longest.
pytestmark = pytest.mark.nightly

#: Longer than the sliding windows.
PREAMBLE = (7, 30, 11, 22, 5, 9, 17, 28, 33)


def behind(prefix: tuple[int, ...], each: Pair) -> Pair:
    """The pair with a prefix before both prompts; the span `p` begins in it."""
    moved = {name: (start + len(prefix), end + len(prefix)) for name, (start, end) in each.spans.items()}
    return replace(
        each,
        clean_ids=prefix + each.clean_ids,
        corrupt_ids=prefix + each.corrupt_ids,
        spans={**moved, "p": (max(0, len(prefix) - 2), len(prefix) + 3)},
    )


PAIRS = [behind(PREAMBLE, each) for each in (LONG, SHORT, MIDDLE)]
#: A place that begins in the preamble, one behind it, one in it, the last.
PLACES = "p,s,3,-1"
KINDS = ("resid_pre", "q", "k", "v", "z", "attn_out", "mlp_out")


def any_prefix() -> Prefixes:
    """Prefixes are shared however short they are and however little they save."""
    return Prefixes(least=1, worth=-(10**6))


@contextmanager
def sharing() -> Iterator[Prefixes]:
    """Everything is shared, and something was."""
    held = any_prefix()
    with use_prefixes(held):
        yield held
    assert len(held) > 0, "nothing was shared"


def with_and_without(call: Callable[[], Tensor], what: str, tolerance: float = 1e-10) -> None:
    """The same numbers whether prefixes are shared or not."""
    with use_prefixes(None):
        whole = call()
    with sharing():
        shared = call()
    agree(shared.nan_to_num(), whole.nan_to_num(), what, tolerance)


@contextmanager
def forwards(model: PatchModel) -> Iterator[list[Tensor]]:
    """The tokens of every forward inside."""
    seen: list[Tensor] = []

    def note(module: Any, args: Any, kwargs: dict[str, Tensor]) -> None:
        seen.append(kwargs["input_ids"].clone())

    handle = model.hf.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def preambles(seen: list[Tensor], preamble: tuple[int, ...] = PREAMBLE) -> int:
    """How many rows of all forwards hold the whole preamble."""
    rows = [row for ids in seen for row in ids.tolist()]
    return sum(any(tuple(row[at : at + len(preamble)]) == preamble for at in range(len(row))) for row in rows)


# Against whole runs, one prompt and one node at a time.


@pytest.mark.parametrize("family", DENSE)
def test_exact_patching_of_every_family(family: str) -> None:
    with sharing():
        scores = check_sweep(family, PAIRS[:2], per_layer=4, kinds=KINDS, positions=PLACES)
    effects = scores.grid.split(scores.effects[0])
    inside = scores.grid.places.index("3")
    for kind, part in effects.items():
        assert not part[:, inside].any(), f"{kind}: nodes in the preamble have an effect"


@pytest.mark.parametrize("family", DENSE)
def test_attribution_of_every_family(family: str) -> None:
    with sharing():
        scores = check_estimates(family, PAIRS[:2], "atp", kinds=KINDS, positions=PLACES)
    inside = scores.grid.places.index("3")
    for kind, part in scores.grid.split(scores.effects[0]).items():
        assert not part[:, inside].any(), f"{kind}: nodes in the preamble have an estimate"


@pytest.mark.parametrize("family", ["gemma2-post-norms-softcap", "gpt2"])
def test_corrected_attribution(family: str) -> None:
    with sharing():
        check_estimates(
            family, PAIRS[:2], "atp-star", kinds=("q", "k", "v", "z", "mlp_out"), positions="p,-1"
        )


def test_float32_sets_and_the_other_direction() -> None:
    with sharing():
        check_sweep("llama-gqa", PAIRS, torch.float32, kinds=("k", "z", "mlp_out"), direction="denoise")
        check_estimates("gpt2", PAIRS, "atp", torch.float32, kinds=("v", "resid_pre"), direction="denoise")
        check_sets("llama-gqa", PAIRS, [("a0.h1", "k.1.h0", "a1.h2")], kinds=("k", "z"))


@pytest.mark.parametrize("family", ["llama-gqa", "gemma2-post-norms-softcap"])
def test_edges(family: str) -> None:
    few = PAIRS[1:]
    with sharing():
        edge_gradient_oracle.check_edges(family, few, "eap", positions="p,-1")
        edge_gradient_oracle.check_edges(family, few, "eap-ig-inputs")
        edge_oracle.check_edges(family, few, 1)
        circuit_oracle.check_circuits(family, few)


def test_paths() -> None:
    with sharing():
        edge_oracle.check_paths("llama-gqa", PAIRS[1:], ("a0.h1", "m0"), ("a1.h0<v>", "logits"))


# With prefixes shared and without.


@pytest.mark.parametrize("family", FAMILIES)
def test_edge_methods_and_circuits_of_every_family(family: str) -> None:
    experts = "experts" in family
    model, _ = pair(family, torch.float32 if experts else torch.float64)
    # Of the norms of some families a part is in float32 always.
    tolerance = 1e-5 if experts else 1e-6
    options, graph = EdgeOptions(), EdgeGraph.of(model.dims)

    def edges(method: str, **given: Any) -> Callable[[], Tensor]:
        return lambda: attribute_edges(model, PAIRS, options, method, keep_pairs=True, **given).per_pair  # type: ignore

    with_and_without(edges("eap"), "eap", tolerance)
    with_and_without(edges("eap", qk_fix=True, grad_drop=True), "eap, both corrections", tolerance)
    circuits = circuit_oracle.random_circuits(graph)
    with_and_without(lambda: run_circuits(model, PAIRS, circuits).metric, "circuits", tolerance)


def test_every_other_gradient_of_edges() -> None:
    model, _ = pair("llama-gqa", torch.float64)
    options = EdgeOptions(positions="p,-1")
    for method, rule in (
        ("eap-ig-inputs", "midpoint"),
        ("clean-corrupted", None),
        ("eap-ig-activations", "midpoint"),
        ("eap-ig-activations", "repo"),
    ):

        def found(method: Any = method, rule: str | None = rule) -> Tensor:
            scores = attribute_edges(model, PAIRS, options, method, steps=2, rule=rule, keep_pairs=True)
            assert scores.per_pair is not None
            return scores.per_pair

        with_and_without(found, f"{method} {rule}")


@settings(max_examples=20, deadline=None)
@given(
    shared=st.integers(0, 11),
    family=st.sampled_from(["llama-gqa", "gpt2", "mistral-window", "olmo2"]),
    which=st.sets(st.integers(0, 2), min_size=1),
    same=st.booleans(),
)
def test_any_prefix(shared: int, family: str, which: set[int], same: bool) -> None:
    model, _ = pair(family, torch.float64)
    pairs = [behind((PREAMBLE * 2)[:shared], (LONG, SHORT, MIDDLE)[number]) for number in sorted(which)]
    if same:
        # Two prompts that are the same in full.
        pairs = [replace(pairs[0], corrupt_ids=pairs[0].clean_ids), *pairs[1:]]
    options = NodeOptions(nodes=("k", "z"), positions="s,-1")
    for call in (patch_nodes, attribute):
        found = []
        for held in (None, any_prefix()):
            with use_prefixes(held):
                scores = call(model, pairs, options)
            found.append(torch.cat([scores.effects, scores.base_metric[:, None]], dim=1))
        agree(found[1], found[0], f"{call.__name__}, {shared} tokens", 1e-10)
        if same:
            assert not found[1][0, :-1].any()


def test_pairs_with_prefixes_of_their_own() -> None:
    """A pair whose prompts begin differently, so that each begins like other pairs' prompts, has effects there."""
    model, _ = pair("llama-gqa", torch.float64)
    one, two = PREAMBLE, tuple(reversed(PREAMBLE))
    across = replace(SHORT, clean_ids=one + SHORT.clean_ids, corrupt_ids=two + SHORT.clean_ids, id="across")
    pairs = [behind(one, SHORT), behind(two, SHORT), across]
    options = NodeOptions(nodes=("z", "mlp_out"), positions="2,-1")
    with use_prefixes(None):
        whole = patch_nodes(model, pairs, options).effects
    for some in ([0, 1], [0, 1, 2]):
        with use_prefixes(any_prefix()):
            found = patch_nodes(model, [pairs[i] for i in some], options).effects
        agree(found, whole[some], f"pairs {some}", 1e-10)
    early = patch_nodes(model, [across], replace(options, positions="2")).effects
    assert bool(early.any())


# What is run.


def test_the_preamble_is_run_once_over_batches_and_methods() -> None:
    model, _ = pair("llama-gqa")
    pairs = [replace(each, id=f"{each.id} {number}") for number in range(3) for each in PAIRS]
    few = {"max_batch_tokens": 40}
    circuit = Circuit.full(EdgeGraph.of(model.dims))

    def everything() -> None:
        patch_nodes(model, pairs, NodeOptions(nodes=("z",), layers=(1,), **few))  # type: ignore[arg-type]
        attribute(model, pairs, NodeOptions(**few))  # type: ignore[arg-type]
        attribute_edges(model, pairs, EdgeOptions(**few), "eap")  # type: ignore[arg-type]
        run_circuits(model, pairs, [circuit], EdgeOptions(**few))  # type: ignore[arg-type]
        prompts = [each.clean_ids for each in pairs]
        run_program(OwnAnswers(), model, prompts, max_batch_tokens=40)

    with use_prefixes(Prefixes(least=5, worth=0)), forwards(model) as seen:
        everything()
    assert preambles(seen) == 1 and len(seen) > 20
    with use_prefixes(None), forwards(model) as whole:
        everything()
    assert preambles(whole) >= 9 * 2 * 3
    assert sum(map(Tensor.numel, seen)) < 0.7 * sum(map(Tensor.numel, whole))


def test_costs_are_of_what_was_run() -> None:
    model, _ = pair("llama-gqa")
    pairs = [PAIRS[0], PAIRS[2]]
    tokens, own = 2 * 16, 2 * 7
    options = NodeOptions(nodes=("z",), positions="-1", layers=(2,))
    held = any_prefix()
    with use_prefixes(held):
        # A backward counts as a forward; the preamble is run for the first method alone.
        assert attribute(model, pairs, options).cost == pytest.approx((3 * own + 9) / tokens)
        assert attribute(model, pairs, options).cost == pytest.approx(3 * own / tokens)
        with forwards(model) as seen:
            exact = patch_nodes(model, pairs, options)
        # Heads of the last layer at the last token: a third of a token each.
        assert exact.cost == pytest.approx((2 * own + 2 * 4 / 3) / tokens)
        assert [each.numel() for each in seen[:2]] == [own, own]
        eap = attribute_edges(model, pairs, method="eap").cost
    with use_prefixes(None):
        assert eap == pytest.approx(attribute_edges(model, pairs, method="eap").cost * own / tokens)


@pytest.mark.parametrize("ablation", ["zero", "mean", "noise"])
def test_other_ablations_run_whole(ablation: Any) -> None:
    model, _ = pair("llama-gqa", torch.float64)
    pairs = [PAIRS[0], PAIRS[2]]
    given = {"reference": pairs} if ablation == "mean" else {}
    options = NodeOptions(nodes=("z",), positions="3,-1", ablation=ablation)
    held = any_prefix()
    for call in (patch_nodes, attribute):
        with use_prefixes(held):
            found = call(model, pairs, options, **given).effects
        with use_prefixes(None):
            agree(found, call(model, pairs, options, **given).effects, ablation, 1e-12)
        assert bool(found[:, 0::2].any())
    with use_prefixes(held):
        attribute_edges(model, pairs, method="ifr")
        run_circuits(model, pairs, [Circuit.full(EdgeGraph.of(model.dims))], EdgeOptions(ablation="zero"))
        patch_edges(model, pairs, EdgeOptions(ablation="zero"), edges=_one_edge(model))
    assert len(held) == 0


def _one_edge(model: PatchModel) -> Tensor:
    graph = EdgeGraph.of(model.dims)
    edges = torch.zeros_like(graph.real)
    edges[0, graph.logits] = True
    return edges


# Mistakes.


def refused(check: Callable[..., Any], *args: Any, match: str, **options: Any) -> None:
    with use_prefixes(any_prefix()), pytest.raises(AssertionError, match=match):
        check(*args, **options)


def test_places_that_are_not_moved_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    right = PairBatch.behind_prefix

    def wrong(self: PairBatch, model: PatchModel) -> PairBatch:
        cut = right(self, model)
        return replace(cut, cover=self.cover[..., : cut.base.width])

    monkeypatch.setattr(PairBatch, "behind_prefix", wrong)
    for check, kind in ((check_sweep, "effect of"), (check_estimates, "atp estimate of")):
        given = ("atp",) if check is check_estimates else ()
        refused(check, "llama-gqa", PAIRS, *given, kinds=("z",), positions="s,-1", match=kind)


def test_prefixes_of_prompts_that_are_not_the_same_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    right = _pair_batch.share_prefixes
    monkeypatch.setattr(_pair_batch, "share_prefixes", lambda model, both, alike: right(model, both))
    with pytest.raises(AssertionError, match="pairs"):
        test_pairs_with_prefixes_of_their_own()


def test_ablations_that_change_the_preamble_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Replacement, "causal", property(lambda self: True))
    with pytest.raises(AssertionError, match="zero"):
        test_other_ablations_run_whole("zero")
