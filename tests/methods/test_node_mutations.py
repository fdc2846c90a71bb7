"""The comparisons of the node methods are able to fail: mistakes that give plausible, wrong numbers are caught.

Each test plants one mistake and expects the very functions that the tests of exact patching and attribution run to
refuse it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from patchkit.methods import _node_gradients, _pair_batch, _qk_fix, _set_rows, activation_patching
from patchkit.methods._node_gradients import NodeReduction
from patchkit.methods._pair_batch import PairBatch
from patchkit.methods._qk_fix import Effects
from patchkit.methods._replacements import Replacement
from patchkit.methods._set_rows import Restart
from patchkit.model import PatchModel, Site
from patchkit.results.scores import Scores
from patchkit.tracing import capture, gradients, restart
from patchkit.tracing.gradients import Attention, LayerGradients
from patchkit.tracing.restart import Swap
from tests.attribution_oracle import STREAM, check_estimates
from tests.comparisons import pair
from tests.node_oracle import LONG, MIDDLE, SHORT, check_sets, check_sweep

#: Beside `make test`, in a lane of its own.
pytestmark = pytest.mark.slow

PAIRS = [LONG, SHORT]
KINDS = ("resid_pre", "k", "z", "mlp_out")
FAMILY = "llama-gqa"


def refused(check: Callable[..., Any], *args: Any, match: str, **options: Any) -> None:
    with pytest.raises(AssertionError, match=match):
        check(*args, **options)


@pytest.fixture(scope="module", autouse=True)
def opened() -> None:
    """Models are opened before anything is broken: validation on load would refuse it before the checks here see it."""
    for family in (FAMILY, "mistral-window", "gemma2-post-norms-softcap"):
        pair(family, torch.float64)


def test_without_a_mistake_the_checks_pass() -> None:
    check_sweep(FAMILY, PAIRS, kinds=KINDS)
    check_sweep(FAMILY, [MIDDLE], kinds=KINDS)
    check_sweep(FAMILY, PAIRS, kinds=KINDS, positions="s,-1")
    check_sweep("mistral-window", PAIRS, kinds=KINDS, positions="-1")
    check_sets(FAMILY, PAIRS, [("a0.h1", "k.1.h0", "a1.h2")], kinds=KINDS)
    for family in (FAMILY, "gemma2-post-norms-softcap"):
        for method in ("atp", "atp-qk", "atp-graddrop", "atp-star"):
            check_estimates(family, PAIRS, method, kinds=("q", *KINDS), positions="s,-1")  # type: ignore[arg-type]


# What is patched, and with what.


def test_source_and_base_swapped(monkeypatch: pytest.MonkeyPatch) -> None:
    right = PairBatch.of.__func__  # type: ignore[attr-defined]

    def wrong(cls: type, model: PatchModel, pairs: Any, covered: Any, direction: str) -> PairBatch:
        return right(cls, model, pairs, covered, "denoise" if direction == "noise" else "noise")

    monkeypatch.setattr(PairBatch, "of", classmethod(wrong))
    for direction in ("noise", "denoise"):
        refused(
            check_sweep, FAMILY, PAIRS, kinds=KINDS, direction=direction, match="effect of|metric of the base"
        )
        refused(
            check_estimates, FAMILY, PAIRS, "atp", kinds=KINDS, direction=direction, match="atp estimate of"
        )


def test_places_counted_from_the_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a shorter prompt beside a longer one tells."""
    right = _pair_batch.covering

    def wrong(covered: Any, lengths: Sequence[int], width: int) -> Tensor:
        return right(covered, [width] * len(lengths), width)

    monkeypatch.setattr(_pair_batch, "covering", wrong)
    options = {"kinds": KINDS, "positions": "s,-1"}
    check_sweep(FAMILY, [LONG], **options)  # type: ignore[arg-type]
    refused(check_sweep, FAMILY, PAIRS, **options, match="effect of .* in pair short")
    refused(check_estimates, FAMILY, PAIRS, "atp", **options, match="estimate of .* in pair short")


def test_keys_read_before_rotary(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Replacement.values

    def wrong(made: Replacement, model: PatchModel, batch: PairBatch, sites: Any, own: Any) -> Any:
        values, logits = right(made, model, batch, sites, own)
        before = capture(model, batch.source, [Site("k_proj", s.layer) for s in sites if s.kind == "k"])
        return values | {Site("k", site.layer): value for site, value in before.values.items()}, logits

    monkeypatch.setattr(Replacement, "values", wrong)
    refused(check_sweep, FAMILY, PAIRS, kinds=("k",), match="effect of k")
    for method in ("atp", "atp-qk", "atp-graddrop", "atp-star"):
        refused(check_estimates, FAMILY, PAIRS, method, kinds=("k",), match="estimate of k")
    # A model without rotary embeddings has nothing to tell them apart by.
    check_sweep("gpt2", PAIRS, kinds=("k",))


def test_every_row_takes_the_first_pairs_values(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Swap.apply

    def wrong(swap: Swap, activation: Tensor, pairs: Tensor, first: int | None = None) -> Tensor:
        return right(swap, activation, torch.zeros_like(pairs), first)

    monkeypatch.setattr(Swap, "apply", wrong)
    # Batches begin with the shortest.
    refused(check_sweep, FAMILY, PAIRS, kinds=KINDS, match="effect of .* in pair long")


# Where runs restart.


def restarts_moved(monkeypatch: pytest.MonkeyPatch, layers: int, columns: int) -> None:
    right = activation_patching.restarts

    def wrong(rows: Any, width: int, budget: int) -> Iterator[Restart]:
        for each in right(rows, width, budget):
            layer, start = min(each.layer + layers, 2), min(each.start + columns, width - 1)
            yield Restart(each.rows, layer, start)

    monkeypatch.setattr(activation_patching, "restarts", wrong)
    # That a restart misses a patch is refused by name otherwise.
    monkeypatch.setattr(restart, "_check", lambda *_: None)


@pytest.mark.parametrize(("layers", "columns"), [(1, 0), (0, 1)])
def test_restarts_too_late(layers: int, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    restarts_moved(monkeypatch, layers, columns)
    for kind in KINDS:
        refused(check_sweep, FAMILY, PAIRS, kinds=(kind,), positions="s", match="effect of")


def test_restarts_too_early_are_no_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    restarts_moved(monkeypatch, 0, 0)
    check_sweep(FAMILY, PAIRS, kinds=KINDS, positions="s")


def test_the_patched_layers_mlp_on_one_column_too_few(monkeypatch: pytest.MonkeyPatch) -> None:
    right = restart._Rows.__init__

    def wrong(rows: Any, *args: Any) -> None:
        right(rows, *args)
        rows.changed -= rows.changed > 1

    monkeypatch.setattr(restart._Rows, "__init__", wrong)
    refused(check_sweep, FAMILY, [LONG], kinds=("z",), positions="s", match="effect of a")
    refused(check_sweep, FAMILY, [LONG], kinds=("mlp_out",), positions="s", match="effect of m")


def test_a_set_restarted_behind_an_attention_that_it_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    right = activation_patching.lay_out

    def wrong(*args: Any) -> Any:
        rows = right(*args)
        return replace(rows, layer=torch.where(rows.layer == 0, 1, rows.layer))

    monkeypatch.setattr(activation_patching, "lay_out", wrong)
    monkeypatch.setattr(restart, "_check", lambda *_: None)
    refused(check_sets, FAMILY, PAIRS, [("a0.h1", "k.1.h0", "a1.h2")], kinds=KINDS, match="set a0.h1")


def test_prompts_that_differ_one_token_earlier_than_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    right = PairBatch.first_difference
    monkeypatch.setattr(PairBatch, "first_difference", lambda batch: right(batch) + 1)
    refused(check_sweep, FAMILY, [MIDDLE], kinds=KINDS, match="effect of")


def test_keys_of_the_last_layer_read_by_none_but_the_last_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_set_rows, "LOCAL_AT_THE_END", (*restart.LOCAL_AT_THE_END, "k", "v"))
    refused(check_sweep, FAMILY, [LONG], kinds=("k",), positions="s", match="effect of k.2")


def test_a_cache_that_forgets_what_is_out_of_sight_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model's own cache for a sliding window, as it comes out of a forward."""
    right = restart.compute_base

    def wrong(*args: Any, **options: Any) -> Any:
        base = right(*args, **options)
        keys = tuple(
            torch.cat([torch.zeros_like(each[:, :, :-3]), each[:, :, -3:]], dim=2) for each in base.keys
        )
        return replace(base, keys=keys)

    monkeypatch.setattr(activation_patching, "compute_base", wrong)
    refused(check_sweep, "mistral-window", [LONG], kinds=("z",), positions="-3", match="effect of a")


# Drops.


def reduction(monkeypatch: pytest.MonkeyPatch, change: Callable[[LayerGradients], LayerGradients]) -> None:
    right = NodeReduction.__call__
    monkeypatch.setattr(NodeReduction, "__call__", lambda reduce, layer: right(reduce, change(layer)))


def test_the_mean_over_drops_without_its_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The drop of a node's own block is counted, with its zero."""

    def with_zero(layer: LayerGradients) -> LayerGradients:
        own = {
            kind: list(parts) if kind in STREAM else [*parts, (1, torch.zeros_like(parts[0][1]))]
            for kind, parts in layer.gradients.items()
        }
        return replace(layer, gradients=own)

    reduction(monkeypatch, with_zero)
    refused(check_estimates, FAMILY, PAIRS, "atp-graddrop", kinds=("z",), match="estimate of z")
    refused(check_estimates, FAMILY, PAIRS, "atp-star", kinds=("q",), match="estimate of q")
    # The stream has no such drop.
    check_estimates(FAMILY, PAIRS, "atp-graddrop", kinds=("resid_pre",))


def test_the_size_of_the_mean_for_the_mean_of_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    right = NodeReduction.__call__

    def wrong(reduce: NodeReduction, layer: LayerGradients) -> dict[str, Tensor]:
        found = right(reduce, layer)
        return found | {f"magnitude.{kind}": found[f"signed.{kind}"].abs() for kind in reduce.grid.kinds}

    monkeypatch.setattr(NodeReduction, "__call__", wrong)
    for method in ("atp-graddrop", "atp-star"):
        refused(check_estimates, FAMILY, PAIRS, method, kinds=("z", "q"), match="magnitude of")
    # Where there are no drops it is the same, pair by pair.
    check_estimates(FAMILY, PAIRS, "atp", kinds=("z", "q"))


def test_the_size_of_the_mean_over_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scores, "mean_abs", lambda scores: scores.mean().abs())
    for method in ("atp", "atp-graddrop"):
        refused(check_estimates, FAMILY, PAIRS, method, kinds=("z",), match="mean magnitude over pairs")


def test_one_gradient_for_all_drops(monkeypatch: pytest.MonkeyPatch) -> None:
    right = gradients._Backward._through_block

    def wrong(backward: Any, output: Tensor, sites: Any, cotangents: Sequence[Tensor]) -> Any:
        return right(backward, output, sites, [cotangents[0]] * len(cotangents))

    monkeypatch.setattr(gradients._Backward, "_through_block", wrong)
    for method in ("atp-graddrop", "atp-star"):
        refused(check_estimates, FAMILY, PAIRS, method, kinds=("z", "q"), match="estimate of|magnitude of")
    check_estimates(FAMILY, PAIRS, "atp", kinds=("z", "q"))


def test_a_drop_that_cuts_the_skip_path_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_own(layer: LayerGradients) -> LayerGradients:
        kept = {
            kind: [*parts[:-1], (1, torch.zeros_like(parts[0][1]))] if kind in STREAM else parts
            for kind, parts in layer.gradients.items()
        }
        return replace(layer, gradients=kept)

    reduction(monkeypatch, without_own)
    refused(
        check_estimates, FAMILY, PAIRS, "atp-graddrop", kinds=("resid_pre",), match="estimate of resid_pre"
    )


def test_sizes_of_dot_products_added_up_over_a_place(monkeypatch: pytest.MonkeyPatch) -> None:
    right = NodeReduction._by_place
    monkeypatch.setattr(
        NodeReduction, "_by_place", lambda reduce, kind, by_token: right(reduce, kind, by_token.abs())
    )
    refused(check_estimates, FAMILY, PAIRS, "atp", kinds=("z",), match="estimate of z")


# The QK fix.


def test_the_old_probabilities_for_the_patched_querys(monkeypatch: pytest.MonkeyPatch) -> None:
    right = _node_gradients.query_effects
    monkeypatch.setattr(
        _node_gradients,
        "query_effects",
        lambda patched, queries, keys, attention: right(queries, queries, keys, attention),
    )
    for method in ("atp-qk", "atp-star"):
        refused(check_estimates, FAMILY, PAIRS, method, kinds=("q",), match="estimate of q")


def test_one_head_for_all_that_share_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("key_effects", "keys_together"):
        right = getattr(_node_gradients, name)

        def wrong(*args: Any, right: Callable[..., Effects] = right) -> Effects:
            effects = right(*args)
            return lambda gradient: effects(
                gradient * (torch.arange(gradient.shape[1]) % 2 == 0)[:, None, None]
            )

        monkeypatch.setattr(_node_gradients, name, wrong)
    for positions in ("-2,0", "all"):
        refused(
            check_estimates, FAMILY, PAIRS, "atp-qk", kinds=("k",), positions=positions, match="estimate of k"
        )


def test_keys_of_several_tokens_as_a_sum_over_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = _node_gradients.key_effects

    def wrong(patched: Tensor, queries: Tensor, keys: Tensor, where: Tensor, attention: Attention) -> Effects:
        effects = alone(patched, queries, keys, attention)
        return lambda gradient: (effects(gradient) * where[..., None]).sum(1)

    monkeypatch.setattr(_node_gradients, "keys_together", wrong)
    check_estimates(FAMILY, PAIRS, "atp-qk", kinds=("k",), positions="last")
    refused(check_estimates, FAMILY, PAIRS, "atp-qk", kinds=("k",), match="estimate of k")


@pytest.mark.parametrize("what", ["softcap", "window", "scaling"])
def test_attention_without_its_details(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = gradients.attention_of

    def wrong(model: PatchModel, layer: int, mask: Tensor) -> Attention:
        given = right(model, layer, mask)
        everything = torch.ones_like(given.allowed).tril()
        changed: dict[str, Any] = {
            "softcap": {"softcap": None},
            "window": {"allowed": everything},
            "scaling": {"scaling": given.scaling * 2},
        }
        return replace(given, **changed[what])

    monkeypatch.setattr(gradients, "attention_of", wrong)
    family = "gemma2-post-norms-softcap"
    for kind in ("q", "k"):
        refused(
            check_estimates, family, [LONG], "atp-qk", kinds=(kind,), positions="s,-1", match=f"of {kind}"
        )


def test_values_of_another_head_in_the_probabilities_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    right = _qk_fix.per_head

    def wrong(of_kv_heads: Tensor, of_heads: Tensor) -> Tensor:
        return of_kv_heads.repeat(1, 1, of_heads.shape[2] // of_kv_heads.shape[2], 1)

    assert right(torch.zeros(1, 1, 2, 1), torch.zeros(1, 1, 4, 1)).shape == (1, 1, 4, 1)
    monkeypatch.setattr(_qk_fix, "per_head", wrong)
    for kind in ("q", "k"):
        refused(check_estimates, FAMILY, PAIRS, "atp-qk", kinds=(kind,), match=f"of {kind}")
